"""The policy: log-probabilities that no padding moves, a reference that is not the policy, files that others load."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from harness.tiny_models import ARCHITECTURES, save, tiny_gpt2, tiny_gpt2_dir, tiny_llama, tiny_tokenizer
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora
from plaudit.policy.generation import Draws, generate
from plaudit.policy.loading import load_policy
from plaudit.policy.merging import merge_adapters, merge_policy
from plaudit.policy.model import Policy
from plaudit.policy.packing import packed, worth_packing
from plaudit.policy.pretrained import ModelNotFound, load_tokenizer
from plaudit.policy.samples import Samples
from plaudit.policy.saving import save_policy
from plaudit.policy.transformer import fuse_activations
from plaudit.ppo import distributions
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
LORA = LoraSettings(r=4, alpha=8)


def samples() -> Samples:
    return Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)


def stir(module: nn.Module, seed: int = 1) -> None:
    """Moves every trainable weight, as an update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def lora_policy(architecture: str = "gpt2") -> Policy:
    policy = Policy(add_lora(ARCHITECTURES[architecture](), LORA))
    stir(policy)
    return policy


def plain_logprobs(model: Any, query: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """One row, no padding, the whole log-softmax: nothing to get wrong."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([query + response])).logits[0] / temperature
    before = logits[len(query) - 1 : -1].log_softmax(-1)
    return before[torch.arange(len(response)), response]


# Defect 7: left padding without position ids shifted GPT-2's log-probabilities.
@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padded_rows_have_the_logprobs_that_each_has_alone(architecture: str, temperature: float) -> None:
    policy = lora_policy(architecture).eval()
    outputs = policy(samples(), temperature=temperature)
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        expected = plain_logprobs(policy.model, query, response, temperature)
        assert torch.allclose(outputs.logprobs[i, : len(response)], expected, atol=1e-5)
        assert not outputs.logprobs[i, len(response) :].any()
        assert not outputs.values[i, len(response) :].any()


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_company_and_padding_change_nothing_about_a_sample(architecture: str) -> None:
    policy = lora_policy(architecture).eval()
    together = policy(samples())
    padded = Samples.concatenate([samples(), Samples.from_lists([[1] * 9], [[2] * 9], pad_token_id=0)])
    for other, rows in ((policy(samples().select([2, 0, 1])), [2, 0, 1]), (policy(padded), [0, 1, 2])):
        for place, row in enumerate(rows):
            width = len(RESPONSES[row])
            for name in ("logprobs", "values", "entropy"):
                expected = getattr(together, name)[row, :width]
                assert torch.allclose(getattr(other, name)[place, :width], expected, atol=1e-5), name


@pytest.mark.usefixtures("layout")
def test_the_value_of_a_token_is_that_of_the_state_before_it() -> None:
    policy = lora_policy().eval()
    values = policy(samples()).values
    other = [[*response[:-1], 99] for response in RESPONSES]
    assert torch.equal(policy(Samples.from_lists(QUERIES, other, pad_token_id=0)).values, values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_find_their_layers_and_start_as_the_reference(architecture: str) -> None:
    policy = Policy(add_lora(ARCHITECTURES[architecture](), LORA)).eval()
    assert any("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert all("lora_" in name or name.startswith("v_head") for name, p in policy.named_parameters() if p.requires_grad)
    assert torch.equal(policy(samples()).logprobs, policy.reference_logprobs(samples()))


# Defect 6: "reference" responses under LoRA came from the policy.
@pytest.mark.usefixtures("layout")
def test_the_reference_is_the_base_model_however_far_the_adapters_have_moved() -> None:
    policy, base = lora_policy().eval(), tiny_gpt2()
    expected = [plain_logprobs(base, q, r) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    reference = policy.reference_logprobs(samples())
    for i, logprobs in enumerate(expected):
        assert torch.allclose(reference[i, : len(logprobs)], logprobs, atol=1e-5)
    assert (policy(samples()).logprobs - reference).abs().max() > 1e-2

    prompt = torch.tensor([QUERIES[0]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with policy.as_reference() as model:
        written = model.generate(input_ids=prompt, **greedy)
    assert torch.equal(written, base.generate(input_ids=prompt, **greedy))


def test_a_full_policy_is_held_to_a_frozen_copy_and_without_one_says_so() -> None:
    policy = Policy(tiny_gpt2(), reference=tiny_gpt2())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    mib = sum(parameter.numel() for parameter in policy.parameters()) * 4 / 2**20
    assert f"frozen copy of the weights: another {mib:.0f} MiB" in policy.reference_line()
    before = policy.reference_logprobs(samples())
    stir(policy)
    assert torch.equal(policy.reference_logprobs(samples()), before)
    assert not torch.equal(policy(samples()).logprobs, before)
    with pytest.raises(ConfigError, match="frozen copy"):
        Policy(tiny_gpt2()).reference_logprobs(samples())


def test_train_mode_scores_as_eval_mode_does_though_the_model_was_configured_with_dropout() -> None:
    for model in (tiny_gpt2(), tiny_llama(attention_dropout=0.5)):
        policy = Policy(add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.5)))
        stir(policy)
        assert torch.equal(policy.train()(samples()).logprobs, policy.eval()(samples()).logprobs)
    assert tiny_gpt2().config.resid_pdrop == 0.1, "the saved configuration keeps its dropout"


def test_a_compiled_policy_has_the_same_numbers_and_generates_without_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr("plaudit.policy.loading.COMPILER", compiler)
    plain, fast = (load_policy(tiny_gpt2_dir(tmp_path), LORA, ModelSettings(compile=on)) for on in (False, True))
    for policy in (plain, fast):
        stir(policy)
        policy.train()(samples()).logprobs.sum().backward()
    assert compiled
    assert torch.allclose(fast(samples()).logprobs, plain(samples()).logprobs, atol=1e-6)
    assert torch.allclose(fast.reference_logprobs(samples()), plain.reference_logprobs(samples()), atol=1e-6)
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)

    compiled.clear()
    settings = GenerationSettings()
    drawn = Draws.of(settings, len(QUERIES), seed=0, step=0)
    with fast.generating():
        responses = generate(fast.language_model, QUERIES, drawn, settings, tiny_tokenizer())
    assert not compiled
    expected = generate(plain.language_model, QUERIES, drawn, settings, tiny_tokenizer())
    assert torch.equal(responses.response_ids, expected.response_ids)


def test_the_language_model_head_sees_response_positions_alone() -> None:
    policy = lora_policy()
    shapes = []
    policy.language_model.get_output_embeddings().register_forward_hook(lambda *args: shapes.append(args[2].shape))
    policy(samples())
    assert shapes == [torch.Size([1, sum(map(len, RESPONSES)), 300])]


def test_no_log_softmax_of_the_vocabulary_is_kept_for_the_backward_pass() -> None:
    policy = lora_policy()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(samples())
    # One copy of the logits: the backward pass finds the softmax again.
    assert [tuple(t.shape) for t in kept if t.shape[-1] == 300 and t.ndim < 4].count((8, 300)) == 1


# Defect 4: training forwards ran in eval mode, so that gradient checkpointing never fired.
def test_gradient_checkpointing_recomputes_in_updates_and_is_off_in_rollouts(tmp_path: Path) -> None:
    path = tiny_gpt2_dir(tmp_path / "policy")
    plain = load_policy(path, LORA)
    policy = load_policy(path, LORA, ModelSettings(gradient_checkpointing=True))
    stir(plain)
    policy.load_state_dict(plain.state_dict())
    calls = []
    policy.language_model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    policy.eval()(samples()).logprobs.sum().backward()
    assert len(calls) == 1
    policy.zero_grad()
    calls.clear()
    policy.train()(samples()).logprobs.sum().backward()
    assert len(calls) == 2, "once forward, once more in the backward pass"

    plain.train()(samples()).logprobs.sum().backward()
    for (name, own), (_, expected) in zip(policy.named_parameters(), plain.named_parameters(), strict=True):
        if expected.grad is not None:
            assert own.grad is not None, name
            assert torch.allclose(own.grad, expected.grad, atol=1e-6), name


def test_bf16_autocast_computes_in_bf16_and_answers_in_fp32(tmp_path: Path) -> None:
    policy = load_policy(tiny_gpt2_dir(tmp_path), LORA, ModelSettings(bf16=True))
    dtypes = []
    policy.language_model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    policy.language_model.get_output_embeddings().register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    outputs = policy(samples())
    assert dtypes == [torch.bfloat16, torch.float32], "the blocks in bf16, the logits in fp32"
    assert {outputs.logprobs.dtype, outputs.values.dtype, outputs.entropy.dtype} == {torch.float32}
    exact = load_policy(tmp_path, LORA)(samples())
    assert 0 < (outputs.logprobs - exact.logprobs).abs().max() < 0.1


@pytest.mark.parametrize("layout", ["padded", "packed"], indirect=True)
def test_a_pass_and_its_gradient_read_nothing_back_from_the_device(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU each such read waits for everything before it. Tensors without data can't be read at all.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no such device
    policy = lora_policy().to("meta")
    policy._takes_own_mask, policy._packs = True, layout == "packed"
    outputs = policy(samples().to("meta"))
    (outputs.logprobs.sum() + outputs.values.sum() + outputs.entropy.sum()).backward()
    assert policy.reference_logprobs(samples().to("meta")).shape == outputs.logprobs.shape


def test_a_fused_activation_gives_the_same_to_a_rounding() -> None:
    model = tiny_gpt2()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(input_ids=ids).logits
    fuse_activations(model)
    assert isinstance(model.transformer.h[0].mlp.act, nn.GELU)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)


def test_padding_is_packed_away_from_1536_cells_on_if_the_model_has_over_5333333_parameters() -> None:
    few = Samples.from_lists([[1] * 8] * 64, [[2] * 16] * 64, pad_token_id=0)
    # 2048 cells x 4,000,000 parameters = 1536 cells x 5,333,333.3 parameters
    assert [worth_packing(few, parameters) for parameters in (0, 4_000_000, 5_333_333, 5_333_334)] == [False] * 3 + [
        True
    ]


def rows_and_columns(lengths: list[int]) -> tuple[int, int]:
    samples = Samples.from_lists([[1]] * len(lengths), [[2] * n for n in lengths], pad_token_id=0)
    rows, columns = packed(samples).arguments["input_ids"].shape
    return rows, columns


def test_rows_of_another_length_are_taken_where_64_columns_would_leave_much_empty() -> None:
    # Four samples of 13 tokens would leave 12 of 64 columns empty.
    assert rows_and_columns([13] * 128) == (128, 13)
    assert rows_and_columns([40] * 50) == (50, 40)
    assert rows_and_columns([20] * 3) == (1, 60)
    assert rows_and_columns([20] * 4) == (4, 20)
    assert rows_and_columns([21] * 30) == (10, 64)  # 63 of 64 columns
    assert rows_and_columns([100, 30, 60]) == (2, 100)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40))
def test_packing_takes_no_more_cells_than_padding_by_more_than_an_eighth_of_the_tokens(lengths: list[int]) -> None:
    rows, columns = rows_and_columns(lengths)
    assert sum(lengths) <= rows * columns <= max(len(lengths) * max(lengths), 1.125 * sum(lengths))


def test_a_larger_model_packs_few_samples_and_fuses_its_activations_and_scores_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=64, n_positions=64, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(shape).eval()  # 4.8 million parameters
    policy = Policy(add_lora(copy.deepcopy(model), LoraSettings(r=2, dropout=0.0)))
    few = Samples.from_lists([[5, 6, 7], [8]] * 70, [[9], list(range(10, 20))] * 70, pad_token_id=0)
    shapes: list[torch.Size] = []
    policy.language_model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    outputs = policy(few)
    # 70 samples of 10 tokens and 70 of 3: eleven rows of 6 x 10 + 3, one of 4 x 10 + 8 x 3, and three of threes alone.
    assert (policy.packs, shapes) == (True, [torch.Size([15, 64])])
    assert not any(isinstance(module, NewGELUActivation) for module in policy.modules())

    monkeypatch.setattr("plaudit.policy.packing.FEW_CELLS", 10**6)
    again = few.select(range(len(few)))
    assert torch.allclose(policy(again).logprobs, outputs.logprobs, atol=1e-5)
    assert shapes[1:] == [torch.Size([140, 12])]
    plain = model(torch.tensor([[8, *range(10, 19)]])).logits[0].log_softmax(-1)
    expected = plain[range(10), list(range(10, 20))]
    assert torch.allclose(outputs.logprobs[1], expected, atol=1e-5)


def test_gpt2_with_the_recipes_lora_learns_590593_of_125030401_parameters() -> None:
    with torch.device("meta"):
        policy = Policy(add_lora(GPT2LMHeadModel(GPT2Config()), LoraSettings(r=16, alpha=32)))
    expected = "trainable params: 590,593 || all params: 125,030,401 || trainable%: 0.4724"
    assert policy.trainable_parameters_line() == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_adapters_load_with_plain_peft_and_merge_into_a_plain_model(architecture: str, tmp_path: Path) -> None:
    base = save(ARCHITECTURES[architecture](), tmp_path / "base")
    policy = load_policy(base, LORA).eval()
    stir(policy)
    expected = policy(samples())
    save_policy(policy, tmp_path / "adapters")
    merge_policy(policy, tmp_path / "merged")

    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapters")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (plain, merged):
        for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
            logprobs = plain_logprobs(model.eval(), query, response)
            assert torch.allclose(logprobs, expected.logprobs[i, : len(response)], atol=1e-4)

    again = load_policy(tmp_path / "adapters").eval()
    outputs = again(samples())
    assert torch.equal(outputs.logprobs, expected.logprobs)
    assert torch.equal(outputs.values, expected.values)
    assert again.trainable_parameters_line() == policy.trainable_parameters_line()
    assert torch.equal(again.reference_logprobs(samples()), policy.reference_logprobs(samples()))


def test_a_merged_model_is_a_policy_to_start_from_with_its_value_head(tmp_path: Path) -> None:
    policy = load_policy(tiny_gpt2_dir(tmp_path / "base"), LORA).eval()
    stir(policy)
    merge_policy(policy, tmp_path / "merged")
    again = load_policy(tmp_path / "merged", LORA).eval()
    assert torch.allclose(again(samples()).logprobs, policy(samples()).logprobs, atol=1e-5)
    assert torch.allclose(again(samples()).values, policy(samples()).values, atol=1e-5)
    assert torch.equal(again.reference_logprobs(samples()), again(samples()).logprobs)


def test_a_full_policy_saves_as_a_plain_model_directory(tmp_path: Path) -> None:
    policy = load_policy(tiny_gpt2_dir(tmp_path / "base"), LoraSettings(enabled=False)).eval()
    stir(policy)
    save_policy(policy, tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    expected = policy(samples())
    assert torch.allclose(plain_logprobs(model, QUERIES[0], RESPONSES[0]), expected.logprobs[0, :2], atol=1e-5)
    again = load_policy(tmp_path / "trained", LoraSettings(enabled=False)).eval()
    assert torch.equal(again(samples()).values, expected.values)


def test_a_separate_value_model_learns_whole_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    settings = ModelSettings(separate_value_model=True)
    policy = load_policy(tiny_gpt2_dir(tmp_path / "base"), LORA, settings)
    stir(policy.v_head)
    policy(samples()).values.sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    assert policy.value_model is not None
    assert policy.value_model.wte.weight.grad is not None
    stir(policy.value_model)
    save_policy(policy, tmp_path / "trained")
    again = load_policy(tmp_path / "trained", LORA, settings)
    assert torch.equal(again(samples()).values, policy(samples()).values)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_trains_and_merges_into_full_precision(quantization: Any, tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    policy = load_policy(base, LORA, ModelSettings(quantization=quantization))
    exact = load_policy(base, LORA)
    assert torch.equal(policy.eval()(samples()).logprobs, policy.reference_logprobs(samples()))
    difference = (policy(samples()).logprobs - exact.eval()(samples()).logprobs).abs().max()
    assert 0 < difference < 0.5
    assert policy.trainable_parameters_line() == exact.trainable_parameters_line()

    assert torch.equal(policy.eval()(samples()).logprobs, policy.train()(samples()).logprobs), "a ratio starts at 1"

    before = policy(samples()).logprobs.sum().item()
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        (-policy.train()(samples()).logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert policy.eval()(samples()).logprobs.sum().item() > before + 0.1

    save_policy(policy, tmp_path / "adapters")
    merge_policy(policy, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.equal(merged.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters").eval()
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.float32}
    ids = torch.tensor([QUERIES[0] + RESPONSES[1]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        with adapted.disable_adapter():
            assert (adapted(input_ids=ids).logits - expected).abs().max() > 1e-2
    value_head = load_file(tmp_path / "merged" / "value_head.safetensors")
    assert torch.equal(value_head["weight"], policy.v_head.weight)


def test_truncated_sampling_gives_its_own_logprobs_and_a_kl_of_zero_at_the_start() -> None:
    policy = Policy(add_lora(tiny_gpt2(), LORA)).eval()
    support = policy.support(samples(), temperature=0.7, top_k=5)
    assert support is not None
    kept = distributions.unpack(support, policy.language_model.config.vocab_size)
    assert kept[samples().mask].sum(-1).max() <= 6, "five, and the sampled token wherever it was outside"
    assert kept.gather(-1, samples().response_ids.unsqueeze(-1)).all()
    assert kept[~samples().mask].all()
    own = policy(samples(), temperature=0.7, support=support).logprobs
    assert torch.equal(own, policy.reference_logprobs(samples(), temperature=0.7, support=support))
    assert policy.support(samples()) is None


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "some/hub/nothing"):
        with pytest.raises(ModelNotFound, match="no such directory") as caught:
            load_policy(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ModelNotFound) as caught:
            load(tmp_path / "empty")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="quantization=8bit trains adapters only"):
        load_policy(tiny_gpt2_dir(tmp_path / "x"), LoraSettings(enabled=False), ModelSettings(quantization="8bit"))
    save_policy(Policy(add_lora(tiny_gpt2(), LORA)), tmp_path / "homeless")
    with pytest.raises(ConfigError, match="do not say which model they belong to"):
        merge_adapters(tmp_path / "homeless", tmp_path / "merged")
