"""Weights in half precision that don't learn, and fp32 for all that does."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.tiny_models import ARCHITECTURES, save, tiny_gpt2, tiny_gpt2_dir, tiny_llama
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.policy import packing
from plaudit.policy.checks import check_policy
from plaudit.policy.loading import DTYPES, load_policy
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.policy.saving import save_policy
from plaudit.settings.policy import Dtype, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters

LORA = LoraSettings(r=4, alpha=8)
DRIFT: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}
"""How far from 1 a ratio may be before the first update."""
OTHER_FORMATS: dict[str, tuple[ModelSettings, float]] = {
    "passes in bf16": (ModelSettings(bf16=True), DRIFT["bf16"]),
    "8 bits": (ModelSettings(quantization="8bit"), DRIFT["fp32"]),
    "4 bits": (ModelSettings(quantization="4bit"), DRIFT["fp32"]),
    "8 bits, the rest bf16": (ModelSettings(quantization="8bit", dtype="bf16"), DRIFT["bf16"]),
    "4 bits, the rest bf16": (ModelSettings(quantization="4bit", dtype="bf16"), DRIFT["bf16"]),
}
"""On a CPU, quantised weights are made whole again before they multiply, in the format of the rest."""
ERROR: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}
"""Of a log-probability in nats, from the same weights computed in fp32 throughout."""


def stir(policy: Policy) -> None:
    """Adapters and value head as an update would leave them: not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or name.startswith("v_head"):
                parameter.normal_(std=0.1, generator=generator)


def ragged(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, 290, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", DRIFT)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_learns_is_fp32_and_the_base_is_as_asked(architecture: str, dtype: Dtype, tmp_path: Path) -> None:
    base = save(ARCHITECTURES[architecture](), tmp_path)
    policy = load_policy(base, LORA, ModelSettings(dtype=dtype))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {DTYPES[dtype]}
    assert check_policy(policy, str(base)), "the cache is exact to a rounding"
    stir(policy)
    samples = Samples.from_lists(ragged(6, 9), ragged(6, 7), pad_token_id=0)
    outputs = policy(samples)
    assert {outputs.logprobs.dtype, outputs.values.dtype, outputs.entropy.dtype} == {torch.float32}
    exact = copy.deepcopy(policy).float()
    assert (outputs.logprobs - exact(samples).logprobs).abs().max() < ERROR[dtype]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype]).float()
    query, response = ragged(6, 9)[0], ragged(6, 7)[0]
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
    own = policy.reference_logprobs(samples)[0, : len(response)]
    assert (own - expected).abs().max() < ERROR[dtype], "plain transformers on the same weights"


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", DRIFT)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_ratio_starts_at_1_to_a_stated_bound(architecture: str, dtype: Dtype, tmp_path: Path) -> None:
    base = save(ARCHITECTURES[architecture](), tmp_path)
    require_drift_below(DRIFT[dtype], load_policy(base, LORA, ModelSettings(dtype=dtype)))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("base", OTHER_FORMATS)
def test_a_ratio_on_a_base_in_another_format_starts_at_1_to_a_stated_bound(base: str, tmp_path: Path) -> None:
    settings, bound = OTHER_FORMATS[base]
    require_drift_below(bound, load_policy(save(tiny_llama(), tmp_path), LORA, settings))


@pytest.mark.parametrize("base", [*DRIFT, *OTHER_FORMATS])
def test_a_ratio_of_logits_in_pieces_starts_at_1_to_a_stated_bound(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "FEW_CELLS", 150)  # the rollout is packed, a mini-batch padded
    settings, bound = (ModelSettings(dtype=base), DRIFT[base]) if base in DRIFT else OTHER_FORMATS[base]
    policy = load_policy(save(tiny_llama(), tmp_path), LORA, dataclasses.replace(settings, logits_mib=0.01))
    assert policy.in_pieces(10)
    require_drift_below(bound, policy)


def require_drift_below(bound: float, policy: Policy) -> None:
    """One step: the rollout evaluates 16 samples at once, the update four of them, in another order."""
    stir(policy)
    config = PPOHyperparameters(batch_size=16, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-3)
    stepper = PPOStepper(policy, None, config)
    stepper.batch_size_finder.size = 16
    statistics = stepper.step(ragged(16, 12), ragged(16, 10), [float(i % 3) for i in range(16)]).statistics
    assert statistics["ppo/policy/ratio_drift"] < bound
    moments = [m for state in stepper.optimizer.state.values() for m in state.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_an_fp16_base_passes_gradients_on_that_a_mean_over_many_tokens_would_lose(tmp_path: Path) -> None:
    base, n = tiny_gpt2_dir(tmp_path), 384
    config = PPOHyperparameters(batch_size=n, mini_batch_size=n, ppo_epochs=1)
    gradients: dict[str, dict[str, torch.Tensor]] = {"fp32": {}, "fp16": {}}
    for dtype in ("fp32", "fp16"):
        torch.manual_seed(0)
        policy = load_policy(base, LORA, ModelSettings(dtype=dtype))
        stir(policy)
        stepper, adapters = PPOStepper(policy, None, config), [x for x in policy.named_parameters() if "lora_" in x[0]]
        stepper.optimizer.register_step_pre_hook(
            lambda *_, dtype=dtype, adapters=adapters: gradients[dtype].update({n: p.grad.clone() for n, p in adapters})
        )
        stepper.step(ragged(n, 12), ragged(n, 40), [0.0, 1.0] * (n // 2))
    for name, exact in gradients["fp32"].items():
        # 1e-2 if each token's gradient is divided by the number of tokens on its way through the base.
        assert (gradients["fp16"][name] - exact).norm() < 2e-3 * exact.norm(), name


def test_auto_is_the_checkpoints_own(tmp_path: Path) -> None:
    base = save(tiny_gpt2().bfloat16(), tmp_path)
    policy = load_policy(base, LORA, ModelSettings(dtype="auto"))
    assert policy.language_model.dtype == torch.bfloat16
    assert load_policy(base, LORA).language_model.dtype == torch.float32


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_keeps_its_other_weights_in_half_precision(quantization: Any, tmp_path: Path) -> None:
    base = save(ARCHITECTURES["llama"](), tmp_path)
    policy = load_policy(base, LORA, ModelSettings(quantization=quantization, dtype="bf16")).eval()
    assert policy.language_model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    samples = Samples.from_lists(ragged(6, 9), ragged(6, 7), pad_token_id=0)
    exact = load_policy(base, LORA).eval()(samples).logprobs
    assert 0 < (policy(samples).logprobs - exact).abs().max() < 0.5
    assert torch.equal(policy(samples).logprobs, policy.reference_logprobs(samples))
    assert torch.equal(policy.train()(samples).logprobs, policy.eval()(samples).logprobs), "a ratio starts at 1"


def test_adapters_of_a_stage_before_ppo_start_at_a_kl_of_0_in_half_precision(tmp_path: Path) -> None:
    first = load_policy(tiny_gpt2_dir(tmp_path / "base"), LORA)
    stir(first)
    save_policy(first, tmp_path / "sft")
    (tmp_path / "sft" / "value_head.safetensors").unlink()
    samples = Samples.from_lists(ragged(6, 9), ragged(6, 7), pad_token_id=0)
    for dtype in ("fp16", "bf16"):
        policy = load_policy(tmp_path / "sft", settings=ModelSettings(dtype=dtype))
        start = policy(samples).logprobs
        assert torch.equal(policy.reference_logprobs(samples), start)
        stir(policy)
        with torch.no_grad():
            next(p for n, p in policy.named_parameters() if "lora_A" in n).mul_(2.0)
        assert torch.equal(policy.reference_logprobs(samples), start), "the reference stays"
        assert not torch.equal(policy(samples).logprobs, start)


def test_weights_that_learn_are_refused_in_half_precision(tmp_path: Path) -> None:
    base, whole = save(tiny_gpt2().bfloat16(), tmp_path), LoraSettings(enabled=False)
    for dtype in ("bf16", "fp16", "auto"):
        with pytest.raises(ConfigError, match=rf"model.dtype={dtype} .*--model.bf16 computes in bf16") as caught:
            load_policy(base, whole, ModelSettings(dtype=dtype))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"bf16=True .* dtype=fp16"):
        ModelSettings(bf16=True, dtype="fp16")
    assert {p.dtype for p in load_policy(base, whole, ModelSettings(bf16=True)).parameters()} == {torch.float32}
