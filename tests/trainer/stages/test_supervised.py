"""Stages 1 and 2 as long runs: what stops them, where they go on, and what they say of what they saved."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

from harness.machine.disks import fill, small_disk
from harness.runs import TrainerProcess
from harness.tiny_models import save, tiny_classifier_dir, tiny_gpt2, tiny_wordpiece_tokenizer
from plaudit import cli
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.run.checkpoint import list_checkpoints
from plaudit.run.runtime import StopRequested
from plaudit.run.storage import NotWritten
from plaudit.settings.data import DataSettings
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig
from plaudit.settings.supervised import ModelSizes, OptimizerSettings
from plaudit.stages import ranked_answers, reward_model, sft, supervised

Stage = tuple[Callable[[Any], Any], Any]
STEPS = 50


@pytest.fixture(params=["sft", "classifier", "pairwise"])
def stage(request: pytest.FixtureRequest, reviews: Path, tmp_path: Path) -> Stage:
    """Each of the trainings, with several epochs and dropout where there is some."""
    return stage_of(request.param, reviews, tmp_path)


def stage_of(name: str, reviews: Path, tmp_path: Path, **settings: Any) -> Stage:
    optimizer = OptimizerSettings(learning_rate=3e-3, batch_size=16, max_steps=STEPS, muon_learning_rate=1e-2)
    common: dict[str, Any] = {
        "from_scratch": True,
        "output_dir": tmp_path / "out",
        "dataset": DataSettings(str(reviews)),
    }
    if name == "sft":
        sizes = ModelSizes("gpt2", vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=32)
        optimizer = dataclasses.replace(optimizer, batch_size=128)
        return sft.run, SFTConfig(**common | {"sizes": sizes, "optimizer": optimizer, "max_length": 32} | settings)
    sizes = ModelSizes("distilbert", vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=48)
    if name == "pairwise":
        ranked = tmp_path / "ranked.jsonl"
        answers = [" is wonderful and great.", " is a film.", " is terrible and awful."]
        rows = [{"prompt": f"Film number {i}", "answers": answers} for i in range(80)]
        ranked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common |= {"kind": "pairwise", "ranked": str(ranked), "allow_chance": True, "scale_on": "none"}
    return reward_model.run, RewardModelConfig(
        **common | {"sizes": sizes, "optimizer": optimizer, "max_length": 48} | settings
    )


def trainer_of(config: Any) -> Any:
    """The trainer's class that computes the loss."""
    if isinstance(config, SFTConfig):
        return trl.SFTTrainer
    return ranked_answers.RankingTrainer if config.kind == "pairwise" else transformers.Trainer


def at_step(step: int, action: Callable[[], None]) -> Any:
    """Calls `action` when so many steps are done."""

    class At(supervised._Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()
            super().on_step_end(args, state, control, **kwargs)

    return At


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("step", [7, 17, STEPS])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights_to_the_bit(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, config = stage
    run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed"))
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "_Watch", at_step(step, functools.partial(signal.raise_signal, signal.SIGTERM)))
        with pytest.raises(StopRequested) as stopped:
            run(config)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    (checkpoint,) = list_checkpoints(config.output_dir / "checkpoints")
    assert checkpoint.step == step
    assert f"the newest whole checkpoint is {checkpoint.directory}" in str(stopped.value.__notes__)
    with pytest.raises(ConfigError, match=rf"unfinished run with checkpoints up to step {step}; go on with --resume"):
        run(config)
    run(dataclasses.replace(config, resume="auto"))
    ours, expected = weights(config.output_dir), weights(tmp_path / "undisturbed")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not (config.output_dir / "checkpoints").exists()


def test_other_texts_are_not_gone_on_with(
    stage: Stage, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "_Watch", at_step(5, functools.partial(signal.raise_signal, signal.SIGINT)))
        with pytest.raises(StopRequested):
            run(config)
    source = Path(getattr(config, "ranked", None) or reviews)
    before = source.read_text()
    try:
        source.write_text(before.replace("ilm", "ilm of old"))
        with pytest.raises(ConfigError, match=r"has changed since: the .*: \d+ rows, sha256 \w+ then, \d+ rows, sha"):
            run(dataclasses.replace(config, resume="auto"))
    finally:
        source.write_text(before)
    with pytest.raises(ConfigError, match=r"cannot resume with other settings: max_length: \d+ -> 20"):
        run(dataclasses.replace(config, resume="auto", max_length=20))


def test_a_gradient_that_is_not_finite_moves_no_weight_and_nothing_is_saved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage

    class Broken(supervised._Watch):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p.grad for p in self._trainer.model.parameters() if p.grad is not None).fill_(torch.nan)
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    monkeypatch.setattr(supervised, "_Watch", Broken)
    with pytest.raises(NotFinite, match="gradient of step 3 is not finite"):
        run(config)
    assert {path.name for path in config.output_dir.iterdir()} <= {".lock", "checkpoints"}


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_changes_next_to_nothing(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage
    optimizer = dataclasses.replace(config.optimizer, max_steps=3, muon_learning_rate=None, batch_size=16)
    config = dataclasses.replace(config, optimizer=optimizer)
    run(config)
    limit = 30 if getattr(config, "kind", "") == "pairwise" else 10
    trainer = trainer_of(config)
    forward = trainer.compute_loss

    def too_large(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", too_large)
    other = dataclasses.replace(config, output_dir=tmp_path / "halved")
    with pytest.warns(UserWarning, match="out of memory: from now on 8 samples"):
        run(other)
    ours, expected = weights(other.output_dir), weights(config.output_dir)
    # Dropout draws for fewer rows at once; what has none is the same but for rounding.
    tolerance = 1e-5 if isinstance(config, SFTConfig) else 2e-2
    assert max((ours[name] - expected[name]).abs().max().item() for name in expected) < tolerance


def test_memory_that_is_full_for_good_leaves_a_checkpoint(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage_of("sft", reviews, tmp_path)
    forward, calls = trl.SFTTrainer.compute_loss, iter(range(1000))

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) >= 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(trl.SFTTrainer, "compute_loss", full)
        with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError) as error:
            run(config)
    (checkpoint,) = list_checkpoints(config.output_dir / "checkpoints")
    assert checkpoint.step == 4
    assert "go on with --resume auto" in str(error.value.__notes__)
    run(dataclasses.replace(config, resume="auto"))
    run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed"))
    ours, expected = weights(config.output_dir), weights(tmp_path / "undisturbed")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["sft", "classifier"])
def test_a_full_disk_ends_the_stage_with_74_and_the_command_that_goes_on(
    reviews: Path, tmp_path: Path, name: str
) -> None:
    _, config = stage_of(name, reviews, tmp_path, checkpoint_every=20)
    command = "sft" if name == "sft" else "reward-model"
    with small_disk(config.output_dir, 4096) as disk:
        filler = fill(disk, but_kib=40)
        code, stderr = TrainerProcess(config, command=command).end()
        assert code == 74, stderr
        place = config.output_dir / "checkpoints" / ".step-000020.writing"
        assert f"plaudit {command}: cannot write {place}: No space left on device; " in stderr
        assert "--resume auto" in stderr
        assert "Traceback" not in stderr
        filler.unlink()
        code, stderr = TrainerProcess(config, "--resume", "auto", command=command).end()
        assert code == 0, stderr
        assert weights(config.output_dir)


def test_a_directory_that_cannot_be_written_to_is_told_before_anything_is_read(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = stage
    (tmp_path / "file").touch()
    dataset = dataclasses.replace(config.dataset, data="nothing.csv")
    with pytest.raises(NotWritten, match=f"cannot write {tmp_path / 'file'}"):
        run(dataclasses.replace(config, output_dir=tmp_path / "file", dataset=dataset))


def test_everything_is_written_inside_the_directory_and_it_may_be_the_current_one(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage
    here = tmp_path / "parent" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    optimizer = dataclasses.replace(config.optimizer, max_steps=2)
    run(dataclasses.replace(config, output_dir=Path(), optimizer=optimizer))
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["here"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in here.iterdir()}
    assert not [path for path in here.iterdir() if path.suffix == ".writing" or path.name == "checkpoints"]


def test_weights_of_an_earlier_model_do_not_stay_beside_the_new_ones(reviews: Path, tmp_path: Path) -> None:
    run, config = stage_of("sft", reviews, tmp_path)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_steps=1))
    tiny_gpt2().save_pretrained(config.output_dir, max_shard_size="20KB")
    assert len(list(config.output_dir.glob("model-*.safetensors"))) > 1
    run(config)
    assert [path.name for path in config.output_dir.glob("model*")] == ["model.safetensors"]
    (config.output_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds adapters"):
        run(config)


def test_a_classifier_that_cannot_be_loaded_again_is_not_saved(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage_of("classifier", reviews, tmp_path)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_steps=1))
    written = transformers.PreTrainedModel.save_pretrained

    def damaged(self: Any, directory: Any, **kwargs: Any) -> None:
        state = kwargs.pop("state_dict", None) or self.state_dict()
        written(self, directory, state_dict={name: 2 * tensor for name, tensor in state.items()}, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedModel, "save_pretrained", damaged)
        patched.setattr(supervised._Keeper, "save", lambda *_, **__: None)
        with pytest.raises(NotAsSaved, match="the model is not saved: loaded again, it is off by"):
            run(config)
    assert not (config.output_dir / "config.json").exists()


def test_weights_that_float16_cannot_hold_are_not_saved(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = stage_of("sft", reviews, tmp_path, half_precision=True)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_steps=1))
    trained = sft.train  # type: ignore[attr-defined]

    def huge(*args: Any) -> Any:
        model = trained(*args)
        with torch.no_grad():
            next(model.parameters())[0, 0] = 1e5
        return model

    monkeypatch.setattr(sft, "train", huge)
    with pytest.raises(NotFinite, match=r"the model is not saved: its weight .* \(torch.float16\) is not finite"):
        run(config)
    assert not (config.output_dir / "config.json").exists()


@pytest.mark.parametrize("kind", ["classifier", "pairwise"])
def test_a_start_model_in_half_precision_trains_in_full(kind: str, reviews: Path, tmp_path: Path) -> None:
    run, config = stage_of(kind, reviews, tmp_path, from_scratch=False, model="imdb-distilbert-mini")
    optimizer = OptimizerSettings(learning_rate=1e-3, batch_size=8, max_steps=25)
    judged = run(dataclasses.replace(config, optimizer=optimizer))
    assert all(found.accuracy > 0.9 for found in judged.values())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(config.output_dir)
    assert model.dtype == torch.float32
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("kind", ["classifier", "pairwise"])
def test_what_the_start_model_was_for_does_not_survive(
    kind: str, problem_type: str, reviews: Path, tmp_path: Path
) -> None:
    labels = ("A",) if problem_type == "regression" else ("A", "B", "C")
    start = tiny_classifier_dir(tmp_path / "start", labels, family="bert")
    config_file = start / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"problem_type": problem_type}))
    run, config = stage_of(kind, reviews, tmp_path, from_scratch=False, model=str(start))
    run(dataclasses.replace(config, optimizer=OptimizerSettings(batch_size=8, max_steps=2)))
    saved = json.loads((config.output_dir / "config.json").read_text())
    assert saved.get("problem_type") == ("single_label_classification" if kind == "classifier" else None)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(config.output_dir)
    assert model.config.num_labels == (2 if kind == "classifier" else 1)
    if kind == "classifier":
        assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


def test_a_text_longer_than_the_start_models_positions_is_told_at_the_start(reviews: Path, tmp_path: Path) -> None:
    start = tiny_classifier_dir(tmp_path / "start", family="roberta")
    _, config = stage_of("classifier", reviews, tmp_path, from_scratch=False, model=str(start), max_length=65)
    with pytest.raises(ConfigError, match=r"can't judge a text of max_length=65 tokens .* names 65 positions"):
        reward_model.run(config)
    _, config = stage_of("sft", reviews, tmp_path, from_scratch=False, model=str(save(tiny_gpt2(), tmp_path / "lm")))
    with pytest.raises(ConfigError, match=r"max_length=65: model=.* has 64 positions"):
        sft.run(dataclasses.replace(config, max_length=65))


def test_a_start_model_that_reads_padding_is_told_at_the_start(reviews: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_wordpiece_tokenizer()
    shape = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "initializer_range": 0.5}
    xlnet = transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape)
    )
    start = save(xlnet, tmp_path / "start", tokenizer)
    _, config = stage_of("classifier", reviews, tmp_path, from_scratch=False, model=str(start))
    with pytest.raises(ConfigError, match="judges a text otherwise beside a longer one than alone"):
        reward_model.run(config)


def test_a_classifiers_body_is_not_made_up(reviews: Path, tmp_path: Path) -> None:
    start = tiny_classifier_dir(tmp_path / "start", family="bert")
    state = load_file(start / "model.safetensors")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(start)
    lacking = {name: tensor for name, tensor in state.items() if "layer.1." not in name}
    model.save_pretrained(start, state_dict=lacking)
    _, config = stage_of("classifier", reviews, tmp_path, from_scratch=False, model=str(start))
    with pytest.raises(ConfigError, match=r"its files lack .* of the weights of a BertForSequenceClassification"):
        reward_model.run(config)


def test_adapters_are_no_start_for_a_reward_model_and_it_says_how_to_go_on(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    _, config = stage_of("classifier", reviews, tmp_path, from_scratch=False, model=str(tmp_path / "adapters"))
    with pytest.raises(ConfigError, match="merge them into their base first"):
        reward_model.run(config)


def test_a_launcher_of_several_processes_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = stage
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process, and a launcher started 2"):
        run(config)


def test_a_console_of_few_characters_does_not_end_a_stage(tmp_path: Path) -> None:
    texts = [f"Ein schöner Film – 映画 \U0001f389 número {i} " + "mit vielen Wörtern " * 12 for i in range(80)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    flags = {"--data": tmp_path / "texts.txt", "--output-dir": tmp_path / "out", "--optimizer.max-steps": 1}
    sizes = {"--sizes.vocab-size": 300, "--sizes.hidden-size": 16, "--sizes.layers": 1, "--sizes.heads": 1}
    named = [str(word) for flag in ({"--max-length": 32} | flags | sizes).items() for word in flag]
    argv = ["plaudit", "sft", "--from-scratch", *named]
    code = f"import sys; from plaudit import cli; sys.argv = {argv!r}; cli.main()"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "sft.json").read_text(encoding="utf-8"))
    assert len(report["samples"]) > 1


def test_the_help_says_how_to_go_on() -> None:
    for name in ("sft", "reward-model"):
        assert cli.resume_command(name, ["--output-dir", "x"]) is not None
    assert cli.resume_command("evaluate", ["--output-dir", "x"]) is None
