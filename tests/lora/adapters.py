"""What the tests of adapter files share: adapters of random numbers, made without putting them on a model."""

import hashlib

import torch

from gendiff.lora import Adapter, plan
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.targets import targets_of


def weights(model):
    """The weights of the layers that can carry adapters, by name."""
    return {target.name: target.module.weight.detach() for target in targets_of(model)}


def drawn(planned, seed=0, size=0.3, dtype=torch.float32, metadata=None):
    """An adapter of a plan with normal numbers; magnitudes of DoRA are about 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for row in planned.rows:
        tensors[row.name] = {
            part: (size * torch.randn(shape, generator=generator) + (part == "magnitude")).to(dtype)
            for part, shape in ALGORITHMS[row.algorithm].shapes(row).items()
        }
    return Adapter(planned, tensors, metadata or {})


def adapter(model, targets, **settings):
    """An adapter for some layers of a model."""
    return drawn(plan(model, targets, **settings))


def error(found, expected):
    """How far one change of a weight is from another, relative to that, or to 1 where that is nothing."""
    with torch.no_grad():
        return float((found.double() - expected.double()).norm() / max(float(expected.norm()), 1e-12))


def worst(adapter, other, model):
    """The greatest error over all layers of both, of which one that has no adapter adds nothing."""
    held = weights(model)
    names = {row.name for row in (*adapter.plan.rows, *other.plan.rows)}
    found = []
    for name in names:
        mine, theirs = (
            one.delta(name, held[name]) if name in one.tensors else None for one in (adapter, other)
        )
        if mine is None or theirs is None:
            rest = theirs if mine is None else mine
            found.append(float(rest.norm() / held[name].norm()))
        else:
            found.append(error(theirs, mine))
    return max(found)


def numbers(model):
    """A hash of all numbers of a model."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
