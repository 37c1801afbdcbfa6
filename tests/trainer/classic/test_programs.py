"""Published programs, reconstructed in `programs/`: nothing but the import lines is different, and they run."""

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.tiny_models import save, tiny_llama
from plaudit import demo_models
from plaudit.classic import AutoModelForCausalLMWithValueHead, set_seed

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*responses began with tokens of their queries:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
)


@pytest.fixture
def judge() -> Path:
    """The embedded one, which has room for whatever an untrained policy writes."""
    return Path(demo_models.resolve("imdb-distilbert-mini"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a program with these arguments, and gives its variables."""

    def program(name: str, *arguments: object) -> dict[str, Any]:
        path = PROGRAMS / f"{name}.py"
        set_seed(0)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        return runpy.run_path(str(path), run_name="__main__")

    return program


def weights(directory: Path) -> dict[str, Any]:
    return dict(AutoModelForCausalLMWithValueHead.from_pretrained(str(directory)).named_parameters())


def test_the_sentiment_notebook(run: Any, policy_dir: Path, judge: Path, reviews: Path, tmp_path: Path) -> None:
    names = run("sentiment_notebook", policy_dir, judge, reviews, tmp_path)
    assert len(names["df_results"]) == 16
    assert names["df_results"].notna().all(axis=None)
    assert names["ppo_trainer"].stepper.steps_done == 2
    assert abs(names["stats"]["objective/kl"]) > 1e-3, "the second step is held to the reference, not to itself"
    before, after = weights(policy_dir), weights(tmp_path)
    name = "pretrained_model.transformer.h.0.attn.c_attn.weight"
    assert not before[name].equal(after[name])
    assert after[name].equal(names["model"].get_parameter(name))


def test_the_control_code_notebook(run: Any, policy_dir: Path, judge: Path, reviews: Path) -> None:
    names = run("control_codes", policy_dir, judge, reviews)
    assert len(names["history"]) == 6
    assert all(len(response) == 10 for response in names["response_tensors"]), "nothing ends a text early here"
    assert {"env/reward_negative", "env/reward_neutral", "env/reward_positive"} <= set(names["stats"])
    assert math.isfinite(names["stats"]["ppo/loss/total"])


def test_detoxification(run: Any, policy_dir: Path, judge: Path, reviews: Path, tmp_path: Path) -> None:
    names = run(
        "detoxification",
        *("--model_name", policy_dir, "--toxicity_model", judge, "--prompts", reviews, "--learning_rate", "0.01"),
        *("--model_save_path", tmp_path / "saved"),
    )
    model, reference = names["model"], names["ref_model"]
    name = "pretrained_model.transformer.h.0.attn.c_attn.weight"
    assert model.get_parameter(name) is reference.get_parameter(name), "the first layer is shared"
    name = name.replace("h.0", "h.1")
    assert not model.get_parameter(name).equal(reference.get_parameter(name)), "and the second one has learnt"
    assert (tmp_path / "saved/model.safetensors").is_file()


def test_best_of_n(run: Any, policy_dir: Path, judge: Path, reviews: Path) -> None:
    names = run("best_of_n", policy_dir, judge, reviews)
    results = names["df_results"]
    assert len(results) == 6
    for i, answers in enumerate(names["responses_best_of"]):
        assert results["response (best_of)"][i] in answers
    assert [len(best) for best in names["chosen"]] == [2] * 6
    for best in names["chosen"]:
        first, second = names["queries_to_scores"](best)
        assert first >= second - 1e-5


@pytest.mark.parametrize("peft", [(), ("--use_peft", "--lora_r", "4")])
def test_the_example_script(run: Any, policy_dir: Path, judge: Path, reviews: Path, peft: tuple[str, ...]) -> None:
    names = run(
        "ppo_script",
        *("--model_name", policy_dir, "--query_dataset", reviews, "--reward_model", f"sentiment-analysis:{judge}"),
        *("--batch_size", "16", "--mini_batch_size", "8", "--learning_rate", "0.003", *peft),
    )
    assert names["ppo_trainer"].stepper.steps_done == 2
    assert (names["ppo_trainer"].ref_model is None) == bool(peft)
    assert names["stats"]["objective/kl"] != 0
    assert len(names["batch"]["ref_response"]) == 16


def test_the_rl_training_of_stack_llama(run: Any, judge: Path, reviews: Path, tmp_path: Path) -> None:
    policy = save(tiny_llama(), tmp_path / "llama")
    names = run(
        "stack_llama",
        *("--model_name", policy, "--tokenizer_name", policy, "--reward_model_name", judge, "--questions", reviews),
        *("--adafactor", "True", "--save_freq", "1", "--steps", "16", "--learning_rate", "0.003"),
        *("--output_dir", f"{tmp_path}/"),
    )
    assert names["model"].is_loaded_in_8bit
    assert type(names["ppo_trainer"].optimizer).__name__ == "Adafactor"
    assert names["ppo_trainer"].stepper.steps_done == 2
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "step_1"))
    learnt = [p.abs().max().item() for name, p in saved.named_parameters() if "lora_B" in name]
    assert min(learnt) > 0
