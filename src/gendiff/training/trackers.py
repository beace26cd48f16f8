"""Trackers: a run's numbers and pictures in TensorBoard, W&B and the like; none of them can stop the run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, final

import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gendiff._checks import unknown
from gendiff.data.images import tile
from gendiff.training.wording import leaves, numbers, plain

_INSTALL = {"aim": "'aim<4'"}  # where the name of the package is not the tracker's own


@dataclass
class _Running:
    name: str
    tracker: GeneralTracker
    ours: bool


@final
class Trackers:
    """The trackers of a run, on the main process; on the others nothing happens.

    Names and objects are those of `accelerate.tracking`. Trackers that the user initialised already in the
    accelerator (`init_trackers`) are used as they are, get no configuration and are not finished; what its
    `log_with` names and nobody initialised is started here. A tracker that raises is warned of once and
    counted, and the run goes on; one that cannot start is left out.

    Args:
        names_or_objects: "tensorboard", "wandb", "trackio", "mlflow", …, a name registered with accelerate,
            "all" for every one that is installed, or `GeneralTracker` objects.
        project: what the trackers call the project.
        config: the run's settings; nested ones become `a/b`, and what is no number is written as text.
        folder: of the run; those that write files write them under `logs`.
        accelerator: the run's `accelerate.Accelerator`.

    Raises:
        ValueError: for a name that accelerate does not know, or whose package is not installed.
        TypeError: for what is neither a name nor a `GeneralTracker`.

    >>> from types import SimpleNamespace
    >>> process = SimpleNamespace(is_main_process=True, trackers=[], log_with=[])
    >>> Trackers(
    ...     ["tensorbord"], project="p", config={}, folder=Path("run"), accelerator=process
    ... )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: unknown tracker 'tensorbord'; did you mean 'tensorboard'? Accepted: 'aim', ...
    """

    def __init__(
        self,
        names_or_objects: Sequence[Any] | str,
        *,
        project: str,
        config: Mapping[str, Any],
        folder: Path,
        accelerator: Any,
    ) -> None:
        given = [names_or_objects] if isinstance(names_or_objects, str) else names_or_objects
        self.asked = [known for one in given for known in _known(one)]
        self.project, self.config, self.folder, self.accelerator = project, config, folder, accelerator
        self.failures: dict[str, int] = {}
        self._running: list[_Running] = []

    def start(self, step: int | None = None) -> None:
        """Begin, and hand over the configuration.

        Args:
            step: where a run goes on; what TensorBoard has of later steps is then hidden.
        """
        if not self.accelerator.is_main_process:
            return
        self.finish()
        theirs = list(self.accelerator.trackers)
        self._running = [_Running(_name(tracker), tracker, False) for tracker in theirs]
        left = [] if theirs else [known for one in self.accelerator.log_with for known in _known(one)]
        for one in [*self.asked, *left]:
            if not any(one is other.tracker or one == other.name for other in self._running):
                self._start(one, step)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a row; nested ones are called `a/b`, and `learning_rate/i` where it has several.

        Texts and other lists are left to `log.jsonl`.
        """
        values = numbers(row)
        if values:
            self._each("log", lambda one: one.tracker.log(values, step=step))

    def images(self, name: str, images: Float[Tensor, "B C H W"], step: int) -> None:
        """Log pictures, with those trackers that take any: comet_ml and dvclive get none.

        wandb, swanlab and objects with a `log_images` get a list of Pillow's images, TensorBoard the batch,
        and aim, clearml, mlflow and trackio one sheet of all.

        Args:
            name: of the series.
            images: [B, 3, H, W] or [B, 1, H, W], in [0, 1]; what exceeds it is clamped.
            step: of the run.
        """
        if self._running:
            batch = images.detach().to("cpu", torch.float32).clamp(0, 1)
            self._each("images", lambda one: _show(one.tracker, one.name, name, batch, step))

    def finish(self) -> None:
        """End those that were started here."""
        ended, self._running = self._running, []
        for one in ended:
            if one.ours:
                self._guarded(one.name, "finish", one.tracker.finish)

    def _start(self, one: GeneralTracker | str, step: int | None) -> None:
        name = one if isinstance(one, str) else _name(one)
        made: list[GeneralTracker] = []

        def begin() -> None:
            tracker = self._made(one, step) if isinstance(one, str) else one
            tracker.start()
            made.append(tracker)

        self._guarded(name, "start", begin)
        for tracker in made:
            self._running.append(_Running(name, tracker, True))
            self._guarded(name, "start", partial(tracker.store_init_configuration, settings(self.config)))

    def _made(self, name: str, step: int | None) -> GeneralTracker:
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        options = {"purge_step": step + 1} if name == "tensorboard" and step is not None else {}
        if not kind.requires_logging_directory:
            return kind(self.project, **options)
        folder = self.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return kind(self.project, str(folder), **options)

    def _each(self, event: str, call: Callable[[_Running], Any]) -> None:
        for one in self._running:
            self._guarded(one.name, event, partial(call, one))

    def _guarded(self, name: str, event: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] == 1:
                warnings.warn(
                    f"tracker {name!r} failed in {event}: {type(error).__name__}: {error}. Training goes on; "
                    f"its further failures are counted in trackers.failures and not told.",
                    RuntimeWarning,
                    stacklevel=2,
                )


def settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration as flat names with numbers and texts, which is all that TensorBoard takes.

    >>> settings({"seed": 0, "ema": None, "optimizer": {"betas": (0.9, 0.99)}, "fused": True})
    {'seed': 0, 'ema': 'None', 'optimizer/betas': '(0.9, 0.99)', 'fused': True}
    """
    return {name: _setting(value) for name, value in leaves(config)}


def _setting(value: Any) -> bool | int | float | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, Real):
        return plain(value)
    return str(getattr(value, "__qualname__", value))  # of a function: its text has an address


def _known(given: Any) -> list[GeneralTracker | str]:
    """What was asked for, as trackers or names that can be started here."""
    if isinstance(given, GeneralTracker):
        return [given]
    name = str(given)
    if not isinstance(given, str | tracking.LoggerType):
        raise TypeError(
            f"a tracker is a name or an object of accelerate.tracking.GeneralTracker, got {given!r}; make an "
            f"object of the class, or register it with accelerate.tracking.register_tracker_class."
        )
    installed = [str(one) for one in tracking.get_available_trackers()]
    if name == "all":
        return list(installed)
    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ValueError(unknown("tracker", name, [*known, "all"]))
    if name in tracking.LoggerType and name not in installed:
        raise ValueError(
            f"tracker {name!r} lacks its package: pip install {_INSTALL.get(name, name)}, "
            f"or take it out of log_with. Installed: {', '.join(installed) or 'none'}."
        )
    return [name]


def _name(tracker: GeneralTracker) -> str:
    return str(getattr(tracker, "name", type(tracker).__name__))


def _show(tracker: Any, kind: str, name: str, batch: Tensor, step: int) -> None:
    """Give a tracker pictures in the form that it takes."""
    levels = (batch * 255).round().to(torch.uint8)
    if kind == "tensorboard":
        tracker.log_images({name: levels.numpy()}, step=step)
    elif kind in ("aim", "clearml"):
        tracker.log_images({name: tile(batch)}, step=step)
    elif kind == "mlflow":
        import_module("mlflow").log_image(tile(batch), key=name, step=step)
    elif kind == "trackio":
        tracker.log({name: import_module("trackio").Image(tile(batch))}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [_picture(one) for one in levels]}, step=step)


def _picture(level: Tensor) -> Image.Image:
    array = level.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
