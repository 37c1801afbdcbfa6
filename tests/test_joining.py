"""What a contributor relies on: workflows, hooks, forms, releases."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = """## [Unreleased]

- later

## [1.2.0] - 2026-11-28

### Added

- a thing

## [1.1.0] - 2026-01-02

- older
"""


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(workflow: Path) -> list[dict[str, str]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_zizmor_finds_nothing_in_the_workflows() -> None:
    zizmor = shutil.which("zizmor", path=f"{Path(sys.executable).parent}")
    assert zizmor, "the development environment has no zizmor: make install"
    done = subprocess.run([zizmor, "--offline", *map(str, WORKFLOWS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_accepts_the_workflows() -> None:
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_commit_and_names_its_release(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_of_our_own_code_calls_make_targets_that_exist(workflow: Path) -> None:
    commands = [step["run"] for step in steps(workflow) if "make " in step.get("run", "")]
    assert commands
    for command in commands:
        for line in re.findall(r"make ([^\n>]*)", command):
            targets = {word for word in line.split() if "=" not in word and not word.startswith("-")}
            assert targets, line
            assert targets <= make_targets(), line


def test_the_tests_run_on_every_python_that_the_package_says_it_supports() -> None:
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", line)}
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["fast"]["strategy"]["matrix"]
    assert set(matrix["python"]) == named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda version: int(version.partition('.')[2]))}"


def test_hooks_call_tools_of_the_environment_that_constraints_pin() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for hook in repo["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system"
        assert program == "git" or (program.startswith(".venv/bin/") and Path(program).name in pinned), hook


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_an_issue_form_has_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert "value" in field["attributes"] or "label" in field["attributes"]


def test_a_tag_that_is_not_the_version_is_refused(release: ModuleType) -> None:
    assert release.problem("v1.2.0", "1.2.0", CHANGELOG) is None
    assert "tag v1.2.0" in release.problem("v1.2.1", "1.2.0", CHANGELOG)
    assert "no section '## [1.3.0]" in release.problem("v1.3.0", "1.3.0", CHANGELOG)


def test_the_notes_of_a_release_are_its_own_section(release: ModuleType) -> None:
    assert release.section("1.2.0", CHANGELOG) == "### Added\n\n- a thing"
    assert release.section("1.1.0", CHANGELOG) == "- older"


def test_the_changelog_has_a_dated_release_and_the_version_is_a_later_one(release: ModuleType) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    dated = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert dated
    assert release.section(dated[0], changelog)
    version = PROJECT["version"]
    assert version in dated or version.endswith(".dev0")
