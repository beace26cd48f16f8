"""Rows of a table or a stream as captioned pictures: Hugging Face datasets, webdatasets, lists."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from gendiff.data.captions import caption_in, drawn, parsed, texts
from gendiff.data.context import BrokenSample
from gendiff.data.folder import check_settings
from gendiff.data.framing import Buckets, Framing, group_of
from gendiff.data.images import MAX_PIXELS, Source, Unreadable, header, load

KEY = "__key__"
OWN = ("id", "image", "caption", "size", "weight")


class Captioned(ABC):
    """Rows with a picture and a caption, as the samples that `Folder` gives.

    Rows with a length and an index become a dataset with indices. Others become a
    `torch.utils.data.IterableDataset` that forwards `set_epoch` and leaves it to the rows to share the work
    among workers. A picture is one of Pillow's, the bytes of a PNG, JPEG or WebP file, a path, or
    `{"bytes": …, "path": …}`; of a Hugging Face dataset with an `Image` column the files are read as they are
    stored, under the limits of `read_image`. A caption is a text, several texts of which each visit draws
    one, or JSON with `caption` or `text`.

    A sample has `id` (the index of the row or, in a stream, its `__key__` if it has one), `image`, `caption`,
    `size`, `weight` and what `keep` names.

    Args:
        rows: `datasets.Dataset`, `datasets.IterableDataset`, `webdataset.WebDataset`, or dictionaries in
            something that can be iterated over again and again.
        image: the column of the picture; "jpg|png|webp" is the first of them that a row has.
        caption: the column of the caption, likewise; None for pictures without captions.
        size, area, buckets, crop, flip: which part of a picture is seen, as for `Framing`. With an area, or
            without a size, the headers of all rows that have an index are read when it is made.
        weight: of all samples in the loss, >= 0.
        max_pixels: height times width of a picture, at most.
        broken: "skip": what the headers show goes to `broken`, and later a `BrokenSample` is raised, which a
            loader counts; a stream leaves the row out, warns, and lists it in `broken` of the process that
            reads. "raise" raises.
        keep: columns that are passed on as they are.

    Raises:
        ValueError: for settings out of range, rows without the columns, and, under broken="raise", pictures
            that cannot be read.
        TypeError: for rows that are none, or can be read only once.

    >>> rows = [{"image": Image.new("RGB", (64, 48)), "text": "a fox", "license": "CC0"}]
    >>> sample = Captioned(rows, size=32)[0]
    >>> sample["caption"], sample["image"].shape, sample["size"].tolist(), sorted(sample)[2:4]
    ('a fox', torch.Size([3, 32, 32]), [48, 64, 0, 6, 32, 32], ['image', 'size'])
    """

    def __new__(cls, rows: Any = None, **settings: Any) -> "Captioned":
        if cls is not Captioned:
            return super().__new__(cls)
        kind: Any = CaptionedRows if _has_index(rows) else CaptionedStream
        return super().__new__(kind)

    def __init__(
        self,
        rows: Any,
        *,
        image: str = "image",
        caption: str | None = "text",
        size: int | Sequence[int] | None = None,
        area: int | None = None,
        buckets: Buckets | int | None = None,
        crop: str = "center",
        flip: bool = False,
        weight: float | int = 1.0,
        max_pixels: int = MAX_PIXELS,
        broken: str = "skip",
        keep: Sequence[str] = (),
    ) -> None:
        check_settings(broken, weight)
        if clash := [name for name in keep if name in OWN]:
            raise ValueError(f"keep={list(keep)} has {clash}, which every sample has; rename the column.")
        self.image, self.caption = image.split("|"), None if caption is None else caption.split("|")
        self.keep, self.weight, self.max_pixels = tuple(keep), float(weight), max_pixels
        self.framing = Framing(size=size, area=area, buckets=buckets, crop=crop, flip=flip)
        self.rows = _stored(rows, [*self.image, *(self.caption or ()), *self.keep, KEY])
        self.broken, self._skip = list[tuple[str | int, str]](), broken == "skip"
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """What is to be known before the first sample."""

    def __repr__(self) -> str:
        columns = "|".join(self.image) + ("" if self.caption is None else f" and {'|'.join(self.caption)}")
        kind = type(self.rows).__name__
        return f"Captioned({kind}: {columns}, {self.framing}, {len(self.broken)} left out)"

    def _sample(self, row: Any, id: str | int | None) -> dict[str, Any]:
        name = "a row" if id is None else f"row {id!r}"
        try:
            image, facts = load(self._source(row, name), self.framing, self.max_pixels)
        except Unreadable as error:
            raise self._error("?" if id is None else id, str(error)) from error
        sample = {} if id is None else {"id": id}
        sample |= {"image": image, "size": facts, "weight": self.weight}
        if self.caption is not None:
            column = _column(row, self.caption, name, "caption")
            sample["caption"] = drawn(_texts(row[column], column, name))
        return sample | {key: row[_column(row, [key], name, "keep")] for key in self.keep}

    def _source(self, row: Any, name: str) -> Source:
        return _source(row[_column(row, self.image, name, "image")], name)

    def _error(self, id: str | int, reason: str) -> Exception:
        if self._skip:
            return BrokenSample(id, reason)
        return ValueError(f"the picture of row {id!r}: {reason} broken='skip' would leave it out.")


@final
class CaptionedRows(Captioned, Dataset[dict[str, Any]]):
    """What `Captioned` makes of rows with a length and an index.

    Attributes:
        ids: of every index.
        groups: of every index; pictures of one shape are one group.
        broken: (id, reason) of what was left out.
    """

    ids: list[str | int]
    groups: list[int]

    def _start(self) -> None:
        kept = range(len(self.rows))
        self.groups = [0 if self.framing.size is None else group_of(self.framing.target(1, 1))] * len(kept)
        if self.framing.size is None:
            found = {index: group for index in kept if (group := self._group(index)) is not None}
            kept, self.groups = list(found), list(found.values())
        if not kept:
            raise ValueError(f"there is no picture among {len(self.rows)} rows; left out: {self.broken[:3]}.")
        self._kept = kept
        self.ids = list(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sample(self.rows[self._kept[index]], self.ids[index])

    def _group(self, index: int) -> int | None:
        try:
            shape = header(self._source(self.rows[index], f"row {index}"), self.max_pixels)
        except Unreadable as error:
            if not self._skip:
                raise self._error(index, str(error)) from error
            self.broken.append((index, str(error)))
            return None
        return group_of(self.framing.target(*shape))


@final
class CaptionedStream(Captioned, IterableDataset[dict[str, Any]]):
    """What `Captioned` makes of rows that can only be iterated over.

    Attributes:
        broken: (id, reason) of what was left out so far in the current pass, in the process that reads.
    """

    def _start(self) -> None:
        if not isinstance(self.rows, Iterable) or isinstance(self.rows, Mapping | str | bytes):
            raise TypeError(
                f"rows are a dataset or a sequence of dictionaries, got {type(self.rows).__name__}; of a "
                f"dictionary of splits give one."
            )
        if isinstance(self.rows, Iterator):
            raise TypeError(
                f"rows are {type(self.rows).__name__}, which can be read only once, but every epoch reads "
                f"them anew; give a list, or an object whose __iter__ starts over."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.broken.clear()
        for row in self.rows:
            try:
                sample = self._sample(row, row.get(KEY) if isinstance(row, Mapping) else None)
            except BrokenSample as error:
                self.broken.append((error.id, error.reason))
                warnings.warn(f"a row is left out: {error}", RuntimeWarning, stacklevel=2)
                continue
            yield sample

    def set_epoch(self, epoch: int) -> None:
        """Tell the rows which epoch comes, so that they shuffle anew, if they want to know."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def _has_index(rows: object) -> bool:
    if isinstance(rows, Mapping | str | bytes | IterableDataset):
        return False
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def _stored(rows: Any, wanted: Sequence[str]) -> Any:
    """A Hugging Face dataset with the columns that are wanted, and pictures as they are stored."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or not hasattr(rows, "cast_column"):
        return rows
    if (getattr(rows, "format", None) or {}).get(
        "type"
    ) is not None:  # the user's own transform makes the rows
        return rows
    rows = rows.select_columns([name for name in features if name in wanted])
    for name in rows.features:
        kind = type(features[name])
        if kind.__name__ == "Image" and kind.__module__.startswith("datasets."):
            rows = rows.cast_column(name, kind(decode=False))
    return rows


def _column(row: object, names: Sequence[str], where: str, setting: str) -> str:
    """The first of these names that the row has."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} is {type(row).__name__}, but a row is a dictionary of columns.")
    for name in names:
        if name in row:
            return name
    raise ValueError(f"{where} has no {'|'.join(names)!r}, but {sorted(map(str, row))}; say {setting}=….")


def _source(value: object, where: str) -> Source:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, str | os.PathLike | bytes | Image.Image):
        return value
    raise Unreadable(f"the picture of {where} is {type(value).__name__}; give a file, its bytes or an image.")


def _texts(value: object, column: str, row: str) -> tuple[str, ...]:
    """The captions of a row."""
    where = f"{column!r} of {row}"
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error}).") from error
    if column.rpartition(".")[2] == "json" and isinstance(value, str):
        value = parsed(value, where)
    if isinstance(value, Mapping):
        value = caption_in(value, where)
    if value is None or not isinstance(value, str | Sequence):
        raise ValueError(
            f"{where} is {type(value).__name__}, not a caption; an empty caption is '', and caption=None is "
            f"for pictures without."
        )
    return texts(value)
