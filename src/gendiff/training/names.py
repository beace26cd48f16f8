"""Canonical names: `<component>.<own name>`, the same whatever wrappers stand between the two."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

INNER = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
HOLDERS = (DistributedDataParallel, DataParallel, AveragedModel)  # what they wrap is their `module`


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside compiled, distributed and checkpointing wrappers.

    >>> net = nn.Linear(1, 1)
    >>> unwrapped(DataParallel(net)) is net
    True
    """
    while True:
        inner = [n for n in module._modules if _wraps(module, n)]
        if not inner:
            return module
        found = module._modules[inner[0]]
        assert found is not None  # a wrapper of nothing cannot be called
        module = found


def canonical(root: nn.Module, name: str) -> str:
    """The name of a parameter or module of `root` without the segments that wrappers add.

    `module` is dropped where a wrapper says it, not where a network has an attribute of that name.

    >>> canonical(nn.Sequential(DataParallel(nn.Linear(1, 1))), "0.module.weight")
    '0.weight'
    """
    kept: list[str] = []
    at: nn.Module | None = root
    for segment in name.split("."):
        if at is not None and segment not in at._modules:
            at = unwrapped(at)  # a wrapper that leaves itself out of names, as that of checkpointing does
        if at is None or not _wraps(at, segment):
            kept.append(segment)
        at = None if at is None else at._modules.get(segment)
    return ".".join(kept)


def parameters(components: Mapping[str, nn.Module], trainable: bool = True) -> dict[str, nn.Parameter]:
    """The parameters of several components by canonical name, a tied one under its first name.

    Args:
        components: modules by name.
        trainable: leave out those that require no gradient.

    Raises:
        ValueError: for two parameters whose canonical names are the same.

    >>> list(parameters({"net": nn.Linear(2, 1)}))
    ['net.weight', 'net.bias']
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for component, module in components.items():
        for own, parameter in module.named_parameters():
            if id(parameter) in seen or (trainable and not parameter.requires_grad):
                continue
            seen.add(id(parameter))
            _add(found, f"{component}.{canonical(module, own)}", parameter)
    return found


def state(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a module's state by canonical name: no copies, parameters as parameters.

    Raises:
        TypeError: for a state that holds something else.
        ValueError: for two tensors whose canonical names are the same.
    """
    found: dict[str, Tensor] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{key!r} in the state of {type(module).__name__} is a {type(value).__name__}; only tensors "
                f"can be saved: remove get_extra_state, or save that part yourself."
            )
        _add(found, canonical(module, key), value)
    return found


def _add(found: dict[str, Any], name: str, tensor: Tensor) -> None:
    if name in found:
        raise ValueError(
            f"two tensors have the name {name!r} once the wrappers are dropped; rename one of the components "
            f"or attributes."
        )
    found[name] = tensor


def _wraps(module: nn.Module, segment: str) -> bool:
    if segment not in module._modules:
        return False
    return segment in INNER or (segment == "module" and isinstance(module, HOLDERS))
