"""The console scripts. If a program's extra is not installed, they say so in one line. Standard library only."""

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
    try:
        code = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "plaudit":
            raise
        code = f"{program}: the package {error.name} is not installed: pip install 'plaudit[{extra}]'"
    sys.exit(code)
