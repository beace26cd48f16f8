"""Where a run is: what a checkpoint needs to find its place again."""

from dataclasses import dataclass, replace
from typing import final

from gendiff.training.windows import Window


@final
@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        epoch: of the next micro-batch.
        micro: its number in that epoch.
        windows: windows run, applied or not.
        step: updates applied, as last read from the device.
        skipped: windows whose update was not applied, as of then.
        samples: real samples of those windows, on all processes.
        logged: (step, samples) of the last row of losses in the log.
    """

    epoch: int = 0
    micro: int = 0
    windows: int = 0
    step: int = 0
    skipped: int = 0
    samples: int = 0
    logged: tuple[int, int] = (0, 0)

    def after(self, window: Window) -> "Position":
        """The position when a window has been run."""
        epoch, micro = window.end
        windows, samples = self.windows + 1, self.samples + window.samples
        return replace(self, epoch=epoch, micro=micro, windows=windows, samples=samples)

    def read(self, applied: int) -> "Position":
        """The position when the device has said how many updates were applied."""
        return replace(self, step=applied, skipped=self.windows - applied)
