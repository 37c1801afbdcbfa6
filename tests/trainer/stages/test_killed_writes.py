"""Every stage's results, killed before each operation on a file: the old are there or the new, never a mixture.

Only the part of each stage that writes is run, on tiny models. After each kill the directory is looked at three times:
as a program sees it that knows nothing of replacements, as the reward service reads it, and after a new start.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import kills
from harness.kills import contents
from harness.tiny_models import tiny_classifier_dir, tiny_gpt2, tiny_tokenizer
from plaudit.data.examples import Example
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora
from plaudit.policy.loading import load_policy
from plaudit.policy.model import Policy
from plaudit.policy.reading import reading, settle
from plaudit.policy.saving import PolicyWeights
from plaudit.report.comparison import WinRate
from plaudit.report.evaluation import Answers, compare
from plaudit.report.page import pair_samples
from plaudit.reward_service.engine.model_files import model_files
from plaudit.run.metrics import MetricsLog, read_metrics
from plaudit.run.runtime import exclusive
from plaudit.run.storage import MODEL_ENTRIES
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sample import SampleConfig
from plaudit.settings.sft import SFTConfig
from plaudit.stages import (
    by_people,
    evaluate,
    judge_model,
    ppo_results,
    ppo_setup,
    reward_model,
    sample,
    sft,
    supervised,
)
from plaudit.wire import rankings as wire

TEXTS = ["this film is great", "this film is bad"]


@dataclass(frozen=True)
class Scene:
    """What a stage writes: `old` and `new` each write a whole result into a directory, `old` into an empty one."""

    old: Callable[[Path], None]
    new: Callable[[Path], None]
    entries: tuple[str, ...] = MODEL_ENTRIES
    """Names by which other programs recognise the result."""


def an_sft(tmp_path: Path) -> Scene:
    def save(root: Path, seed: int) -> None:
        config = SFTConfig(output_dir=root, max_length=6, seed=seed)
        with exclusive(root):
            sft.save(config, tiny_gpt2(seed), tiny_tokenizer(), [Example(text) for text in TEXTS], train_rows=seed)
            # Checkpoints go when the model is there.
            supervised.forget_checkpoints(supervised.Run(config, None, None))  # type: ignore[arg-type]

    return Scene(lambda root: save(root, 0), lambda root: save(root, 1))


def a_reward_model(tmp_path: Path) -> Scene:
    head: dict[str, Any] = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "problem_type": None}
    made = []
    for seed in (0, 1):
        model, tokenizer = judge_model.load_classifier(
            str(tiny_classifier_dir(tmp_path / f"start-{seed}", seed=seed)), **head
        )
        judge_model.encode(tokenizer, TEXTS, 16)  # a tokenizer's file tells how it was last used
        made.append((model, tokenizer))

    def save(root: Path, seed: int) -> None:
        model, tokenizer = made[seed]
        judged = {"texts": reward_model.Judgement(2, 0.5 + seed / 4, 0.1)}
        with exclusive(root):
            config = RewardModelConfig(output_dir=root, max_length=16, seed=seed)
            judge_model.save_classifier(
                config,
                model,
                tokenizer,
                lambda model, tokenizer: judge_model.logits(model, tokenizer, TEXTS, 16),
                lambda _, beside: judge_model.write_report(beside, config, judged),
            )

    return Scene(lambda root: save(root, 0), lambda root: save(root, 1))


def a_ppo_run(tmp_path: Path) -> Scene:
    """Adapters, value head and model card; the old run had a value model of its own and a merged model as well."""
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)

    def save(root: Path, seed: int, **more: Any) -> None:
        config = PPOConfig(policy=str(base), output_dir=root, seed=seed, **more)
        with exclusive(root):
            (root / "metrics.jsonl").write_text('{"step": 0, "env/reward_mean": 1.0, "objective/kl": 0.5}\n')
            ppo_results.write_results(config, policies[seed], tiny_tokenizer(), reward_revision=f"r{seed}")

    policies = []
    for seed in (0, 1):
        model = tiny_gpt2()
        model.name_or_path = str(base)
        torch.manual_seed(seed)
        own = tiny_gpt2(5).transformer if seed == 0 else None
        policies.append(Policy(add_lora(model, LoraSettings()), value_model=own))
        torch.nn.init.normal_(policies[-1].v_head.weight)
    return Scene(lambda root: save(root, 0, merge=True), lambda root: save(root, 1))


def a_merged_model(tmp_path: Path) -> Scene:
    """The other way round. Merged once and copied afterwards: it is about the files, and merging takes its time."""
    scene, merged = a_ppo_run(tmp_path), tmp_path / "merged"

    def copied(policy: Policy, directory: Path, weights: PolicyWeights | None = None) -> None:
        shutil.copytree(merged, directory)

    def save(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_results, "merge_policy", copied)
            scene.old(root)

    scene.old(tmp_path / "once")
    (tmp_path / "once" / "merged").rename(merged)
    return Scene(scene.new, save)


def an_evaluation(tmp_path: Path) -> Scene:
    def write(root: Path, reward: float) -> None:
        answers = Answers(("a", "b"), (reward, 0.0), *(3 * ((-1.0, -2.0),)), (1, 1))
        result = evaluate.EvaluationResult(compare(answers, answers), pair_samples(TEXTS, answers, answers))
        with exclusive(root):
            evaluate.write_evaluation(root, result, f"<p>{reward}</p>")

    return Scene(lambda root: write(root, 1.0), lambda root: write(root, 2.0), (evaluate.EVALUATION_FILE,))


def answers_for_people(tmp_path: Path) -> Scene:
    def write(root: Path, seed: int) -> None:
        answers = [wire.new_answer(f"{word} {seed}", policy=word, revision="r", seed=seed) for word in ("one", "two")]
        with exclusive(root):
            rows = [wire.new_answers_row("batch", text, answers, group="g") for text in TEXTS]
            by_people.write_answers(root, rows, {"seed": seed})

    return Scene(lambda root: write(root, 0), lambda root: write(root, 1), (by_people.SETTINGS_FILE,))


def figures_by_people(tmp_path: Path) -> Scene:
    def write(root: Path, wins: float) -> None:
        rate = WinRate(2, wins, (0.0, 1.0), wins, 0.0, 1 - wins)
        ranking: Any = SimpleNamespace(model_dump_json=lambda: json.dumps({"wins": wins}))
        with exclusive(root):
            by_people.write_figures(root, [ranking], by_people.PeopleResult("b", 2, 0, 0, 2, 1, rate, 0.0, {}))

    return Scene(lambda root: write(root, 0.5), lambda root: write(root, 1.0), (by_people.FIGURES_FILE,))


SCENES = (
    an_sft,
    a_reward_model,
    a_ppo_run,
    a_merged_model,
    an_evaluation,
    answers_for_people,
    figures_by_people,
)


def by_folder(found: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    folders: dict[str, dict[str, bytes]] = {}
    for name, content in found.items():
        folders.setdefault(str(Path(name).parent), {})[name] = content
    return folders


def served(root: Path) -> dict[str, bytes]:
    """What the reward service would read."""
    return {path.name: path.read_bytes() for path in model_files(root)}


@pytest.mark.parametrize("make_scene", SCENES)
def test_a_kill_at_any_file_operation_leaves_the_old_result_or_the_new(
    tmp_path: Path, make_scene: Callable[[Path], Scene]
) -> None:
    scene, before, root = make_scene(tmp_path), tmp_path / "before", tmp_path / "run"
    # Files tell where they are: everything is written to one path.
    scene.old(root)
    root.rename(before)
    old = contents(before)
    kills.fresh(before, root)
    old_served = served(root)
    scene.new(root)
    new, new_served = contents(root), served(root)
    assert old != new
    whole = [by_folder(old), by_folder(new)]
    outcomes: list[bool] = []
    for operations in kills.after_each_kill(scene.new, before, root):
        for folder, files in by_folder(contents(root)).items():
            # Without its entry, nothing loads what is in a folder; with it, all must be of one version.
            if any(Path(name).name in scene.entries for name in files):
                assert files in [version.get(folder) for version in whole], (operations, folder)
        assert served(root) in (old_served, new_served), operations
        with exclusive(root):
            found = contents(root)
        assert found in (old, new), operations
        outcomes.append(found == new)
        if operations % 16 == 0:
            scene.new(root)
            assert contents(root) == new
    # Once the new counts, it does for good; and without a kill, it does.
    assert outcomes == sorted(outcomes)
    first_new = outcomes.index(True)
    assert 0 < first_new < len(outcomes) - 3
    print(f"{make_scene.__name__}: {len(outcomes) - 1} kills; the new result counts after {first_new} operations")
    for operations in (first_new - 1, first_new + 2):
        kills.fresh(before, root)
        kills.really_killed(scene.new, root, operations)
        settle(root)
        assert contents(root) == (new if operations >= first_new else old)


def test_a_policy_is_loaded_whole_after_any_kill(tmp_path: Path) -> None:
    scene, before, root = a_ppo_run(tmp_path), tmp_path / "before", tmp_path / "run"
    scene.old(root)
    expected = [load_policy(root).state_dict()]
    root.rename(before)
    kills.fresh(before, root)
    scene.new(root)
    expected.append(load_policy(root).state_dict())
    kills.fresh(before, root)
    total = kills.operations_of(scene.new, root)
    for operations in range(total - 16, total):  # while files are moved
        kills.fresh(before, root)
        assert kills.killed(scene.new, root, operations)
        loaded = load_policy(root).state_dict()
        assert any(all(torch.equal(loaded[name], state[name]) for name in loaded) for state in expected), operations


def test_reading_a_model_that_is_replaced_meanwhile_says_so(tmp_path: Path) -> None:
    scene, root = an_evaluation(tmp_path), tmp_path / "run"
    model = an_sft(tmp_path)
    model.old(root)
    with reading(root):
        scene.new(root)  # another result of the same directory
    with pytest.raises(ConfigError, match="replaced while they were being read"), reading(root):
        model.new(root)


@pytest.mark.parametrize(("found", "enabled"), [("config.json", True), ("adapter_config.json", False)])
def test_adapters_and_a_whole_model_never_replace_each_other(tmp_path: Path, found: str, enabled: bool) -> None:
    config = PPOConfig(policy=str(tmp_path), output_dir=tmp_path / "run", lora=LoraSettings(enabled=enabled))
    ppo_results.require_same_kind(config)
    config.output_dir.mkdir()
    (config.output_dir / found).write_text("{}")
    with pytest.raises(ConfigError, match=r"and this run makes .*: give another --output-dir"):
        ppo_results.require_same_kind(config)


def test_answers_to_rank_are_the_same_after_any_kill(policy_dir: Path, reviews: Path, tmp_path: Path) -> None:
    root, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    config = SampleConfig(
        policy=str(policy_dir),
        to=str(root / "answers.jsonl"),
        output_dir=root,
        k=2,
        n=2,
        dataset=DataSettings(str(reviews), held_out_fraction=0.3),
        prompts=PromptSettings(min_tokens=6, max_tokens=8),
        generation=GenerationSettings(batch_size=2, min_new_tokens=2, max_new_tokens=2),
    )

    def work(_: Path) -> None:
        sample.sample(config, lambda rows: None)

    kills.fresh(empty, root)
    work(root)
    expected = contents(root)
    points = -1
    for _ in kills.after_each_kill(work, empty, root):
        work(root)
        assert contents(root) == expected
        points += 1
    assert points > 5
    kills.fresh(empty, root)
    kills.really_killed(work, root, points - 1)
    work(root)
    assert contents(root) == expected
    print(f"sample: {points} kills")


def test_metrics_lose_no_step_and_repeat_none_when_a_resumed_run_is_killed(tmp_path: Path) -> None:
    before, root = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    with MetricsLog(before, tensorboard=False) as log:
        for step in range(3):
            log.write(step, {"old": step})
    config = dataclasses.replace(PPOConfig(), output_dir=root)

    def resume(_: Path) -> None:
        ppo_setup._prepare_directory(config, 2)
        with MetricsLog(root, tensorboard=False) as log:
            log.write(2, {"new": 2})

    kept = [{"step": step, "old": step} for step in range(2)]
    points = -1
    for _ in kills.after_each_kill(resume, before, root):
        found = read_metrics(root / "metrics.jsonl")
        assert found[:2] == kept
        assert found[2:] in ([], [{"step": 2, "old": 2}], [{"step": 2, "new": 2}])
        if (root / "run.json").exists():
            assert json.loads((root / "run.json").read_text())["seed"] == 0
        points += 1
    assert found[2:] == [{"step": 2, "new": 2}]
    kills.fresh(before, root)
    kills.really_killed(resume, root, points - 1)
    assert read_metrics(root / "metrics.jsonl")[:2] == kept
    print(f"ppo's start: {points} kills")
