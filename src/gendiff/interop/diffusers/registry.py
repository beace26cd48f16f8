"""Which family a pipeline is of."""

from typing import Any, final

from gendiff._checks import unknown
from gendiff.interop.diffusers.family import Family
from gendiff.interop.diffusers.rows import ROWS

_FAMILIES: dict[str, Family] = {row.name: row for row in ROWS}


@final
class Registration:
    """That a family is known; `remove`, or leaving it as a context manager, ends it."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def remove(self) -> None:
        """Make the family unknown again; a second time does nothing."""
        if _FAMILIES.get(self.family.name) is self.family:
            del _FAMILIES[self.family.name]

    def __enter__(self) -> Family:
        return self.family

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_family(family: Family) -> Registration:
    """Make a family's pipelines known to `family_of`, and so to `denoiser_of` and `codec_of`.

    Args:
        family: with a name and pipeline classes of its own.

    Returns:
        What takes it back: a context manager with `remove`.

    Raises:
        TypeError: for what is no `Family`.
        ValueError: for a name or a pipeline class that another family has.

    >>> with register_family(Family(name="mine", pipelines=("MyPipeline",))):
    ...     family_of("MyPipeline").name
    'mine'
    """
    if not isinstance(family, Family):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"a family is a gendiff.interop.diffusers.Family, got {type(family).__name__}.")
    if family.name in _FAMILIES:
        raise ValueError(
            f"there is a family {family.name!r} already, of {', '.join(_FAMILIES[family.name].pipelines)}; "
            f"give this one, of {', '.join(family.pipelines)}, another name."
        )
    for other in _FAMILIES.values():
        if both := sorted(set(other.pipelines) & set(family.pipelines)):
            raise ValueError(
                f"{', '.join(both)} is of family {other.name!r} already, and cannot be of {family.name!r} "
                f"too; pass family=… to denoiser_of and codec_of instead of registering it."
            )
    _FAMILIES[family.name] = family
    return Registration(family)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline, by the name of its class or of one that it is derived from.

    Args:
        pipe: a diffusers pipeline, its class, or the name of that.

    Raises:
        ValueError: for a pipeline of no known family.

    >>> family_of("FluxPipeline").name
    'flux'
    """
    kind = pipe if isinstance(pipe, str | type) else type(pipe)
    names = [kind] if isinstance(kind, str) else [base.__name__ for base in kind.__mro__]
    for name in names:
        for family in _FAMILIES.values():
            if name in family.pipelines:
                return family
    known = [pipeline for family in _FAMILIES.values() for pipeline in family.pipelines]
    raise ValueError(
        f"{unknown('pipeline', names[0], known)} Families: {', '.join(_FAMILIES)}. To use another "
        f"one, describe it with a gendiff.interop.diffusers.Family and register_family it, or pass it as "
        f"family=…."
    )


def family_for(pipe: Any, family: Family | str | None) -> Family:
    """The family that was asked for, by itself or by name, or else the pipeline's own."""
    if family is None:
        return family_of(pipe)
    if isinstance(family, str):
        if family not in _FAMILIES:
            raise ValueError(unknown("family", family, _FAMILIES))
        return _FAMILIES[family]
    return family
