"""Sample grids: what the model draws now, from the same noise every time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from gendiff.condition import Condition
from gendiff.data.images import tile
from gendiff.denoiser import Denoised
from gendiff.guidance import Guider
from gendiff.math.grids import Grid
from gendiff.random import Rng
from gendiff.sampling import DDIM, Solver, sample
from gendiff.training.callbacks import Callback, check_every
from gendiff.training.views import Weights

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


@final
class SampleGrid(Callback):
    """Draw images every so many updates, to `samples/` of the run, the progress and the trackers.

    The noise is the sampler's own and the same every time, so that pictures can be compared; the run's
    randomness is not touched.

    Args:
        captions: what to draw: captions or labels for the codec, or a condition that is ready.
        every: updates between two grids, >= 1.
        size: (height, width) of the images, in pixels.
        grid: times to sample at, on the model's schedule.
        solver: the solver.
        combine: a guidance rule of `cond` and `uncond`, such as `partial(cfg, scale=7.5)`; None for none.
        facts: further facts for the codec's `cond`, such as a control image.
        weights: "ema" or "live"; None is the average where there is one.
        seed: of the noise.
        model: name of the model that is sampled, where there are several.
        columns: images in a row; None for nearly a square.
    """

    def __init__(
        self,
        captions: Sequence[Any] | Mapping[str, Tensor],
        *,
        every: int,
        size: tuple[int, int],
        grid: Grid,
        solver: Solver | None = None,
        combine: Callable[[Denoised, Denoised], Denoised] | None = None,
        facts: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        seed: int = 0,
        model: str | None = None,
        columns: int | None = None,
    ) -> None:
        check_every(every)
        self.captions, self.every, self.size, self.grid = captions, every, size, grid
        self.solver, self.combine, self.facts = (
            DDIM() if solver is None else solver,
            combine,
            dict(facts or {}),
        )
        self.weights: Weights | None = weights
        self.seed, self.model, self.columns = seed, model, columns

    def images(self, trainer: "Trainer") -> Tensor:
        """The images that the model draws now, [B, 3, H, W] in [0, 1]."""
        with trainer.using(self.weights) as models:
            codec = trainer.codec
            if codec is None:
                raise TypeError("SampleGrid decodes with the trainer's codec, and there is none; give one.")
            denoise = models[self.model] if self.model is not None else models
            cond = self._cond(codec, trainer.device)
            rows = len(self.captions) if cond.rows is None else cond.rows
            guided = denoise
            if self.combine is not None:
                guided = Guider(denoise, {"cond": cond, "uncond": codec.null(cond)}, self.combine)
                cond = None
            noise = Rng(self.seed, ids=range(rows), device=trainer.device)
            x = noise.normal("start", (rows, *codec.shape(*self.size)))
            x0 = sample(guided, x, self.grid, self.solver, cond=cond, rng=noise)
            return codec.decode(x0).float().cpu()

    def on_step_end(self, trainer: "Trainer") -> None:
        if not trainer.accelerator.is_main_process:
            return
        images, step = self.images(trainer), trainer.position.step
        folder = trainer.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:08d}.png"
        aside = path.with_suffix(".part")
        tile(images, self.columns).save(aside, format="PNG")
        aside.replace(path)
        trainer.progress.picture(path, f"step {step}")
        trainer.trackers.images("samples", images, step)

    def _cond(self, codec: Any, device: torch.device) -> Condition:
        if isinstance(self.captions, Mapping):
            made = Condition.of(self.captions)
        else:
            made = codec.cond(self.captions, **self.facts)
        return Condition({name: value.to(device) for name, value in made.items()})


def samples_of(folder: str | Path) -> list[Path]:
    """The sample grids of a run, in the order of their steps."""
    return sorted(Path(folder).glob("samples/step-*.png"))
