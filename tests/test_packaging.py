"""The built wheel, and the users' files that once stood in its way."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as in site-packages."""
    directory = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(directory)
    return directory


def run(site: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel before the checkout, in the user's directory."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(directory)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_wheel_brings_one_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"plaudit"}
    assert {"plaudit/__init__.py", "plaudit/py.typed"}.isdisjoint(names)


def test_presets_and_embedded_models_travel_in_the_wheel(site: Path) -> None:
    for name in ("presets/demo.yaml", "presets/gpt2-imdb.yaml"):
        assert (site / "plaudit" / name).read_bytes() == (ROOT / "trainer" / "plaudit" / name).read_bytes()
    for model in ("imdb-gpt2-mini", "imdb-distilbert-mini"):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (site / "plaudit" / "demo_models" / model / name).stat().st_size > 0


def test_pages_styles_and_migrations_travel_in_the_wheel(site: Path, tmp_path: Path) -> None:
    for name in (
        "web/templates/task.html",
        "web/static/page.css",
        "web/static/page.js",
        "store/migrations/versions/v0001_first.py",
    ):
        assert (site / "plaudit" / "ranking_service" / name).is_file(), name
    done = run(site, tmp_path, "-m", "plaudit.ranking_service", "invite", "--database", str(tmp_path / "r.db"))
    assert done.returncode == 0, done.stderr
    assert "/i/" in done.stdout


@pytest.mark.parametrize("module", ["plaudit.cli", "plaudit.reward_service"])
@pytest.mark.parametrize("theirs", ["trainer.py", "services/__init__.py", "trainer/__init__.py", "tests/__init__.py"])
def test_a_users_own_files_do_not_collide(site: Path, tmp_path: Path, theirs: str, module: str) -> None:
    path = tmp_path / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('the file of the user was imported')\n")
    done = run(site, tmp_path, "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: plaudit")


def test_another_package_that_ships_a_top_level_trainer_touches_nothing_of_ours(site: Path, tmp_path: Path) -> None:
    """What such a package overwrites and removes again: paths below `trainer/` and `services/`."""
    ours = {path.relative_to(site).parts[0] for path in site.rglob("*") if path.is_file()}
    assert not {"trainer", "services"} & ours


@pytest.mark.parametrize(
    ("script", "missing", "said"),
    [
        ("trainer", "tyro", "plaudit: the package tyro is not installed: pip install 'plaudit[trainer]'"),
        (
            "ranking_service",
            "sqlalchemy",
            "plaudit-rank: the package sqlalchemy is not installed: pip install 'plaudit[rank]'",
        ),
        (
            "reward_service",
            "pydantic_settings",
            "plaudit-reward: the package pydantic_settings is not installed: pip install 'plaudit[reward]'",
        ),
    ],
)
def test_a_console_script_without_its_extra_says_which_one(
    site: Path, tmp_path: Path, script: str, missing: str, said: str
) -> None:
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from plaudit import console
console.{script}()
"""
    done = run(site, tmp_path, "-c", code)
    assert done.returncode == 1
    assert done.stderr.strip() == said


def test_an_embedded_model_is_found_by_its_name_from_any_directory(site: Path, tmp_path: Path) -> None:
    code = "from plaudit import demo_models; print(demo_models.resolve('imdb-gpt2-mini'))"
    assert run(site, tmp_path, "-c", code).stdout.strip() == str(site / "plaudit" / "demo_models" / "imdb-gpt2-mini")
    elsewhere = code.replace("imdb-gpt2-mini", "/gone/site-packages/plaudit/demo_models/imdb-gpt2-mini")
    assert run(site, tmp_path, "-c", elsewhere).stdout == run(site, tmp_path, "-c", code).stdout
    (tmp_path / "models" / "imdb-gpt2-mini").mkdir(parents=True)
    own = run(site, tmp_path, "-c", code.replace("imdb-gpt2-mini", "models/imdb-gpt2-mini"))
    assert own.stdout.strip() == "models/imdb-gpt2-mini"
