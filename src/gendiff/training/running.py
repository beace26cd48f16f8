"""What is changed while a loop runs and put back when it ends, however it ends."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gendiff.training.names import unwrapped
from gendiff.training.parts import has_adapters, library_of

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS is deterministic with a workspace of its own only


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """torch's own generators, which dropout draws from, are afterwards as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms, if asked for."""
    if not on:
        yield
        return
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    switches, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        cudnn.deterministic, cudnn.benchmark = switches
        if workspace is None:
            del os.environ[WORKSPACE]


@contextmanager
def mode(components: Mapping[str, nn.Module], training: bool) -> Iterator[None]:
    """Modules in training or evaluation mode; each one's own mode comes back.

    In training a frozen model keeps the mode that it has: a frozen VAE is not to drop out.
    """
    every = [one for module in components.values() for one in module.modules()]
    before = [(one, one.training) for one in every]
    for module in components.values():
        if training:
            _train(module)
        else:
            module.eval()
    try:
        yield
    finally:
        for one, was in before:
            one.training = was


def _train(module: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if library_of(module) or has_adapters(module):
        module.train()
        return
    module.training = True
    for child in module.children():
        _train(child)


@contextmanager
def checkpointing(components: Mapping[str, nn.Module], on: bool) -> Iterator[None]:
    """Activations recomputed in backward, in every model of diffusers or transformers that can.

    Raises:
        ValueError: if there is none.
    """
    if not on:
        yield
        return
    found: dict[int, Any] = {
        id(one): one for module in components.values() for one in module.modules() if _recomputes(one)
    }
    if not found:
        raise ValueError(
            "gradient_checkpointing=True, but no component has a diffusers or transformers model that "
            "supports it; use torch.utils.checkpoint inside your own network, and leave this off."
        )
    with ExitStack() as undo:
        for one in found.values():
            if not one.is_gradient_checkpointing:
                enable, disable = _switches(one)
                enable()
                undo.callback(disable)
        yield


def _recomputes(module: Any) -> bool:
    if library_of(module) is None or unwrapped(module) is not module:
        return False
    ours, theirs = "_supports_gradient_checkpointing", "supports_gradient_checkpointing"
    return bool(getattr(module, ours, False) or getattr(module, theirs, False))


def _switches(model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    if hasattr(model, "enable_gradient_checkpointing"):
        return model.enable_gradient_checkpointing, model.disable_gradient_checkpointing
    return model.gradient_checkpointing_enable, model.gradient_checkpointing_disable


@contextmanager
def wrapped(module: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """The module, in the accelerator's wrapper where there are several processes; gone afterwards."""
    if accelerator.num_processes == 1:
        yield module
        return
    held = list(accelerator._models)
    forward = module.forward
    outer = accelerator.prepare_model(module)
    try:
        yield outer
    finally:
        accelerator._models[:] = held
        module.forward = forward  # accelerate puts autocast round it, in place
