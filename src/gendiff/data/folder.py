"""A folder of pictures with captions, as a dataset."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any, final

from torch.utils.data import Dataset

from gendiff._checks import unknown
from gendiff.data.captions import captions_of, drawn, texts
from gendiff.data.context import BrokenSample
from gendiff.data.framing import Buckets, Framing, group_of
from gendiff.data.images import MAX_PIXELS, Unreadable, header, load

READ = (".png", ".jpg", ".jpeg", ".webp")
REFUSED = (".avif", ".bmp", ".eps", ".gif", ".heic", ".heif", ".ico", ".jxl", ".svg", ".tif", ".tiff")
BROKEN = ("skip", "raise")


@final
class Folder(Dataset[dict[str, Any]]):
    """The pictures of a folder and of the folders in it, with their captions.

    A sample is known by its path relative to the folder, with forward slashes; samples are sorted by it. It
    has `id`, `image` (float32 [3, H, W] in [0, 1]), `size` (the six facts of `Framing`), `weight` and, if
    there are captions, `caption`.

    Captions come from `<stem>.txt`, from `caption` or `text` in `<stem>.json`, or from the line of
    `metadata.jsonl` whose `file_name` it is, relative to the folder of that file, with `caption` or `text`.
    Several sources have to agree. All pictures have a caption, or none has.

    When it is made, only headers are read. Hidden files and folders are passed over. Links are followed to
    regular files inside the folder, and not to folders or out of it. What cannot be used (links of that kind,
    FIFOs, pictures of other formats, larger than `max_pixels` or damaged) is dealt with as `broken` says.

    Args:
        path: the folder.
        size, area, buckets, crop, flip: which part of a picture is seen, as for `Framing`.
        caption: of all samples, in place of files: one text, or several of which each visit draws one.
        weight: of all samples in the loss, >= 0.
        only: "image" leaves out captions, weights and facts.
        broken: "skip" leaves out what cannot be read and lists it in `folder.broken`; what turns out to be
            damaged when it is decoded is a `BrokenSample`, which a loader counts. "raise" raises.
        max_pixels: height times width of a file, at most.

    Attributes:
        ids: of every index.
        captions: of every index; None if there are none or each visit draws one.
        groups: of every index; pictures of one shape are one group.
        broken: (id, reason) of what was left out.

    Raises:
        ValueError: for a folder without pictures, captions that are missing, contradictory or unreadable, and
            settings out of range; under broken="raise", for what cannot be read, when it is found.

    >>> import tempfile, torch
    >>> from gendiff.data.images import save_images
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = save_images(torch.rand(2, 3, 48, 64), path)
    ...     photos = Folder(path, size=32, caption="a photo", flip=True)
    ...     photos.ids, photos[0]["image"].shape, photos[0]["size"].tolist()
    (['00000.png', '00001.png'], torch.Size([3, 32, 32]), [48, 64, 0, 6, 32, 32])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | Sequence[int] | None = None,
        area: int | None = None,
        buckets: Buckets | int | None = None,
        crop: str = "center",
        flip: bool = False,
        caption: str | Sequence[str] | None = None,
        weight: float | int = 1.0,
        only: str | None = None,
        broken: str = "skip",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_settings(broken, weight)
        if only not in (None, "image"):
            raise ValueError(unknown("only", only, ["image"]))
        if only is not None and caption is not None:
            raise ValueError(f"caption={caption!r} has no effect with only='image'; leave one of them out.")
        self.path, self.only, self.weight, self.max_pixels = Path(path), only, float(weight), max_pixels
        self.framing = Framing(size=size, area=area, buckets=buckets, crop=crop, flip=flip)
        self.broken, self._skip = list[tuple[str, str]](), broken == "skip"
        files = self._files()
        self.ids, self._sizes = self._headers(sorted(name for name in files if _suffix(name) in READ))
        self.groups = [group_of(self.framing.target(*one)) for one in self._sizes]
        self.templates = None if caption is None else texts(caption)
        self.captions = None
        if self.templates is not None and len(self.templates) == 1:
            self.captions = [self.templates[0]] * len(self.ids)
        elif self.templates is None and only is None:
            known = {*files, *(id for id, _ in self.broken)}
            self.captions = captions_of(self.path, self.ids, files, known)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        id = self.ids[index]
        try:
            image, facts = load(self.path / id, self.framing, self.max_pixels)
            if tuple(facts[:2].tolist()) != self._sizes[index]:
                raise Unreadable(
                    "its size is not what it was when the folder was read; make the dataset anew."
                )
        except Unreadable as error:
            raise self._error(id, str(error)) from error
        if self.only is not None:
            return {"id": id, "image": image}
        sample = {"id": id, "image": image, "size": facts, "weight": self.weight}
        if self.captions is not None:
            sample["caption"] = self.captions[index]
        elif self.templates is not None:
            sample["caption"] = drawn(self.templates)
        return sample

    def __repr__(self) -> str:
        told = [f"{len(self)} images", _target(self.framing, len(set(self.groups)))]
        if self.only is None:
            count = 0 if self.templates is None else len(self.templates)
            files = "no captions" if self.captions is None else "captions from files"
            told.append([files, "one caption", f"one of {count} captions"][min(count, 2)])
        return f"Folder({str(self.path)!r}: {', '.join(told)}, {len(self.broken)} left out)"

    def _files(self) -> list[str]:
        """Names of what may be read; what may not is reported."""
        if not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is not a folder; give one with pictures.")
        found = dict(_walk(self.path))
        for name, reason in sorted(found.items()):
            if reason is None and _suffix(name) in REFUSED:
                reason = f"{_suffix(name)} is not read; convert it to PNG, JPEG or WebP."
            if reason is not None:
                self._leave_out(name, reason)
        return [name for name, reason in found.items() if reason is None]

    def _headers(self, names: Sequence[str]) -> tuple[list[str], list[tuple[int, int]]]:
        sizes = dict[str, tuple[int, int]]()
        for name in names:
            try:
                sizes[name] = header(self.path / name, self.max_pixels)
            except Unreadable as error:
                self._leave_out(name, str(error))
        if not sizes:
            why = "; ".join(f"{id!r}: {reason}" for id, reason in self.broken[:3])
            raise ValueError(
                f"{str(self.path)!r} has no picture that can be read ({', '.join(READ)}); {len(self.broken)} "
                f"left out{': ' + why if why else '; check the path'}"
            )
        return list(sizes), list(sizes.values())

    def _leave_out(self, id: str, reason: str) -> None:
        if not self._skip:
            raise self._error(id, reason)
        self.broken.append((id, reason))

    def _error(self, id: str, reason: str) -> Exception:
        if self._skip:
            return BrokenSample(id, reason)
        return ValueError(f"{str(self.path / id)!r}: {reason} broken='skip' would leave it out.")


def check_settings(broken: str, weight: float | int) -> None:
    """Raise a ValueError for a policy or a weight that is none."""
    if broken not in BROKEN:
        raise ValueError(unknown("broken", broken, BROKEN))
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight is a finite number >= 0, got {weight!r}.")


def _walk(root: Path) -> Iterator[tuple[str, str | None]]:
    """Files below a folder by relative path, and why one may not be read."""
    inside, pending = os.path.realpath(root), [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                elif entry.is_dir():
                    yield name, "it is a link to a folder, which is not followed."
                elif _suffix(name) in (*READ, *REFUSED, ".txt", ".json", ".jsonl"):
                    yield name, _refusal(entry, inside)


def _refusal(entry: "os.DirEntry[str]", inside: str) -> str | None:
    if entry.is_file(follow_symlinks=False):
        return None
    if not entry.is_symlink():
        return "it is not a regular file."
    target = os.path.realpath(entry.path)
    if os.path.commonpath([inside, target]) != inside:
        return "it is a link that leads out of the folder; put the file itself there."
    return None if os.path.exists(target) and S_ISREG(os.stat(target).st_mode) else "it is a link to no file."


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _target(framing: Framing, shapes: int) -> str:
    if isinstance(framing.size, tuple):
        return "{} × {}".format(*framing.size)
    kind = "of their own size" if framing.buckets is None else f"of about {framing.area} pixels"
    return f"{shapes} shapes {kind}"
