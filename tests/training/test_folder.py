"""A folder takes its place whole or not at all, whatever fails, and what is removed loses its name first."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gendiff.training import folder as module
from gendiff.training.folder import aside, discard, erase, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, text: str, error: BaseException | None = None) -> None:
    with written_aside(path) as folder:
        (folder / "file").write_text(text)
        if error is not None:
            raise error


def test_it_is_beside_its_place_until_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with written_aside(target) as folder:
        (folder / "file").write_text("new")
        assert folder.parent == target.parent
        assert not target.exists()
        assert aside(target.parent) == [(folder, "run", "new")]
    assert names(target.parent) == ["run"]
    make(target, "newer")
    assert (target / "file").read_text() == "newer"
    assert names(target.parent) == ["run"]


def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, rename = module._flush, os.rename

    def flushed(path: Path) -> None:
        kind = "parent" if path == tmp_path else "folder" if path.is_dir() else path.name
        events.append(kind)
        flush(path)

    def renamed(source: Any, target: Any) -> None:
        events.append(f"{Path(source).name.split('-')[0]} to {Path(target).name.split('-')[0]}")
        rename(source, target)

    make(tmp_path / "run", "old")
    monkeypatch.setattr(module, "_flush", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    make(tmp_path / "run", "new")
    before = ["file", "folder", "run to .run.old", ".run.new to run", "parent"]
    assert events == [*before, ".run.old to .run.gone", "parent"]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("after", [False, True], ids=["instead of", "after"])
@pytest.mark.parametrize("where", [".old-", ".new-"])
def test_the_earlier_one_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: bool, error: BaseException
) -> None:
    """The rename of the earlier one out of the way and that of the new one into its place, hit twice each."""
    rename = os.rename

    def hit(source: Any, target: Any) -> None:
        hits = where in str(target) or (where in str(source) and where == ".new-")
        if after or not hits:
            rename(source, target)
        if hits:
            raise error

    make(tmp_path / "run", "old")
    monkeypatch.setattr(os, "rename", hit)
    with pytest.raises(type(error)):
        make(tmp_path / "run", "new")
    monkeypatch.undo()
    placed = after and where == ".new-"
    assert (tmp_path / "run" / "file").read_text() == ("new" if placed else "old")
    if not placed:
        assert names(tmp_path) == ["run"]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "run", "old")
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "run", "half", ZeroDivisionError())
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "file").read_text() == "old"


def test_removing_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    remove = shutil.rmtree
    make(tmp_path / "run", "old")
    monkeypatch.setattr(shutil, "rmtree", lambda path: (seen.append(names(tmp_path)), remove(path)))
    discard(tmp_path / "run")
    ((only,),) = seen
    assert only.startswith(".run.gone-")
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    make(tmp_path / "run", "old")
    monkeypatch.setattr({"rename": os, "rmtree": shutil}[call], call, fail)
    with pytest.warns(RuntimeWarning, match=r"run.*cannot be removed \(Permission denied\)"):
        discard(tmp_path / "run")
    assert [name == "run" for name in names(tmp_path)] == [call == "rename"]


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "kept", "text")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    discard(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    erase(tmp_path / "dangling")
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]


def test_only_names_of_ours_are_leftovers(tmp_path: Path) -> None:
    ours = [".a.new-0123abcd", ".a.b.old-00000000", ".run.gone-ffffffff"]
    others = ["a.new-0123abcd", ".a.new-0123abc", ".a.tmp-0123abcd", ".a.new-0123ABCD", ".new-0123abcd"]
    for name in ours + others:
        (tmp_path / name).mkdir()
    assert sorted((name, word) for _, name, word in aside(tmp_path)) == [
        ("a", "new"),
        ("a.b", "old"),
        ("run", "gone"),
    ]
