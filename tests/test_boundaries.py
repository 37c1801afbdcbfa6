"""The two deployables share one file. Each claim is checked in a fresh interpreter, over every module there is."""

import importlib.util
import pkgutil
import subprocess
import sys

import pytest

import services
import trainer


def modules(package: str, path: list[str]) -> list[str]:
    return [package, *(module.name for module in pkgutil.walk_packages(path, package + "."))]


def imported_by(*names: str) -> set[str]:
    """Every module that importing these brings in; not `__main__`, which would run."""
    runnable = [name for name in names if not name.endswith("__main__")]
    code = f"import sys, importlib\nfor name in {runnable!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def below(package: str, names: set[str]) -> list[str]:
    return sorted(name for name in names if name == package or name.startswith(package + "."))


def test_the_reward_service_never_imports_the_trainer() -> None:
    reward = [name for name in modules("services", list(services.__path__)) if name.startswith("services.reward")]
    assert below("trainer", imported_by(*reward)) == []


def test_the_trainer_imports_nothing_of_services_but_the_wire() -> None:
    imported = imported_by(*modules("trainer", list(trainer.__path__)))
    assert set(below("services", imported)) <= {"services", "services.wire"}


def test_the_wire_needs_neither_torch_nor_fastapi() -> None:
    assert not {"torch", "fastapi", "starlette", "httpx", "transformers"} & imported_by("services.wire")


@pytest.mark.parametrize("module", ["trainer.config", "trainer.cli", "trainer.reward_client"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    assert not {"torch", "transformers"} & imported_by(module)
