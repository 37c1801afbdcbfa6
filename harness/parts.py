"""Which modules each part of the distribution has: what `pip install 'plaudit[PART]'` must be able to import."""

import ast
import functools
import importlib.metadata
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path

import plaudit

PARTS = {
    "client": ("plaudit.atomic", "plaudit.checks", "plaudit.wire", "plaudit.errors", "plaudit.rewards"),
    "rank": ("plaudit.atomic", "plaudit.console", "plaudit.serving", "plaudit.ranking_service", "plaudit.wire"),
    "reward": (
        "plaudit.atomic",
        "plaudit.console",
        "plaudit.serving",
        "plaudit.demo_models",
        "plaudit.wire",
        "plaudit.reward_service",
    ),
    "trainer": (
        "plaudit.atomic",
        "plaudit.checks",
        "plaudit.classic",
        "plaudit.cli",
        "plaudit.console",
        "plaudit.data",
        "plaudit.demo_models",
        "plaudit.doctor",
        "plaudit.errors",
        "plaudit.learner",
        "plaudit.parallel",
        "plaudit.policy",
        "plaudit.ppo",
        "plaudit.presets",
        "plaudit.report",
        "plaudit.rewards",
        "plaudit.run",
        "plaudit.settings",
        "plaudit.sizing",
        "plaudit.stages",
        "plaudit.wire",
    ),
}


@functools.cache
def all_modules() -> dict[str, Path]:
    """Every module of the project and its file, packages included."""
    found = {}
    for module in pkgutil.walk_packages(plaudit.__path__, "plaudit."):
        spec = module.module_finder.find_spec(module.name, None)
        assert spec is not None
        assert spec.origin is not None
        found[module.name] = Path(spec.origin)
    return found


def modules_of(part: str) -> dict[str, Path]:
    """The modules of one part. `__main__` modules are left out where they would run."""
    roots = PARTS[part]
    return {
        name: path
        for name, path in all_modules().items()
        if any(name == root or name.startswith(f"{root}.") for root in roots)
    }


def imported_distributions(path: Path, *, at_the_head: bool = False) -> set[str]:
    """The installed distributions whose modules a file imports, at its head alone or inside functions too."""
    provided_by = _distributions()
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_the_head else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, "plaudit"}
    return {_provider(provided_by.get(name, [name])) for name in names}


def _provider(distributions: list[str]) -> str:
    """Which distribution an import means: of several that share a namespace, the one that pyproject.toml names."""
    names = [name.lower().replace("_", "-") for name in distributions]
    named = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return next((name for name in names if f'"{name}' in named), names[0])


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def plaudit_modules_imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, at its head or inside a function."""
    known, found = set(all_modules()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("plaudit")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "plaudit":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (submodules & known) or {str(node.module)}
    return found
