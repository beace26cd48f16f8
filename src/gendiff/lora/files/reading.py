"""A file of an adapter, of any format, as adapters of the live networks: all of it, or an error."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from gendiff import _patterns
from gendiff.lora.adapter import Adapter
from gendiff.lora.files import fused
from gendiff.lora.files.components import Models, components_of
from gendiff.lora.files.fused import FACTORS, Part
from gendiff.lora.files.grouping import SHOWN, Group, Grouped
from gendiff.lora.files.opening import opened, sources
from gendiff.lora.files.plain import Form, plain
from gendiff.lora.files.report import AdapterFile
from gendiff.lora.files.settings import HEADER_KEY
from gendiff.lora.files.strength import Missing, Strength, check_missing, options_of, strength_of
from gendiff.lora.plan import LoraPlan, Planned
from gendiff.lora.quantised import plain_weight
from gendiff.lora.targets import Target

OWN_WORDS = (HEADER_KEY, "format")  # of a header, that are of the file and not of the adapter


def read(
    path: str | Path,
    model: Models,
    *,
    ignore: str | Iterable[str] = (),
    missing_alpha: Missing = None,
) -> AdapterFile:
    """Read an adapter from a file, and change nothing.

    The format is found from the keys: those of diffusers, new and old, of peft, of kohya's tools, LyCORIS and
    OneTrainer, and the names of the original release, with which ComfyUI reads files. Each is looked up among
    the names that the live networks have; layers that the file has stacked are cut exactly. Shapes are
    checked before numbers are read, and nothing in the file is run.

    Args:
        path: a file of safetensors, or a folder of peft or diffusers with one.
        model: a network, several by name, such as {"unet": unet, "text_encoder": encoder}, or a pipeline.
        ignore: patterns of keys that may stay unmatched, such as "text_encoder.**"; and names of settings in
            its configuration that are not known here, and are known not to matter.
        missing_alpha: of layers for which the file says none: "rank", for a scale of 1, as kohya's tools and
            diffusers assume, or a number.

    Returns:
        The `AdapterFile`.

    Raises:
        ValueError: with the file, the key and what to do: for keys that are for no layer, two for one, parts
            that are missing; shapes of another model, ranks of 0, numbers that are not finite; a missing
            alpha; a pickle; and settings that cannot be honoured.
    """
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    for pattern in patterns:
        _patterns.check(pattern)
    check_missing(missing_alpha)
    components = components_of(model)
    path = Path(path)
    with _about(path), ExitStack() as stack:
        grouped = Grouped(components, patterns)
        words: dict[str, str] = {}
        for source in sources(path):
            file = stack.enter_context(opened(source.path))
            words |= {name: text for name, text in file.metadata.items() if name not in OWN_WORDS}
            grouped.add(source, file)
        grouped.check()
        return _read(grouped, words, missing_alpha)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors within say which file they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read(grouped: Grouped, words: Mapping[str, str], missing: Missing) -> AdapterFile:
    checked: dict[str, list[tuple[Group, Form, Strength]]] = {}
    for group in grouped.groups.values():
        targets = grouped.names.targets[group.place.component]
        form = group.form(_shape(group, targets))
        if form.algorithm not in FACTORS and not _is_whole(group, targets):
            raise ValueError(
                f"{group.key} is of {form.algorithm} on {', '.join(fused.layers_of(group.place.original))} "
                f"in one, which cannot be cut: train it in the naming of diffusers."
            )
        checked.setdefault(group.place.component, []).append((group, form, strength_of(group, form, missing)))
    _check_strengths([one for every in checked.values() for one in every])
    for every in checked.values():
        _check_algorithm(every)
    adapters: dict[str, Adapter] = {}
    sources: dict[str, dict[str, str]] = {}
    for component in grouped.components:  # in the order that they were given
        if component not in checked:
            continue
        every = checked[component]
        adapters[component], sources[component] = _adapter(every, grouped.names.targets[component], words)
    formats = dict.fromkeys(group.place.format for group in grouped.groups.values())
    return AdapterFile(" and ".join(formats), adapters, tuple(grouped.unmatched), sources)


def _shape(group: Group, targets: Mapping[str, Target]) -> tuple[int, ...]:
    """Of the weight that an adapter is for, with the rows of all its layers."""
    rows = group.place.original.rows
    inward = {targets[one.layer].shape[1:] for one in rows}
    assert len(inward) == 1
    covered: dict[str, int] = {}
    for one in rows:
        covered[one.layer] = covered.get(one.layer, 0) + one.stop - one.start
    for layer, count in covered.items():
        if count != targets[layer].shape[0]:
            raise ValueError(
                f"{group.key} is for {count} of the {targets[layer].shape[0]} outputs of {layer}, which is "
                f"stacked of more in this model: undo that first, as by unfuse_qkv_projections()."
            )
    return (sum(covered.values()), *inward.pop())


def _is_whole(group: Group, targets: Mapping[str, Target]) -> bool:
    original = group.place.original
    return fused.is_whole(original, targets[original.rows[0].layer].shape[0])


def _check_strengths(every: list[tuple[Group, Form, Strength]]) -> None:
    without = [group.key for group, _, strength in every if strength.alpha is None]
    if without:
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        raise ValueError(
            f"the file says no alpha for {len(without)} of {len(every)} layers, {', '.join(without[:SHOWN])}"
            f"{more}, so that their strength is not known: pass missing_alpha='rank', which kohya's tools "
            f"and diffusers assume, or the number that it was trained with."
        )


def _check_algorithm(every: list[tuple[Group, Form, Strength]]) -> None:
    first, form, _ = every[0]
    for group, other, _ in every:
        if other.algorithm != form.algorithm:
            raise ValueError(
                f"{first.key} is of {form.algorithm} and {group.key} of {other.algorithm}: an adapter of "
                f"peft is of one algorithm; split the file, and load both under two names."
            )


def _adapter(
    every: list[tuple[Group, Form, Strength]], targets: Mapping[str, Target], words: Mapping[str, str]
) -> tuple[Adapter, dict[str, str]]:
    """The adapter of a component, and who says the alpha of each layer."""
    options: tuple = ()
    if every[0][1].algorithm == "lokr":
        options = options_of((group, form, _shape(group, targets)) for group, form, _ in every)
    rows: dict[str, Planned] = {}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    sources: dict[str, str] = {}
    for group, form, strength in every:
        for layer, part in _parts(group, form, strength, targets).items():
            target = targets[layer]
            rank, alpha = strength.rank, strength.alpha
            if form.algorithm in FACTORS and part.rank != rank:
                rank = part.rank
                alpha = strength.scale * (rank**0.5 if strength.rslora else rank)
            assert alpha is not None
            rows[layer] = Planned(
                layer,
                target.kind,
                target.shape,
                rank,
                alpha,
                rslora=strength.rslora,
                algorithm=form.algorithm,
                options=options,
            )
            tensors[layer], sources[layer] = part.tensors, strength.source
    order = [name for name in targets if name in rows]
    plan = LoraPlan(tuple(rows[name] for name in order), len(targets))
    return Adapter(plan, tensors, dict(words)), {name: sources[name] for name in order}


def _parts(group: Group, form: Form, strength: Strength, targets: Mapping[str, Target]) -> dict[str, Part]:
    """The adapters of the layers that one of the file is for."""
    whole = Part(strength.scale, plain(form, group.read()))
    original = group.place.original
    if _is_whole(group, targets):
        return {original.rows[0].layer: whole}
    weights = {}
    if form.algorithm == "dora":
        weights = {name: plain_weight(targets[name].module) for name in fused.layers_of(original)}
    return fused.cut(original, form.algorithm, whole, weights)
