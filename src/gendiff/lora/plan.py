"""What is to be adapted, and how strongly: decided, checked and printed before anything is changed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import nn

from gendiff import _patterns
from gendiff._checks import unknown
from gendiff._tables import as_html, as_text
from gendiff.attention.selectors import Selector
from gendiff.attention.table import unwrapped
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.presets import is_preset, preset
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
    """

    rows: tuple[Planned, ...]
    layers: int

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
    targets: str | Selector | Iterable[str],
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
            cover a layer, or a selector.
        rank: rows of A and columns of B, at least 1.
        lora_alpha: the scale times the rank; None is the rank, for a scale of 1.
        rules: what holds for some of the layers: patterns or selectors to `rank`, `lora_alpha` and
            `learning_rate`, or to None, which leaves them out. A later rule wins; a `rank` without a
            `lora_alpha` takes that of the plan.
        rslora: whether the scale is lora_alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        algorithm: "lora"; "dora", which learns the length of each row apart; "loha" and "lokr", Hadamard and
            Kronecker products of low rank; "oft", which turns the inputs in blocks of rank channels.
        options: of "lokr": `decompose_factor`, the lesser factor of the widths, where -1 takes the most even
            one, and `decompose_both`, whether the lesser matrix is of low rank too.

    Returns:
        The `LoraPlan`.

    Raises:
        ValueError: for a target or rule that covers no layer, with the nearest names; for ranks below 1, or
            above what a weight has.

    Hu et al. 2021, *LoRA*, arXiv 2106.09685, section 4.1.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> plan(net, "*", rank=2, rules={"2": {"rank": 1, "learning_rate": 1e-4}})
    layer  class   weight  algorithm  rank  lora_alpha  scale  learning_rate  parameters
    0      Linear  6x4     lora       2     2           1      -              20
    2      Linear  2x6     lora       1     1           1      0.0001         8
    2 of 2 layers, 28 parameters
    """
    kind = _algorithm(algorithm, options, rslora, lora_alpha)
    every = targets_of(model)
    chosen = _chosen(unwrapped(model), every, targets)
    settings: dict[str, dict[str, Any] | None] = {target.name: {"rank": rank} for target in chosen}
    for key, changes in (rules or {}).items():
        covered = _covered(key, chosen)
        _check_settings(key, changes)
        for target in covered:
            before = settings[target.name]
            settings[target.name] = None if changes is None else {**(before or {"rank": rank}), **changes}
    rows: list[Planned] = []
    for target in chosen:
        given = settings[target.name]
        if given is not None:
            rows.append(_planned(target, given, lora_alpha, kind))
    if not rows:
        raise ValueError(f"the rules leave out all {len(chosen)} layers of the targets.")
    return LoraPlan(tuple(rows), len(every))


def _algorithm(
    name: str, options: Mapping[str, Any] | None, rslora: bool, lora_alpha: float | int | None
) -> dict[str, Any]:
    """What every row says of the algorithm."""
    if name not in ALGORITHMS:
        raise ValueError(unknown("algorithm", name, ALGORITHMS))
    known = ALGORITHMS[name].options
    for option in options or ():
        if option not in known:
            raise ValueError(unknown(f"option of {name}", option, known))
    if rslora and name not in ("lora", "dora"):
        raise ValueError(f"rslora is a scale of lora and dora, and {name} has none such.")
    if lora_alpha is not None and not ALGORITHMS[name].scaled:
        raise ValueError(f"{name} has no scale, so that lora_alpha says nothing: leave it out.")
    changed = tuple((key, value) for key, value in sorted((options or {}).items()) if value != known[key])
    return {"rslora": rslora, "algorithm": name, "options": changed}


def _planned(
    target: Target, given: Mapping[str, Any], lora_alpha: float | int | None, kind: Mapping[str, Any]
) -> Planned:
    rank, rate = given["rank"], given.get("learning_rate")
    alpha = given.get("lora_alpha", lora_alpha)
    alpha = float(rank if alpha is None else alpha)
    algorithm = ALGORITHMS[kind["algorithm"]]
    if target.kind != "Linear" and not algorithm.convolves:
        raise ValueError(
            f"{target.name} is a {target.kind}, which carries no {kind['algorithm']}: leave it out, or take "
            f"another algorithm."
        )
    highest = algorithm.limit(target.shape[0], math.prod(target.shape[1:]))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= highest:
        raise ValueError(
            f"ranks are whole numbers from 1 to that of the weight, which is {highest} at {target.name} of "
            f"shape {target.shape}, got {rank!r}."
        )
    if kind["algorithm"] == "oft" and (rank == 1 or target.shape[1] % rank):
        sizes = [one for one in range(2, highest + 1) if highest % one == 0]
        raise ValueError(
            f"oft turns blocks of rank channels: at {target.name}, of {highest}, the rank is one of "
            f"{', '.join(map(str, sizes))}, got {rank}."
        )
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"lora_alpha is a number above 0, got {alpha:g} for {target.name}.")
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"a learning rate is a number of 0 or more, got {rate!r} for {target.name}.")
    return Planned(target.name, target.kind, target.shape, rank, alpha, rate, **kind)


def _chosen(root: nn.Module, every: list[Target], targets: str | Selector | Iterable[str]) -> list[Target]:
    if isinstance(targets, Selector):
        found = [target for target in every if targets(target)]
        if not found:
            raise ValueError(f"{targets} covers none of {len(every)} layers; {_kinds(every)}.")
        return found
    if isinstance(targets, str):
        patterns = preset(targets) if is_preset(targets) else (targets,)
    else:
        patterns = tuple(targets)
    names = [target.name for target in every]
    wanted: set[str] = set()
    for alternative in (part.strip() for pattern in patterns for part in pattern.split("|")):
        covered = {name for name in names if _patterns.match(alternative, name)}
        if not covered:
            raise ValueError(_nothing(root, alternative, names))
        wanted |= covered
    return [target for target in every if target.name in wanted]


def _nothing(root: nn.Module, pattern: str, names: list[str]) -> str:
    """Why a target covers no layer."""
    others = [
        (name, type(one).__name__) for name, one in root.named_modules() if _patterns.match(pattern, name)
    ]
    if others:
        name, kind = others[0]
        below = [one for one in names if one.startswith(f"{name}.")]
        hint = f"; its layers are {', '.join(map(repr, below[:3]))}" if below else ""
        return f"{pattern!r} covers {name!r}, a {kind}, which carries no adapter{hint}."
    try:
        _patterns.select(pattern, names, "layers that can carry an adapter")
    except ValueError as error:
        return str(error)
    raise AssertionError  # it covers none, which select has just refused


def _covered(key: Selector | str, chosen: list[Target]) -> list[Target]:
    """The planned layers that a rule is for."""
    if isinstance(key, Selector):
        covered = [target for target in chosen if key(target)]
        if not covered:
            raise ValueError(
                f"the rule for {key} covers none of {len(chosen)} planned layers; {_kinds(chosen)}."
            )
        return covered
    names = set(_patterns.select(key, [target.name for target in chosen], "planned layers"))
    return [target for target in chosen if target.name in names]


def _check_settings(key: Selector | str, changes: Mapping[str, Any] | None) -> None:
    for name in changes or ():
        if name not in SETTINGS:
            raise ValueError(unknown(f"setting of the rule for {key}", name, SETTINGS))


def _kinds(targets: list[Target]) -> str:
    kinds = sorted({target.kind for target in targets})
    return f"there are {', '.join(kinds)}"
