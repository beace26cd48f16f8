"""Folders of pipelines, as a download would leave them."""

import os
from pathlib import Path

from gendiff.testing.pipelines import tiny_pipeline


def pipeline_folder(name: str, folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """The folder of a tiny pipeline with random weights, written where there is none.

    `diffusers.DiffusionPipeline.from_pretrained(folder)` opens it like that of a released model.

    Args:
        name: one of `TINY_PIPELINES`.
        folder: where; one that has a `model_index.json` is left as it is.
        seed: seed of the weights.

    Raises:
        ValueError: there is no pipeline of that name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as empty:
    ...     sorted(path.name for path in pipeline_folder("ddpm", empty).iterdir())
    ['model_index.json', 'scheduler', 'unet']
    """
    path = Path(folder)
    if not (path / "model_index.json").exists():
        tiny_pipeline(name, seed=seed).save_pretrained(path)
    return path
