"""Results of a finished PPO run: the trained policy, value head, tokenizer, model card, and a merged model.

Failure modes: adapters of one run next to the value head of another; adapters next to a full model that a loader takes
for their base.
"""

from plaudit.errors import ConfigError
from plaudit.policy.adapters import is_adapters
from plaudit.policy.merging import merge_policy
from plaudit.policy.model import Policy
from plaudit.policy.saving import PolicyWeights, check_saved, save_policy
from plaudit.policy.tokenizer import Tokenizer
from plaudit.report.model_card import write_model_card
from plaudit.run.metrics import FILE_NAME, read_metrics
from plaudit.run.storage import replaced_model
from plaudit.settings.ppo import PPOConfig

MERGED = "merged"
CONFIG_FILE = "run.json"
"""The run's settings."""


def write_results(
    config: PPOConfig,
    policy: Policy,
    tokenizer: Tokenizer,
    *,
    reward_revision: str,
    weights: PolicyWeights | None = None,
) -> None:
    """Write the results, check that they read back correctly, and replace earlier ones in `config.output_dir`
    atomically.

    The run's metrics must exist already. `weights` are the gathered weights if the policy is sharded.

    Raises:
        NotFinite: a weight is not finite.
        NotAsSaved: what was written reads back as something else.
        NotWritten: the disk is full, or can't be written to. In all three cases the earlier files stay.
    """
    directory = config.output_dir
    metrics = read_metrics(directory / FILE_NAME)
    with replaced_model(directory) as beside:
        save_policy(policy, beside, weights)
        tokenizer.save_pretrained(beside)
        check_saved(policy, beside, weights)
        write_model_card(config, beside, metrics, reward_revision)
        if config.merge:
            merge_policy(policy, beside / MERGED, weights)
            tokenizer.save_pretrained(beside / MERGED)
            write_model_card(config, beside / MERGED, metrics, reward_revision, merged=MERGED)


def require_same_kind(config: PPOConfig) -> None:
    """Raises `ConfigError` where adapters would replace a whole model in the output directory, or the other way round.

    A whole model there may be the very one that the adapters are trained on.
    """
    directory = config.output_dir
    adapters = config.lora.enabled or is_adapters(config.policy)
    found, made = ("a whole model", "adapters") if adapters else ("adapters", "a whole model")
    if (directory / ("config.json" if adapters else "adapter_config.json")).is_file():
        raise ConfigError(f"output_dir={directory} holds {found}, and this run makes {made}: give another --output-dir")
