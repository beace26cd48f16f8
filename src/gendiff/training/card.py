"""The model card: what was trained, with which settings, and how to load it; no path of a machine."""

import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from gendiff._checks import unknown
from gendiff.training.parts import Part

FACTS = ("title", "text", "base_model", "license", "tags", "steps", "seed", "weights", "settings")
PATH = re.compile(r"(?<![\w.:/~\\-])(?:~|[A-Za-z]:)?[/\\][^\s'\",)\]}]+")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PACKAGES = ("gendiff", "torch", "diffusers", "transformers", "peft")


def check_facts(facts: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The facts for the card, or an error that names what it has no place for."""
    for name in facts or {}:
        if name not in FACTS:
            raise ValueError(unknown("fact for the model card", name, FACTS))
    tags = (facts or {}).get("tags", ())
    if isinstance(tags, str):
        raise ValueError(f"tags is a list of texts, got the text {tags!r}; give [{tags!r}].")
    return facts or {}


def card(
    parts: Iterable[Part],
    files: Iterable[str],
    facts: Mapping[str, Any],
    pipeline: Any = None,
    whole: bool = False,
) -> str:
    """The text of README.md.

    Args:
        parts: what was saved.
        files: names of the adapter files.
        facts: what the run knows of itself, see `FACTS`.
        pipeline: the pipeline that the parts belong to.
        whole: whether all of the pipeline was written.
    """
    parts, files = list(parts), list(files)
    base = facts.get("base_model") or _base(parts, pipeline)
    loading = [_pipeline(pipeline)] if whole else []
    loading += [_model(p) for p in parts if p.kind == "model" and not (whole and p.name in pipeline.config)]
    loading += [_adapter(file, base) for file in files]
    loading += [_rest(p) for p in parts if p.kind == "rest"]
    loading += [_all(parts)] if any(p.kind == "rest" for p in parts) else []
    text = [
        _front(parts, facts, base),
        f"# {scrubbed(facts.get('title', 'Trained with gendiff'))}\n",
        *([f"{scrubbed(facts['text'])}\n"] if "text" in facts else []),
        "## What was trained\n",
        "| part | saved as | trained parameters |\n|---|---|---|\n"
        + "".join(f"| `{p.where}` | {_saved(p)} | {_trained(p):,} |\n" for p in parts),
        _run(facts),
        "## How to load it\n\nFrom this folder:\n",
        *loading,
        "## Versions\n",
        ", ".join(f"{name} {found}" for name, found in _versions()) + "\n",
    ]
    if "license" not in facts:
        text.append(
            "No license is stated here: whoever publishes this adds `license:` to the head of the file.\n"
        )
    return "\n".join(text)


def scrubbed(value: object) -> str:
    r"""A value as text, without paths and memory addresses.

    >>> scrubbed("cached in /home/me/cache, see docs/a.md and 1/2")
    'cached in …, see docs/a.md and 1/2'
    """
    return ADDRESS.sub("", PATH.sub("…", str(value)))


def _front(parts: list[Part], facts: Mapping[str, Any], base: str | None) -> str:
    library = "gendiff" if all(p.kind == "rest" for p in parts) else "diffusers"
    tags = ["gendiff", *(["lora"] if any(p.kind == "adapter" for p in parts) else []), *facts.get("tags", ())]
    lines = [f"library_name: {library}"]
    lines += [f"license: {_yaml(facts['license'])}"] if "license" in facts else []
    lines += [f"base_model: {_yaml(base)}"] if base else []
    lines += ["tags:", *(f"- {_yaml(tag)}" for tag in dict.fromkeys(tags))]
    return "\n".join(["---", *lines, "---", ""])


def _yaml(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)  # a JSON string is a YAML string


def _base(parts: list[Part], pipeline: Any) -> str | None:
    """The name on the Hub of what training began from, if that is what the models remember."""
    for holder in (pipeline, *(part.module for part in parts)):
        config = getattr(holder, "config", None)
        name = getattr(config, "_name_or_path", None)
        if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _saved(part: Part) -> str:
    return {
        "model": f"`{part.name}/`",
        "adapter": f"LoRA adapter `{part.adapter}` of `{part.name}`",
        "rest": f"`{part.name}.safetensors`",
    }[part.kind]


def _trained(part: Part) -> int:
    return sum({id(t): t.numel() for t in part.tensors.values() if t.requires_grad}.values())


def _run(facts: Mapping[str, Any]) -> str:
    rows = {name: facts[name] for name in ("steps", "seed", "weights") if name in facts}
    settings = {
        name: value
        for name, value in facts.get("settings", {}).items()
        if not isinstance(value, PurePath) and not (isinstance(value, str) and PATH.fullmatch(value))
    }
    cells = [
        f"| {name} | {scrubbed(value).replace('|', chr(92) + '|').replace(chr(10), ' ')} |"
        for name, value in (rows | {name: f"`{value!r}`" for name, value in settings.items()}).items()
    ]
    return "\n".join(["## Settings\n", "| | |\n|---|---|", *cells, ""]) if cells else ""


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def _pipeline(pipeline: Any) -> str:
    kind = type(pipeline)
    return _code(_import(kind), "", f'pipeline = {kind.__name__}.from_pretrained(".")')


def _model(part: Part) -> str:
    kind = type(part.module)
    return _code(
        _import(kind), "", f'{_identifier(part.name)} = {kind.__name__}.from_pretrained("{part.name}")'
    )


def _import(kind: type) -> str:
    library = kind.__module__.split(".")[0]
    home = library if library in ("diffusers", "transformers") else kind.__module__
    return f"from {home} import {kind.__name__}"


def _adapter(file: str, base: str | None) -> str:
    where, _, name = file.rpartition("/")
    load = f'load_lora_weights("{where or "."}", weight_name="{name}")'
    if base is None:
        return f"Into the pipeline that it was trained for:\n\n{_code(f'pipeline.{load}')}"
    return _code(
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{base}")',
        f"pipeline.{load}",
    )


def _rest(part: Part) -> str:
    return _code(
        "from safetensors.torch import load_file",
        "",
        f'{_identifier(part.name)}_tensors = load_file("{part.name}.safetensors")',
    )


def _all(parts: list[Part]) -> str:
    names = dict.fromkeys(part.where.split(".")[0] for part in parts)
    given = ", ".join(f'"{name}": {_identifier(name)}' for name in names)
    return "Or all of it into components made as in training:\n\n" + _code(
        "from gendiff.training.saving import load_pretrained", "", f'load_pretrained({{{given}}}, ".")'
    )


def _identifier(name: str) -> str:
    return re.sub(r"\W|^(?=\d)", "_", name)


def _versions() -> Iterable[tuple[str, str]]:
    yield "Python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:  # an optional library, or gendiff run from its source folder
            continue
