import jaxtyping
import pytest


@pytest.fixture
def as_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks of the tests, so that gendiff's own errors are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
