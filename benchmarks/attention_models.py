"""What holds for attention in every class of diffusers: the table of docs/attention-models.md.

Run: OMP_NUM_THREADS=1 python -m benchmarks.attention_models [--only Flux Wan] [--no-compile]

On tiny models with random weights. A cell is "yes", a dash where there is nothing to check, or what is
wrong; if something is, the exit status is 1. "identity": middlewares that change nothing, at every layer,
are bit-equal; "restored": the same objects of the same classes afterwards, and the output bit-equal;
"effect": half the queries change the output; "maps": a capture of text maps is not empty; "gradients":
equal with the identity, bit for bit; "compiled": torch.compile(fullgraph=True) has as many graphs as the
stock model, and says the same.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from gendiff.attention import Capture, Middleware, Sites, sites, stack
from tests.attention.models import Around, Halved, Same, said, state
from tests.zoo import ZOO, build, run

BLOCKS = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")


def added(model: nn.Module, middleware: Middleware, found: Sites) -> Any:
    """A stack with a middleware at the layers it reaches, and one that changes nothing at the others."""
    one = stack(model)
    reached = [site for site in found if site.kernels]
    if reached:
        one.add(middleware, on=reached)
    if len(reached) < len(found):
        one.add(Around(), on=[site for site in found if not site.kernels])
    return one


def identity(model: nn.Module, name: str, found: Sites) -> str:
    plain = said(model, name)
    with added(model, Same(), found):
        return "yes" if torch.equal(said(model, name), plain) else "differs"


def restored(model: nn.Module, name: str, found: Sites) -> str:
    plain, before = said(model, name), state(model)
    with added(model, Halved(), found):
        said(model, name)
    return "yes" if state(model) == before and torch.equal(said(model, name), plain) else "differs"


def effect(model: nn.Module, name: str, found: Sites) -> str:
    if not any(site.kernels for site in found):
        return "-"
    plain = said(model, name)
    with added(model, Halved(), found):
        return "yes" if not torch.allclose(said(model, name), plain, atol=1e-5) else "none"


def maps(model: nn.Module, name: str, found: Sites) -> str:
    chosen = [site for site in found if site.kind in ("cross", "joint", "single") and site.kernels]
    if not chosen:
        return "-"
    with stack(model) as one:
        capture = Capture()
        one.add(capture, on=chosen)
        try:
            said(model, name)
        except ValueError as error:  # which says why, and what to do
            return "- (no grid)" if "are no grid" in str(error) else "- (text not told)"
        found_maps = [capture.of(name) for name in capture.sites]
        return "yes" if any(bool(one.nan_to_num().any()) for one in found_maps) else "empty"


def gradients(model: nn.Module, name: str, found: Sites) -> str:
    if name in BLOCKS:
        return "- (no backward)"  # of flex attention, on a CPU

    def of() -> list[torch.Tensor]:
        out = run(model, name)
        out.real.float().square().mean().backward()
        values = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return values

    plain = of()
    with added(model, Same(), found):
        return "yes" if all(torch.equal(a, b) for a, b in zip(of(), plain, strict=True)) else "differs"


def compiled(model: nn.Module, name: str, found: Sites) -> str:
    def graphs() -> tuple[int, torch.Tensor] | str:
        torch._dynamo.reset()
        counter = CompileCounter()
        try:
            with warnings.catch_warnings(action="ignore"):  # one that is an error would stop the compiler
                compiled = torch.compile(model, fullgraph=True, backend=counter)
                out = said(compiled, name)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # what stops the stock model is said in the table
            return type(error).__name__
        return counter.frame_count, out

    said(model, name)  # some fill tables in their first call
    stock = graphs()
    with added(model, Same(), found):
        ours = graphs()
    torch._dynamo.reset()
    if isinstance(stock, str):
        return "- (nor stock)" if isinstance(ours, str) else "yes, and stock not"
    if isinstance(ours, str):
        return ours
    if ours[0] > stock[0]:
        return f"{ours[0]} graphs, stock {stock[0]}"
    return "yes" if torch.allclose(ours[1], stock[1], atol=1e-6) else "differs"


CHECKS: dict[str, Callable[[nn.Module, str, Sites], str]] = {
    "identity": identity,
    "restored": restored,
    "effect": effect,
    "maps": maps,
    "gradients": gradients,
    "compiled": compiled,
}


QUICK = ("identity", "restored", "effect")


def row(name: str, checks: list[str]) -> dict[str, str]:
    """What holds for a class."""
    model = build(name)
    found = sites(model)
    closed = sum(not site.kernels for site in found) + len(found.others)
    kinds = ", ".join(dict.fromkeys(site.kind for site in found)) or "-"
    cells = {"class": name, "sites": str(len(found)), "kinds": kinds, "not reached": str(closed or "-")}
    for check in checks:
        cells[check] = CHECKS[check](model, name, found) if len(found) else "-"
    return cells


def main(only: list[str], checks: list[str]) -> int:
    wrong = 0
    head = ["class", "sites", "kinds", "not reached", *checks]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in ZOO:
        if only and not any(word in name for word in only):
            continue
        cells = row(name, checks)
        print("| " + " | ".join(cells[key] for key in head) + " |", flush=True)
        wrong += any(cells[check] != "yes" and cells[check][0] != "-" for check in checks)
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny models
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names = [check for check in CHECKS if not (arguments.no_compile and check == "compiled")]
    sys.exit(main(arguments.only, names))
