"""A policy is tried before it is trained: what it says of itself and does not keep is one line."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from harness.tiny_models import ARCHITECTURES, VOCAB_SIZE, save, tiny_gpt2, tiny_gpt2_dir, tiny_llama, tiny_tokenizer
from harness.tiny_policies import tiny_causal_lm
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.parallel.devices import device_named
from plaudit.policy.adapters import add_lora
from plaudit.policy.checks import check_policy, check_room, check_tokenizer_fits, max_positions
from plaudit.policy.generation import Draws, generate
from plaudit.policy.loading import load_policy
from plaudit.policy.merging import merge_policy
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import ModelNotFound, load_causal_lm, load_tokenizer
from plaudit.policy.saving import check_saved, save_policy
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.settings.policy import GenerationSettings, LoraSettings

SETTINGS = GenerationSettings(min_new_tokens=3, max_new_tokens=9)
QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def policy_of(model: Any) -> Policy:
    return Policy(model, reference=model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_common_policy_passes_and_samples_with_its_cache(architecture: str) -> None:
    assert check_policy(policy_of(ARCHITECTURES[architecture]()), "p")


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_recurrent_or_hybrid_policy_samples_without_a_cache_the_same_in_any_batch(family: str) -> None:
    model, tokenizer = tiny_causal_lm(family), tiny_tokenizer()
    model.generation_config.eos_token_id = 0
    assert not check_policy(policy_of(model), "p")
    draws = Draws.of(SETTINGS, len(QUERIES), seed=0, step=0)
    together = generate_uncached(model, QUERIES, draws, SETTINGS, tokenizer)
    assert together.response_lengths.tolist() == draws.lengths.tolist()
    for i, query in enumerate(QUERIES):
        alone = generate_uncached(model, [query], draws.rows(i, i + 1), SETTINGS, tokenizer)
        assert alone.response_ids[0].tolist() == together.response_ids[i][together.mask[i]].tolist()


def test_without_a_cache_the_samples_are_those_with_one() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    draws = Draws.of(SETTINGS, len(QUERIES), seed=0, step=0)
    cached, uncached = (draw(model, QUERIES, draws, SETTINGS, tokenizer) for draw in (generate, generate_uncached))
    assert torch.equal(cached.response_ids[cached.mask], uncached.response_ids[uncached.mask])
    assert torch.equal(cached.mask, uncached.mask)


def test_a_model_that_reads_padding_or_the_future_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy='p' \(RwkvForCausalLM\) .* beside a longer text"):
        check_policy(policy_of(tiny_causal_lm("rwkv")), "p")
    looks_ahead = tiny_causal_lm("bert", is_decoder=False)
    with pytest.raises(ConfigError, match=r"policy='p' \(BertLMHeadModel\) .* depends on the tokens behind it"):
        check_policy(policy_of(looks_ahead), "p")


@pytest.mark.parametrize("pad_token_id", [0, 3])
def test_a_model_that_reads_padding_is_refused_while_the_embedding_of_its_padding_token_is_still_zero(
    pad_token_id: int,
) -> None:
    model = tiny_causal_lm("recurrent_gemma", pad_token_id=pad_token_id)
    assert not model.get_input_embeddings().weight[pad_token_id].any()
    with pytest.raises(ConfigError, match=r"policy='p' \(RecurrentGemmaForCausalLM\) .* beside a longer text"):
        check_policy(policy_of(model), "p")


def test_damaged_weights_are_told() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(NotFinite, match="policy='p' gives log-probabilities that are not finite"):
        check_policy(policy_of(model), "p")


def test_a_response_ends_at_any_of_the_models_end_tokens() -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    settings = GenerationSettings(min_new_tokens=40, max_new_tokens=40)
    draws = Draws.of(settings, 32, seed=0, step=0)
    model.generation_config.eos_token_id = ends = [0, *range(100, 130)]
    for draw in (generate, generate_uncached):
        samples = draw(model, [[5, 6]] * 32, draws, settings, tokenizer)
        rows = [row[real].tolist() for row, real in zip(samples.response_ids, samples.mask, strict=True)]
        assert all(len(row) == 40 or row[-1] in ends for row in rows)
        assert not any(token in ends for row in rows for token in row[:-1])
        assert sum(row[-1] in ends for row in rows) > 16


def test_a_tokenizer_with_tokens_beyond_the_embedding_or_of_another_model_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizer_fits(tokenizer, tiny_gpt2(), "p")
    check_tokenizer_fits(tokenizer, tiny_gpt2(vocab_size=VOCAB_SIZE + 60), "p")
    with pytest.raises(ConfigError, match="its tokenizer knows 300 tokens and the model 5000"):
        check_tokenizer_fits(tokenizer, tiny_gpt2(vocab_size=5000), "p")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    check_tokenizer_fits(tokenizer, tiny_gpt2(), "p", ["no text holds it"])
    with pytest.raises(ConfigError, match=r"has number 300.*resize_token_embeddings\(301\)"):
        check_tokenizer_fits(tokenizer, tiny_gpt2(), "p", ["one", "<|im_start|>two"])
    tokenizer.pad_token = "<|im_start|>"
    with pytest.raises(ConfigError, match=r"'<\|im_start\|>' of its tokenizer has number 300"):
        check_tokenizer_fits(tokenizer, tiny_gpt2(), "p")
    with pytest.raises(ConfigError, match=r"has embeddings for 0 to 199 alone"):
        check_tokenizer_fits(tiny_tokenizer(), tiny_gpt2(vocab_size=200), "p")


def test_a_prompt_and_a_response_must_have_positions() -> None:
    model = tiny_gpt2()
    assert max_positions(model) == 64
    check_room(model, 64 - 8, SETTINGS, "p")
    with pytest.raises(ConfigError, match=r"policy='p' has 64 positions, and a prompt of 57 tokens .* needs 65"):
        check_room(model, 57, SETTINGS, "p")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_directory_without_tokenizer_files_is_one_line(architecture: str, tmp_path: Path) -> None:
    ARCHITECTURES[architecture]().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_end_and_padding_says_what_to_write(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    save(tiny_gpt2(), tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"neither a pad token nor an end-of-text token: name one as .eos_token."):
        load_tokenizer(tmp_path)


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    model = tiny_llama()
    save(model, tmp_path)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelNotFound, match=r"lack 1 of the weights of a LlamaForCausalLM, .*up_proj\.weight"):
        load_causal_lm(tmp_path)


def test_adapters_that_cannot_be_put_on_a_model_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"lora: no adapters can be put on GPT2LMHeadModel .*--lora.target-modules"):
        add_lora(tiny_gpt2(), LoraSettings(target_modules=("q_proj",)))


def test_a_policy_in_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    save(tiny_gpt2().half(), tmp_path)
    policy = load_policy(tmp_path)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{name}'"):
        device_named(name)


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    policy = Policy(add_lora(tiny_gpt2(), LoraSettings(r=2)))
    save_policy(policy, tmp_path)
    check_saved(policy, tmp_path)
    with torch.no_grad():
        policy.v_head.bias.fill_(1.0)
    with pytest.raises(NotAsSaved, match=r"not written as it should be: bias"):
        check_saved(policy, tmp_path)
    with torch.no_grad():
        policy.v_head.bias.fill_(torch.nan)
    save_policy(policy, tmp_path)
    with pytest.raises(NotFinite, match="bias"):
        check_saved(policy, tmp_path)


def test_a_mixture_of_experts_that_learns_whole_is_read_again_in_the_shapes_of_its_files(tmp_path: Path) -> None:
    policy = Policy(tiny_causal_lm("qwen3_moe"))
    save_policy(policy, tmp_path)
    check_saved(policy, tmp_path)
    with torch.no_grad():
        policy.language_model.model.layers[1].mlp.experts.down_proj[1, 0, 0] += 1
    with pytest.raises(NotAsSaved, match=r"model\.layers\.1\.mlp\.experts\.1\.down_proj\.weight"):
        check_saved(policy, tmp_path)


def test_a_value_model_of_its_own_is_read_again_too(tmp_path: Path) -> None:
    policy = Policy(add_lora(tiny_gpt2(), LoraSettings()), value_model=tiny_gpt2(1).transformer)
    save_policy(policy, tmp_path)
    check_saved(policy, tmp_path)
    tiny_gpt2(2).transformer.save_pretrained(tmp_path / "value_model")
    with pytest.raises(NotAsSaved, match="value_model was not written as it should be"):
        check_saved(policy, tmp_path)


def test_a_merged_model_that_was_written_wrong_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_gpt2_dir(tmp_path / "base")
    policy = load_policy(base, LoraSettings())
    merged = peft.LoraModel.merge_and_unload

    def merged_and_saved_wrong(*arguments: Any, **settings: Any) -> Any:
        model = merged(*arguments, **settings)
        model.save_pretrained = tiny_gpt2(3).save_pretrained
        return model

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", merged_and_saved_wrong)
    with pytest.raises(NotAsSaved, match="the merged model, loaded again, has another"):
        merge_policy(policy, tmp_path / "merged")
