"""What of a set of components is saved, and as what: whole models, adapters, and the rest."""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from torch import Tensor, nn

from gendiff.training.names import canonical, parameters, state, unwrapped

USUAL = {"unet": "UNet", "transformer": "Transformer"}  # attribute of a pipeline, and the class's word for it
NAME = re.compile(r"[\w-]+")  # it becomes the name of a file
# how peft names the original inside of what it wraps; beside it stand the adapters
ORIGINAL = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)(?=\.)")
# what is on a model for a time and none of its own: weights of middlewares, and rows of new words
BESIDE = re.compile(r"attention_middlewares\.|(.+\.)?new_tokens\.\d+$")
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that change the weights of the model
PRETRAINED = (
    ("diffusers.models.modeling_utils", "ModelMixin"),
    ("transformers.modeling_utils", "PreTrainedModel"),
)


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Part:
    """One thing to save.

    Attributes:
        kind: "model" is saved by its own `save_pretrained`; "adapter" as a file that a pipeline loads;
            "rest" is what trains outside of both, as a file of tensors.
        name: of its folder, or before the keys in its file.
        where: canonical name of the module, `<component>.<path>`.
        module: the module, without wrappers.
        tensors: its live tensors by the key that they are saved under.
        adapter: name of the adapter.
    """

    kind: Literal["model", "adapter", "rest"]
    name: str
    where: str
    module: nn.Module
    tensors: Mapping[str, Tensor]
    adapter: str | None = None


def find(components: Mapping[str, nn.Module], pipeline: Any = None) -> list[Part]:
    """The parts of components that have something to train.

    A part is named as in the pipeline, or else by its attribute, or else by its component. An adapter of a
    network of diffusers is named as every pipeline names such a network, since that is what its keys in the
    file begin with.

    Raises:
        ValueError: where nothing trains, for a name that is none for a file, or two parts of one name.
    """
    for name in components:
        _check_name("component", name)
    if not parameters(components):
        raise ValueError(
            f"nothing in {', '.join(map(repr, components)) or 'no component'} requires grad, so that there "
            f"is nothing to save; the weights are those that you began with."
        )
    found = [part for name, module in components.items() for part in _component(name, module, pipeline)]
    unique: dict[tuple[int, str | None, str], Part] = {}
    for part in found:  # a model that stands in two components is saved once
        unique.setdefault((id(part.module), part.adapter, part.kind), part)
    parts = list(unique.values())
    _check_names(parts, pipeline)
    return parts


def library_of(module: nn.Module) -> str | None:
    """The library that a module is a model of, diffusers or transformers; it imports neither to find out."""
    for home, name in PRETRAINED:
        base = getattr(sys.modules.get(home), name, None)
        if base is not None and isinstance(module, base):
            return home.split(".")[0]
    return None


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The live state of a model without what is on it for a time."""
    return {key: tensor for key, tensor in state(module).items() if not BESIDE.match(key)}


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The live state of a model as if its adapters had never been added."""
    wrapped = [name for name, one in module.named_modules() if hasattr(one, "adapter_layer_names")]
    prefixes = tuple(f"{canonical(module, name)}." for name in wrapped)
    found: dict[str, Tensor] = {}
    for key, tensor in own_state(module).items():
        if not key.startswith(prefixes):
            found[key] = tensor
        elif ORIGINAL.search(key):
            found[ORIGINAL.sub("", key)] = tensor
    return found


def _component(component: str, module: nn.Module, pipeline: Any) -> Iterator[Part]:
    covered: set[int] = set()
    parts = []
    for path, one in _roots(module, ""):
        where = f"{component}.{path}" if path else component
        name, live = _name(one, path, component, pipeline), own_state(one)
        if has_adapters(one):
            made = [Part("adapter", name, where, one, t, a) for a, t in _trained_adapters(one, live)]
        else:
            made = [Part("model", name, where, one, live)]
        parts += made
        covered |= {id(t) for part in made for t in part.tensors.values()}
        covered |= {id(t) for t in live.values() if not t.requires_grad}  # frozen, or a buffer of it
    yield from parts
    rest: dict[str, Tensor] = {}
    trains = False
    for key, tensor in state(module).items():
        if id(tensor) in covered or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
            continue
        covered.add(id(tensor))
        rest[key] = tensor
        trains = trains or tensor.requires_grad
    if trains:
        yield Part("rest", component, component, unwrapped(module), rest)


def _roots(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models and adapted modules in which something trains, each with its path."""
    module = core(module)
    if library_of(module) or has_adapters(module):
        if any(parameter.requires_grad for parameter in own_state(module).values()):
            yield path, module
        return
    for name, child in module.named_children():
        yield from _roots(child, f"{path}.{name}" if path else name)


def _name(module: nn.Module, path: str, component: str, pipeline: Any) -> str:
    if pipeline is not None:
        for name, one in pipeline.components.items():
            if isinstance(one, nn.Module) and core(one) is module:
                return name
    words = [word for word in path.split(".") if word and not word.isdigit()]
    name = words[-1] if words else component
    if has_adapters(module) and library_of(module) == "diffusers":
        for usual, word in USUAL.items():
            if word in type(module).__name__ and not name.startswith(usual):
                return usual
    return name


def core(module: nn.Module) -> nn.Module:
    """The model inside wrappers and a PeftModel."""
    found: Any = unwrapped(module)
    return found.get_base_model() if hasattr(found, "get_base_model") else found


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a {what}'s name is letters, digits, '_' and '-', got {name!r}.")


def _check_names(parts: list[Part], pipeline: Any) -> None:
    taken: dict[tuple[str, str | None], Part] = {}
    for part in parts:
        _check_name("part", part.name)
        if part.adapter is not None:
            _check_name("adapter", part.adapter)
        key = (part.name if part.kind != "rest" else f"{part.name}.safetensors", part.adapter)
        other = taken.setdefault(key, part)
        if other is not part:
            raise ValueError(
                f"{other.where!r} and {part.where!r} would both be saved as {part.name!r}; give one of them "
                f"another attribute name, or save them in two folders."
            )
        if pipeline is not None and part.kind == "model" and part.name in pipeline.config:
            held = getattr(pipeline, part.name, None)
            if not (isinstance(held, nn.Module) and core(held) is part.module):
                raise ValueError(
                    f"{part.where!r} would be saved as {part.name!r}, but the pipeline's {part.name!r} is "
                    f"another object; put the trained one into the pipeline first: pipeline.{part.name} = ..."
                )


# ---- adapters of peft


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def has_adapters(module: nn.Module) -> bool:
    """Whether peft has put adapters into this module."""
    configs = getattr(module, "peft_config", None)
    return isinstance(configs, Mapping) and any(map(_is_adapted, module.modules()))


def _trained_adapters(module: Any, live: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every LoRA adapter that trains, with its tensors by the key that peft gives them."""
    from peft.utils import get_peft_model_state_dict

    for name, config in module.peft_config.items():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            continue
        every = get_peft_model_state_dict(
            module, state_dict=dict(live), adapter_name=name, save_embedding_layers=False
        )
        tensors = {key: tensor for key, tensor in every.items() if "lora_" in key}
        if any(tensor.requires_grad for tensor in tensors.values()):
            _check_beginning(name, config.init_lora_weights)
            _check_scale(module, name)
            yield name, tensors


def metadata(part: Part) -> dict[str, Any]:
    """The settings of an adapter that differ from peft's, and those that its strength follows from.

    Settings at their default are left out, so that an older peft, which does not know them all, still loads
    the file; what peft knows of its own machine is left out as well.
    """
    module: Any = part.module
    config = module.peft_config[part.adapter]
    plain = type(config)().to_dict()
    always = {"r", "lora_alpha", "target_modules"}
    never = {
        "base_model_name_or_path",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "task_type",
    }
    given = config.to_dict()
    return {
        key: sorted(value) if isinstance(value, (set, frozenset)) else value
        for key, value in given.items()
        if key not in never and (key in always or value != plain.get(key))
    }


def _check_beginning(adapter: str, init: str | bool) -> None:
    """A file with this beginning would have whoever loads it take it off the weights once more."""
    if str(init).startswith(CHANGING):
        raise ValueError(
            f"the adapter {adapter!r} began by {init}, which has changed the weights of the model, so that "
            f"its A and B alone are not what it adds: save what it adds to the weights of before by "
            f"gendiff.lora.save(handle, path)."
        )


def _check_scale(module: Any, adapter: str) -> None:
    """A file says alpha and rank: an adapter that is live at another strength would come back changed."""
    for name, layer in module.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, Mapping) or adapter not in scaling:
            continue
        rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
        config = module.peft_config[adapter]
        expected = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(float(scaling[adapter]), expected, rel_tol=1e-6):
            raise ValueError(
                f"the adapter {adapter!r} is live at the scale {float(scaling[adapter]):g} in {name}, but "
                f"its alpha and rank say {expected:g}, which is what a file would bring back; undo "
                f"set_adapters or set_scale before saving."
            )
