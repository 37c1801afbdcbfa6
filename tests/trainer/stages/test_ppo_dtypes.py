"""A run whose base is in half precision, from start to plain transformers."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from harness.runs import assert_same_run, weights
from harness.tiny_models import save, tiny_gpt2, tiny_tokenizer
from plaudit.errors import ConfigError
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.policy import Dtype, ModelSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import evaluate, ppo


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "auto"])
def test_a_run_resumes_to_the_bit_and_its_results_are_evaluated_and_load_without_plaudit(
    dtype: Dtype, config: PPOConfig, tmp_path: Path
) -> None:
    base = save(tiny_gpt2().bfloat16(), tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    config = dataclasses.replace(config, policy=str(base), model=ModelSettings(dtype=dtype), steps=2, merge=True)
    undisturbed = ppo.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir
    ppo.run(dataclasses.replace(config, steps=1))
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        ppo.run(dataclasses.replace(config, resume="auto", model=ModelSettings()))
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same_run(config.output_dir, undisturbed)
    assert {tensor.dtype for tensor in weights(undisturbed).values()} == {torch.float32}

    evaluation = EvaluateConfig(
        after=str(undisturbed), output_dir=tmp_path / "out", dataset=config.dataset, reward=config.reward, n_prompts=8
    )
    assert evaluate.run(evaluation) is not None
    merged = transformers.AutoModelForCausalLM.from_pretrained(undisturbed / "merged")
    assert merged.dtype == torch.bfloat16, "as the base is"
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        assert 0 < (merged(**ids).logits - plain(**ids).logits).abs().max() < 1.0
