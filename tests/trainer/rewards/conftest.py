"""Waits between retries that tests can afford."""

import pytest

from plaudit.rewards import source


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits milliseconds before it asks again."""
    monkeypatch.setattr(source, "WAIT_INITIAL_S", 0.01)
    monkeypatch.setattr(source, "WAIT_MAX_S", 0.05)
    monkeypatch.setattr(source, "WAIT_JITTER_S", 0.01)
