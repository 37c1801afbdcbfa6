"""Adapters go where they change what is computed, and can be folded into the weights."""

from pathlib import Path

import peft
import pytest

from harness.tiny_models import save
from harness.tiny_policies import tiny_causal_lm
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora
from plaudit.policy.loading import load_policy
from plaudit.policy.lora_targets import default_targets
from plaudit.policy.merging import merge_adapters
from plaudit.policy.pretrained import load_whole_causal_lm
from plaudit.settings.policy import LoraSettings


def adapted_layers(family: str) -> set[str]:
    names: list[str] = add_lora(tiny_causal_lm(family), LoraSettings(r=2)).targeted_module_names
    return {name.rpartition(".")[2] for name in names}


def test_a_family_that_peft_knows_has_its_adapters_and_another_one_has_them_everywhere() -> None:
    assert default_targets(tiny_causal_lm("llama")) == ["q_proj", "v_proj"]
    assert default_targets(tiny_causal_lm("phi3")) == "all-linear"
    assert adapted_layers("phi3") == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_of_mambas_mixer_the_first_layer_alone_is_adapted(family: str) -> None:
    assert adapted_layers(family) == {"in_proj"}


def test_experts_stay_as_they_are() -> None:
    assert adapted_layers("qwen3_moe") == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_layers_that_share_a_weight_stay_as_they_are() -> None:
    assert adapted_layers("zamba2") == {"in_proj", "linear"}


@pytest.mark.parametrize(
    ("family", "named", "said"),
    [
        (
            "bamba",
            "out_proj",
            r"on \S+mamba.out_proj can't be right, since its mixer reads the weight",
        ),
        (
            "zamba2",
            "q_proj",
            r"on \S+self_attn.q_proj can't be right, since other layers share its",
        ),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name_and_so_are_adapters_of_others_on_them(
    family: str, named: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"lora.target_modules: adapters {said}"):
        add_lora(tiny_causal_lm(family), LoraSettings(target_modules=(named,)))
    base = save(tiny_causal_lm(family), tmp_path / "base")
    theirs = peft.get_peft_model(
        load_whole_causal_lm(base), peft.LoraConfig(r=2, target_modules=[named], task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    for use in (load_policy, load_whole_causal_lm, lambda adapters: merge_adapters(adapters, tmp_path / "merged")):
        with pytest.raises(ConfigError, match=f"theirs: adapters {said}"):
            use(tmp_path / "theirs")
