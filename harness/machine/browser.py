"""A real browser for tests: Debian's chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from harness.absent import absent


def chromium() -> str:
    """Where the browser is; its absence skips a test here and fails it in continuous integration."""
    found = shutil.which("chromium")
    return found or absent("chromium is not installed: apt-get install chromium")


@contextmanager
def browser() -> Iterator[Browser]:
    """One browser process for as long as the block."""
    path = chromium()
    with sync_playwright() as playwright:
        # A sandbox of its own needs rights that containers and root lack.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()
