"""The console scripts. If a program can't run (no extra, Windows), they say so in one line. Standard library only."""

import importlib
import sys


def trainer() -> None:
    """Run `plaudit`."""
    _start("plaudit", "plaudit.cli", extra="trainer")


def reward_service() -> None:
    """Run `plaudit-reward`."""
    _start("plaudit-reward", "plaudit.reward_service.__main__", extra="reward")


def ranking_service() -> None:
    """Run `plaudit-rank`."""
    _start("plaudit-rank", "plaudit.ranking_service.__main__", extra="rank")


def _start(program: str, module: str, *, extra: str) -> None:
    if sys.platform == "win32":
        sys.exit(
            f"{program}: it runs on Linux and macOS, and on Windows inside WSL 2: "
            "https://learn.microsoft.com/windows/wsl/install"
        )
    try:
        code = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "plaudit":
            raise
        code = f"{program}: the package {error.name} is not installed: pip install 'plaudit[{extra}]'"
    sys.exit(code)
