"""One call that tries a hand-written processor against the 18 contracts of attention in diffusers."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from gendiff.attention.check import life, probes
from gendiff.attention.check.contracts import Finding, of_error, report
from gendiff.attention.check.grid import fresh, own
from gendiff.attention.check.scene import Scene, like, put
from gendiff.attention.check.values import outputs, tried
from gendiff.attention.registry import made_for
from gendiff.attention.selectors import On
from gendiff.attention.table import sites


def check_processor(
    processor: Any,
    model: nn.Module,
    on: On = None,
    *,
    exact: bool = True,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Try a processor on copies of a model's layers and on small fresh ones, and say all that is wrong.

    The model is not touched: layers are copied, weights of the copies drawn anew, and torch's random state
    is as before. Where layers are the `Attention` of a UNet, small fresh ones are tried too, one for each
    setting that such a layer may have. Outputs are compared with those of the reference processors, or for
    other families with the layer's own processor.

    ==  ==========================================================================================
    1   the context is used, and may be None, or a single zero
    2   `attn.to_out` is a list
    3   the dropout behind the output layer
    4   heads are split; those of keys may be fewer *
    5   order of axes
    6   residual, rescale factor, group norm, spatial norm, images in their shape
    7   norm of the context, and only of a context
    8   norms of queries and keys, rotation after them
    9   masks: nothing masked has influence, no NaN where all is masked
    10  the scale, once *
    11  bfloat16 in, bfloat16 out
    12  order, sizes and number of streams
    13  rows of a batch, whatever their order and number
    14  keywords that the layer passes
    15  inputs are not written to; gradients
    16  nothing left between calls; copies, pickling, one processor on two layers
    17  adapters, fused projections, checkpointing, `torch.compile(fullgraph=True)`
    18  the layer is as it was afterwards
    ==  ==========================================================================================

    * Fewer heads of keys, another scale, and upcasts are asked only where the model's own layers have them,
    since the fast processor of diffusers honours none of the three. Its slow one (`AttnProcessor`) breaks
    contract 8, and 9 for rows that are masked entirely. Compiling is tried where nothing else was found.
    Boolean masks are asked of Flux only, since UNets make numbers of them; masks of SD3 are not asked. In a
    family without a reference, a contract that the layer's own processor breaks is not asked.

    With `exact=False`, for a processor that changes attention on purpose, no output is compared with the
    reference. What is still asked: (1) a context has an effect; (2, 12) shapes and number of outputs; (3)
    a dropout of half leaves zeros; (6) where the output layer has weights of zero, the output is (its bias +
    residual) / factor, in the input's shape, and a group or spatial norm takes a factor 3 of the tokens away;
    (7, 8) likewise the norm of the context and that of queries; (9) as above; (11) dtype; (14); (15) nothing
    written, gradients are finite, and not zero but for queries and keys; (16) to (18) as above. What is not:
    (4), (5), (10), (13), values in (8, rotation) and (12, order), and, where a text has added keys, (3), (9)
    and the group norm.

    Args:
        processor: a class, a function that makes one (it may take the `site`), an object, or a name.
        model: a UNet or transformer of diffusers, or one attention layer.
        on: the layers that it is meant for; None is all.
        exact: whether it computes the layer's own attention, only otherwise.
        inputs: what a layer is called with, by keyword, where that is not known of its family.

    Raises:
        AssertionError: with a table of what is wrong and how to mend each.
        ValueError: where nothing matches, or the layers' inputs are not known.

    >>> from diffusers.models.attention_processor import Attention
    >>> from gendiff.attention.reference import ReferenceProcessor
    >>> check_processor(ReferenceProcessor, Attention(query_dim=8, heads=2, dim_head=4))
    """
    found = list(sites(model).on(on))
    devices = [like(model)] if like(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        own_scenes = list(own(found, inputs))
        families = dict.fromkeys((scene.family, like(scene.layer)) for scene in own_scenes)
        fresh_scenes = [scene for family in families for scene in fresh(*family, exact)]
        findings = _findings(lambda scene: _fresh(processor, scene), [*fresh_scenes, *own_scenes], exact)
    if findings:
        asked = (
            f"tried on {len(own_scenes)} settings of the model's layers and {len(fresh_scenes)} fresh ones"
        )
        raise AssertionError(report(_name(processor), findings, asked))


def _fresh(processor: Any, scene: Scene) -> Any:
    """A processor of its own for a layer."""
    if not isinstance(processor, str | type | FunctionType):
        try:
            return deepcopy(processor)
        except Exception:
            return processor  # which is found out by another check
    put(scene.layer, scene.oracle)
    site = sites(scene.layer)[0] if scene.site is None else replace(scene.site, module=scene.layer)
    return made_for(processor, site, 1)


def _findings(make: Callable[[Scene], Any], scenes: list[Scene], exact: bool) -> list[Finding]:
    """All that is wrong; where plain attention is, what builds on it is not looked at."""
    findings: list[Finding] = []
    for scene in scenes:
        findings += _tried(scene, make, exact) if scene.base else []
    if findings:
        return findings
    for scene in scenes:
        findings += [] if scene.base else _tried(scene, make, exact)
    main = _main(scenes)
    for scene in main:
        findings += _lived(scene, make, exact)
    for scene in main if not findings else ():
        findings += _asked("compile", life.compiling, scene, make)
    return findings


def _main(scenes: list[Scene]) -> list[Scene]:
    """A scene of each family with a context and one without, on which lives are tried; bare ones first."""
    chosen: dict[Any, Scene] = {}
    for scene in sorted(scenes, key=lambda scene: not scene.base):
        chosen.setdefault((scene.family, "encoder_hidden_states" in scene.inputs), scene)
    return list(chosen.values())


def _tried(scene: Scene, make: Callable[[Scene], Any], exact: bool) -> list[Finding]:
    """What a scene shows of values, or of settings that must matter."""
    scene = scene.apart()
    found = _asked("", outputs, scene, make, (exact,))
    if not found and not exact:
        for check in (probes.ends, probes.norms, probes.dependence):
            found += _asked("", check, scene, make)
    return found


def _lived(scene: Scene, make: Callable[[Scene], Any], exact: bool) -> Iterator[Finding]:
    """What a scene shows of a processor's life."""
    checks: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("layer", life.leaving, ()),  # first, on a layer that no call has seen
        ("dropout", probes.dropout, (exact,)),
        ("mask", probes.hidden_keys, ()),
        ("resolutions", probes.resolutions, ()),
        ("gradients", probes.gradients, (exact,)),
        ("dtype", life.dtype, (exact,)),
        ("inputs", life.inference, ()),
        ("copies", life.copies, ()),
        ("errors", life.errors, ()),
        ("sharing", life.sharing, (make,)),
        ("adapters", life.adapters, ()),
        ("fusing", life.fusing, ()),
        ("checkpointing", life.checkpointing, ()),
        *([("rows", probes.rows, ())] if exact else []),
    ]
    scene = scene.apart()
    for contract, check, args in checks:
        yield from _asked(contract, check, scene, make, args)


def _asked(
    contract: str,
    check: Callable[..., Any],
    scene: Scene,
    make: Callable[[Scene], Any],
    args: tuple[Any, ...] = (),
) -> list[Finding]:
    """The findings of a check; what a family's own processor breaks is not asked."""
    try:
        processor = make(scene)
    except Exception as error:
        return [of_error(error, "keywords", scene.label)]
    found = list(tried(check, scene, processor, *args, contract=contract))
    if not found or scene.family != "other":
        return found
    other = scene.apart()
    own = {one.contract for one in tried(check, other, deepcopy(other.oracle), *args, contract=contract)}
    return [one for one in found if one.contract not in own]


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", None) or (
        processor if isinstance(processor, str) else type(processor).__name__
    )
