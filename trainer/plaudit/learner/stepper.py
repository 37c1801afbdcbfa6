"""The learner's state, and the PPO step that moves it: token rewards, advantages, updates, the KL coefficient.

This is also the classic step API: `PPOStepper(policy, reference, config).step(queries, responses, scores)` with rewards
from any source. Failure mode: an advantage or coefficient computed from other samples than those that were scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.errors import ConfigError
from plaudit.learner import step_statistics
from plaudit.learner.adam import (
    learning_rate_factor,
    restore_state,
    set_learning_rates,
    skips_on_found_inf,
    state_for_files,
)
from plaudit.learner.evaluator import Evaluator
from plaudit.learner.experience import Experience, make_experience
from plaudit.learner.memory import BatchSizeFinder
from plaudit.learner.minibatches import MinibatchEngine
from plaudit.parallel.processes import Processes
from plaudit.policy.model import Policy
from plaudit.policy.samples import EvaluatedSamples, Rollout, Samples
from plaudit.ppo import kl, rewards
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOHyperparameters


@dataclass(frozen=True)
class StepResult:
    """What a step did. All tensors are [B, T] by response token and 0 outside `mask`, but for `scores` [B]."""

    statistics: Mapping[str, float]
    """Flat, under the names that users of the classic trainer know."""
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kls: Tensor
    scores: Tensor
    """As used: after scaling, normalising and clipping."""
    non_score_rewards: Tensor
    rewards: Tensor
    """Before whitening."""
    advantages: Tensor
    """Whitened over the batch if they come from GAE."""
    returns: Tensor
    minibatch_permutations: Sequence[Sequence[int]]
    """The order in which each epoch took the samples."""


class PPOStepper:
    """The optimizer, KL coefficient and running moments of a run, and the step that moves them.

    `reference` is a frozen model, or None to hold the policy to the reference it brings (its own weights with the
    adapters off, or a frozen copy). Of `generation`, temperature, top-k and top-p say which distribution the responses
    were drawn from: log-probabilities are those of that distribution. `total_steps` is needed by learning-rate
    schedules that end. With several `processes`, each calls `update` with the same rollout of the whole batch. On a
    GPU, updates are recorded as CUDA graphs where that is possible, unless `graphs` is off.
    """

    def __init__(
        self,
        policy: Policy,
        reference: nn.Module | None,
        config: PPOHyperparameters,
        *,
        generation: GenerationSettings | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        processes: Processes | None = None,
        graphs: bool = True,
    ) -> None:
        """`seed` draws the order of samples in each epoch.

        Raises:
            ConfigError: the schedule needs `total_steps`, a mini-batch has fewer samples than there are processes, or
                the policy has a value head where advantages need none, or none where they need one.
        """
        if config.lr_schedule != "constant" and total_steps is None:
            raise ConfigError(f"lr_schedule={config.lr_schedule} needs to know the number of steps")
        if reference is not None:
            policy.use_reference(reference.model if isinstance(reference, Policy) else reference)
        self.policy = policy
        self.config = config
        self.processes = processes or Processes()
        _require_rows_for_all(config, self.processes)
        if config.critic_free == (policy.v_head is not None):
            raise ConfigError(
                f"advantage_estimator={config.advantage_estimator} needs a policy made with "
                f"Policy(..., value_head={not config.critic_free})"
            )
        generation = generation or GenerationSettings()
        self.total_steps = total_steps
        self.kl_coef = config.init_kl_coef
        self.moments = rewards.RunningMoments()
        self.steps_done = 0
        self._shuffles = torch.Generator().manual_seed(seed)
        self._graphs = graphs
        self._engine = MinibatchEngine(policy, config, processes=self.processes)
        self._generation = generation
        self._set_sampling(generation)

    def draw_from(self, generation: GenerationSettings) -> None:
        """Says how the responses of the next steps are sampled: temperature, top-k and top-p, as for `PPOStepper`."""
        if generation != self._generation:
            self._set_sampling(generation)

    def _set_sampling(self, generation: GenerationSettings) -> None:
        policy, config = self.policy, self.config
        record = self._graphs and _can_record(policy, config, generation, self.processes)
        self._generation = generation
        self._engine.draw_from(generation.temperature, record=record)
        self._evaluator = Evaluator(
            policy, generation, self.batch_size_finder, full_kl=config.kl_penalty == "full", record=record
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over everything that learns. Another one may be put in its place before the first step."""
        return self._engine.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._engine.optimizer = optimizer

    @property
    def batch_size_finder(self) -> BatchSizeFinder:
        """How many samples go through the model at once."""
        return self._engine.batch_size_finder

    def step(
        self,
        queries: Sequence[Tensor | Sequence[int]],
        responses: Sequence[Tensor | Sequence[int]],
        scores: Tensor | Sequence[float | Tensor],
        minibatch_permutations: Sequence[Sequence[int]] | None = None,
    ) -> StepResult:
        """One PPO step on token lists and one score for each, from any source.

        `minibatch_permutations` gives each epoch's order of samples; without it they are drawn. With
        `responses_per_prompt`, the responses to one prompt follow each other.

        Raises:
            ValueError: the counts differ from each other or from `batch_size`, or a score is not finite.
            NonFiniteUpdate: a loss or gradient is not finite; no weight has seen it.
        """
        samples = Samples.from_lists(queries, responses, pad_token_id=0, device=self.policy.device)
        scores = torch.stack([torch.as_tensor(score, dtype=torch.float32).reshape(()) for score in scores])
        rollout = self.evaluate(samples).with_scores(scores.to(self.policy.device))
        return self.update(rollout, minibatch_permutations)

    def evaluate(self, samples: Samples) -> EvaluatedSamples:
        """Log-probabilities and values of the policy as it is now, and the reference's log-probabilities."""
        return self._evaluator.evaluate(samples)

    def update(self, rollout: Rollout, minibatch_permutations: Sequence[Sequence[int]] | None = None) -> StepResult:
        """The step on a rollout: `make_experience`, then `learn`. Raises as `step` does."""
        return self.learn(self.make_experience(rollout), minibatch_permutations)

    def make_experience(self, rollout: Rollout) -> Experience:
        """Token rewards and advantages, with the current KL coefficient.

        With score scaling, the scores enter the running moments: call this once a step.

        Raises:
            ValueError: the rollout has not `batch_size` samples, or a score is not finite.
        """
        if len(rollout) != self.config.batch_size:
            raise ValueError(f"{len(rollout)} samples in a step with batch_size={self.config.batch_size}")
        if not bool(rollout.scores.isfinite().all()):
            raise ValueError(f"scores must be finite: {rollout.scores.tolist()}")
        scores = self._prepare_scores(rollout.scores)
        return make_experience(rollout, scores, self.config, kl_coef=self.kl_coef)

    def learn(
        self, experience: Experience, minibatch_permutations: Sequence[Sequence[int]] | None = None
    ) -> StepResult:
        """Epochs x mini-batches of clipped updates, then the KL coefficient of the next step.

        Raises:
            ValueError: `minibatch_permutations` has too few epochs, one that is no permutation of the samples, or one
                that puts the responses to a prompt into two mini-batches.
            NonFiniteUpdate: a loss or gradient is not finite; no weight has seen it.
        """
        config, rollout = self.config, experience.rollout
        learning_rate = self._set_learning_rates()
        # Drawn as they are taken: epochs that early stopping leaves out draw nothing.
        orders = (self._order(epoch, minibatch_permutations) for epoch in range(config.ppo_epochs))
        value_only = self.steps_done < config.value_warmup_steps
        minibatches, permutations = self._engine.run(experience, orders, step=self.steps_done, value_only=value_only)
        statistics = {
            **step_statistics.of_experience(experience, kl_coef=self.kl_coef),
            **minibatches,
            "ppo/learning_rate": learning_rate,
        }
        if config.adap_kl_ctrl and not value_only:
            self.kl_coef = kl.adapt_coefficient(
                self.kl_coef,
                statistics["objective/kl"],
                target=config.target,
                horizon=config.horizon,
                samples=config.batch_size,
            )
        self.steps_done += 1
        return StepResult(
            statistics=statistics,
            mask=rollout.samples.mask,
            logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            values=rollout.values,
            kls=experience.kls,
            scores=experience.scores,
            non_score_rewards=experience.non_score_rewards,
            rewards=experience.rewards,
            advantages=experience.advantages,
            returns=experience.returns,
            minibatch_permutations=permutations,
        )

    def _prepare_scores(self, scores: Tensor) -> Tensor:
        """Scaled by the running moments, normalised and clipped, as the settings say."""
        config, scores = self.config, scores.float()
        if config.use_score_scaling:
            self.moments = self.moments.update(scores)
            scores = (rewards.normalise_scores if config.use_score_norm else rewards.scale_scores)(scores, self.moments)
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _set_learning_rates(self) -> float:
        """Sets the rates of the step to come; returns the first group's."""
        factor = learning_rate_factor(
            self.steps_done,
            self.config.lr_schedule,
            warmup_steps=self.config.lr_warmup_steps,
            total_steps=self.total_steps,
        )
        return set_learning_rates(self.optimizer, factor)

    def _order(self, epoch: int, permutations: Sequence[Sequence[int]] | None) -> Tensor:
        """The order [B] in which this epoch takes the samples: the given one, or a drawn one of whole groups."""
        n = self.config.responses_per_prompt
        if permutations is None:
            groups = torch.randperm(self.config.batch_size // n, generator=self._shuffles)
            return (n * groups.unsqueeze(1) + torch.arange(n)).flatten()
        if epoch >= len(permutations):
            raise ValueError(f"epoch {epoch} has no permutation among the {len(permutations)} given")
        order = torch.as_tensor(permutations[epoch])
        if not torch.equal(order.sort().values, torch.arange(self.config.batch_size)):
            raise ValueError(f"{order.tolist()} is not a permutation of {self.config.batch_size} samples")
        groups = (order // n).view(-1, self.config.mini_batch_size).sort(1).values.view(-1, n)
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(
                f"{order.tolist()} has responses to one prompt, {n} consecutive samples, in two mini-batches"
            )
        return order

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights that the next step depends on.

        All processes call this; if weights are sharded, rank 0 gets whole tensors and the others empty ones.
        """
        return {
            "optimizer": state_for_files(self.optimizer, self.processes),
            "kl_coef": self.kl_coef,
            "moments": (self.moments.count, self.moments.mean, self.moments.var),
            "steps_done": self.steps_done,
            "shuffles": self._shuffles.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`: the next steps are bit-identical."""
        restore_state(self.optimizer, self._engine.parameters(), state["optimizer"], self.processes)
        self.kl_coef = state["kl_coef"]
        self.moments = rewards.RunningMoments(*state["moments"])
        self.steps_done = state["steps_done"]
        self._shuffles.set_state(state["shuffles"].cpu())


def _require_rows_for_all(config: PPOHyperparameters, processes: Processes) -> None:
    """Raises `ConfigError` where a process would have no row of a mini-batch."""
    n = config.responses_per_prompt
    if config.mini_batch_size // n < processes.count:
        groups = f", {config.mini_batch_size // n} prompts with {n} responses each," if n > 1 else ""
        raise ConfigError(f"mini_batch_size={config.mini_batch_size}{groups} is less than {processes.count} processes")


def _can_record(
    policy: Policy, config: PPOHyperparameters, generation: GenerationSettings, processes: Processes
) -> bool:
    """Whether a whole mini-batch goes through the model in one pass of fixed shape, on one GPU, with this torch."""
    return (
        # A recorded mini-batch is one row of tokens, which does not say which response a token belongs to, and has no
        # log-probabilities of the reference.
        config.loss_aggregation == "token_mean"
        and config.kl_loss_coef == 0
        # Its statistics have fixed names, those of the values among them.
        and not config.critic_free
        and policy.device.type == "cuda"
        and processes.count == 1
        and policy.packs
        and policy.language_model.dtype != torch.float16  # whose gradients are divided afterwards
        and config.gradient_accumulation_steps == 1
        and config.micro_batch_size is None
        and not getattr(policy.language_model, "is_gradient_checkpointing", False)
        and generation.top_k == 0
        and generation.top_p == 1.0
        and skips_on_found_inf(policy.device.type)
    )
