"""What the parts of a layer do not say: one row a processor class where the general rule is wrong."""

from typing import NamedTuple


class Fact(NamedTuple):
    """What is known of a processor class.

    Attributes:
        kind: what attends to what; "" where the layer's parts say it.
        text: where the text stands among the keys: first, last, all, none; "" by the kind.
        outputs: number of tensors it returns; 0 by the kind.
        main: which call of a kernel is the attention itself, where the layer has another for an image.
    """

    kind: str = ""
    text: str = ""
    outputs: int = 0
    main: int = 0


FACTS: dict[str, Fact] = {}
NONE = Fact()


def fact_of(processor: str) -> Fact:
    """The row of a processor class."""
    return FACTS.get(processor, NONE)
