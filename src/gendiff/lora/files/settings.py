"""What a configuration of peft, beside a file or in its header, says of strengths; nothing in it is run."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, final

from gendiff.lora.files.opening import mapping, short

HEADER_KEY = "lora_adapter_metadata"  # what diffusers keeps it under, in the header of a file
HONOURED = (
    *("peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("decompose_both", "decompose_factor", "oft_block_size", "use_cayley_neumann", "init_lora_weights"),
)
HARMLESS = (  # where it comes from, how it was trained, and which layers, of which the keys speak
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "lora_bias"),
    *("megatron_core", "megatron_config", "fan_in_fan_out", "qalora_group_size", "ensure_weight_tying"),
    *("num_cayley_neumann_terms", "eps", "use_effective_conv2d", "trainable_token_indices", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the weights of the model
UNSET = (None, False, 0, "", "none", [], {})
PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_\-.]|\\[.\-_]|\[[A-Za-z0-9_\-]+\]|[*+]|\\d)+\$?")  # no groups: quick
HIGHEST, MOST = 1e30, 5000  # a number, and how many patterns
KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT": "oft"}


@final
class Settings:
    """The strengths of layers as a configuration says them.

    Args:
        fields: of the configuration.
        source: "config" or "metadata".
        ignore: fields that may stay unread.

    Raises:
        ValueError: for a field that is set and not read here, since it may change what the adapter adds.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, ignore: tuple[str, ...] = ()) -> None:
        self.fields, self.source = fields, source
        for name, value in fields.items():
            if name not in (*HONOURED, *HARMLESS, *ignore) and value not in UNSET:
                raise ValueError(
                    f"its {source} sets {short(name)} to {short(value)}, which is not read here and may "
                    f"change what the adapter adds: if it does not, name it in ignore=."
                )
        begun = fields.get("init_lora_weights")
        if begun not in BEGINNINGS:
            raise ValueError(
                f"its {source} says that it began by {short(begun)}, which changed the weights of the model "
                f"too: save it again with path_initial_model_for_weight_conversion of peft."
            )
        kind = fields.get("peft_type", "LORA")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(
                f"its {source} says it is {short(kind)}: adapters here are of {', '.join(KINDS)}."
            )
        if kind == "OFT" and fields.get("use_cayley_neumann", True) is not False:
            raise ValueError(
                f"its {source} does not set use_cayley_neumann to false: its rotations are of a series, and "
                f"not exact, as they are here."
            )
        self.algorithm = "dora" if fields.get("use_dora") else KINDS[kind]
        self.rslora = bool(fields.get("use_rslora"))
        self._alpha = "lora_alpha" if kind == "LORA" else "alpha"
        self._patterns: dict[str, list[tuple[re.Pattern[str], Any]]] = {}

    def alpha(self, name: str) -> float | None:
        """The lora_alpha of a layer."""
        return self._number(self._alpha, "alpha_pattern", name)

    def rank(self, name: str) -> int | None:
        """The rank of a layer, where its tensors do not tell it."""
        found = self._number("r", "rank_pattern", name)
        if found is not None and not found.is_integer():
            raise ValueError(f"its {self.source} says a rank of {found}, and ranks are whole numbers.")
        return None if found is None else int(found)

    def _number(self, usual: str, patterns: str, name: str) -> float | None:
        if patterns not in self._patterns:
            self._patterns[patterns] = list(self._compiled(patterns))
        fits = (value for pattern, value in self._patterns[patterns] if pattern.match(name))
        value = next(fits, self.fields.get(usual))
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= HIGHEST:
            raise ValueError(f"its {self.source} sets {usual} of {name} to {short(value)}, no number.")
        return float(value)

    def _compiled(self, field: str) -> Iterator[tuple[re.Pattern[str], Any]]:
        """What peft takes its patterns for: a whole name, or the end of one at a dot."""
        given = self.fields.get(field) or {}
        if not isinstance(given, Mapping) or len(given) > MOST:
            raise ValueError(
                f"its {self.source} sets {field} to {short(given)}, no mapping of {MOST} at most."
            )
        for pattern, value in given.items():
            if not PLAIN.fullmatch(pattern) or len(pattern) > 200 or len(re.findall(r"[*+]", pattern)) > 3:
                raise ValueError(
                    f"its {self.source} has a pattern {short(pattern)}: patterns are names of layers here, "
                    f"with sets such as [0-9] and three * or + at most."
                )
            try:
                yield re.compile(rf"(?:.*\.)?(?:{pattern})\Z"), value
            except re.error as error:
                raise ValueError(
                    f"its {self.source} has a pattern {short(pattern)}, which is none ({error})."
                ) from None


def settings_in(
    metadata: Mapping[str, str], component: str, others: tuple[str, ...]
) -> dict[str, Any] | None:
    """What the header of a file says of a component, whose name stands before each field, or of all.

    Args:
        metadata: words of the file.
        component: the network.
        others: other names that it has in files.
    """
    if HEADER_KEY not in metadata:
        return None
    fields = mapping(metadata[HEADER_KEY], f"{HEADER_KEY} in its header")
    for name in (component, *others):
        own = {
            key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")
        }
        if own:
            return own
    bare = {key: value for key, value in fields.items() if "." not in key}
    return bare or None


def header(config: Any) -> str:
    """A configuration as JSON, as a file beside weights holds it."""
    return json.dumps(settings_of(config), indent=2, sort_keys=True) + "\n"


def settings_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration of peft that differ from its defaults, and those of its strength.

    Fields at their defaults are left out, so that an older peft, which does not know them all, still loads
    the file; what peft knows of its own machine is left out as well.
    """
    plain = type(config)().to_dict()
    always = {"peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    always |= {"use_rslora", "use_dora"}
    never = {
        *("base_model_name_or_path", "auto_mapping", "peft_version", "revision"),
        "inference_mode",
        "task_type",
    }
    return {
        key: _plain(value)
        for key, value in config.to_dict().items()
        if key not in never and (key in always or value != plain.get(key))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)  # of an enumeration
