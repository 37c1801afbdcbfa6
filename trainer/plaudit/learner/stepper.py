"""One PPO step on samples that have been scored: token rewards, advantages, updates, the KL coefficient.

This is also the classic step API: `PPOStepper(policy, reference, config).step(queries, responses, scores)` with rewards
from any source. Failure mode: an advantage or coefficient computed from other samples than those that were scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.errors import ConfigError
from plaudit.learner.adam import learning_rate_factor, restore_state, set_learning_rates, state_for_files
from plaudit.learner.graphs import FlatSamples, Graphs, warn_of_no_graphs
from plaudit.learner.memory import Fitting
from plaudit.learner.minibatches import MinibatchEngine
from plaudit.parallel.processes import Processes
from plaudit.policy.model import Policy, ResponseOutputs
from plaudit.policy.samples import Evaluation, Rollout, Samples
from plaudit.ppo import kl, rewards
from plaudit.ppo.advantages import gae
from plaudit.ppo.masked import masked_mean, masked_sum, scale, whiten
from plaudit.settings.ppo import PPOHyperparameters


@dataclass(frozen=True)
class Sampling:
    """How responses were drawn; log-probabilities are those of this distribution."""

    temperature: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0


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
    """Whitened over the batch."""
    returns: Tensor
    minibatch_permutations: Sequence[Sequence[int]]
    """The order in which each epoch took the samples."""


class PPOStepper:
    """The optimizer, KL coefficient and running moments of a run, and the step that moves them.

    `reference` is a frozen model, or None to hold the policy to the reference it brings (its own weights with the
    adapters off, or a frozen copy). `total_steps` is needed by learning-rate schedules that end. With several
    `processes`, each calls `update` with the same rollout of the whole batch. On a GPU, updates are recorded as CUDA
    graphs where that is possible, unless `graphs` is off.
    """

    def __init__(
        self,
        policy: Policy,
        reference: nn.Module | None,
        config: PPOHyperparameters,
        *,
        sampling: Sampling | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        processes: Processes | None = None,
        graphs: bool = True,
    ) -> None:
        if config.lr_schedule != "constant" and total_steps is None:
            raise ConfigError(f"lr_schedule={config.lr_schedule} needs to know the number of steps")
        if reference is not None:
            policy.use_reference(reference.model if isinstance(reference, Policy) else reference)
        self.policy = policy
        self.config = config
        self.processes = processes or Processes()
        if config.mini_batch_size < self.processes.count:
            raise ConfigError(f"mini_batch_size={config.mini_batch_size} is less than {self.processes.count} processes")
        self.sampling = sampling or Sampling()
        self.total_steps = total_steps
        self.kl_coef = config.init_kl_coef
        self.moments = rewards.RunningMoments()
        self.steps_done = 0
        self._shuffles = torch.Generator().manual_seed(seed)
        record = graphs and self._can_record()
        self._engine = MinibatchEngine(
            policy, config, temperature=self.sampling.temperature, processes=self.processes, record=record
        )
        self._evaluations = Graphs(self._think) if record else None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over everything that learns. Another one may be put in its place before the first step."""
        return self._engine.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._engine.optimizer = optimizer

    @property
    def fitting(self) -> Fitting:
        """How many samples go through the model at once."""
        return self._engine.fitting

    def _can_record(self) -> bool:
        """Whether a whole mini-batch goes through the model in one pass of fixed shape, on one GPU."""
        return (
            self.policy.device.type == "cuda"
            and self.processes.count == 1
            and self.policy.packs
            and self.config.gradient_accumulation_steps == 1
            and self.config.micro_batch_size is None
            and not getattr(self.policy.language_model, "is_gradient_checkpointing", False)
            and self.sampling.top_k == 0
            and self.sampling.top_p == 1.0
        )

    def step(
        self,
        queries: Sequence[Tensor | Sequence[int]],
        responses: Sequence[Tensor | Sequence[int]],
        scores: Tensor | Sequence[float | Tensor],
        minibatch_permutations: Sequence[Sequence[int]] | None = None,
    ) -> StepResult:
        """One PPO step on token lists and one score for each, from any source.

        `minibatch_permutations` gives each epoch's order of samples; without it they are drawn.
        """
        samples = Samples.from_lists(queries, responses, pad_token_id=0, device=self.policy.device)
        scores = torch.stack([torch.as_tensor(score, dtype=torch.float32).reshape(()) for score in scores])
        rollout = self.evaluate(samples).with_scores(scores.to(self.policy.device))
        return self.update(rollout, minibatch_permutations)

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Evaluation:
        """Log-probabilities and values of the policy as it is now, and the reference's log-probabilities."""
        self.policy.eval()
        return self.fitting.run(
            lambda size: Evaluation.concatenate([self._evaluate(chunk) for chunk in samples.chunks(size)])
        )

    def _think(self, flat: FlatSamples) -> Tensor:
        """[3, N]: log-probabilities and values of the policy, and log-probabilities of the reference."""
        temperature = self.sampling.temperature
        own = self.policy.score(flat.given, flat.tokens, temperature=temperature, entropy=False)
        reference = self.policy.reference_score(flat.given, flat.tokens, temperature=temperature)
        return torch.stack([own.logprobs, own.values, reference])

    def _recorded_evaluation(self, samples: Samples) -> Evaluation | None:
        """`_evaluate` by a recorded graph; None where there is none."""
        if self._evaluations is None or self.config.kl_penalty == "full":
            return None
        try:
            thought = self._evaluations.run(FlatSamples.of(samples, self.policy.mask_dtype))
        except RuntimeError as error:
            self._evaluations = None
            warn_of_no_graphs("evaluations", error)
            return None
        logprobs, values, reference = (samples.spread(row[: len(samples.cells)]) for row in thought)
        return Evaluation(samples=samples, logprobs=logprobs, values=values, ref_logprobs=reference)

    def _evaluate(self, samples: Samples) -> Evaluation:
        recorded = self._recorded_evaluation(samples)
        if recorded is not None:
            return recorded
        temperature = self.sampling.temperature
        support = self.policy.support(
            samples, temperature=temperature, top_k=self.sampling.top_k, top_p=self.sampling.top_p
        )
        own: ResponseOutputs = self.policy(samples, temperature=temperature, support=support, entropy=False)
        full = None
        if self.config.kl_penalty == "full":
            full = samples.spread(
                kl.full_kl(
                    self.policy.policy_logits(samples, temperature=temperature, support=support).log_softmax(-1),
                    self.policy.reference_logits(samples, temperature=temperature, support=support).log_softmax(-1),
                )
            )
        return Evaluation(
            samples=samples,
            logprobs=own.logprobs,
            values=own.values,
            ref_logprobs=self.policy.reference_logprobs(samples, temperature=temperature, support=support),
            full_kl=full,
            support=support,
        )

    def update(self, rollout: Rollout, minibatch_permutations: Sequence[Sequence[int]] | None = None) -> StepResult:
        """Token rewards, advantages, then epochs x mini-batches of clipped updates, then the KL coefficient."""
        config, mask = self.config, rollout.samples.mask
        if len(rollout) != config.batch_size:
            raise ValueError(f"{len(rollout)} samples in a step with batch_size={config.batch_size}")
        if not bool(rollout.scores.isfinite().all()):
            raise ValueError(f"scores must be finite: {rollout.scores.tolist()}")

        scores = self._prepare_scores(rollout.scores)
        kls = rollout.full_kl
        if kls is None:
            kls = kl.ESTIMATORS[config.kl_penalty](rollout.logprobs, rollout.ref_logprobs)
        token_rewards, non_score = rewards.token_rewards(scores, kls, mask, kl_coef=self.kl_coef)
        earned = scale(token_rewards, mask) if config.whiten_rewards else token_rewards
        advantages, returns = gae(earned, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        advantages = whiten(advantages, mask)

        learning_rate = self._set_learning_rates()
        self._engine.step = self.steps_done
        # Drawn as they are taken: epochs that early stopping leaves out draw nothing.
        orders = (self._order(epoch, minibatch_permutations) for epoch in range(config.ppo_epochs))
        minibatches, permutations = self._engine.run(rollout, advantages, returns, orders)
        mean_kl = masked_sum(kls, mask, dim=1).mean().item()
        statistics = {
            "objective/kl": mean_kl,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": masked_sum(-rollout.logprobs, mask, dim=1).mean().item(),
            "ppo/mean_non_score_reward": masked_mean(non_score, mask).item(),
            "ppo/mean_scores": scores.mean().item(),
            "ppo/std_scores": _std(scores),
            **_length_statistics("queries", rollout.samples.query_lengths),
            **_length_statistics("responses", rollout.samples.response_lengths),
            **minibatches,
            "ppo/learning_rate": learning_rate,
        }
        if config.adap_kl_ctrl:
            self.kl_coef = kl.adapt_coefficient(
                self.kl_coef, mean_kl, target=config.target, horizon=config.horizon, samples=config.batch_size
            )
        self.steps_done += 1
        return StepResult(
            statistics=statistics,
            mask=mask,
            logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            values=rollout.values,
            kls=kls,
            scores=scores,
            non_score_rewards=non_score,
            rewards=token_rewards,
            advantages=advantages,
            returns=returns,
            minibatch_permutations=permutations,
        )

    def _prepare_scores(self, scores: Tensor) -> Tensor:
        config, scores = self.config, scores.float()
        if config.use_score_scaling:
            self.moments = self.moments.update(scores)
            scores = (rewards.normalise_scores if config.use_score_norm else rewards.scale_scores)(scores, self.moments)
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _set_learning_rates(self) -> float:
        """For the step to come; the first group's."""
        factor = learning_rate_factor(
            self.steps_done,
            self.config.lr_schedule,
            warmup_steps=self.config.lr_warmup_steps,
            total_steps=self.total_steps,
        )
        return set_learning_rates(self.optimizer, factor)

    def _order(self, epoch: int, permutations: Sequence[Sequence[int]] | None) -> Tensor:
        if permutations is None:
            return torch.randperm(self.config.batch_size, generator=self._shuffles)
        if epoch >= len(permutations):
            raise ValueError(f"epoch {epoch} has no permutation among the {len(permutations)} given")
        order = torch.as_tensor(permutations[epoch])
        if not torch.equal(order.sort().values, torch.arange(self.config.batch_size)):
            raise ValueError(f"{order.tolist()} is not a permutation of {self.config.batch_size} samples")
        return order

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights that the next step depends on.

        Where those are sharded, all processes must call this, and the first gets it.
        """
        return {
            "optimizer": state_for_files(self.optimizer),
            "kl_coef": self.kl_coef,
            "moments": (self.moments.count, self.moments.mean, self.moments.var),
            "steps_done": self.steps_done,
            "shuffles": self._shuffles.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, to the bit."""
        restore_state(self.optimizer, self._engine.parameters(), state["optimizer"])
        self.kl_coef = state["kl_coef"]
        self.moments = rewards.RunningMoments(*state["moments"])
        self.steps_done = state["steps_done"]
        self._shuffles.set_state(state["shuffles"].cpu())


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else 0.0


def _length_statistics(name: str, lengths: Tensor) -> dict[str, float]:
    lengths = lengths.float()
    return {f"tokens/{name}_len_mean": lengths.mean().item(), f"tokens/{name}_len_std": _std(lengths)}
