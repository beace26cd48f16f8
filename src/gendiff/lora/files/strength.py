"""How strong the adapter of a layer is, and who says so."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from gendiff.lora.algorithms import ALGORITHMS, factors
from gendiff.lora.files.grouping import Group
from gendiff.lora.files.opening import short
from gendiff.lora.files.plain import Form
from gendiff.lora.files.settings import HIGHEST

Missing: TypeAlias = float | int | str | None  # "rank" of all texts


@final
@dataclass(frozen=True)
class Strength:
    """What is said of a layer's strength.

    Attributes:
        rank: of its product.
        alpha: lora_alpha; None where nobody says it.
        rslora: whether the scale is alpha over the root of the rank.
        source: "tensor", "metadata", "config", "assumed", or "none" for an algorithm without a scale.
    """

    rank: int
    alpha: float | None
    rslora: bool
    source: str

    @property
    def scale(self) -> float:
        """The factor of the product."""
        assert self.alpha is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check_missing(missing: Any) -> None:
    """Raise a ValueError for what cannot stand for a missing alpha."""
    number = isinstance(missing, int | float) and not isinstance(missing, bool)
    if missing not in (None, "rank") and not (number and math.isfinite(missing) and missing > 0):
        raise ValueError(
            f"missing_alpha is 'rank', which kohya's tools assume, a number above 0, or None, got "
            f"{missing!r}."
        )


def strength_of(group: Group, form: Form, missing: Missing) -> Strength:
    """The strength of a layer: of its alpha, else of a configuration, else of what is assumed.

    Raises:
        ValueError: for an alpha that is no number above 0; for an alpha, an algorithm or a rank that a
            configuration says otherwise.
    """
    settings, name = group.settings, group.place.original.name
    if settings is not None and settings.algorithm != form.algorithm:
        raise ValueError(
            f"{group.key} is of {form.algorithm}, and the {settings.source} of the file says "
            f"{settings.algorithm}: the file is not whole."
        )
    if not ALGORITHMS[form.algorithm].scaled:
        assert form.rank is not None
        if settings is None:
            raise ValueError(
                f"{group.key} is of {form.algorithm}, and no configuration says whether its rotations are "
                f"exact, as they are here, or of a series, as peft makes them where it is not told: load the "
                f"folder that peft saved, or the file that gendiff did."
            )
        return Strength(form.rank, float(form.rank), False, "none")
    own = _own(group)
    told = None if settings is None else settings.alpha(name)
    if form.rank is None:
        return _of_whole(group, form, own, told, missing)
    rslora = settings is not None and settings.rslora
    if own is not None:
        found = Strength(form.rank, own, False, "tensor")
        if told is not None and not math.isclose(
            found.scale, Strength(form.rank, told, rslora, "").scale, rel_tol=1e-3
        ):
            assert settings is not None
            raise ValueError(
                f"{short(group.entries['alpha'].key)} is {own:g}, and the {settings.source} of the file says "
                f"{told:g}{' by the root of the rank' if rslora else ''}: take one of them out of the file."
            )
        return found
    if told is not None:
        assert settings is not None
        return Strength(form.rank, _above_0(told, f"lora_alpha of {name}"), rslora, settings.source)
    assumed = None if missing is None else float(form.rank if missing == "rank" else missing)
    return Strength(form.rank, assumed, rslora, "assumed")


def options_of(forms: Iterable[tuple[Group, Form, tuple[int, ...]]]) -> tuple[tuple[str, Any], ...]:
    """The settings of LoKr under which peft factors all weights as the file does.

    Args:
        forms: of all layers, with the shapes of their weights.

    Raises:
        ValueError: where there are none.
    """
    forms = list(forms)
    both = any("lokr_w1_a" in form.expected for _, form, _ in forms)
    sizes = {size for _, form, _ in forms for pair in form.factors or () for size in pair}
    left = forms
    for factor in (-1, *sorted(sizes | set(range(1, 65)))):
        odd = [
            one for one in forms if one[1].factors != (factors(one[2][0], factor), factors(one[2][1], factor))
        ]
        if not odd:
            known = ALGORITHMS["lokr"].options
            found = {"decompose_both": both, "decompose_factor": factor}
            return tuple((name, value) for name, value in found.items() if value != known[name])
        left = odd if len(odd) < len(left) else left
    group, form, weight = left[0]
    raise ValueError(
        f"{group.key} factors a weight of shape {weight} by {form.factors}, and there is no decompose_factor "
        f"for which peft factors all layers of this file so."
    )


def _own(group: Group) -> float | None:
    """The number of its alpha."""
    if "alpha" not in group.entries:
        return None
    entry = group.entries["alpha"]
    if math.prod(entry.file.shapes[entry.key]) != 1:
        raise ValueError(f"{short(entry.key)} is of shape {entry.file.shapes[entry.key]}, and no number.")
    return _above_0(float(entry.read()), short(entry.key))


def _above_0(alpha: float, what: str) -> float:
    if not 0 < alpha <= HIGHEST:
        raise ValueError(
            f"{what} is {alpha:g}, and strengths are numbers above 0: kohya's tools take 0 for the rank when "
            f"they train, and write that; put the rank there if that is meant."
        )
    return alpha


def _of_whole(group: Group, form: Form, own: float | None, told: float | None, missing: Missing) -> Strength:
    """Of LoKr with two whole factors, whose scale is 1 but in peft, where it has a rank all the same."""
    assert form.factors is not None
    (_, out_2), (_, in_2) = form.factors
    least = -(-max(out_2, in_2) // 2)
    if told is not None:
        assert group.settings is not None
        rank = group.settings.rank(group.place.original.name)
        if rank is None:
            raise ValueError(f"the {group.settings.source} of the file says no rank, r, for {group.key}.")
        return Strength(rank, _above_0(told, "alpha"), False, group.settings.source)
    rank = int(own) if own is not None and own.is_integer() and own >= least else least
    if own is None and missing is None:
        return Strength(rank, None, False, "assumed")
    return Strength(rank, float(rank), False, "assumed" if own is None else "tensor")
