"""Every UNet and transformer of diffusers: what the table of docs/attention-models.md says is so."""

from pathlib import Path

import pytest
import torch

from benchmarks.attention_models import CHECKS, QUICK
from gendiff.attention import sites
from tests.zoo import QUIET, ZOO, build

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PAGE = Path(__file__).parents[2] / "docs/attention-models.md"
FEW = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel")


def rows() -> dict[str, dict[str, str]]:
    """The table of the page: class, check, cell."""
    table = PAGE.read_text()
    lines = [line for line in table[table.index("| class |") :].splitlines() if line.startswith("| ")]
    head, *body = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def test_the_page_has_every_class() -> None:
    found = rows()
    assert list(found) == list(ZOO)
    assert all(set(CHECKS) <= set(row) for row in found.values())
    for row in found.values():
        assert all(row[check] == "yes" or row[check][0] == "-" for check in CHECKS)


@pytest.mark.parametrize("name", ZOO)
def test_what_the_page_says_holds(name) -> None:
    model, row = build(name), rows()[name]
    found = sites(model)
    assert row["sites"] == str(len(found))
    if not len(found):
        pytest.skip("a model without attention layers")
    for check in QUICK:
        assert CHECKS[check](model, name, found)[:1] == row[check][:1], check


@pytest.mark.slow
@pytest.mark.parametrize("check", [check for check in CHECKS if check not in QUICK])
@pytest.mark.parametrize("name", ZOO)
def test_what_the_page_says_holds_slowly(name, check) -> None:
    model, row = build(name), rows()[name]
    found = sites(model)
    if not len(found):
        pytest.skip("a model without attention layers")
    assert CHECKS[check](model, name, found)[:1] == row[check][:1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FEW)
def test_inductor_says_the_same(name) -> None:
    """Compiled by the back-end that is used, with what changes the output."""
    from gendiff.attention import stack
    from tests.attention.models import Halved, said

    model = build(name)
    with stack(model) as one:
        one.add(Halved())
        eager = said(model, name)
        torch._dynamo.reset()
        compiled = said(torch.compile(model), name)  # pyright: ignore[reportArgumentType]
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
