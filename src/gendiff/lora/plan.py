"""What is to be adapted, and how strongly: decided, checked and printed before anything is changed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import nn

from gendiff._checks import unknown
from gendiff._tables import as_html, as_text
from gendiff.attention.selectors import Selector
from gendiff.attention.table import unwrapped
from gendiff.lora import configurations
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.choosing import chosen, covered
from gendiff.lora.fitting import check, check_options
from gendiff.lora.targets import Target, targets_of

Rules: TypeAlias = Mapping[Selector | str, Mapping[str, Any] | None]
COLUMNS = (
    "layer",
    "class",
    "weight",
    "algorithm",
    "rank",
    "lora_alpha",
    "scale",
    "learning_rate",
    "parameters",
)
SETTINGS = ("rank", "lora_alpha", "learning_rate")


@final
@dataclass(frozen=True)
class Planned:
    r"""An adapter of one layer: :math:`y = Wx + \text{scale} \cdot B(Ax)`.

    Attributes:
        name: dotted name of the layer.
        kind: its class.
        shape: of its weight.
        rank: rows of A and columns of B; of OFT the size of a block.
        lora_alpha: what the scale is lora_alpha over the rank of.
        learning_rate: of its own; None is the optimizer's.
        rslora: whether the scale is lora_alpha / sqrt(rank).
        algorithm: "lora", "dora", "loha", "lokr" or "oft".
        options: settings of the algorithm, by name, that are not its defaults.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    lora_alpha: float
    learning_rate: float | None = None
    rslora: bool = False
    algorithm: str = "lora"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def scale(self) -> float:
        """The factor of B(Ax)."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parameters(self) -> int:
        """How many numbers its parts have."""
        return sum(math.prod(shape) for shape in ALGORITHMS[self.algorithm].shapes(self).values())

    def option(self, name: str) -> Any:
        """A setting of the algorithm."""
        return dict(self.options).get(name, ALGORITHMS[self.algorithm].options[name])


@final
@dataclass(frozen=True)
class LoraPlan:
    """The adapters of a model, one a layer; prints as a table.

    Attributes:
        rows: what is planned for each layer, in the order of the model's modules.
        layers: how many layers the model has that could carry one.
        init: how they begin, where `inject` is not told.
    """

    rows: tuple[Planned, ...]
    layers: int
    init: str | bool = True

    @property
    def parameters(self) -> int:
        """How many numbers are to be trained."""
        return sum(row.parameters for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Planned:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(unknown("layer of the plan", name, [row.name for row in self.rows]))

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                row.algorithm,
                str(row.rank),
                f"{row.lora_alpha:g}",
                f"{row.scale:g}",
                "-" if row.learning_rate is None else f"{row.learning_rate:g}",
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]

    def _total(self) -> str:
        return f"{len(self.rows)} of {self.layers} layers, {self.parameters:,} parameters"

    def __repr__(self) -> str:
        return f"{as_text(COLUMNS, self._rows())}\n{self._total()}"

    def _repr_html_(self) -> str:
        return as_html(COLUMNS, self._rows(), [self._total()])


def plan(
    model: nn.Module,
    targets: str | Selector | Iterable[str] | Any,
    *,
    rank: int = 8,
    lora_alpha: float | int | None = None,
    rules: Rules | None = None,
    rslora: bool = False,
    algorithm: str = "lora",
    options: Mapping[str, Any] | None = None,
) -> LoraPlan:
    """Decide which layers of a model get an adapter, and of what rank and strength; nothing is changed.

    Args:
        model: the network.
        targets: a preset such as "sdxl/attention+ff", patterns of names, of which every alternative has to
            cover a layer, or a selector. Or a `LoraConfig`, `LoHaConfig`, `LoKrConfig` or `OFTConfig` of
            peft, which says all but the rules: it is read as peft reads it, and what it asks for that an
            adapter here has not, such as dropout, is refused.
        rank: rows of A and columns of B, at least 1.
        lora_alpha: the scale times the rank; None is the rank, for a scale of 1.
        rules: what holds for some of the layers: patterns or selectors to `rank`, `lora_alpha` and
            `learning_rate`, or to None, which leaves them out. A later rule wins; a `rank` without a
            `lora_alpha` takes that of the plan.
        rslora: whether the scale is lora_alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        algorithm: "lora"; "dora", which learns the length of each row apart; "loha" and "lokr", Hadamard and
            Kronecker products of low rank; "oft", which turns the inputs in blocks of rank channels.
        options: of "lokr": `decompose_factor`, the first factor of the widths, where -1 takes the most even
            ones, and `decompose_both`, whether the lesser matrix is of low rank too.

    Returns:
        The `LoraPlan`.

    Raises:
        ValueError: for a target or rule that covers no layer, with the nearest names; for ranks below 1, or
            above what a weight has; for layers that the algorithm cannot be put on.

    Hu et al. 2021, *LoRA*, arXiv 2106.09685, section 4.1.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> plan(net, "*", rank=2, rules={"2": {"rank": 1, "learning_rate": 1e-4}})
    layer  class   weight  algorithm  rank  lora_alpha  scale  learning_rate  parameters
    0      Linear  6x4     lora       2     2           1      -              20
    2      Linear  2x6     lora       1     1           1      0.0001         8
    2 of 2 layers, 28 parameters
    """
    every, root = targets_of(model), unwrapped(model)
    first: dict[str, Mapping[str, Any]]
    if configurations.is_config(targets):
        _refuse_beside(rank=rank, lora_alpha=lora_alpha, rslora=rslora, algorithm=algorithm, options=options)
        read = configurations.read(root, every, targets)
        meant, first, kind, init = read.targets, dict(read.settings), read.kind, read.init
    else:
        kind, init = _algorithm(algorithm, options, rslora, lora_alpha), True
        meant = chosen(root, every, targets)
        first = {target.name: {"rank": rank, "lora_alpha": lora_alpha} for target in meant}
    settings: dict[str, Mapping[str, Any] | None] = {**first}
    for key, changes in (rules or {}).items():
        _check_settings(key, changes, kind["algorithm"])
        for target in covered(key, meant):
            before = settings[target.name]
            settings[target.name] = None if changes is None else {**(before or first[target.name]), **changes}
    given = [(target, settings[target.name]) for target in meant]
    rows = tuple(_planned(target, one, kind) for target, one in given if one is not None)
    if not rows:
        raise ValueError(f"the rules leave out all {len(meant)} layers of the targets.")
    return LoraPlan(rows, len(every), init)


def _algorithm(
    name: str, options: Mapping[str, Any] | None, rslora: bool, lora_alpha: float | int | None
) -> dict[str, Any]:
    """What every row says of the algorithm."""
    if name not in ALGORITHMS:
        raise ValueError(unknown("algorithm", name, ALGORITHMS))
    check_options(name, dict(options or {}))
    if rslora and name not in ("lora", "dora"):
        raise ValueError(f"rslora is a scale of lora and dora, and {name} has none such.")
    if lora_alpha is not None and not ALGORITHMS[name].scaled:
        raise ValueError(f"{name} has no scale, so that lora_alpha says nothing: leave it out.")
    known = ALGORITHMS[name].options
    changed = tuple((key, value) for key, value in sorted((options or {}).items()) if value != known[key])
    return {"rslora": rslora, "algorithm": name, "options": changed}


def _refuse_beside(**given: Any) -> None:
    """A configuration of peft says these things itself."""
    usual = {"rank": 8, "lora_alpha": None, "rslora": False, "algorithm": "lora", "options": None}
    said = [name for name, value in given.items() if value != usual[name]]
    if said:
        raise ValueError(f"the configuration says {', '.join(said)} itself: change it there, or by rules.")


def _planned(target: Target, given: Mapping[str, Any], kind: Mapping[str, Any]) -> Planned:
    rank, alpha = given["rank"], given.get("lora_alpha")
    highest = ALGORITHMS[kind["algorithm"]].limit(target.shape[0], math.prod(target.shape[1:]))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= highest:
        raise ValueError(
            f"ranks are whole numbers from 1 to that of the weight, which is {highest} at {target.name} of "
            f"shape {target.shape}, got {rank!r}."
        )
    row = Planned(
        target.name,
        target.kind,
        target.shape,
        rank,
        float(rank if alpha is None else alpha),
        given.get("learning_rate"),
        **kind,
    )
    check(row, target.module)
    return row


def _check_settings(key: Selector | str, changes: Mapping[str, Any] | None, algorithm: str) -> None:
    known = [name for name in SETTINGS if name != "lora_alpha" or ALGORITHMS[algorithm].scaled]
    for name in changes or ():
        if name not in known:
            raise ValueError(unknown(f"setting of the rule for {key}", name, known))
