"""What the sampling examples share: their arguments, and a pipeline from a local folder or a tiny one."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from gendiff.testing import pipeline_folder

RUNS = Path("runs")


def arguments(doc: str | None, **defaults: Any) -> Namespace:
    """Command-line arguments with these defaults."""
    parser = ArgumentParser(description=(doc or "").splitlines()[0])
    for name, value in {
        **defaults,
        "seed": 0,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }.items():
        kind = Path if value is None or isinstance(value, Path) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    return parser.parse_args()


def load(folder: Path | None, tiny: str, device: str) -> Any:
    """The pipeline of a folder, or a tiny one of that family with random weights, which is written once."""
    path = pipeline_folder(tiny, RUNS / "tiny" / tiny) if folder is None else folder
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, local_files_only=True)
    return pipe.to(device)


def engine(device: str) -> str:
    """Captured steps where there are CUDA graphs."""
    return "graph" if device.startswith("cuda") else "eager"
