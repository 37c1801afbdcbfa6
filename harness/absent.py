"""What a test does when this machine lacks what it needs."""

import os
from typing import NoReturn

import pytest


def absent(why: str) -> NoReturn:
    """Skip the test here, and fail it in continuous integration (`CI` is set), where nothing may be left out unseen."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
