"""Models with a value head: where they come from, what they hand to the step, and what is found again after saving."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from harness.tiny_models import ARCHITECTURES, tiny_gpt2, tiny_gpt2_dir, tiny_llama
from plaudit.classic import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from plaudit.errors import ConfigError
from plaudit.policy.loading import load_policy
from plaudit.settings.policy import LoraSettings

LORA = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_gpt2_dir(tmp_path / "policy")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_pass_gives_the_models_logits_and_a_value_for_each_state(architecture: str) -> None:
    bare = ARCHITECTURES[architecture]()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(bare).eval()
    logits, loss, values = model(input_ids=IDS, labels=IDS)
    expected = bare(input_ids=IDS, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(values, model.v_head.summary(expected.hidden_states[-1]).squeeze(-1))


def test_the_cache_is_the_fourth_result_where_it_is_asked_for(directory: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory)).eval()
    whole = model(input_ids=IDS)[0]
    cache = model(input_ids=IDS[:, :3], return_past_key_values=True)[3]
    rest = model(input_ids=IDS[:, 3:], past_key_values=cache)[0]
    torch.testing.assert_close(rest[:, 0], whole[:, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_is_saved_is_loaded_again_value_head_included(
    directory: Path, tmp_path: Path, lora: peft.LoraConfig | None
) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(directory), peft_config=lora, v_head_init_strategy="normal", v_head_initializer_range=0.5
    )
    assert model.v_head.summary.weight.std() > 0.2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"), is_trainable=True)
    for mine, other in zip(model.eval()(input_ids=IDS), again.eval()(input_ids=IDS), strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other)
    assert any(p.requires_grad for p in again.pretrained_model.parameters())
    policy = load_policy(tmp_path / "saved", LoraSettings(enabled=lora is not None))
    torch.testing.assert_close(policy.v_head.weight, model.v_head.summary.weight)


def test_a_value_head_that_trl_saved_is_found(directory: Path) -> None:
    head = {"weight": torch.full((1, 32), 0.25), "bias": torch.tensor([3.0])}
    torch.save({f"v_head.summary.{n}": t for n, t in head.items()}, directory / "pytorch_model.bin")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory))
    assert torch.equal(model.v_head.summary.weight, head["weight"])
    assert model.v_head.summary.bias.item() == 3.0


def test_a_value_head_in_a_shard_is_found(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    head = {"v_head.summary.weight": torch.full((1, 32), 0.5), "v_head.summary.bias": torch.tensor([1.0])}
    save_file(head, directory / "model-00002-of-00002.safetensors")
    names = transformers.AutoModelForCausalLM.from_config(tiny_gpt2().config).state_dict()
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(head, "model-00002-of-00002.safetensors")
    index = transformers.utils.SAFE_WEIGHTS_INDEX_NAME
    import json

    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory))
    assert model.v_head.summary.bias.item() == 1.0


def test_weights_are_fp32_unless_the_program_says_otherwise(directory: Path) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(directory).bfloat16()
    half.save_pretrained(directory)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(str(directory)).pretrained_model.dtype == torch.float32
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory), torch_dtype=torch.bfloat16)
    assert model.pretrained_model.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32


def test_eight_bits_are_asked_for_by_the_old_argument(directory: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory), load_in_8bit=True, peft_config=LORA)
    assert model.is_loaded_in_8bit
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name or "v_head" in name for name in learning)


def test_checkpointing_is_switched_by_the_names_that_programs_use(directory: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(directory), peft_config=LORA)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    bare = model.pretrained_model.get_base_model()
    assert bare.transformer.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not bare.transformer.gradient_checkpointing


def test_a_reference_is_a_frozen_copy() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    reference = create_reference_model(model)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in reference.parameters()}
    torch.testing.assert_close(reference(input_ids=IDS)[0], model.eval()(input_ids=IDS)[0])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_shared_layers_are_the_same_tensors_and_learn_no_longer(make: type) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make())
    reference = create_reference_model(model, num_shared_layers=1)
    own, copied = dict(model.named_parameters()), dict(reference.named_parameters())
    shared = {name for name in own if own[name] is copied[name]}
    assert {name for name in own if not own[name].requires_grad} == shared
    first = "transformer.h.0." if make is tiny_gpt2 else "model.layers.0."
    assert shared == {n for n in own if first in n or "wte" in n or "wpe" in n or "embed_tokens" in n}
    if make is tiny_gpt2:  # its head is the embedding
        assert reference.pretrained_model.lm_head.weight is own["pretrained_model.transformer.wte.weight"]


def test_layers_that_are_not_there_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="num_shared_layers=9"):
        create_reference_model(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()), num_shared_layers=9)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    create_reference_model(model, num_shared_layers=1, pattern="h.{layer}.attn")


def test_reward_adapters_score_every_token_and_leave_the_policy_as_it_was(directory: Path, tmp_path: Path) -> None:
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    judge.config.pad_token_id = 0
    settings = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    judge = peft.get_peft_model(judge, settings).eval()
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.1)
    judge.save_pretrained(tmp_path / "judge")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(directory), peft_config=LORA, reward_adapter=str(tmp_path / "judge")
    )
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    before = model.eval()(input_ids=IDS)[0]
    scores = model.compute_reward_score(IDS, torch.ones_like(IDS))
    assert scores.shape == (2, 4, 2)
    torch.testing.assert_close(scores[:, -1], judge(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    torch.testing.assert_close(model(input_ids=IDS)[0], before)
    assert torch.equal(model.compute_reward_model_score(IDS, torch.ones_like(IDS)), scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_config": {"r": 4}}, "must be a peft.PeftConfig"),
        ({"v_head_init_strategy": "zeros"}, "v_head_init_strategy='zeros'"),
        ({"reward_adapter": "judge"}, "reward_adapter needs a model with adapters"),
        ({"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "learns a prompt"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(
    directory: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(directory), **options)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="from_pretrained of a int"):
        AutoModelForCausalLMWithValueHead.from_pretrained(3)
    with pytest.raises(ConfigError, match="no reward adapter"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()).compute_reward_score(IDS)


def test_encoder_decoder_models_are_refused_with_what_to_use() -> None:
    with pytest.raises(ConfigError, match="use AutoModelForCausalLMWithValueHead"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained("t5-small")


# The published recipe's line on GPT-2's sizes; nothing is computed on the meta device.
def test_the_recipes_adapters_are_590_593_of_125_030_401_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        bare = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    with torch.device("meta"):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(bare, peft_config=lora)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (learning, sum(p.numel() for p in model.parameters())) == (590_593, 125_030_401)
    model.print_trainable_parameters()
    assert "590,593" in capsys.readouterr().out
