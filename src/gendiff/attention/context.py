"""What a middleware may know of the call: step, time and level on the device; rows, sizes, text length."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from gendiff._checks import unknown
from gendiff.attention.site import Site

SAMPLES = ("sample", "hidden_states", "x", "latent", "hidden_states_list", "input_ids")
TEXTS = (
    "encoder_hidden_states",
    "text_bth",
    "text_hidden_states",
    "cap_feats",
    "context",
    "encoder_hidden_states_t5",
)


class Grid(NamedTuple):
    """How tokens lie: frames, height and width, of which tokens are the product."""

    frames: int
    height: int
    width: int


@final
class Context:
    r"""What is being computed, for the middlewares of a stack.

    Numbers that change while sampling are buffers on the device, which are written in place: a step that was
    captured in a CUDA graph, or compiled, reads their present values.

    Args:
        rows: names of the parts of the batch.
        axes: what the axes of a video are behind the batch: channels, frames, height and width.

    Attributes:
        step: number of the call of the network, from 0, int64 scalar; counted where something asks for it.
        t: time in [0, 1], 1 is noise; NaN until a denoiser or `at` says it.
        alpha: level of the data at that time, likewise.
        sigma: level of the noise, likewise.
        timestep: what the network was given, as it was given it; NaN before, and where nothing asks for it.
        rows: names of the parts of the batch, such as uncond and cond, to their places.
        size: frames, height and width of what the network was given, where it has them.
        text: number of tokens of the text that the network was given, or has at the layer that runs; yours to
            set for a network that is given it in another way.
    """

    def __init__(self, rows: Sequence[str] | Mapping[str, slice] | None = None, axes: str = "CFHW") -> None:
        self.step = torch.full((), -1, dtype=torch.int64)  # the first call of the network makes it 0
        self.t, self.alpha, self.sigma, self.timestep = (torch.full((), math.nan) for _ in range(4))
        self._rows, self.axes = rows, axes
        self.size: Grid | None = None
        self.text: int | None = None
        self.batch: int | None = None
        self._counts = True
        self.wanted: set[str] = set()
        self._read: tuple[tuple[Any, ...], Grid | None] | None = None
        if rows is not None:
            self.name_rows(rows)

    def to(self, device: torch.device | str) -> "Context":
        """Move the buffers; those that are there stay the objects they are."""
        for name in ("step", "t", "alpha", "sigma", "timestep"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def name_rows(self, rows: Sequence[str] | Mapping[str, slice] | None) -> None:
        """Say what the rows of a batch are: names of equal parts in their order, or a slice each."""
        if isinstance(rows, str) or (rows is not None and not len(rows)):
            raise ValueError(
                f"rows are names in the order of the batch, such as ('uncond', 'cond'), got {rows!r}."
            )
        if isinstance(rows, Sequence) and len(set(rows)) != len(rows):
            raise ValueError(f"every part of a batch has a name of its own, got {rows!r}.")
        if isinstance(rows, Mapping):
            _refuse_slices(rows)
        self._rows = rows

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of the parts of a batch, in their order."""
        return tuple(self._rows or ())

    def rows_of(self, name: str, batch: int) -> slice:
        """Where a part is in a batch of so many rows.

        Raises:
            ValueError: for an unknown name, or a batch that does not split.
        """
        if self._rows is None or name not in self._rows:
            raise ValueError(
                unknown("rows", name, self.rows)
                if self._rows
                else f"the rows {name!r} are asked for, and the stack was not told what the rows of a batch "
                f"are: stack(model, rows=('uncond', 'cond')) for a pipeline with guidance."
            )
        if isinstance(self._rows, Mapping):
            return self._spread(self._rows[name], batch)
        parts = len(self._rows)
        if batch % parts:
            raise ValueError(f"a batch of {batch} rows does not split into {self.rows}.")
        place = self._rows.index(name)
        return slice(place * batch // parts, (place + 1) * batch // parts)

    def _spread(self, part: slice, batch: int) -> slice:
        """A slice of the network's batch among the rows of a layer that folds frames into the batch."""
        if self.batch and batch % self.batch:
            raise ValueError(
                f"the layer runs on {batch} rows at a time, and the batch has {self.batch}: it does not see "
                f"it whole, so that nothing can be limited to rows of it there."
            )
        times = batch // self.batch if self.batch else 1
        return slice(part.start * times, part.stop * times)

    def at(
        self,
        *,
        step: int | Tensor | None = None,
        t: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        sigma: float | Tensor | None = None,
    ) -> None:
        """Write where the run is; what counts its steps itself turns the counting off."""
        given = {"step": step, "t": t, "alpha": alpha, "sigma": sigma}
        self._counts = self._counts and step is None
        places = {value.device for value in given.values() if isinstance(value, Tensor)}
        for device in places - {self.step.device}:
            self.to(device)
        for name, value in given.items():
            if value is not None:
                _write(getattr(self, name), value)

    def begin(self) -> None:
        """Begin another run: the next call of the network is step 0."""
        self.step.fill_(-1 if self._counts else 0)

    def grid(self, site: Site, tokens: int, *, line: bool = False) -> Grid:
        """How the tokens of an image lie at a site; of an input without a size, if `line`, in a line.

        They are those of the network's input, halved as often as the layer's place in the model asks, or cut
        into patches. The input may have no height and width, as sound, or not say them, as packed tokens
        without ids, or with ids that were compiled before they were read: set `size` then.

        Raises:
            ValueError: where no such grid has as many tokens.
        """
        if site.kind == "temporal":
            return Grid(tokens, 1, 1)
        size = self.size
        if size is not None:
            counts = {1, *(math.ceil(size.frames / over) for over in range(1, size.frames + 1))}
            for by in range(1, max(size.height, size.width) + 1):
                height, width = math.ceil(size.height / by), math.ceil(size.width / by)
                if tokens % (height * width) == 0 and tokens // (height * width) in counts:
                    return Grid(tokens // (height * width), height, width)
        if size is None and line:
            return Grid(1, 1, tokens)
        raise ValueError(
            f"{tokens} tokens at {site.name} are no grid of the network's input of {size}; say how they lie "
            f"with stack.context.size = Grid(frames, height, width)."
        )

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a compiled or captured step depends on."""
        rows = (
            tuple((n, s.start, s.stop) for n, s in self._rows.items())
            if isinstance(self._rows, Mapping)
            else None
        )
        return rows or self.rows

    def enter(self, given: Mapping[str, Any]) -> None:
        """Read what a network is called with, by name; nothing is read from the device."""
        x = next((given[name] for name in SAMPLES if given.get(name) is not None), None)
        x = x[0] if isinstance(x, list | tuple) else x
        if isinstance(x, Tensor):
            if self.step.device != x.device:
                self.to(x.device)
            self.batch = len(x)
            if x.ndim == 4:
                self.size = Grid(1, x.shape[2], x.shape[3])
            elif x.ndim == 5:
                self.size = Grid(*(x.shape[1 + self.axes.index(axis)] for axis in "FHW"))
            elif x.ndim == 3 and not x.is_floating_point():  # one number a place
                self.size = Grid(1, *x.shape[-2:])
            else:
                self.size = _from_sizes(given) or self._from_ids(given.get("img_ids")) or self.size
        text = next((given[name] for name in TEXTS if given.get(name) is not None), None)
        self.text = text.shape[1] if isinstance(text, Tensor) and text.ndim > 2 else self.text
        timestep = given.get("timestep", given.get("t"))
        if "timestep" in self.wanted and timestep is not None and not isinstance(timestep, list | tuple):
            value = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
            _write(self.timestep, value)
        if "step" in self.wanted and self._counts:
            self.step += 1

    def _from_ids(self, ids: Any) -> Grid | None:
        """The size that the places of packed tokens span, read from the device once for each tensor."""
        if not isinstance(ids, Tensor) or torch.compiler.is_compiling() or _capturing(ids):
            return None
        places = ids[0] if ids.ndim == 3 else ids
        key = ids.data_ptr(), tuple(ids.shape)
        if self._read is None or self._read[0] != key:
            height, width = (int(places[:, axis].max() - places[:, axis].min()) + 1 for axis in (1, 2))
            self._read = key, Grid(1, height, width) if height * width == len(places) else None
        return self._read[1]


def _refuse_slices(rows: Mapping[str, slice]) -> None:
    """Raise unless the parts are rows from a number to a later one, and no two share one."""
    last = 0
    for name, part in sorted(rows.items(), key=lambda item: item[1].start or 0):
        if not (isinstance(part.start, int) and isinstance(part.stop, int) and part.step is None):
            raise ValueError(f"the rows {name!r} go from a number to another, as slice(0, 2), got {part}.")
        if not last <= part.start < part.stop:
            raise ValueError(f"the rows {name!r} are none, or some are another part's too, in {dict(rows)}.")
        last = part.stop


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _from_sizes(given: Mapping[str, Any]) -> Grid | None:
    """Sizes that a call gives beside packed tokens."""
    height, width = given.get("height"), given.get("width")
    if isinstance(height, int) and isinstance(width, int):
        frames = given.get("num_frames")
        return Grid(frames if isinstance(frames, int) else 1, height, width)
    shapes = given.get("img_shapes")
    if isinstance(shapes, list | tuple) and shapes:
        shape = shapes[0]
        shape = shape[0] if isinstance(shape[0], list | tuple) else shape
        return Grid(*map(int, shape))
    return None


def _write(buffer: Tensor, value: Any) -> None:
    if not isinstance(value, Tensor):
        buffer.fill_(value)
    elif value.device.type == "cpu" and buffer.device.type != "cpu":
        buffer.fill_(value.flatten()[0].item())  # a copy would wait for the device
    else:
        buffer.copy_(value.flatten()[0] if value.ndim else value)
