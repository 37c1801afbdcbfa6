"""One root for all errors, with the exit code on each class."""

import importlib

import pytest

from harness.parts import modules_of
from plaudit import errors
from plaudit.cli import exit_code
from plaudit.errors import PlauditError

CODES = {
    "ConfigError": 2,
    "ModelNotFound": 2,
    "ChatTemplateError": 2,
    "DataError": 2,
    "NotFinite": 1,
    "NonFiniteUpdate": 1,
    "NotAsSaved": 1,
    "AtChance": 65,
    "ProcessLost": 1,
    "NotWritten": 74,
    "StopRequested": 1,  # each has that of its signal
    "RankingsRejected": 65,
    "RankingsUnavailable": 75,
    "HubRejected": 65,
    "HubUnavailable": 75,
    "RewardError": 1,
    "RewardRejected": 65,
    "NoScore": 65,
    "RewardUnavailable": 75,
}


def all_of(root: type[PlauditError]) -> set[type[PlauditError]]:
    return {root} | {found for child in root.__subclasses__() for found in all_of(child)}


def test_every_error_stands_in_the_tree_with_its_exit_code() -> None:
    for name in modules_of("trainer"):
        importlib.import_module(name)
    found = {error.__name__: error.exit_code for error in all_of(PlauditError) if error is not PlauditError}
    assert found == CODES
    assert errors.__doc__ is not None
    for name in CODES:
        assert name in errors.__doc__, name


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left on device"), 74), (FileNotFoundError(2, "gone"), 2), (ValueError("a bug"), 1)],
)
def test_errors_of_others_have_an_exit_code_too(error: Exception, code: int) -> None:
    assert exit_code(error) == code
