"""Captions: where the text of a picture stands, and which of several a visit gets."""

import json
import os
import posixpath
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gendiff.data.context import sample_rng

LONGEST = 2**20  # bytes of a file that holds one caption
METADATA = "metadata.jsonl"


def texts(caption: str | Sequence[str]) -> tuple[str, ...]:
    """One caption, or those of which one is drawn."""
    given = (caption,) if isinstance(caption, str) else tuple(caption)
    if not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"a caption is a text or a list of at least one text, got {caption!r}.")
    return given


def drawn(given: Sequence[str]) -> str:
    """One of some captions, by the sample's own randomness."""
    return given[int(sample_rng().integers("caption", len(given), ()))] if len(given) > 1 else given[0]


def caption_in(record: object, where: str) -> str | None:
    """The caption of a JSON object: its `caption` or `text`, None if it has neither.

    Raises:
        ValueError: if it is no object, its caption is no text, or the two differ.

    >>> caption_in({"text": "a fox", "license": "CC0"}, "fox.json")
    'a fox'
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is {type(record).__name__}; give an object with 'caption' or 'text'.")
    found = {key: record[key] for key in ("caption", "text") if key in record}
    for key, text in found.items():
        if not isinstance(text, str):
            raise ValueError(f"{key!r} of {where} is {type(text).__name__}, not a text.")
    return _agreed(found, where)


def captions_of(
    root: Path, ids: Sequence[str], files: Collection[str], known: Collection[str]
) -> list[str] | None:
    """The caption of every picture of a folder, from the files beside them; None if there is none at all.

    Args:
        root: the folder.
        ids: relative paths of the pictures.
        files: what may be read.
        known: what is there at all, so that metadata may be about it.

    Raises:
        ValueError: for sources that differ or cannot be read, and where only some pictures have a caption.
    """
    listed, found = _metadata(root, files, known), dict[str, str]()
    for id in ids:
        stem, said = os.path.splitext(id)[0], dict[str, str | None]()
        if (file := f"{stem}.txt") in files:
            said[file] = _text(root, file, LONGEST)
        if (file := f"{stem}.json") in files:
            said[file] = caption_in(parsed(_text(root, file, LONGEST), file), file)
        said |= listed.get(id, {})
        caption = _agreed({source: text.strip() for source, text in said.items() if text is not None}, id)
        if caption is not None:
            found[id] = caption
    missing = [id for id in ids if id not in found]
    if found and missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} pictures of {str(root)!r} have no caption: "
            f"{', '.join(map(repr, missing[:5]))}{' …' if len(missing) > 5 else ''}; write one to <stem>.txt "
            f"(an empty file is an empty caption), remove the picture, or give caption='…' for all."
        )
    return [found[id] for id in ids] if found else None


def parsed(text: str | bytes, where: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: for what is no JSON, naming where it stands.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); correct or remove it.") from error


def _agreed(found: Mapping[str, str], where: str) -> str | None:
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{text[:60]!r} in {source}" for source, text in found.items())
        raise ValueError(f"{where} has captions that differ: {listed}; leave one of them.")
    return next(iter(found.values()), None)


def _metadata(root: Path, files: Collection[str], known: Collection[str]) -> dict[str, dict[str, str | None]]:
    """Captions by picture and source, from every metadata.jsonl."""
    result = dict[str, dict[str, str | None]]()
    for file in sorted(name for name in files if posixpath.basename(name) == METADATA):
        for number, line in enumerate(_text(root, file).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            record = parsed(line, where)
            caption = caption_in(record, where)
            name = record.get("file_name")
            if not isinstance(name, str):
                raise ValueError(f"{where} has no 'file_name', which says what picture it is about.")
            id = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
            if id not in known:
                raise ValueError(
                    f"{where} is about {name!r}, which is not there; correct or remove the line."
                )
            result.setdefault(id, {})[where] = caption
    return result


def _text(root: Path, name: str, longest: int | None = None) -> str:
    with open(root / name, "rb") as file:
        content = file.read() if longest is None else file.read(longest + 1)
    if longest is not None and len(content) > longest:
        raise ValueError(f"{name} is longer than {longest} bytes, which is no caption; shorten or remove it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}); save it as UTF-8.") from error
