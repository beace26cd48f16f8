r"""Averages of other widths after training, from stored snapshots of power functions.

Every snapshot is a known weighting of the weights over the run so far, so that a wanted weighting is
approximated by a combination of them, and the wanted average by the same combination of the snapshots.
"""

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gendiff.training.ema import Averages, gamma_of
from gendiff.training.folder import _flush as flush

FORMAT = 1
METADATA = "gendiff.snapshot"
PATTERN = "snapshot-*.safetensors"
CUTOFF = 1e-13  # of the largest eigenvalue: below it a direction of the profiles is rounding
FLOATS = {"F32": torch.float32, "F64": torch.float64}

Source = str | Path | Iterable[str | Path]


@final
@dataclass(frozen=True)
class Snapshot:
    """What a file of averages says of itself.

    Attributes:
        file: a safetensors file that `save_snapshot` wrote.
        step: updates applied when it was written.
        sigma_rel: widths of the averages that it holds.
        every: updates between two moves of them.
    """

    file: Path
    step: int
    sigma_rel: tuple[float, ...]
    every: int

    @property
    def moved(self) -> int:
        """The last update that the averages have seen."""
        return self.step - self.step % self.every

    @classmethod
    def read(cls, file: str | Path) -> "Snapshot":
        """The facts of one file; no tensor is read.

        Raises:
            ValueError: for what is no such file.
        """
        file = Path(file)
        with _opened(file) as opened:
            text = (opened.metadata() or {}).get(METADATA)
        try:
            facts = json.loads(text or "null")
            if not isinstance(facts, dict) or facts.get("format") != FORMAT:
                raise ValueError(f"its {METADATA!r} is no record of format {FORMAT}.")
            step, every = (_whole(name, facts.get(name)) for name in ("step", "every"))
            widths = tuple(map(float, facts.get("sigma_rel", ())))
            if step < every or not widths or len(set(widths)) < len(widths):
                raise ValueError(f"step={step}, every={every} and sigma_rel={widths} cannot be.")
            for width in widths:
                gamma_of(width)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file.name} is no snapshot that save_snapshot wrote: {error}") from error
        return cls(file, step, widths, every)


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Combination:
    r"""The sum of profiles that is nearest to a wanted one.

    Attributes:
        step: of the wanted average.
        snapshots: those that are used, by step.
        weights: of every snapshot and profile, summing to 1.
        residual: :math:`\lVert \sum_i w_i p_i - p\rVert / \lVert p\rVert`, over the updates of the run.
    """

    step: int
    snapshots: tuple[Snapshot, ...]
    weights: Float64[Tensor, "snapshots profiles"]
    residual: float


def save_snapshot(folder: str | Path, averages: Averages, step: int) -> Path:
    """Store the power functions of a moment, in one file that is whole or not there.

    Args:
        folder: of the snapshots of one run; made where there is none.
        averages: of power functions.
        step: updates applied so far, at least `EMA.every`.

    Returns:
        The file, `snapshot-<step>.safetensors`; one of the same step is replaced.

    Raises:
        ValueError: for averages of a constant decay, and before they have moved.

    >>> import tempfile
    >>> from gendiff.training.ema import EMA
    >>> averages = Averages({"w": torch.nn.Parameter(torch.ones(2))}, EMA(sigma_rel=0.1))
    >>> file = save_snapshot(tempfile.mkdtemp(), averages, step=1)
    >>> file.name, Snapshot.read(file).sigma_rel
    ('snapshot-0000000001.safetensors', (0.1,))
    """
    ema = averages.ema
    if not ema.widths:
        raise ValueError(
            "snapshots are of power functions, and these averages have a constant decay; use "
            "EMA(sigma_rel=(0.05, 0.1), snapshot_steps=...)."
        )
    if _whole("step", step) < ema.every:
        raise ValueError(f"at step {step} the averages, with every={ema.every}, have not moved yet.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{profile}.{name}": tensor.detach().to("cpu").contiguous()
        for profile in range(len(ema.widths))
        for name, tensor in averages.weights(profile).items()
    }
    facts = {"format": FORMAT, "step": step, "sigma_rel": ema.widths, "every": ema.every}
    file = folder / PATTERN.replace("*", f"{step:010d}")
    aside = folder / f".{file.name}.new-{uuid.uuid4().hex[:8]}"
    try:
        save_file(tensors, aside, metadata={METADATA: json.dumps(facts)})
        flush(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
    flush(folder)
    return file


def snapshots(source: Source) -> list[Snapshot]:
    """The snapshots of a folder, or of some files, by step.

    Raises:
        ValueError: where there are none, where a file is none, and for files that are not of one run: of
            other widths, another interval, or the same step twice.
    """
    if isinstance(source, (str, Path)):
        files = sorted(Path(source).glob(PATTERN))
        if not files:
            raise ValueError(
                f"there is no {PATTERN} in {Path(source).name!r}; EMA(snapshot_steps=...) makes them."
            )
    else:
        files = list(source)
        if not files:
            raise ValueError("no snapshot was given.")
    found = sorted(map(Snapshot.read, files), key=lambda one: one.step)
    first = found[0]
    for before, one in pairwise(found):
        if (one.sigma_rel, one.every) != (first.sigma_rel, first.every):
            raise ValueError(
                f"{one.file.name} has sigma_rel={one.sigma_rel} and every={one.every}, {first.file.name} "
                f"{first.sigma_rel} and {first.every}; take the snapshots of one run."
            )
        if one.step == before.step:
            raise ValueError(f"{before.file} and {one.file} are both of step {one.step}; take one of them.")
    return found


def combine(stored: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> Combination:
    r"""The combination of stored profiles that is nearest to the profile of a width.

    Least squares over the run, with the scalar product of two power functions that end at :math:`t_i`,

    .. math:: \langle p_i, p_j\rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1}\;
              \frac{\min(t_i, t_j)^{\gamma_i + \gamma_j + 1}}{t_i^{\gamma_i + 1}\, t_j^{\gamma_j + 1}}

    where t is the last update that an average has seen. An average that moves at every k-th update weighs by
    the means of the function over k updates, whose distance is no larger.

    Args:
        stored: of one run, in any order.
        sigma_rel: the wanted width, in (0, 0.2887).
        step: when the wanted average ends, by default at the last snapshot; later ones are not used.

    Raises:
        ValueError: if no snapshot is as early as `step`.

    References:
        Karras et al. 2024, *Analyzing and improving the training dynamics of diffusion models*, section 3.2
        and algorithm 3.
    """
    last = max(one.step for one in stored) if step is None else _whole("step", step)
    used = tuple(sorted((one for one in stored if one.step <= last), key=lambda one: one.step))
    if not used or last < used[0].every:
        raise ValueError(
            f"the first snapshot is of step {min(one.step for one in stored)}, so that no average of step "
            f"{last} can be made; give a later step."
        )
    every, widths = used[0].every, used[0].sigma_rel
    gammas = torch.tensor([gamma_of(width) for width in widths], dtype=torch.float64).repeat(len(used))
    ends = torch.tensor([float(one.moved) for one in used], dtype=torch.float64)
    ends = ends.repeat_interleave(len(widths)) / (last - last % every)
    wanted, end = torch.tensor([gamma_of(sigma_rel)], dtype=torch.float64), ends.new_ones(1)
    gram, with_wanted = _products(ends, gammas, ends, gammas), _products(ends, gammas, end, wanted)[:, 0]
    own = _products(end, wanted, end, wanted)[0, 0]
    weights = _least_squares(gram, with_wanted)
    weights = weights / weights.sum()
    square = (weights @ gram @ weights - 2 * weights @ with_wanted + own) / own
    return Combination(last, used, weights.reshape(len(used), -1), square.clamp(min=0).sqrt().item())


def reconstruct(
    source: Source, sigma_rel: float, step: int | None = None, *, tolerance: float | int = 0.05
) -> dict[str, Float[Tensor, "..."]]:
    """The average of a width that was not kept, from a folder of snapshots, or some files of one run.

    Sums are in float64. One file is open at a time, and one tensor of it is read at a time.

    Args:
        source: a folder, or files.
        sigma_rel: the wanted width, in (0, 0.2887).
        step: updates after which the wanted average ends; by default those of the last snapshot.
        tolerance: largest relative residual, of the profiles, that is accepted (see `Combination`).

    Returns:
        The average by name, on the CPU, in the dtype of the snapshots.

    Raises:
        ValueError: if the residual is larger than the tolerance; for files that are damaged, not of one run,
            or hold other names, shapes or dtypes than the first; for NaN and infinity.

    >>> import tempfile
    >>> from gendiff.training.ema import EMA
    >>> weight, folder = torch.nn.Parameter(torch.zeros(())), tempfile.mkdtemp()
    >>> kept, wanted = (Averages({"w": weight}, EMA(sigma_rel=s)) for s in ((0.05, 0.1), 0.07))
    >>> for step in range(1, 101):
    ...     _ = weight.data.fill_(step)
    ...     for averages in (kept, wanted):
    ...         averages.update(torch.tensor(step), torch.tensor(True))
    ...     if step % 10 == 0:
    ...         _ = save_snapshot(folder, kept, step)
    >>> made = reconstruct(folder, 0.07)
    >>> round(made["w"].item(), 1), round(wanted.weights()["w"].item(), 1)
    (92.9, 92.9)
    >>> round(combine(snapshots(folder), 0.07).residual, 2)
    0.01
    """
    stored = snapshots(source)
    plan = combine(stored, sigma_rel, step)
    if not plan.residual <= tolerance:
        raise ValueError(
            f"sigma_rel={sigma_rel} at step {plan.step} is out of reach of {len(plan.snapshots)} snapshots "
            f"of {stored[0].sigma_rel}, the last of step {plan.snapshots[-1].step}: the nearest sum is "
            f"off by {plan.residual:.2g} of the profile, and tolerance={tolerance:g}. Take the step of a "
            f"snapshot, a width nearer to the stored ones, more snapshots, or a larger tolerance."
        )
    sums: dict[str, Tensor] = {}
    layout: dict[str, tuple[list[int], str]] = {}
    for one, weights in zip(plan.snapshots, plan.weights.tolist(), strict=True):
        with _opened(one.file) as opened:
            found = _layout(opened, one)
            layout = layout or found
            _check_same(layout, found, one.file.name, plan.snapshots[0].file.name)
            for name, (shape, _dtype) in layout.items():
                total = sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                for profile, weight in enumerate(weights):
                    total.add_(opened.get_tensor(f"{profile}.{name}"), alpha=weight)
    broken = [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]
    if broken:
        raise ValueError(f"{broken[0]} of the average is not finite: a snapshot has NaN or infinity in it.")
    return {name: sums.pop(name).to(FLOATS[dtype]) for name, (_shape, dtype) in layout.items()}


def _products(
    ends: Float64[Tensor, "A"],
    gammas: Float64[Tensor, "A"],
    others: Float64[Tensor, "B"],
    other_gammas: Float64[Tensor, "B"],
) -> Float64[Tensor, "A B"]:
    """Scalar products of power functions that end at these times; in logarithms, as exponents are large."""
    t, g, u, h = ends[:, None], gammas[:, None], others[None], other_gammas[None]
    common = torch.minimum(t, u)
    shrunk = torch.exp((g + 1) * torch.log(common / t) + (h + 1) * torch.log(common / u))
    return (g + 1) * (h + 1) / (g + h + 1) * shrunk / common


def _least_squares(gram: Float64[Tensor, "A A"], right: Float64[Tensor, "A"]) -> Float64[Tensor, "A"]:
    """The solution of least squares of profiles scaled to norm 1, without directions that are rounding."""
    norms = gram.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(gram / norms[:, None] / norms)
    inverse = torch.where(values > CUTOFF * values[-1], 1 / values, 0.0)
    return (vectors * inverse) @ (vectors.mT @ (right / norms)) / norms


def _opened(file: Path) -> Any:
    """An open file; a ValueError for one that is missing, damaged or no safetensors."""
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}.")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged, or no safetensors file: {error}.") from error


def _layout(opened: Any, snapshot: Snapshot) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype by name, read from the header, where every profile has the same."""
    each: list[dict[str, tuple[list[int], str]]] = [{} for _ in snapshot.sigma_rel]
    for key in opened.keys():  # noqa: SIM118 (no mapping)
        profile, _, name = key.partition(".")
        if not (profile.isdecimal() and int(profile) < len(each) and name):
            raise ValueError(f"{snapshot.file.name} has a tensor {key!r}, which is of none of its profiles.")
        part = opened.get_slice(key)
        each[int(profile)][name] = part.get_shape(), part.get_dtype()
        if part.get_dtype() not in FLOATS:
            raise ValueError(
                f"{key!r} in {snapshot.file.name} is {part.get_dtype()}; averages are F32 or F64."
            )
    for one in each[1:]:
        _check_same(each[0], one, snapshot.file.name, "its first profile")
    return each[0]


def _check_same(first: dict[str, Any], other: dict[str, Any], where: str, reference: str) -> None:
    wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is {other.get(wrong[0], 'absent')} in {where}, and "
            f"{first.get(wrong[0], 'absent')} in {reference}; take the snapshots of one run."
        )


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**53:
        raise ValueError(f"{name} is a whole number of at least 1, got {str(value)[:40]}.")
    return value
