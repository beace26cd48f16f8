"""Adapters put on a model as planned."""

import re
import warnings
from typing import Any

import torch
from torch import nn

from gendiff._checks import unknown
from gendiff.attention.handle import changeable
from gendiff.attention.project import refuse_fused
from gendiff.attention.site import is_layer
from gendiff.attention.table import unwrapped
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.handle import HELD, TRAINED, LoraHandle, tell
from gendiff.lora.layers import carries, config, family, part_of, tuner
from gendiff.lora.plan import LoraPlan

NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes part of keys and of file names


def inject(
    model: nn.Module,
    plan: LoraPlan | Adapter,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    init: str | bool = True,
    seed: int = 0,
) -> LoraHandle:
    r"""Put adapters on a model as planned, :math:`y = Wx + \text{scale} \cdot B(Ax)`, with layers of peft.

    At first B is zero, so that the model says what it says frozen, bit for bit. From then on only the adapter
    trains. The scale of a layer is a tensor on its device, written in place by `scaled`, so that compiled and
    captured steps see it change; move the model to its device before, since peft does not move scales.

    Args:
        model: the network that was planned for.
        plan: see `plan`; or an adapter with its numbers, as `read` and the algebra give it.
        adapter_name: letters, digits, - and _; one that the model has is refused, and no other is touched.
        dtype: of the adapter's weights, whatever the model's: bfloat16 weights lose small updates.
        init: how A begins: True is peft's own, uniform, "gaussian" normal with deviation 1/rank.
        seed: of these numbers; torch's own generators are left as they were.

    Returns:
        The `LoraHandle`, which is a context manager too.

    Raises:
        ValueError: for a name that is taken or none, a plan of another model, fused projections, and an
            initialisation that changes the model's own weights.

    Hu et al. 2021, *LoRA*, arXiv 2106.09685, section 4.1.
    """
    from peft import inject_adapter_in_model

    if isinstance(plan, Adapter):
        handle = inject(model, plan.plan, adapter_name, dtype=dtype)
        handle.swap(plan)
        return handle
    changeable()
    root = unwrapped(model)
    if init not in (True, "gaussian"):
        raise ValueError(unknown("initialisation", init, [True, "gaussian"]))
    _check_name(root, adapter_name)
    _check_plan(root, plan)
    trained = {name: parameter.requires_grad for name, parameter in root.named_parameters()}
    modules: list[tuple[str, Any]] = list(root.named_modules())
    active = {name: list(one.active_adapters) for name, one in modules if family(one)}
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        # several adapters are what is asked for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config(plan, init), root, adapter_name)
    layers: dict[str, Any] = {row.name: root.get_submodule(row.name) for row in plan.rows}
    for row in plan.rows:
        layer, parts = layers[row.name], ALGORITHMS[row.algorithm].shapes(row)
        assert all(carries(layer, part, adapter_name) for part in parts)
        for part in parts:
            parameter = part_of(layer, part, adapter_name)
            parameter.data = parameter.data.to(dtype)
        if tuner(row.algorithm) == "lora":
            device = layer.get_base_layer().weight.device
            layer.scaling[adapter_name] = torch.tensor(row.scale, dtype=torch.float32, device=device)
        layer._active_adapter = [*active.get(row.name, ()), adapter_name]
    tell(root, True)
    handle = LoraHandle(root, adapter_name, plan, layers, trained)
    own = {id(parameter) for parameter in handle.parameters()}
    for parameter in root.parameters():
        parameter.requires_grad_(id(parameter) in own)
    vars(root).setdefault(HELD, {})[adapter_name] = handle
    vars(root).setdefault(TRAINED, trained)
    return handle


def remove(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off a model; see `LoraHandle.remove`.

    Raises:
        ValueError: for a name that the model has not from `inject`.
    """
    held: dict[str, LoraHandle] = unwrapped(model).__dict__.get(HELD, {})
    if adapter_name not in held:
        raise ValueError(unknown("adapter", adapter_name, held))
    held[adapter_name].remove()


def _check_name(root: Any, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"the name of an adapter has letters, digits, - and _, got {name!r}.")
    if name in getattr(root, "peft_config", {}):
        raise ValueError(
            f"the model has an adapter {name!r} already, beside {sorted(root.peft_config)}: choose another "
            f"name, or remove that one first."
        )


def _check_plan(root: nn.Module, plan: LoraPlan) -> None:
    """Raise unless the model has the layers of a plan, in which an adapter has its effect."""
    for row in plan.rows:
        try:
            module: Any = root.get_submodule(row.name)
        except AttributeError:
            raise ValueError(
                f"the plan is for a layer {row.name!r}, which {type(root).__name__} has not: plan for this "
                f"model."
            ) from None
        base = getattr(module, "base_layer", module)
        if family(module) not in (None, tuner(row.algorithm)):
            raise ValueError(
                f"{row.name} carries a {family(module)} adapter, on which no {row.algorithm} can be put: "
                f"remove that one first, or leave the layer out."
            )
        if tuple(base.weight.shape) != row.shape:
            raise ValueError(
                f"the plan is for {row.name} of shape {row.shape}, which has {tuple(base.weight.shape)} "
                f"here: plan for this model."
            )
    for name, module in root.named_modules():
        if is_layer(module) and getattr(module, "fused_projections", False):
            if any(row.name.startswith(f"{name}.") for row in plan.rows):
                raise ValueError(
                    f"the projections of {name} are fused, and an adapter in their parts has no effect: call "
                    f"model.unfuse_qkv_projections() first."
                )
            refuse_fused(module, name)
