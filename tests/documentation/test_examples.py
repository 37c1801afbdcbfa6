"""Every example of the documentation is executed, or stands in a list with its reason; all are parsed for real."""

import ast
import importlib
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from harness.documentation import LISTED, ROOT, Example, blocks, commands, listed, words
from plaudit import cli
from plaudit.errors import PlauditError
from plaudit.ranking_service import settings as rank
from plaudit.reward_service.__main__ import parse_settings
from plaudit.serving.listening import StartError
from plaudit.settings import files
from plaudit.settings.loop import LoopConfig
from plaudit.settings.ppo import PPOConfig

RANK = {"serve": rank.Serve, "invite": rank.InviteCommand, "export": rank.Export, "import": rank.Import}
HERE = ("test_examples.py", "test_walks.py")
COMMANDS = commands()
PYTHON = blocks("python")
WHY = {"hub", "gpu", "engine", "people", "yours", "setup", "long", "other"}


def stand_ins(flags: list[str], directory: Path) -> list[str]:
    """Flags whose values are files of the reader's: settings files that don't exist are left out, `…` too."""
    kept: list[str] = []
    skip = False
    for flag, value in zip(flags, [*flags, ""][1:], strict=True):
        if skip or (flag == "…" and not (kept and kept[-1].startswith("--"))):
            skip = False
        elif flag == "--config" and value.endswith((".yaml", ".yml")) and not Path(value).exists():
            skip = True
        else:
            kept.append("http://127.0.0.1:8000" if flag == "…" else flag)
    return kept


def parse(command: str, directory: Path) -> None:
    """Parse a command as its program does. Raises whatever the program raises."""
    match words(command):
        case ["plaudit", name, *flags]:
            if flags != ["--help"]:
                cli.parse(name, stand_ins(flags, directory))
        case ["plaudit-reward", *flags]:
            parse_settings(flags)
        case ["plaudit-rank", name, *flags] if name in RANK:
            RANK[name](_cli_parse_args=flags)
        case ["accelerate", "launch", *rest]:
            cli.parse(rest[rest.index("plaudit.cli") + 1], stand_ins(rest[rest.index("plaudit.cli") + 2 :], directory))
        case ["python", "-m", module, *flags] if module.startswith(("benchmarks.", "plaudit.")):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            package = "".join(
                path.read_text() for path in (ROOT / module.rpartition(".")[0].replace(".", "/")).glob("*.py")
            )
            for flag in flags:
                if flag.startswith("--"):
                    assert flag.partition("=")[0] in source + package, f"{module} has no {flag}"
        case ["python", script, *_] if script.startswith("examples/"):
            assert (ROOT / script).is_file()
        case ["make", *rest]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets)
        case ["pip", "install", *rest]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for name in re.findall(r"(?:\.|plaudit)\[([\w,-]+)\]", " ".join(rest)):
                assert set(name.split(",")) <= set(extras)
        case ["docker", *rest]:
            for word in rest:
                if word.startswith(("Dockerfile.", "docker-compose")):
                    assert (ROOT / word).is_file()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_one_that_its_program_takes(
    command: Example, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    where = ROOT / Path(command.page).parent
    if where.is_relative_to(ROOT / "examples"):
        monkeypatch.chdir(where)
    for name in ("REWARD_MODEL", "RANK_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    try:
        parse(command.text, directory)
    except (PlauditError, StartError, SystemExit) as error:
        pytest.fail(f"{command.page}: {command.text}\n{error}")


def test_every_command_is_executed_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    executed = {line for name in HERE for line in _executed_in(name)}
    unknown = [
        str(command)
        for command in COMMANDS
        if listed(command, LISTED["commands"]) is None and not any(command.text.startswith(line) for line in executed)
    ]
    assert unknown == [], "execute them in test_walks.py, or list them in examples.yaml with a reason"
    reasons = Counter((listed(c, LISTED["commands"]) or {}).get("why", "executed") for c in COMMANDS)
    with capsys.disabled():
        print(f"\ncommands of the documentation: {dict(reasons)}")


def _executed_in(name: str) -> list[str]:
    """The beginnings of commands that a test file says it executes: its list EXECUTED."""
    tree = ast.parse((Path(__file__).parent / name).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXECUTED":
            return list(ast.literal_eval(node.value))
    return []


def test_the_list_names_reasons_that_exist_tests_that_exist_and_nothing_that_is_gone() -> None:
    for kind, examples in (("commands", COMMANDS), ("python", PYTHON)):
        for entry in LISTED[kind]:
            assert ("why" in entry) != ("run_by" in entry), entry
            assert entry.get("why", "hub") in WHY, entry
            if "run_by" in entry:
                path, _, test = entry["run_by"].partition("::")
                assert f"def {test}" in (ROOT / path).read_text(), entry
            assert any(listed(example, [entry]) for example in examples), (
                f"the documentation has no such example: {entry}"
            )


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs_or_its_imports_from_plaudit_do(
    block: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(block.text)
    if listed(block, LISTED["python"]) is None:
        exec(compile(tree, block.page, "exec"), {"__name__": "example"})
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("plaudit"):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if "seriesQuery" not in b.text], ids=str)
def test_settings_in_yaml_are_settings(block: Example, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(block.text)
    errors = []
    for config_type in (PPOConfig, LoopConfig):
        try:
            files.load(config_type, path)
            return
        except PlauditError as error:
            errors.append(str(error))
    pytest.fail(f"{block.page}: {errors}")


def test_the_reward_functions_of_the_documentation_give_the_numbers_that_it_says() -> None:
    namespace: dict[str, object] = {}
    for block in PYTHON:
        if block.page == "docs/how-to/reward-function.md":
            exec(block.text, namespace)
    short, exact = namespace["short"], namespace["exact"]
    assert callable(short)
    assert callable(exact)
    assert short(["p"] * 2, ["one two", "w " * 20]) == [1.0, 0.5]
    assert exact(["p"] * 2, [" 4", "5"], answer=["4", "4"]) == [1.0, 0.0]
