"""Progress: what is told of a run, how often, in how much room, and that it cannot stop the run."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from gendiff.training.pace import Pace
from gendiff.training.progress import Bar, Guarded, Lines, Progress, Silent, _Line, progress_for

ROW = {
    "loss": 0.12344,
    "learning_rate": [1e-4],
    "images_per_second": 1234.4,
    "memory_gb": 3.41,
    "skipped": 2,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(written: str) -> list[str]:
    """What a terminal shows of it: after a carriage return, the line is overwritten."""
    lines = [""]
    for part in re.split("([\r\n])", written):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            at = 0
        else:
            begin = lines[-1][:at] if lines[-1] else ""
            lines[-1] = begin + part + lines[-1][len(begin) + len(part) :]
            at = len(begin) + len(part)
    return [line.rstrip() for line in lines]


def bar(columns: int = 120, total: int | None = 1000, done: int = 0) -> tuple[Bar, io.StringIO, Clock]:
    clock, stream = Clock(), io.StringIO()
    made = Bar(stream, columns, clock)
    made.start(total, done, "training in run")
    return made, stream, clock


@pytest.mark.parametrize("compiling", [0.0, 500.0])
def test_a_resumed_run_counts_from_where_it_is_and_not_the_first_update(compiling: float) -> None:
    clock = Clock()
    pace = Pace(1000, 400, clock)
    assert pace.time() == ""
    clock.now += compiling
    pace.advance(1)
    for _ in range(10):
        clock.now += 3
        pace.advance(2)
    assert pace.left() == (1000 - 421) * 1.5
    assert (pace.steps(), pace.time()) == ("421/1,000", "14 min left")
    pace.end()
    clock.now += 1e6
    assert pace.passed() == compiling + 30
    assert pace.time().startswith("after")


def test_a_bar_tells_everything_where_there_is_room() -> None:
    made, stream, clock = bar(done=450)
    for _ in range(3):
        clock.now += 2
        made.advance()
    clock.now += 2
    made.show({"step": 453, **ROW})
    title, line = screen(stream.getvalue())
    assert title == "training in run"
    found = re.fullmatch(r" 45%\|#+\d? +\| (.*)", line)
    assert found
    assert found[1].split("  ") == [
        *("453/1,000", "loss 0.1234", "lr 1.0e-04", "1,234 images/s", "3.4 GB", "2 skipped", "27 min left")
    ]  # 547 updates, of which two took 6 seconds
    assert len(line) == 120
    made.close()


@given(
    columns=st.integers(40, 200),
    total=st.sampled_from([None, 10, 1000, 123_456_789]),
    loss=st.floats(),
    rates=st.lists(st.floats(0, 1), max_size=3),
    speed=st.floats(0, 1e6),
    skipped=st.integers(0, 10**6),
)
def test_a_bar_never_exceeds_its_width(
    columns: int, total: Any, loss: float, rates: list[float], speed: float, skipped: int
) -> None:
    made, stream, clock = bar(columns, total)
    row = {"loss": loss, "learning_rate": rates, "images_per_second": speed, "skipped": skipped}
    for _ in range(3):
        clock.now += 7
        made.advance()
    made.show({"step": 3, "memory_gb": 71.5, **row})
    made.close()
    lines = re.split("[\r\n]+", stream.getvalue())
    assert max(map(len, lines)) <= columns
    assert all(len(line.split("|")[1]) >= 8 for line in lines if "%" in line)
    if columns >= 80:
        assert all(text in lines[-2] for text in ("loss", "after" if total != 3 else "took"))


def test_a_bar_is_drawn_at_most_ten_times_a_second_and_at_the_end() -> None:
    made, stream, clock = bar()
    drawn = stream.getvalue().count("\r")
    for _ in range(1000):
        clock.now += 0.001
        made.advance()
    assert 9 <= stream.getvalue().count("\r") - drawn <= 11
    before = stream.getvalue()
    made.show({"step": 1000, **ROW})
    assert "loss 0.1234" in stream.getvalue()[len(before) :]  # not held back: sampling may follow
    made.close()
    assert screen(stream.getvalue())[1].startswith("100%|###")
    assert "1,000/1,000" in screen(stream.getvalue())[1]
    assert screen(stream.getvalue())[2:] == [""]


def test_the_step_of_a_row_is_believed_since_updates_may_be_skipped() -> None:
    made, stream, clock = bar()
    made.advance(10)
    clock.now += 1
    made.show({"step": 7, "skipped": 3})
    assert "7/1,000" in screen(stream.getvalue())[-1]
    made.close()


def test_messages_do_not_tear_the_bar() -> None:
    made, stream, clock = bar(80)
    clock.now += 1
    made.advance()
    made.say("a checkpoint")
    made.picture(Path("run/step.png"), "step 1")
    shown = screen(stream.getvalue())
    assert shown[:3] == ["training in run", "a checkpoint", "step 1: run/step.png"]
    assert "1/1,000" in shown[3]
    made.close("KeyboardInterrupt")
    made.close("again")
    assert screen(stream.getvalue())[4:] == ["KeyboardInterrupt", ""]


def test_a_bar_leaves_nothing_of_tqdm_changed() -> None:
    before = tqdm.monitor_interval, tqdm.monitor
    made, _, clock = bar()
    for _ in range(5):
        clock.now += 20
        made.advance()
    assert (tqdm.monitor_interval, tqdm.monitor) == before
    assert "monitor" not in vars(_Line)  # the thread that tqdm would start
    made.close()
    assert not list(tqdm._instances)  # type: ignore[attr-defined]


def test_lines_come_every_ten_seconds_and_the_last_one_in_any_case() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock=clock)
    lines.start(100, 50, "training in run")
    for step in range(51, 91):
        clock.now += 1
        lines.advance()
        lines.show({"step": step, "loss": step / 100})
    told = [re.split(" {2,}", line) for line in stream.getvalue().splitlines()[1:]]
    assert [line[0] for line in told] == ["51/100", "61/100", "71/100", "81/100"]
    assert told[1] == ["61/100", "61 %", "loss 0.6100", "39 s left"]
    lines.close("stopped")
    assert "90/100" in stream.getvalue().splitlines()[-2]
    assert stream.getvalue().splitlines()[-1] == "stopped"
    lines.start(100, 99, "more")
    lines.show({"step": 99})
    lines.advance()
    lines.show({"step": 100, "epoch": 1.5, "metrics": {"fid": 12.0}})
    assert stream.getvalue().splitlines()[-1] == "100/100  100 %  epoch 1.50  fid 12.00  took 0 s"


@pytest.mark.parametrize("kind", [Bar, Lines])
def test_what_was_not_closed_is_closed_by_the_next_start(kind: Callable[..., Progress]) -> None:
    stream = io.StringIO()
    made = kind(stream)
    made.start(10, 0, "first")
    made.start(10, 0, "second")
    shown = screen(stream.getvalue())
    assert shown.index("first") < shown.index("interrupted") < shown.index("second")
    made.close()


def test_which_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_for(), Guarded)

    def chosen(kind: str = "auto") -> str:
        return type(getattr(progress_for(kind), "inner", None)).__name__

    assert [chosen(kind) for kind in ("auto", "bar", "lines")] == ["Lines", "Bar", "Lines"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [chosen(kind) for kind in ("auto", "bar", "lines")] == ["Bar", "Bar", "Lines"]
    monkeypatch.setattr(sys, "stderr", None)
    assert chosen() == "Lines"
    assert isinstance(progress_for("none"), Silent)
    assert "IPython" not in sys.modules
    for shell, which in ((None, "Lines"), (object(), "Lines"), (SimpleNamespace(kernel=1), "Notebook")):
        pytest.importorskip("IPython")
        monkeypatch.setattr("IPython.get_ipython", lambda shell=shell: shell)
        assert chosen() == which
    with pytest.raises(ValueError, match=r"'bra'; did you mean 'bar'.*'notebook'"):
        progress_for("bra")


class Broken(Progress):
    def fails(self, *_: Any) -> None:
        raise self.error("no space left")

    error: type[BaseException] = OSError
    start = advance = show = picture = say = close = fails  # type: ignore[assignment]


def test_a_display_that_fails_is_warned_of_once_and_counted() -> None:
    made = Guarded(Broken())
    with pytest.warns(RuntimeWarning, match="OSError: no space left"):
        made.start(10, 0, "run")
    made.advance()  # a second warning would be an error here
    made.show({})
    made.picture(Path("x.png"), "x")
    made.say("x")
    made.close()
    assert made.failures == 6
    made.inner.error = KeyboardInterrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        made.advance()
