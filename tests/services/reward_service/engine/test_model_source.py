"""Where the model comes from is decided once, and its revision is that of the bytes that were loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import kills
from harness.tiny_models import tiny_classifier_dir
from plaudit import atomic, demo_models
from plaudit.reward_service.engine import model_files
from plaudit.reward_service.engine import model_source as model_source_module
from plaudit.reward_service.engine import scorer as scorer_module
from plaudit.reward_service.engine.loading import read_model
from plaudit.reward_service.engine.model_files import ModelError, ModelSource
from plaudit.reward_service.engine.model_source import ModelOrigins, pinned_files
from plaudit.reward_service.engine.scorer import load_scorer
from plaudit.reward_service.settings import Settings
from plaudit.wire.revisions import content_revision


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str | None]]:
    """What was asked of the hub, which gives everybody the same stranger's model."""
    strangers = tiny_classifier_dir(tmp_path_factory.mktemp("hub") / "strangers", seed=9)
    asked: list[tuple[str, str | None]] = []

    def snapshot(model: str, revision: str | None = None) -> Path:
        asked.append((model, revision))
        return strangers

    monkeypatch.setattr(model_source_module, "snapshot", snapshot)
    return asked


def settings_of(model: str, **more: Any) -> Settings:
    return Settings(model=model, **more)


def test_a_directory_that_has_gone_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[tuple[str, str | None]]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tiny_classifier_dir(tmp_path / "models" / "mine")
    settings = settings_of("models/mine")
    source = ModelOrigins(settings.model)
    first = load_scorer(settings, source)
    mine.rename(tmp_path / "away")
    with pytest.raises(ModelError, match=r"models/mine no longer exists; .* Restore it"):
        load_scorer(settings, source)
    (tmp_path / "away").rename(mine)
    assert load_scorer(settings, source).revision == first.revision
    assert hub == []


def test_an_embedded_name_stays_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ModelOrigins("imdb-distilbert-mini")
    tiny_classifier_dir(tmp_path / "imdb-distilbert-mini")
    assert source.files().directory == Path(demo_models.resolve("imdb-gpt2-mini")).parent / "imdb-distilbert-mini"


def test_a_hub_model_is_fetched_at_the_revision_that_was_asked_for(hub: list[tuple[str, str | None]]) -> None:
    source = ModelOrigins("owner/model", "abc123")
    assert source.files() == source.files()
    assert hub == [("owner/model", "abc123")] * 2


def test_a_revision_of_a_directory_is_refused(classifier_dir: Path) -> None:
    with pytest.raises(ModelError, match="--revision v1 is for models of the hub"):
        ModelOrigins(str(classifier_dir), "v1")


def test_a_link_that_flips_while_a_model_is_read_gives_one_model_and_its_own_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tiny_classifier_dir(tmp_path / "one"), tiny_classifier_dir(tmp_path / "two", seed=1)
    link = tmp_path / "current"
    link.symlink_to(one)
    texts = [("good film", None), ("bad film", None)]
    expected = load_scorer(settings_of(str(one)))

    def flip(target: Path) -> None:
        beside = tmp_path / "beside"
        beside.symlink_to(target)
        beside.replace(link)

    load = read_model

    def load_while_it_flips(*arguments: Any) -> Any:
        flip(two)
        loaded = load(*arguments)
        flip(one)
        return loaded

    monkeypatch.setattr(scorer_module, "read_model", load_while_it_flips)
    scorer = load_scorer(settings_of(str(link)))
    assert scorer.revision == expected.revision == content_revision(one)
    assert scorer.score(scorer.encode(texts), 0) == expected.score(expected.encode(texts), 0)


@pytest.mark.parametrize("open_files", [model_source_module.OPEN_FILES, Path("/nonexistent")])
def test_what_is_held_stays_as_it_was_when_files_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_files: Path
) -> None:
    monkeypatch.setattr(model_source_module, "OPEN_FILES", open_files)
    directory = tiny_classifier_dir(tmp_path / "model")
    other = tiny_classifier_dir(tmp_path / "other", seed=1)
    before = content_revision(directory)

    def replace_while_held() -> None:
        with pinned_files(ModelSource(directory)) as files:
            for path in other.iterdir():
                shutil.copy(path, tmp_path / "beside")
                (tmp_path / "beside").replace(directory / path.name)
            assert content_revision(*files.directories) == before

    with pytest.raises(ModelError, match="changed while it was being read"):
        replace_while_held()


def test_a_model_that_a_killed_trainer_left_half_moved_is_served_whole(tmp_path: Path) -> None:
    before, other = tiny_classifier_dir(tmp_path / "before"), tiny_classifier_dir(tmp_path / "other", seed=1)
    directory, new = tmp_path / "model", content_revision(other)

    def replace(directory: Path) -> None:
        with atomic.replacing(directory, "model", entries=("config.json",)) as beside:
            shutil.copytree(other, beside, dirs_exist_ok=True)

    for _ in kills.after_each_kill(replace, before, directory):
        if atomic.is_pending(directory) and not (directory / "config.json").exists():
            break
    assert load_scorer(settings_of(str(directory))).revision == new
    # The service only reads; whoever writes there moves the rest.
    assert atomic.finish(directory)
    assert content_revision(directory) == new


def test_a_model_that_is_replaced_while_its_files_are_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, other = tiny_classifier_dir(tmp_path / "model"), tiny_classifier_dir(tmp_path / "other", seed=1)
    new, stamps, calls = content_revision(other), model_files.file_stamps, iter([True])

    def replaced_after_the_first_look(*directories: Path) -> list[tuple[str, int, int, int]]:
        found = stamps(*directories)
        if next(calls, False):
            with atomic.replacing(directory, "model") as beside:
                shutil.copytree(other, beside, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(model_source_module, "file_stamps", replaced_after_the_first_look)
    with pinned_files(ModelSource(directory)) as files:
        assert content_revision(*files.directories) == new
