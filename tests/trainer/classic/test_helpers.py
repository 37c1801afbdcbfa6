"""The names that programs import, and the helpers behind them by hand-worked numbers."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import tyro
from transformers import HfArgumentParser

from harness.tiny_models import tiny_classifier_dir, tiny_gpt2, tiny_tokenizer
from plaudit import classic
from plaudit.classic import BestOfNSampler, LengthSampler, PPOConfig, RunningMoments, core, pipeline
from plaudit.errors import ConfigError

NAMES = {
    "plaudit.classic": (
        "PPOTrainer PPOConfig AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead set_seed "
        "create_reference_model PreTrainedModelWrapper BestOfNSampler SUPPORTED_ARCHITECTURES pipeline"
    ),
    "plaudit.classic.core": (
        "LengthSampler set_seed respond_to_batch logprobs_from_logits entropy_from_logits masked_mean masked_var "
        "masked_whiten whiten clip_by_value stack_dicts stats_to_np convert_to_scalar flatten_dict add_suffix "
        "top_k_top_p_filtering WANDB_PADDING"
    ),
    "plaudit.classic.extras": "BestOfNSampler",
    "plaudit.classic.import_utils": (
        "is_xpu_available is_npu_available is_peft_available is_torch_xpu_available is_torch_npu_available "
        "is_diffusers_available is_rich_available is_unsloth_available is_liger_kernel_available is_wandb_available "
        "is_llmblender_available"
    ),
    "plaudit.classic.models": (
        "AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead PreTrainedModelWrapper "
        "create_reference_model SUPPORTED_ARCHITECTURES ValueHead"
    ),
    "plaudit.classic.trainer": "PPOTrainer PPOConfig",
    "plaudit.classic.controllers": "AdaptiveKLController FixedKLController RunningMoments",
}


@pytest.mark.parametrize("module", NAMES)
def test_what_programs_import_from_trl_is_here(module: str) -> None:
    found = importlib.import_module(module)
    for name in NAMES[module].split():
        assert getattr(found, name) is not None


def test_an_import_that_is_still_in_trl_or_gone_says_so() -> None:
    with pytest.raises(ImportError, match="from trl import SFTTrainer"):
        classic.SFTTrainer  # noqa: B018
    with pytest.raises(ImportError, match="leave out what tools wrote"):
        classic.TextEnvironment  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        classic.nothing  # noqa: B018


# Settings


def test_settings_come_from_the_command_line_as_programs_parse_it() -> None:
    arguments = ["--batch_size", "16", "--mini_batch_size", "4", "--gradient_accumulation_steps", "2"]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        [*arguments, "--tracker_kwargs", '{"wandb": {"name": "first"}}', "--kl_penalty", "full", "--max_grad_norm", "1"]
    )
    assert (config.backward_batch_size, config.total_ppo_epochs) == (8, 1250)
    assert config.tracker_kwargs == {"wandb": {"name": "first"}}
    assert (config.kl_penalty, config.max_grad_norm) == ("full", 1.0)
    by_tyro = tyro.cli(PPOConfig, args=["--batch-size", "8", "--mini-batch-size", "2", "--project-kwargs", '{"a": 1}'])
    assert (by_tyro.batch_size, by_tyro.project_kwargs, by_tyro.backward_batch_size) == (8, {"a": 1}, 2)


def test_a_configuration_is_mutable_and_flattens() -> None:
    config = PPOConfig(tracker_kwargs={"wandb": {"name": "first"}}, forward_batch_size=16)
    assert config.mini_batch_size == 16
    config.model_name = "mine"
    assert config.to_dict()["model_name"] == "mine"
    assert config.to_dict()["tracker_kwargs/wandb/name"] == "first"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "mini_batch_size": 4}, "does not divide batch_size=10"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"use_score_norm": True}, "use_score_norm=True"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "no repo_id"),
        ({"log_with": "wandb"}, "needs the package wandb"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**settings)


# Numbers


def test_lengths_are_drawn_below_the_upper_bound() -> None:
    core.set_seed(0)
    sampler = LengthSampler(2, 8)
    assert {sampler() for _ in range(200)} == {2, 3, 4, 5, 6, 7}
    with pytest.raises(ValueError, match=r"LengthSampler\(4, 4\)"):
        LengthSampler(4, 4)


def test_masked_statistics_by_hand() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert core.masked_mean(values, mask).item() == 2
    assert core.masked_mean(values, mask, axis=1).tolist() == [1.5, 3.0]
    assert core.masked_var(values, mask).item() == 1
    assert core.masked_var(values, mask, unbiased=False).item() == pytest.approx(2 / 3)
    assert core.masked_whiten(values, mask)[mask.bool()].tolist() == pytest.approx([-1, 0, 1])
    assert core.masked_whiten(values, mask, shift_mean=False)[mask.bool()].tolist() == pytest.approx([1, 2, 3])
    assert core.whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1, 0, 1])


def test_distributions_by_hand() -> None:
    logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    labels = torch.tensor([[1, 0]])
    assert core.logprobs_from_logits(logits, labels).exp().tolist() == [pytest.approx([0.75, 0.5])]
    assert core.logprobs_from_logits(logits, None, gather=False).exp()[0, 0].tolist() == pytest.approx([0.25, 0.75])
    assert core.entropy_from_logits(logits)[0, 1].item() == pytest.approx(math.log(2))
    kept = core.top_k_top_p_filtering(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_k=0, top_p=0.6)
    assert kept.softmax(-1).tolist() == [pytest.approx([0.625, 0.375, 0.0])]
    kept = core.top_k_top_p_filtering(torch.tensor([[3.0, 2.0, 1.0]]), top_k=1, min_tokens_to_keep=2)
    assert kept[0].isfinite().tolist() == [True, True, False]


def test_dictionaries_by_hand() -> None:
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    with pytest.raises(ValueError, match="'a/b' holds the separator"):
        core.flatten_dict({"a/b": 1})
    assert core.add_suffix({"a": 1}, "_x") == {"a_x": 1}
    stacked = core.stack_dicts([{"a": torch.tensor([1.0])}, {"a": torch.tensor([[2.0, 3.0]])}])
    assert stacked["a"].tolist() == [[1, -1], [2, 3]]
    arrays = core.stats_to_np({"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": 2, "c": "text"})
    assert (arrays["a"].tolist(), arrays["b"], arrays["c"]) == ([1.5], 2.0, "text")
    assert core.convert_to_scalar({"a": np.array([2.0]), "b": torch.tensor(3), "c": np.zeros(2)})["a"] == 2.0
    assert core.clip_by_value(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 1.0]), 2.0).tolist() == [1, 2]


def test_running_moments_by_hand() -> None:
    moments = RunningMoments()
    assert moments.update(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    moments.update(torch.tensor([5.0, 7.0]))
    assert (moments.mean, moments.count, moments.var) == (4.0, 4, pytest.approx(5.0))
    assert moments.std == pytest.approx(math.sqrt(20 / 3))


def test_a_response_has_as_many_tokens_as_were_asked_for() -> None:
    model = classic.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()).eval()
    queries = torch.tensor([[5, 6, 7], [8, 9, 10]])
    core.set_seed(0)
    one = core.respond_to_batch(model, queries, txt_len=4, top_k=3)
    core.set_seed(0)
    assert torch.equal(one, core.respond_to_batch(model, queries, txt_len=4, top_k=3))
    assert one.shape == (2, 4)
    logits = model(input_ids=torch.cat([queries, one], 1))[0][:, 2:-1]
    assert (logits.gather(2, one.unsqueeze(2)) >= logits.topk(3).values[..., -1:]).all(), "each is among the best 3"


# Best of n


def test_the_best_of_n_are_those_with_the_highest_scores_best_first() -> None:
    model = classic.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    seen: list[list[str]] = []

    def judge(texts: list[str]) -> list[float]:
        seen.append(texts)
        return [float(len(text)) for text in texts]

    sampler = BestOfNSampler(model, tiny_tokenizer(), judge, LengthSampler(3, 9), sample_size=6, seed=0, n_candidates=2)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "pad_token_id": 0}
    for queries in (torch.tensor([5, 6]), [5, 6], [torch.tensor([5, 6]), torch.tensor([7])], [[5, 6], [7]]):
        seen.clear()
        chosen = sampler.generate(queries, device="cpu", **options)
        assert len(chosen) == len(seen)
        for best, texts in zip(chosen, seen, strict=True):
            assert len(texts) == 6
            assert [len(text) for text in best] == sorted(map(len, texts), reverse=True)[:2]
    with pytest.raises(ConfigError, match="n_candidates=7"):
        BestOfNSampler(model, tiny_tokenizer(), judge, LengthSampler(3, 9), sample_size=6, n_candidates=7)


# The pipeline


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier_dir(tmp_path_factory.mktemp("judge"))


def test_all_scores_come_in_label_order_as_they_used_to(judge: Path) -> None:
    texts = ["a good movie", "a bad movie", "family"]
    pipe = pipeline("sentiment-analysis", model=str(judge), device="cpu")
    options = {"return_all_scores": True, "function_to_apply": "none", "batch_size": 16}
    outputs = pipe(texts, **options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    for output, row in zip(outputs, logits, strict=True):
        assert [entry["label"] for entry in output] == ["NEGATIVE", "POSITIVE"]
        assert [entry["score"] for entry in output] == pytest.approx(row.tolist(), abs=1e-5)
    (alone,) = pipe(texts[0], **options)
    assert [entry["score"] for entry in alone] == pytest.approx(logits[0].tolist(), abs=1e-5)
    assert pipe.tokenizer.pad_token_id == 0
    at_its_making = pipeline("text-classification", model=str(judge), return_all_scores=True, device="cpu")
    assert [entry["label"] for entry in at_its_making("family")[0]] == ["NEGATIVE", "POSITIVE"]


def test_one_label_and_other_tasks_are_as_transformers_has_them(judge: Path, tmp_path: Path) -> None:
    (top,) = pipeline("sentiment-analysis", model=str(judge), device="cpu")(["family"])
    assert set(top) == {"label", "score"}
    tiny_gpt2().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    other = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(other, transformers.TextGenerationPipeline)
