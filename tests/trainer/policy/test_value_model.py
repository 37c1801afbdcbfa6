"""Where values come from: the policy's states, a copy, or another causal model with the same vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from harness.tiny_models import VOCAB_SIZE, save, tiny_gpt2, tiny_gpt2_dir, tiny_tokenizer, tiny_wordpiece_tokenizer
from plaudit.errors import ConfigError
from plaudit.policy.checks import check_room
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import ModelNotFound
from plaudit.policy.samples import Samples
from plaudit.policy.saving import check_saved, save_policy
from plaudit.policy.value_model import require_same_vocabulary
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings

LORA = LoraSettings(r=4, alpha=8)
QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]


def samples() -> Samples:
    return Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)


def reward_model(family: str, labels: int = 1) -> Any:
    torch.manual_seed(3)
    if family == "gpt2":
        shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64, "pad_token_id": 0}
        config = GPT2Config(vocab_size=VOCAB_SIZE, num_labels=labels, initializer_range=0.5, **shape)
        return GPT2ForSequenceClassification(config).eval()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    if family == "bert":
        config = BertConfig(vocab_size=VOCAB_SIZE, num_labels=1, initializer_range=0.5, **shape)
        return BertForSequenceClassification(config).eval()
    shape |= {"vocab_size": VOCAB_SIZE, "num_labels": labels, "max_position_embeddings": 64, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**shape, initializer_range=0.5)).eval()


def scores(model: Any, row: int) -> Tensor:
    """The reward model's score of a query and each beginning of its response: no padding, one text at a time."""
    texts = [QUERIES[row] + RESPONSES[row][:end] for end in range(len(RESPONSES[row]))]
    with torch.no_grad():
        states = [model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0, -1] for text in texts]
        return torch.stack([model.score(state)[0] for state in states])


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_model_starts_with_its_score_of_what_is_written_as_the_value(
    family: str, lora: bool, tmp_path: Path
) -> None:
    judge = reward_model(family)
    judge.save_pretrained(tmp_path / "judge")
    settings = ModelSettings(value_model=str(tmp_path / "judge"), value_model_lora=lora)
    policy = load_policy(tiny_gpt2_dir(tmp_path / "base"), LORA, settings).eval()
    values = policy(samples()).values
    for row, response in enumerate(RESPONSES):
        assert torch.allclose(values[row, : len(response)], scores(judge, row), atol=1e-5)
    learning = [name for name, p in policy.named_parameters() if p.requires_grad and name.startswith("value_model")]
    assert all("lora_" in name for name in learning) == lora
    policy(samples()).values.sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in policy.value_model.parameters())

    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in learning:
                parameter.add_(0.1)
    (tmp_path / "run").mkdir()
    save_policy(policy, tmp_path / "run")
    check_saved(policy, tmp_path / "run")
    again = load_policy(tmp_path / "run", LORA, settings).eval()
    assert torch.equal(again(samples()).values, policy(samples()).values)
    assert not torch.allclose(again(samples()).values, values)
    assert [n for n, p in again.named_parameters() if p.requires_grad and n.startswith("value_model")] == learning
    # Elsewhere the policy is loaded for its texts, and its value head belongs to other states.
    assert not load_policy(tmp_path / "run")(samples()).values.any()


def test_a_causal_model_without_a_score_head_starts_with_values_of_0(tmp_path: Path) -> None:
    other = save(tiny_gpt2(7), tmp_path / "other")
    policy = load_policy(tiny_gpt2_dir(tmp_path / "base"), LORA, ModelSettings(value_model=str(other)))
    assert not policy(samples()).values.any()
    assert torch.equal(policy.value_model.wte.weight, tiny_gpt2(7).transformer.wte.weight)


def test_a_copy_is_the_policys_start_under_the_settings_new_and_earlier_name(tmp_path: Path) -> None:
    base = tiny_gpt2_dir(tmp_path / "base")
    new, earlier = (
        load_policy(base, LORA, settings)
        for settings in (ModelSettings(value_model="copy"), ModelSettings(separate_value_model=True))
    )
    start = tiny_gpt2().transformer.state_dict()
    for policy in (new, earlier):
        assert all(torch.equal(tensor, start[name]) for name, tensor in policy.value_model.state_dict().items())
        assert all(parameter.requires_grad for parameter in policy.value_model.parameters())
    small = load_policy(base, LORA, ModelSettings(value_model="copy", value_model_lora=True, dtype="bf16"))
    assert {p.dtype for p in small.value_model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in small.parameters() if p.requires_grad} == {torch.float32}
    whole = load_policy(base, LORA, ModelSettings(value_model="copy", dtype="bf16"))
    assert {p.dtype for p in whole.value_model.parameters()} == {torch.float32}, "what learns is fp32"
    for policy in (small, whole):
        assert policy(samples()).values.dtype == torch.float32


def test_what_cannot_give_values_is_refused_in_one_line(tmp_path: Path) -> None:
    base = tiny_gpt2_dir(tmp_path / "base")
    reward_model("bert").save_pretrained(tmp_path / "encoder")
    reward_model("gpt2", labels=2).save_pretrained(tmp_path / "two")
    for directory, problem in (
        ("encoder", "no left-to-right model .* tokens that are not written yet"),
        ("two", "scores 2 labels"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            load_policy(base, LORA, ModelSettings(value_model=str(tmp_path / directory)))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelNotFound, match=r"model\.value_model=.*no such directory"):
        load_policy(base, LORA, ModelSettings(value_model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="separate_value_model=True means value_model=copy"):
        ModelSettings(separate_value_model=True, value_model="elsewhere")
    with pytest.raises(ConfigError, match="needs a value model of its own"):
        ModelSettings(value_model_lora=True)


def test_another_vocabulary_is_refused_and_one_with_more_tokens_is_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name, its in (("same", tiny_tokenizer()), ("more", tiny_tokenizer()), ("other", tiny_wordpiece_tokenizer())):
        if name == "more":
            its.add_special_tokens({"pad_token": "<pad>"})
        tiny_gpt2_dir(tmp_path / name)
        its.save_pretrained(tmp_path / name)
    model = tiny_gpt2().transformer
    require_same_vocabulary(tmp_path / "same", model, tokenizer, VOCAB_SIZE)
    require_same_vocabulary(tmp_path / "more", model, tokenizer, VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"another vocabulary than the policy: .* of the policy's 300 tokens"):
        require_same_vocabulary(tmp_path / "other", model, tokenizer, VOCAB_SIZE)
    with pytest.raises(ConfigError, match="embeddings for 300 tokens, and the policy writes 301"):
        require_same_vocabulary(tmp_path / "same", model, tokenizer, VOCAB_SIZE + 1)
    with pytest.raises(ConfigError, match=r"model\.value_model='judge' has 64 positions"):
        check_room(model, 60, GenerationSettings(), "judge", setting="model.value_model")
