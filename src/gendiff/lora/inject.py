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
from gendiff.lora.dora import install, refuse_empty_rows
from gendiff.lora.fitting import check, check_init, is_principal
from gendiff.lora.handle import LoraHandle, refuse_within
from gendiff.lora.layers import carries, config, family, mend, part_of, take_off, tuner
from gendiff.lora.plan import LoraPlan
from gendiff.lora.principal import Principal, check_principal
from gendiff.lora.quantised import kept, refuse_algorithm, shape_of
from gendiff.lora.records import HELD, TRAINED, forget, tell, train_again
from gendiff.lora.scales import hold
from gendiff.lora.words import NEW

NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes part of keys and of file names


def inject(
    model: nn.Module,
    plan: LoraPlan | Adapter,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    init: str | bool | None = None,
    seed: int = 0,
) -> LoraHandle:
    r"""Put adapters on a model as planned, :math:`y = Wx + \text{scale} \cdot B(Ax)`, with layers of peft.

    At first B is zero, so that the model says what it says frozen, bit for bit. From then on only the adapter
    trains. The scale of a layer is a tensor that moves with it and is written in place by `scaled`, so that
    compiled and captured steps see it change.

    With "pissa" (Meng et al. 2024, arXiv 2404.02948) and "olora" (Büyükakyüz 2024, arXiv 2406.01775) A and B
    begin as a part of the weight, which is taken off it: what the model says is the same up to rounding. The
    weights as they were are kept on the CPU, and come back with `remove`.

    Args:
        model: the network that was planned for.
        plan: see `plan`; or an adapter with its numbers, as `read` and the algebra give it.
        adapter_name: letters, digits, - and _; one that the model has is refused, and no other is touched.
        dtype: of the adapter's weights, whatever the model's: bfloat16 weights lose small updates.
        init: how A begins: True is peft's own, uniform, "gaussian" normal with deviation 1/rank; "pissa" by
            the first singular vectors, "pissa_niter_4" by those of 4 steps of a power iteration, "olora" by
            a QR decomposition; of lokr also "lycoris", which begins with the other factor at zero. None is
            what the plan says.
        seed: of these numbers; torch's own generators are left as they were.

    Returns:
        The `LoraHandle`, which is a context manager too.

    Raises:
        ValueError: for a name that is taken or none, a plan of another model, layers that cannot carry what
            is planned, fused projections and fused adapters; the model is as it was then.

    Hu et al. 2021, *LoRA*, arXiv 2106.09685, section 4.1.
    """
    changeable()
    root = unwrapped(model)
    planned = plan.plan if isinstance(plan, Adapter) else plan
    begin = True if isinstance(plan, Adapter) else plan.init if init is None else init
    _check_name(root, adapter_name)
    _check_plan(root, planned)
    check_init(planned.rows[0].algorithm, begin)
    held: dict[str, LoraHandle] = vars(root).get(HELD, {})
    check_principal(root, planned, begin, held)
    if is_principal(begin):
        refuse_within(held.values(), "is put on")
    trained = {name: parameter.requires_grad for name, parameter in root.named_parameters()}
    principal = Principal(str(begin)) if is_principal(begin) else None
    try:
        layers = _put_on(root, planned, adapter_name, begin, seed, dtype, principal)
    except BaseException:
        for row in planned.rows:
            if principal is not None:
                principal.restore(row.name, root.get_submodule(row.name))
            take_off(root, row.name, adapter_name)
        forget(root, adapter_name)
        train_again(root, trained)
        raise
    tell(root, True)
    handle = LoraHandle(root, adapter_name, planned, layers, trained, principal)
    own = {id(parameter) for parameter in handle.parameters()}
    for key, parameter in root.named_parameters():
        word = NEW in key and trained[key]  # which trains beside an adapter
        parameter.requires_grad_(word or id(parameter) in own)
    vars(root).setdefault(HELD, {})[adapter_name] = handle
    vars(root).setdefault(TRAINED, trained)
    if isinstance(plan, Adapter):
        handle.swap(plan)
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


def _put_on(
    root: nn.Module,
    plan: LoraPlan,
    adapter_name: str,
    init: str | bool,
    seed: int,
    dtype: torch.dtype,
    principal: Principal | None,
) -> dict[str, Any]:
    """Have peft put the layers on, and make of them what is planned."""
    from peft import inject_adapter_in_model

    modules: list[tuple[str, Any]] = list(root.named_modules())
    active = {name: one._active_adapter for name, one in modules if family(one)}
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    made = config(plan, True if principal is not None else init)
    bases = [getattr(one, "base_layer", one) for one in (root.get_submodule(row.name) for row in plan.rows)]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=sorted(devices)), kept(bases):
        torch.manual_seed(seed)
        # several adapters are what is asked for, blocks of other sizes are mended, and into torchao's weights
        # nothing is merged
        for message in ("Already found a `peft_config`", "Invalid `oft_block_size`", "TorchaoLoraLinear was"):
            warnings.filterwarnings("ignore", message=message)
        try:
            inject_adapter_in_model(made, root, adapter_name)
            layers: dict[str, Any] = {row.name: root.get_submodule(row.name) for row in plan.rows}
            for row in plan.rows:
                mend(layers[row.name], row, adapter_name, made)
                if principal is not None:
                    principal.take(row.name, layers[row.name], adapter_name)
        finally:
            for name, before in active.items():  # peft switches to the one that came last
                layer: Any = root.get_submodule(name)
                layer._active_adapter = before
    if principal is not None:
        made.init_lora_weights = principal.init  # what peft has to know to load the same A and B
    for row in plan.rows:
        layer, parts = layers[row.name], ALGORITHMS[row.algorithm].shapes(row)
        assert all(carries(layer, part, adapter_name) for part in parts)
        for part in parts:
            parameter = part_of(layer, part, adapter_name)
            parameter.data = parameter.data.to(dtype)
        if principal is not None:
            principal.note(row.name, layer, adapter_name)
        if ALGORITHMS[row.algorithm].scaled:
            hold(layer, adapter_name, row.scale)
        if row.algorithm == "dora":
            install(layer, adapter_name)
        others = layer.active_adapters if row.name in active else []
        layer._active_adapter = [*others, adapter_name]
        layer.train(layer.get_base_layer().training)  # peft's new layers train, whatever the model does
    return layers


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
    names = [row.name for row in plan.rows]
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"a plan has each layer once, got {f'{twice} twice' if twice else 'none'}.")
    kinds = {(row.algorithm, row.options, row.rslora) for row in plan.rows}
    if len(kinds) > 1:
        said = sorted({row.algorithm + (" with rslora" if row.rslora else "") for row in plan.rows})
        raise ValueError(
            f"an adapter is of one algorithm, with the same options, got {', '.join(said)}: put one on after "
            f"the other, under two names."
        )
    for row in plan.rows:
        try:
            module: Any = root.get_submodule(row.name)
        except AttributeError:
            raise ValueError(
                f"the plan is for a layer {row.name!r}, which {type(root).__name__} has not: plan for this "
                f"model."
            ) from None
        base = getattr(module, "base_layer", module)
        check(row, base)
        refuse_algorithm(row.name, base, row.algorithm)
        if family(module) not in (None, tuner(row.algorithm)):
            raise ValueError(
                f"{row.name} carries a {family(module)} adapter, on which no {row.algorithm} can be put: "
                f"remove that one first, or leave the layer out."
            )
        if getattr(module, "merged", False):
            raise ValueError(
                f"adapters are fused into the weight of {row.name}, beside which no other has an effect: "
                f"call unfuse_lora() or unmerge() first."
            )
        if shape_of(base) != row.shape:
            raise ValueError(
                f"the plan is for {row.name} of shape {row.shape}, which has {shape_of(base)} here: plan for "
                f"this model."
            )
        if row.algorithm == "dora":
            refuse_empty_rows(row.name, base)
    for name, module in root.named_modules():
        if is_layer(module) and getattr(module, "fused_projections", False):
            if any(row.name.startswith(f"{name}.") for row in plan.rows):
                raise ValueError(
                    f"the projections of {name} are fused, and an adapter in their parts has no effect: call "
                    f"model.unfuse_qkv_projections() first."
                )
            refuse_fused(module, name)
