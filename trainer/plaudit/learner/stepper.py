"""One PPO step on samples that have been scored: epochs x mini-batches of clipped updates over one rollout.

This is also the classic step API: `PPOStepper(policy, reference, config).step(queries, responses, scores)` with rewards
from any source. Wrong here would be a weight that moves on a skipped mini-batch, or on a number that is not finite.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.errors import ConfigError
from plaudit.learner.graphs import FlatMinibatch, FlatSamples, Graphs, UpdateGraphs
from plaudit.learner.memory import Fitting
from plaudit.parallel.processes import Processes
from plaudit.parallel.sharding import as_split, for_files, is_sharded, whole
from plaudit.policy.model import Policy, ResponseOutputs
from plaudit.policy.samples import Evaluation, Rollout, Samples, on_device, stack_rows
from plaudit.ppo import kl, losses, rewards
from plaudit.ppo.advantages import gae
from plaudit.ppo.masked import masked_mean, masked_sum, masked_var, scale, whiten
from plaudit.settings.ppo import LearningRateSchedule, PPOHyperparameters

OWN_OPTIONS = ("fused", "foreach", "capturable", "lr")
"""Of an optimizer's options, those that a checkpoint does not decide: how it computes, and the rate, set each step."""


STATISTICS = (
    *(f"ppo/loss/{name}" for name in ("policy", "value", "total")),
    *(f"ppo/policy/{name}" for name in ("entropy", "approxkl", "policykl", "clipfrac", "advantages_mean", "ratio")),
    "ppo/policy/ratio_drift",
    *("ppo/returns/mean", "ppo/returns/var"),
    *(f"ppo/val/{name}" for name in ("vpred", "error", "clipfrac", "mean", "var")),
)
"""What is measured of each mini-batch, in the order of `PPOStepper._measured`."""


class NonFiniteUpdate(RuntimeError):
    """A loss or gradient was NaN or infinite. No weight has seen it; `samples` are the mini-batch, for inspection."""

    def __init__(self, what: str, *, step: int, epoch: int, rows: Tensor, samples: Samples) -> None:
        super().__init__(f"{what} in step {step}, epoch {epoch}, samples {rows.tolist()} of the batch")
        self.step = step
        self.epoch = epoch
        self.rows = rows
        self.samples = samples


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


@dataclass(frozen=True)
class _Minibatch:
    """Some rows of a rollout, as wide as the longest of them needs. Everything but the samples is [b, T]."""

    samples: Samples
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    support: Tensor | None

    @classmethod
    def of(cls, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor) -> "_Minibatch":
        whole = cls(rollout.samples, rollout.logprobs, rollout.values, advantages, returns, rollout.support)
        return whole.rows(rows)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mask(self) -> Tensor:
        return self.samples.mask

    def rows(self, rows: Tensor | Sequence[int]) -> "_Minibatch":
        samples = self.samples.select(rows)
        width, chosen = samples.mask.shape[1], on_device(torch.as_tensor(rows), self.mask.device)

        def of(tensor: Tensor) -> Tensor:
            return tensor[:, :width].index_select(0, chosen)

        return _Minibatch(
            samples,
            of(self.logprobs),
            of(self.values),
            of(self.advantages),
            of(self.returns),
            None if self.support is None else of(self.support),
        )


@dataclass(frozen=True)
class _Recorded:
    """A mini-batch whose update a recorded graph has computed, and its statistics on the device."""

    statistics: Tensor
    rows: Tensor
    epoch: int


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
        self.optimizer = make_optimizer(policy, config)
        self.kl_coef = config.init_kl_coef
        self.moments = rewards.RunningMoments()
        self.steps_done = 0
        # With sharded weights, one process that tried again would be out of step with the others.
        share = self.processes.largest_share(config.mini_batch_size)
        self.fitting = Fitting(min(config.micro_batch_size or share, share), fixed=is_sharded(policy))
        self._shuffles = torch.Generator().manual_seed(seed)
        self._updates: UpdateGraphs | None = None
        self._evaluations: Graphs[FlatSamples] | None = None
        if graphs and self._can_record():
            self._updates, self._evaluations = UpdateGraphs(self._parameters(), self._learn), Graphs(self._think)

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
            _warn_of_no_graphs("evaluations", error)
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
        minibatches, permutations = self._optimise(rollout, advantages, returns, minibatch_permutations)
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
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place, for whatever graph reads it
            else:
                group["lr"] = rate
        return float(self.optimizer.param_groups[0]["initial_lr"] * factor)

    def _optimise(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        permutations: Sequence[Sequence[int]] | None,
    ) -> tuple[dict[str, float], list[list[int]]]:
        """All epochs. Returns the mini-batches' statistics, averaged, and the orders that were taken."""
        config = self.config
        self.policy.train()
        history: list[dict[str, float]] = []
        recorded: list[_Recorded] = []
        orders: list[list[int]] = []
        for epoch in range(config.ppo_epochs):
            order = self._order(epoch, permutations)
            orders.append(order.tolist())
            for group in torch.split(order, config.mini_batch_size * config.gradient_accumulation_steps):
                done = self._recorded_step(rollout, advantages, returns, group, epoch=epoch)
                if done is None:
                    history += self._optimizer_step(rollout, advantages, returns, group, epoch=epoch)
                else:
                    recorded.append(done)
            if config.early_stopping or epoch == config.ppo_epochs - 1:
                # One look at the device for all of them.
                history += self._read(recorded, rollout)
                recorded.clear()
            if config.early_stopping and history[-1]["ppo/policy/policykl"] > 1.5 * config.target_kl:
                break
        self.policy.eval()
        statistics = {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}
        spread = statistics["ppo/returns/var"]
        statistics["ppo/val/var_explained"] = 1 - statistics["ppo/val/error"] / spread if spread > 0 else 0.0
        statistics["ppo/policy/ratio_drift"] = history[0]["ppo/policy/ratio_drift"]
        return statistics, orders

    def _order(self, epoch: int, permutations: Sequence[Sequence[int]] | None) -> Tensor:
        if permutations is None:
            return torch.randperm(self.config.batch_size, generator=self._shuffles)
        if epoch >= len(permutations):
            raise ValueError(f"epoch {epoch} has no permutation among the {len(permutations)} given")
        order = torch.as_tensor(permutations[epoch])
        if not torch.equal(order.sort().values, torch.arange(self.config.batch_size)):
            raise ValueError(f"{order.tolist()} is not a permutation of {self.config.batch_size} samples")
        return order

    def _optimizer_step(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, *, epoch: int
    ) -> list[dict[str, float]]:
        """Accumulates the gradients of a group of mini-batches and moves the weights once, if any of them counted."""
        config = self.config
        history = [
            self._accumulate(rollout, advantages, returns, minibatch, epoch=epoch)
            for minibatch in torch.split(rows, config.mini_batch_size)
        ]
        if all(statistics["ppo/skipped"] for statistics in history):
            return history
        self.processes.sum_gradients(self._parameters())
        norm = whole(nn.utils.clip_grad_norm_(self._parameters(), config.max_grad_norm or math.inf))
        if not bool(norm.isfinite()):
            raise self._non_finite(f"gradient norm is {norm.item()}", rollout, rows, epoch)
        for statistics in history:
            statistics["ppo/grad_norm"] = norm.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return history

    def _recorded_step(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, *, epoch: int
    ) -> "_Recorded | None":
        """The same for one mini-batch, by a recorded graph, unread; None where there is none."""
        if self._updates is None:
            return None
        minibatch = _Minibatch.of(rollout, advantages, returns, rows)
        flat = FlatMinibatch.of(
            minibatch.samples,
            self.policy.mask_dtype,
            logprobs=minibatch.logprobs,
            values=minibatch.values,
            advantages=minibatch.advantages,
            returns=minibatch.returns,
        )
        try:
            return _Recorded(self._updates.run(flat), rows, epoch)
        except RuntimeError as error:
            self._updates = None
            self.optimizer.zero_grad()
            _warn_of_no_graphs("updates", error)
            return None

    def _learn(self, minibatch: FlatMinibatch, hold: Tensor) -> Tensor:
        """One mini-batch's update without a look from the host: its statistics, the gradient's norm last.

        No weight moves if the mean ratio is over the threshold, if loss or gradient is not finite, or if `hold` > 0.
        """
        config, mask = self.config, minibatch.mask
        new = self.policy.score(minibatch.given, minibatch.tokens, temperature=self.sampling.temperature)
        loss = masked_sum(self._token_losses(minibatch, new), mask) / mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters(), config.max_grad_norm or math.inf)
        measured = self._measured(minibatch, ResponseOutputs(*(output.detach() for output in vars(new).values())))
        stays = (
            (measured["ppo/policy/ratio"] > config.ratio_threshold)
            | ~measured["ppo/loss/total"].isfinite()
            | ~norm.isfinite()
        )
        # As torch.amp.GradScaler tells a fused optimizer.
        told: Any = self.optimizer
        told.grad_scale, told.found_inf = None, torch.maximum(stays.float(), hold)
        try:
            told.step()
        finally:
            del told.grad_scale, told.found_inf
        return torch.stack([*measured.values(), norm])

    def _read(self, recorded: Sequence["_Recorded"], rollout: Rollout) -> list[dict[str, float]]:
        """The statistics of recorded updates. Raises `NonFiniteUpdate` for one whose weights did not move for that."""
        history: list[dict[str, float]] = []
        if not recorded:
            return history
        for done, (*values, norm) in zip(
            recorded, torch.stack([done.statistics for done in recorded]).tolist(), strict=True
        ):
            statistics, skipped = self._judged(dict(zip(STATISTICS, values, strict=True)))
            if not skipped:
                if not math.isfinite(statistics["ppo/loss/total"]):
                    what = f"loss is {statistics['ppo/loss/total']}"
                    raise self._non_finite(what, rollout, done.rows, done.epoch)
                if not math.isfinite(norm):
                    raise self._non_finite(f"gradient norm is {norm}", rollout, done.rows, done.epoch)
                statistics["ppo/grad_norm"] = norm
            history.append(statistics)
        return history

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, *, epoch: int
    ) -> dict[str, float]:
        """Adds a mini-batch's gradient to the parameters', unless its mean ratio says that the policy has left."""
        old = _Minibatch.of(rollout, advantages, returns, rows)
        before = [parameter.grad for parameter in self._parameters()]
        own = self.processes.share(len(rows))
        outputs = self.fitting.run(lambda size: self._backward(old, own, size))
        new = ResponseOutputs(*self.processes.complete(outputs, own, old.mask.shape))
        statistics, skipped = self._statistics(old, new)
        if not skipped and not math.isfinite(statistics["ppo/loss/total"]):
            raise self._non_finite(f"loss is {statistics['ppo/loss/total']}", rollout, rows, epoch)
        for parameter, earlier in zip(self._parameters(), before, strict=True):
            if skipped or parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad += earlier
        return statistics

    def _backward(self, minibatch: "_Minibatch", own: range, size: int) -> Tensor:
        """The gradient of this process's `own` rows, in groups that fit into memory, and their outputs [3, b, T].

        The loss is a mean over all tokens of the mini-batch, so the groups' gradients add up to its gradient.
        """
        self.optimizer.zero_grad()
        divisor = minibatch.mask.sum() * self.config.gradient_accumulation_steps
        groups = []
        for start in range(0, self.processes.largest_share(len(minibatch)), size):
            rows = own[start : start + size]
            if not rows:
                if is_sharded(self.policy):
                    self._idle_pass(minibatch)
                continue
            group = minibatch.rows(rows)
            new: ResponseOutputs = self.policy(
                group.samples,
                temperature=self.sampling.temperature,
                support=group.support,
            )
            loss = masked_sum(self._token_losses(group, new), group.mask) / divisor
            loss.backward()  # type: ignore[no-untyped-call]
            groups.append(torch.stack([new.logprobs, new.values, new.entropy]).detach())
        return stack_rows(groups, dim=2)

    def _idle_pass(self, minibatch: "_Minibatch") -> None:
        """A pass for nothing: other processes have a group more, and gather the weights with everybody's help."""
        new: ResponseOutputs = self.policy(minibatch.rows(range(1)).samples)
        loss = 0.0 * (new.logprobs.sum() + new.values.sum())
        loss.backward()  # type: ignore[no-untyped-call]

    def _token_losses(self, old: "_Minibatch | FlatMinibatch", new: ResponseOutputs) -> Tensor:
        policy_losses, value_losses = self._losses(old, new)
        losses = policy_losses + self.config.vf_coef * value_losses
        return losses if self.config.entropy_coef == 0 else losses - self.config.entropy_coef * new.entropy

    def _losses(self, old: "_Minibatch | FlatMinibatch", new: ResponseOutputs) -> tuple[Tensor, Tensor]:
        config = self.config
        ratios = (new.logprobs - old.logprobs).exp()
        return (
            losses.policy_losses(ratios, old.advantages, cliprange=config.cliprange),
            losses.value_losses(new.values, old.values, old.returns, cliprange=config.cliprange_value),
        )

    def _measured(self, old: "_Minibatch | FlatMinibatch", new: ResponseOutputs) -> dict[str, Tensor]:
        """What a whole mini-batch was like, still on the device."""
        config, mask = self.config, old.mask
        log_ratios = new.logprobs - old.logprobs
        ratios = log_ratios.exp()
        policy_losses, value_losses = self._losses(old, new)
        policy_loss, value_loss = masked_mean(policy_losses, mask), masked_mean(value_losses, mask)
        entropy = masked_mean(new.entropy, mask)
        policy_clipped = losses.policy_clipped(ratios, old.advantages, cliprange=config.cliprange)
        value_clipped = losses.value_clipped(new.values, old.values, old.returns, cliprange=config.cliprange_value)
        return {
            "ppo/loss/policy": policy_loss,
            "ppo/loss/value": value_loss,
            "ppo/loss/total": policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy,
            "ppo/policy/entropy": entropy,
            "ppo/policy/approxkl": 0.5 * masked_mean(log_ratios.square(), mask),
            "ppo/policy/policykl": masked_mean(-log_ratios, mask),
            "ppo/policy/clipfrac": masked_mean(policy_clipped.float(), mask),
            "ppo/policy/advantages_mean": masked_mean(old.advantages, mask),
            "ppo/policy/ratio": masked_mean(ratios, mask),
            "ppo/policy/ratio_drift": (ratios - 1).masked_fill(~mask, 0.0).abs().max(),
            "ppo/returns/mean": masked_mean(old.returns, mask),
            "ppo/returns/var": masked_var(old.returns, mask),
            "ppo/val/vpred": masked_mean(new.values, mask),
            "ppo/val/error": masked_mean((new.values - old.returns).square(), mask),
            "ppo/val/clipfrac": masked_mean(value_clipped.float(), mask),
            "ppo/val/mean": masked_mean(old.values, mask),
            "ppo/val/var": masked_var(old.values, mask),
        }

    def _statistics(self, old: "_Minibatch", new: ResponseOutputs) -> tuple[dict[str, float], bool]:
        """What a whole mini-batch was like, and whether it has to be skipped."""
        measured = self._measured(old, new)
        # One copy from the device for all of them.
        return self._judged(dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True)))

    def _judged(self, statistics: dict[str, float]) -> tuple[dict[str, float], bool]:
        """The statistics of a mini-batch, and whether it was skipped."""
        config = self.config
        skipped = statistics["ppo/policy/ratio"] > config.ratio_threshold
        if skipped:
            warnings.warn(
                f"mean ratio {statistics['ppo/policy/ratio']:.2f} exceeds ratio_threshold={config.ratio_threshold}: "
                "mini-batch skipped",
                stacklevel=2,
            )
            statistics |= dict.fromkeys(("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"), 0.0)
        return statistics | {"ppo/skipped": float(skipped), "ppo/grad_norm": 0.0}, skipped

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _non_finite(self, what: str, rollout: Rollout, rows: Tensor, epoch: int) -> NonFiniteUpdate:
        self.optimizer.zero_grad()
        return NonFiniteUpdate(what, step=self.steps_done, epoch=epoch, rows=rows, samples=rollout.samples.select(rows))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights that the next step depends on.

        Where those are sharded, all processes must call this, and the first gets it.
        """
        optimizer = self.optimizer.state_dict()
        return {
            "optimizer": {
                "state": _tensors(optimizer["state"], lambda _, moment: for_files(moment)),
                "param_groups": [group | {"lr": float(group["lr"])} for group in optimizer["param_groups"]],
            },
            "kl_coef": self.kl_coef,
            "moments": (self.moments.count, self.moments.mean, self.moments.var),
            "steps_done": self.steps_done,
            "shuffles": self._shuffles.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, to the bit."""
        saved, parameters = state["optimizer"], self._parameters()
        own = _tensors(saved["state"], lambda i, moment: as_split(moment, parameters[i]) if moment.ndim else moment)
        # How steps are computed is this process's business, not that of the one which wrote the file.
        pairs = zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        groups = [group | {name: current[name] for name in OWN_OPTIONS} for group, current in pairs]
        self.optimizer.load_state_dict({"state": own, "param_groups": groups})
        self.kl_coef = state["kl_coef"]
        self.moments = rewards.RunningMoments(*state["moments"])
        self.steps_done = state["steps_done"]
        self._shuffles.set_state(state["shuffles"].cpu())


def make_optimizer(policy: Policy, config: PPOHyperparameters) -> torch.optim.Adam:
    """Adam without weight decay over everything that learns; what makes values apart if it has a rate of its own."""
    modules = [policy.v_head] if policy.value_model is None else [policy.v_head, policy.value_model]
    head = {id(parameter) for module in modules for parameter in module.parameters()}
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    rate, head_rate = config.learning_rate, config.value_head_learning_rate
    groups: list[dict[str, Any]] = [{"params": learning, "lr": rate, "initial_lr": rate}]
    if head_rate is not None:
        groups = [
            {"params": [p for p in learning if id(p) not in head], "lr": rate, "initial_lr": rate},
            {"params": [p for p in learning if id(p) in head], "lr": head_rate, "initial_lr": head_rate},
        ]
    # One kernel for all parameters; split ones have none.
    fused = True if policy.device.type == "cuda" and not is_sharded(policy) else None
    if fused:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=policy.device)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.Adam(groups, betas=betas, eps=config.adam_eps, fused=fused, capturable=bool(fused))


def learning_rate_factor(
    step: int, schedule: LearningRateSchedule, *, warmup_steps: int = 0, total_steps: int | None = None
) -> float:
    """What multiplies the learning rate in step `step` (from 0): rising over the warm-up, then by the schedule."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    assert total_steps is not None
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _tensors(
    states: Mapping[int, Mapping[str, Tensor]], change: Callable[[int, Tensor], Tensor]
) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state, `change` applied to each parameter's number and each of its tensors."""
    return {i: {name: change(i, tensor) for name, tensor in state.items()} for i, state in states.items()}


def _warn_of_no_graphs(what: str, error: RuntimeError) -> None:
    reason = " ".join(str(error).split())
    warnings.warn(f"{what} are not recorded as CUDA graphs, and slower for it: {reason:.200}", stacklevel=2)


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else 0.0


def _length_statistics(name: str, lengths: Tensor) -> dict[str, float]:
    lengths = lengths.float()
    return {f"tokens/{name}_len_mean": lengths.mean().item(), f"tokens/{name}_len_std": _std(lengths)}
