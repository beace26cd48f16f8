"""An adapter from a file onto networks: on all of them, or on none."""

from collections.abc import Iterable
from pathlib import Path

import torch

from gendiff.lora.files.components import Models, components_of
from gendiff.lora.files.reading import read
from gendiff.lora.files.report import LoadReport
from gendiff.lora.files.strength import Missing
from gendiff.lora.handle import LoraHandle
from gendiff.lora.inject import inject


def load(
    path: str | Path,
    model: Models,
    adapter_name: str = "default",
    *,
    ignore: str | Iterable[str] = (),
    missing_alpha: Missing = None,
    dtype: torch.dtype = torch.float32,
) -> LoadReport:
    """Put an adapter from a file on networks; nothing on them changes before all of it was checked.

    Args:
        path: a file of safetensors, or a folder of peft or diffusers with one.
        model: a network, several by name, or a pipeline.
        adapter_name: letters, digits, - and _; one that a network has is refused.
        ignore: see `read`.
        missing_alpha: see `read`.
        dtype: of the adapter's weights on the networks.

    Returns:
        The `LoadReport`, whose `handles` take the adapter off again.

    Raises:
        ValueError: see `read` and `inject`; the networks are as they were then.
    """
    found = read(path, model, ignore=ignore, missing_alpha=missing_alpha)
    components = components_of(model)
    handles: dict[str, LoraHandle] = {}
    try:
        for name, adapter in found.adapters.items():
            handles[name] = inject(components[name], adapter, adapter_name, dtype=dtype)
    except BaseException:
        for handle in handles.values():
            handle.remove()
        raise
    matched = {name: tuple(row.name for row in handle.plan.rows) for name, handle in handles.items()}
    return LoadReport(found.format, matched, found.unmatched, found.alpha_source, handles)
