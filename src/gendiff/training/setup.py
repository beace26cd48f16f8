"""What a trainer is made of, put together once: components, device, precision, optimizer, rates."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from gendiff._checks import unknown
from gendiff._groups import group
from gendiff.data.loader import Loader
from gendiff.training.callbacks import Callback
from gendiff.training.config import Precision, TrainConfig
from gendiff.training.ema import Averages
from gendiff.training.names import parameters
from gendiff.training.optimizer import Factory, adamw, made
from gendiff.training.rates import rates_of
from gendiff.training.update import LossScaler, Update
from gendiff.training.windows import count

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SPREAD = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def components_of(
    model: nn.Module | Mapping[str, nn.Module], codec: nn.Module | None
) -> dict[str, nn.Module]:
    """The modules of a run by name: one model is called "model", a codec "codec"."""
    if isinstance(model, nn.Module):
        found: dict[str, nn.Module] = {"model": model}
    elif isinstance(model, Mapping) and model:  # pyright: ignore[reportUnnecessaryIsInstance]
        found = dict(model)
    else:
        raise TypeError(f"model is a module, or modules by name, got {type(model).__name__}.")
    for name, module in found.items():
        if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the model {name!r} is a module, got {type(module).__name__}.")
        if not name.isidentifier() or name == "codec":
            raise ValueError(f"a model's name is a Python name other than 'codec', got {name!r}.")
    return found if codec is None else found | {"codec": codec}


def trained(components: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Parameter], int]:
    """What requires grad, by name and in at least float32, and how many were raised to that."""
    found = parameters(components)
    if not found:
        raise ValueError(
            f"nothing requires grad in {', '.join(map(repr, components))}, so that there is nothing to "
            f"train; call requires_grad_(True) on what should, or add an adapter first."
        )
    integers = [name for name, p in found.items() if not p.is_floating_point()]
    if integers:
        raise TypeError(
            f"{integers[0]} requires grad and is {found[integers[0]].dtype}; it must be floating."
        )
    low = [p for p in found.values() if p.dtype not in (torch.float32, torch.float64)]
    for parameter in low:
        parameter.data = parameter.data.float()  # exact; small updates would vanish in 16 bits
    return found, len(low)


def accelerated(accelerator: Accelerator | None) -> Accelerator:
    """The user's accelerator, or one as `accelerate launch` configured it; several processes by DDP only."""
    accelerator = Accelerator() if accelerator is None else accelerator
    kind = accelerator.distributed_type
    if kind not in SPREAD:
        raise ValueError(
            f"this trainer runs on one process or with DDP, and the launch says {kind.value}: DeepSpeed owns "
            f"backward and step, and sharded weights are not supported yet; use --multi_gpu."
        )
    return accelerator


def agreed_precision(config: TrainConfig, accelerator: Accelerator) -> Precision:
    """The precision that config and accelerator agree on; "no" is what an accelerator says by default."""
    theirs, ours = accelerator.mixed_precision, config.mixed_precision
    if theirs not in get_args(Precision):
        raise ValueError(unknown("mixed precision of the accelerator", theirs, get_args(Precision)))
    if ours is not None and theirs not in ("no", ours):
        raise ValueError(
            f"the accelerator says mixed_precision={theirs!r} and TrainConfig says {ours!r}; make them "
            f"equal, or give one of them only."
        )
    return ours or theirs  # pyright: ignore[reportReturnType]  (narrowed above)


def agreed_accumulation(config: TrainConfig, accelerator: Accelerator) -> int:
    """Micro-batches of an update that config and accelerator agree on; 1 is an accelerator's default."""
    theirs, ours = accelerator.gradient_accumulation_steps, config.gradient_accumulation_steps
    if ours is not None and theirs not in (1, ours):
        raise ValueError(
            f"the accelerator says gradient_accumulation_steps={theirs} and TrainConfig says {ours}; make "
            f"them equal, or give one of them only."
        )
    return ours or theirs


def loader_of(dataset: Any, config: TrainConfig, accelerator: Accelerator, shuffle: bool = True) -> Loader:
    """The loader of this process's share of a dataset."""
    return Loader(
        dataset,
        config.per_device_batch_size,
        config.seed,
        ranks=accelerator.num_processes,
        rank=accelerator.process_index,
        shuffle=shuffle,
        num_workers=config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def samples_of(loader: Loader) -> int | None:
    """The samples of an epoch; None for a stream, which has no length."""
    try:
        return loader.samples
    except TypeError:
        return None


def total_of(loader: Loader, config: TrainConfig, accumulation: int) -> int:
    """The number of updates of the run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_epochs is not None  # TrainConfig has one of the two
    total = count(len(loader), accumulation, config.windows, config.num_epochs)
    if total == 0:
        raise ValueError(
            f"windows='drop' leaves nothing of epochs of {len(loader)} micro-batches where an update takes "
            f"{accumulation}; use 'carry', or a smaller gradient_accumulation_steps."
        )
    return total


def update_of(
    found: Mapping[str, nn.Parameter],
    config: TrainConfig,
    precision: Precision,
    total: int,
    factory: Factory | None,
) -> Update:
    """The update: AdamW with the settings of the config, or what the factory makes of the groups."""
    groups = group(found, config.param_groups, config.learning_rate, config.weight_decay)
    optimizer = made(factory or (lambda given: adamw(given, config.betas, config.eps)), groups)
    device = next(iter(found.values())).device
    return Update(
        found,
        optimizer,
        rates_of(config.lr_scheduler).tables([one["lr"] for one in groups], total),
        max_norm=config.max_grad_norm,
        scaler=LossScaler(device) if precision == "fp16" else None,
        averages=None if config.ema is None else Averages(found, config.ema),
    )


def autocast_of(precision: Precision, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision of a run, as a context."""
    if precision == "no":
        return nullcontext()
    handler = accelerator.autocast_handler
    cache = True if handler is None else bool(handler.cache_enabled)
    return torch.autocast(accelerator.device.type, DTYPES[precision], cache_enabled=cache)


def named_callbacks(callbacks: Sequence[Any]) -> dict[str, Callback]:
    """Callbacks by a name that is the same in the run that resumes: the class, numbered if it recurs."""
    found: dict[str, Callback] = {}
    for one in callbacks:
        if not isinstance(one, Callback):
            raise TypeError(
                f"callbacks are instances of gendiff.training.Callback, got {one!r}; give an instance of a "
                f"class that inherits from it."
            )
        kind, number = type(one).__name__, 1
        while f"{kind}-{number}" in found:
            number += 1
        found[f"{kind}-{number}"] = one
    return found
