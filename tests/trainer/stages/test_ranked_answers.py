"""Ranked answers become a reward model that every server gives the same scores of, or it is said why not."""

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.ranking_service import KEY, RankingService, rows
from harness.reward_service import RewardService
from harness.runs import TrainerProcess
from harness.tiny_models import CHATML, chat_tokenizer, save, tiny_gpt2, tiny_qwen2
from plaudit.cli import exit_code
from plaudit.errors import ConfigError, NotFinite
from plaudit.policy.adapters import add_lora
from plaudit.report.preferences import RankingFigures
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
from plaudit.run.checkpoint import list_checkpoints
from plaudit.run.runtime import StopRequested
from plaudit.settings.policy import LoraSettings
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.supervised import ModelSizes, OptimizerSettings
from plaudit.stages import judge_model, ranked_answers, reward_model, supervised
from plaudit.wire import rankings as wire

SIZES = ModelSizes("distilbert", vocab_size=300, hidden_size=32, layers=1, heads=2, max_positions=64)
ANSWERS = [" is wonderful and great.", " is a film.", " is terrible and awful."]
LORA = LoraSettings(r=4, dropout=0.0)


def written(path: Path, answers: list[str] | None = None, **more: Any) -> str:
    lines = [{"prompt": f"Film number {i}", "answers": answers or ANSWERS, **more} for i in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    """From nothing, on answers that are easy to rank."""
    return RewardModelConfig(
        kind="pairwise",
        from_scratch=True,
        sizes=SIZES,
        output_dir=tmp_path / "judge",
        ranked=written(tmp_path / "ranked.jsonl"),
        optimizer=OptimizerSettings(learning_rate=3e-3, batch_size=16, max_steps=40),
        max_length=64,
    )


def loaded(directory: Path) -> tuple[Any, Any]:
    return (
        transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval(),
        transformers.AutoTokenizer.from_pretrained(directory),
    )


def all_scores(directory: Path) -> torch.Tensor:
    model, tokenizer = loaded(directory)
    prompts = [f"Film number {i}" for i in range(80) for _ in ANSWERS]
    return judge_model.scores(model, tokenizer, prompts, ANSWERS * 80, 64)


def test_scores_have_standard_deviation_1_and_the_service_gives_them(config: RewardModelConfig) -> None:
    judged = reward_model.run(config)["pairs"]
    assert judged.accuracy == 1.0
    scores = all_scores(config.output_dir)
    report = json.loads((config.output_dir / "reward_model.json").read_text())
    assert report["scale"]["answers"] == 3 * report["train_prompts"]
    assert scores.std().item() == pytest.approx(1.0, abs=0.05)  # a tenth of them is held out
    factor = json.loads((config.output_dir / "config.json").read_text())["score_scale"]
    assert factor == report["scale"]["factor"] != 1.0
    assert f"a factor of {factor:.6g}" in (config.output_dir / "README.md").read_text()
    service = RewardService(config.output_dir)
    try:
        settings = RewardSettings.of(url=(service.url,))
        with RewardClient(settings) as client:
            client.connect()
            served = client.score([f"Film number {i}" for i in range(80) for _ in ANSWERS], ANSWERS * 80)
    finally:
        service.kill()
    torch.testing.assert_close(torch.tensor(served), scores, atol=1e-4, rtol=1e-4)


def test_scaling_multiplies_what_the_unscaled_model_says(config: RewardModelConfig, tmp_path: Path) -> None:
    reward_model.run(config)
    reward_model.run(dataclasses.replace(config, scale_on="none", output_dir=tmp_path / "plain"))
    factor = json.loads((config.output_dir / "config.json").read_text())["score_scale"]
    expected = factor * all_scores(tmp_path / "plain")
    torch.testing.assert_close(all_scores(config.output_dir), expected, atol=1e-4, rtol=1e-4)


def test_the_scale_may_be_that_of_a_files_answers_by_one_policy(config: RewardModelConfig, tmp_path: Path) -> None:
    row = wire.new_answers_row(
        "b",
        "Film 1",
        [wire.new_answer(text, policy="sft") for text in ANSWERS] + [wire.new_answer("x", policy="other")],
    )
    file = tmp_path / "answers.jsonl"
    file.write_text(row.model_dump_json() + "\n")
    reward_model.run(dataclasses.replace(config, scale_on=str(file), scale_policy="sft"))
    model, tokenizer = loaded(config.output_dir)
    scores = judge_model.scores(model, tokenizer, ["Film 1"] * 3, ANSWERS, 64)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ConfigError, match=r"scale_policy='ppo' wrote none .* there are those of 'other', 'sft'"):
        reward_model.run(
            dataclasses.replace(config, scale_on=str(file), scale_policy="ppo", output_dir=tmp_path / "other")
        )


def test_scores_that_are_all_the_same_have_no_scale(config: RewardModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(NotFinite, match=r"the scores of 1 answers .* have standard deviation 0"):
        reward_model.run(dataclasses.replace(config, scale_on=str(file)))


def test_a_model_at_chance_ends_with_65_and_is_saved_when_that_is_wanted(
    config: RewardModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": f"Film {i}", "answers": ANSWERS[:2][:: 1 if i % 2 else -1]} for i in range(80)]
    ranked = tmp_path / "noise.jsonl"
    ranked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(
        config, ranked=str(ranked), optimizer=dataclasses.replace(config.optimizer, max_steps=3), scale_on="none"
    )
    with pytest.raises(ranked_answers.AtChance, match=r"at chance: it orders .* as people did, 95 % interval") as error:
        reward_model.run(config)
    assert exit_code(error.value) == 65
    assert not (config.output_dir / "config.json").exists()
    reward_model.run(dataclasses.replace(config, resume="auto", allow_chance=True))
    assert "saved all the same, since allow_chance is given" in capsys.readouterr().out
    assert (config.output_dir / "config.json").exists()


def test_two_prompts_are_too_few_to_tell_anything(config: RewardModelConfig, tmp_path: Path) -> None:
    ranked = tmp_path / "few.jsonl"
    lines = [{"prompt": f"Film {i}", "answers": ANSWERS} for i in range(4)]
    ranked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ranked_answers.AtChance, match=r"1 held-out prompts are too few to tell"):
        reward_model.run(dataclasses.replace(config, ranked=str(ranked)))
    ranked.write_text(json.dumps({"prompt": "one", "answers": ANSWERS}) + "\n")
    with pytest.raises(ConfigError, match="1 ranked prompts of 1 texts give 1 to train on and 0 to hold out"):
        reward_model.run(dataclasses.replace(config, ranked=str(ranked), output_dir=tmp_path / "other"))


def test_answers_that_are_the_same_once_cut_are_told(config: RewardModelConfig, tmp_path: Path) -> None:
    ranked = written(tmp_path / "long.jsonl", ["word " * 50 + "good", "word " * 50 + "bad"])
    with pytest.raises(ConfigError, match="cuts the answers to every prompt down to the same tokens"):
        reward_model.run(dataclasses.replace(config, ranked=ranked, max_length=16))


@pytest.mark.parametrize("start", ["whole", "adapters"])
@pytest.mark.parametrize("lora", [False, True])
def test_it_starts_from_the_model_of_stage_1(
    start: str, lora: bool, config: RewardModelConfig, policy_dir: Path, tmp_path: Path
) -> None:
    source = policy_dir
    if start == "adapters":
        adapted = add_lora(transformers.AutoModelForCausalLM.from_pretrained(policy_dir), LORA)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        adapted.save_pretrained(tmp_path / "adapters")
        source = tmp_path / "adapters"
    config = dataclasses.replace(
        config,
        from_scratch=False,
        model=str(source),
        lora=dataclasses.replace(LORA, enabled=lora),
        optimizer=dataclasses.replace(config.optimizer, max_steps=25, learning_rate=1e-2),
        allow_chance=True,
        scale_on="none",
    )
    started, _ = judge_model.load_classifier(str(source), num_labels=1, problem_type=None)
    stage_1 = started.transformer.h[0].attn.c_attn.weight
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy_dir).transformer.h[0].attn.c_attn.weight
    assert torch.equal(stage_1, plain) is (start == "whole")
    reward_model.run(config)
    assert not list(config.output_dir.glob("adapter*"))
    state = load_file(config.output_dir / "model.safetensors")
    assert not torch.equal(state["transformer.h.0.attn.c_attn.weight"], stage_1)
    embeddings = state["transformer.wte.weight"]
    assert torch.equal(embeddings, started.transformer.wte.weight) is lora  # adapters leave them alone
    scores = all_scores(config.output_dir).reshape(80, 3)
    assert (scores[:, 0] > scores[:, 2]).float().mean() > 0.8


def test_conversations_are_judged_by_the_judges_own_template(config: RewardModelConfig, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    start = save(tiny_qwen2(vocab_size=len(tokenizer)), tmp_path / "start", tokenizer)
    user = [{"role": "user", "content": "How is the film?"}]
    said = [[{"role": "assistant", "content": text}] for text in ("Great.", "Awful.")]
    lines = [
        {"prompt": [{"role": "system", "content": f"{i}"}, *user], "chosen": said[0], "rejected": said[1]}
        for i in range(60)
    ]
    ranked = tmp_path / "talks.jsonl"
    ranked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(
        config,
        from_scratch=False,
        model=str(start),
        ranked=str(ranked),
        optimizer=dataclasses.replace(config.optimizer, max_steps=25),
    )
    assert reward_model.run(config)["pairs"].accuracy == 1.0
    model, tokenizer = loaded(config.output_dir)
    assert tokenizer.chat_template == CHATML
    scores = judge_model.scores(model, tokenizer, [user, user], ["Great.", "Awful."], 64)
    assert scores[0] > scores[1]
    text = "<|im_start|>user\nHow is the film?<|im_end|>\n<|im_start|>assistant\nGreat.<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert model(ids).logits.item() == pytest.approx(scores[0].item(), abs=1e-4)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="has no chat template, and the data holds conversations"):
        reward_model.run(
            dataclasses.replace(config, model=str(save(tiny_gpt2(), tmp_path / "other")), output_dir=tmp_path / "no")
        )


def at_step(step: int, action: Callable[[], None]) -> Any:
    class At(supervised._Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()
            super().on_step_end(args, state, control, **kwargs)

    return At


def kill_at_step_17() -> None:
    """In a process of its own: SIGKILL after step 17, when the checkpoint of step 10 is there."""
    supervised._Watch = at_step(17, functools.partial(os.kill, os.getpid(), signal.SIGKILL))  # type: ignore[misc]


def test_after_a_real_sigkill_it_goes_on_to_the_same_weights_to_the_bit(
    config: RewardModelConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, checkpoint_every=10, allow_chance=True)
    code, _ = TrainerProcess(config, command="reward-model", before=kill_at_step_17).end()
    assert code == -signal.SIGKILL
    (checkpoint,) = list_checkpoints(config.output_dir / "checkpoints")
    assert checkpoint.step == 10
    code, stderr = TrainerProcess(config, "--resume", "auto", command="reward-model").end()
    assert code == 0, stderr
    undisturbed = dataclasses.replace(config, output_dir=tmp_path / "undisturbed")
    code, stderr = TrainerProcess(undisturbed, command="reward-model").end()
    assert code == 0, stderr
    ours, expected = (load_file(c.output_dir / "model.safetensors") for c in (config, undisturbed))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_adapters_that_are_stopped_go_on_to_the_same_weights_to_the_bit(
    config: RewardModelConfig, policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(
        config,
        from_scratch=False,
        model=str(policy_dir),
        lora=dataclasses.replace(LORA, dropout=0.1),
        optimizer=dataclasses.replace(config.optimizer, max_steps=12),
        allow_chance=True,
    )
    reward_model.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed"))
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "_Watch", at_step(7, functools.partial(signal.raise_signal, signal.SIGTERM)))
        with pytest.raises(StopRequested):
            reward_model.run(config)
    reward_model.run(dataclasses.replace(config, resume="auto"))
    ours, expected = (load_file(d / "model.safetensors") for d in (config.output_dir, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_rankings_come_straight_from_the_ranking_service(
    config: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK_API_KEY", KEY)
    service = RankingService(f"sqlite:///{tmp_path}/rank.db")
    try:
        service.upload(rows(100, k=3), overlap=2, overlap_share=1.0)
        service.upload(rows(2, batch="judging"), purpose="evaluation")
        for person in (service.annotator(), service.annotator()):
            with person:
                while (task := person.get("/").json()).get("assignment") is not None:
                    ranks = {a["id"]: 1 + int(a["text"].split()[1]) for a in task["answers"]}
                    sent = {"key": task["key"], "version": task["version"], "ranks": ranks}
                    person.post(f"/a/{task['assignment']}/ranking", json=sent).raise_for_status()
        config = dataclasses.replace(config, ranked=service.url, batches=("b1",), weights="reliability")
        judged = reward_model.run(config)["pairs"]
        assert isinstance(judged, RankingFigures)
        assert judged.accuracy == 1.0
        assert (judged.agreement, judged.ceiling) == (1.0, 1.0)
        told = capsys.readouterr().out
        assert "weighs 0." in told
        assert "(100 shared tasks)" in told
        kept = (config.output_dir / "rankings.jsonl").read_text().splitlines()
        assert {wire.RankingRow.model_validate_json(line).status for line in kept} == {"counted"}
        other = dataclasses.replace(
            config, ranked=str(config.output_dir / "rankings.jsonl"), batches=(), weights="equal"
        )
        assert reward_model.run(dataclasses.replace(other, output_dir=tmp_path / "file"))["pairs"].accuracy == 1.0
    except httpx.HTTPStatusError as error:
        raise AssertionError(error.response.text) from error
    finally:
        service.kill()


def person(name: str, shared: int, weight: float | None) -> wire.AnnotatorReport:
    return wire.AnnotatorReport(
        annotator=name,
        rankings=max(shared, 1),
        skipped=0,
        flagged=0,
        overlapping_tasks=shared,
        tie_rate=None,
        pair_agreement=None,
        reliability=None if weight is None else (1 + weight) / 2,
        weight=weight,
        median_seconds=None,
    )


def agreement(*people: wire.AnnotatorReport) -> wire.AgreementReport:
    nothing = wire.Estimate(value=None, low=None, high=None)
    return wire.AgreementReport(
        batch="b",
        rankings=1,
        overlapping_tasks=1,
        pairs_compared=1,
        tie_rate=None,
        pair_agreement=nothing,
        chance=None,
        kappa=nothing,
        tau_b=nothing,
        tau_b_undefined=0,
        alpha=nothing,
        annotators=list(people),
    )


def test_reliability_is_a_mean_over_batches_by_the_tasks_that_are_shared() -> None:
    found = ranked_answers.reliability_weights(
        [agreement(person("a", 30, 0.9), person("b", 40, 0.5)), agreement(person("a", 10, 0.1))]
    )
    assert found == {"a": pytest.approx((30 * 0.9 + 10 * 0.1) / 40), "b": 0.5}
    with pytest.raises(ConfigError, match=r"needs 30 tasks .* some share fewer \(a 29, c 0\)"):
        ranked_answers.reliability_weights([agreement(person("a", 29, 0.9), person("c", 0, None))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "reliability"}, "weights=reliability needs the ranking service's own estimates"),
        ({"batches": ("b1",)}, "batches=b1 are those of a ranking service"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient=-1.0 must be 0"),
        ({"lora": LORA}, "adapters on a model that was never trained"),
    ],
)
def test_settings_that_can_not_go_together_are_refused(
    config: RewardModelConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **settings)
