"""A micro-batch: how it is made of samples, and whose randomness is at work while they are loaded."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from hashlib import blake2b
from itertools import cycle, islice
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gendiff._philox import sample_keys
from gendiff.data.collate import collate as collate_samples
from gendiff.data.context import sampled_with
from gendiff.data.order import Plan
from gendiff.random import Rng

Id = str | int
Sample = Mapping[str, Any]
Collate = Callable[[Sequence[Sample]], Mapping[str, Any]]


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Micro:
    """One micro-batch of one rank; its real samples come first, and padding, of weight 0, after them.

    Attributes:
        batch: what the collation gave, always with `id` and `weight` (float32, [B]).
        keys: the Philox key of every sample, [B], for `Rng.from_keys`.
        rows: real samples of this rank that could be read, 0 … B.
        total: real samples over all ranks, less those that *this* rank could not read; where samples may be
            broken, the sum of `rows` over the ranks is what was read by all.
        epoch: its epoch.
        index: its number in the epoch.
        last: whether it is the last of the epoch.
        broken: id and reason of every sample of this rank that could not be read.
    """

    batch: dict[str, Any]
    keys: Int64[Tensor, "B"]
    rows: int
    total: int
    epoch: int
    index: int
    last: bool
    broken: tuple[tuple[Id, str], ...] = ()

    def pin_memory(self) -> "Micro":
        """This micro-batch in page-locked memory, from which a copy to a device does not block."""
        return replace(self, batch=_pinned(self.batch), keys=self.keys.pin_memory())


def micro_of(
    read: Sequence[tuple[Sample, int]],
    plan: Plan,
    seed: int,
    collate: Collate,
    broken: Sequence[tuple[Id, str]] = (),
) -> Micro:
    """The micro-batch of samples and their occurrences, padded with copies of them to the plan's size.

    It leaves the global generators with other states, since a collation may draw as samples do.
    """
    rows = len(read) if plan.rows else 0
    padded = list(islice(cycle(read), len(plan.indices)))
    counts = [occurrence for _, occurrence in padded]
    keys = sample_keys(seed, [sample["id"] for sample, _ in padded], epoch=plan.epoch, occurrence=counts)
    with seeded(int(keys[0]), "collate"):
        given = collate([dict(sample) for sample, _ in padded])
    if not isinstance(given, Mapping):
        raise TypeError(f"the collation gave {type(given).__name__}; it has to give a mapping, the batch.")
    batch = dict(given)
    if not batch.keys() >= {"id", "weight"}:  # a collation of the user's may leave out what is reserved
        reserved = [{key: sample[key] for key in ("id", "weight") if key in sample} for sample, _ in padded]
        batch = {**collate_samples(reserved), **batch}
    return _micro(batch, keys, rows, plan, broken)


def micro_at_once(batch: dict[str, Any], plan: Plan, seed: int) -> Micro:
    """The micro-batch of a batch that has an entry for each of the plan's."""
    keys = sample_keys(seed, batch["id"], epoch=plan.epoch, occurrence=plan.occurrences)
    return _micro(batch, keys, plan.rows, plan)


def _micro(
    batch: dict[str, Any],
    keys: Int64[Tensor, "B"],
    rows: int,
    plan: Plan,
    broken: Sequence[tuple[Id, str]] = (),
) -> Micro:
    weight = torch.as_tensor(batch["weight"], dtype=torch.float32)
    if weight.shape != keys.shape:
        raise ValueError(
            f"the collation gave `weight` the shape {list(weight.shape)}; it has to be [{len(keys)}]."
        )
    batch["weight"] = weight.where(torch.arange(len(keys)) < rows, 0.0)
    total = plan.total - len(broken)
    return Micro(batch, keys, rows, total, plan.epoch, plan.index, plan.last, tuple(broken))


def named(given: object, id: Id, *names: str) -> Sample:
    """A sample with an `id`: its own, or what it has under another name, or this one."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"sample {id!r} is a {type(given).__name__}; a sample is a mapping from names to tensors, "
            f"numbers or strings, such as {{'image': ..., 'caption': ...}}."
        )
    return {"id": next((given[name] for name in names if name in given), id), **given}


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the global CPU generators are what they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seeded(key: int, *path: str) -> sampled_with:
    """Seed the global CPU generators from a hash of a key and a path; inside, `sample_rng` is of the same.

    It costs every sample: the seeds are hashed, not drawn, and the Rng is made when it is asked for.
    """
    seed = blake2b(" ".join([str(key), *path]).encode(), digest_size=16).digest()
    torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little"))  # not that of the devices
    np.random.seed(int.from_bytes(seed[8:12], "little"))
    random.seed(int.from_bytes(seed, "little"))
    return sampled_with(lambda: reduce(Rng.fold, path, Rng.from_keys(torch.tensor(key))))


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, Mapping):
        return {key: _pinned(one) for key, one in value.items()}
    return [_pinned(one) for one in value] if isinstance(value, list | tuple) else value
