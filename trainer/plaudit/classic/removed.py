"""What programs may ask for and cannot have, with what to write instead."""

from typing import Any

CHANGE_SCORES = "change the scores before step(), or the experience between stepper.make_experience() and .learn()"
CHANGE_LOSS = "set cliprange, vf_coef or the stepper's entropy_coef; another loss belongs in plaudit.learner.objective"
TOOLS = "write the loop over tools yourself, and leave out what tools wrote by step()'s response_masks"
HOOKS = {
    "compute_rewards": CHANGE_SCORES,
    "_kl_penalty": "choose kl_penalty='kl', 'abs', 'mse', 'full' or 'k3'",
    "compute_advantages": CHANGE_SCORES,
    "loss": CHANGE_LOSS,
    "train_minibatch": CHANGE_LOSS,
    "batched_forward_pass": "ask stepper.evaluate(Samples.from_lists(queries, responses, 0)) for log-probabilities",
    "prepare_model_inputs": "give step() the token lists; it pads and packs them itself",
    "record_step_stats": "change the dictionary that step() returns",
    "gather_stats": "step() returns the statistics of all processes' samples already",
    "_early_stop": "set early_stopping and target_kl",
    "_generate_batched": "call generate() with a list of queries, which is one batch",
    "_step_safety_checker": "check queries, responses and scores before step()",
}
"""Methods of the classic trainer that a step no longer calls, and what to do in place of overriding or calling them."""

STILL_IN_TRL = {
    *("CPOConfig", "CPOTrainer", "DPOConfig", "DPOTrainer", "GKDConfig", "GKDTrainer", "KTOConfig", "KTOTrainer"),
    *("ModelConfig", "NashMDConfig", "NashMDTrainer", "OnlineDPOConfig", "OnlineDPOTrainer", "ORPOConfig"),
    *("ORPOTrainer", "RewardConfig", "RewardTrainer", "RLOOConfig", "RLOOTrainer", "SFTConfig", "SFTTrainer"),
    *("XPOConfig", "XPOTrainer", "TrlParser", "get_kbit_device_map", "get_peft_config", "get_quantization_config"),
    *("apply_chat_template", "extract_prompt", "is_conversational", "maybe_apply_chat_template"),
}
GONE = {
    "PPOv2Trainer": "the later PPO is `plaudit ppo`: docs/how-to/coming-from-trl.md has its settings",
    "PPOv2Config": "the later PPO is `plaudit ppo`: docs/how-to/coming-from-trl.md has its settings",
    "TextEnvironment": TOOLS,
    "TextHistory": TOOLS,
    "DDPOTrainer": "images are no part of Plaudit",
    "DDPOConfig": "images are no part of Plaudit",
    "IterativeSFTTrainer": "train on your best texts with `plaudit sft`",
    "setup_chat_format": "load a tokenizer that has a chat template",
}


def refuse_overrides(cls: type) -> None:
    """Raises `TypeError` for a subclass of the trainer that overrides what a step no longer calls."""
    for name, instead in HOOKS.items():
        if name in vars(cls):
            raise TypeError(f"{cls.__name__}.{name} would never be called: {instead}")


def missing(module: str, name: str) -> Any:
    """Raises what `from module import name` should say of a name that isn't there."""
    if name in STILL_IN_TRL:
        raise ImportError(f"{module} has PPO's names alone: write `from trl import {name}`")
    if name in GONE:
        raise ImportError(f"{module} has no {name}: {GONE[name]}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
