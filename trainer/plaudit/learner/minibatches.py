"""Epochs of mini-batches over one rollout: gradients, and the optimizer's steps.

Each process computes its share of a mini-batch's rows, in groups that fit into memory; or, on a GPU, the whole
mini-batch by one recorded CUDA graph. Failure modes: a weight that moves on a skipped mini-batch or on a number that is
not finite, and a batch that ran out of memory and counted twice.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plaudit.errors import PlauditError
from plaudit.learner.adam import make_optimizer, step_unless
from plaudit.learner.experience import Experience
from plaudit.learner.graphs import FlatMinibatch, UpdateGraphs, warn_of_no_graphs
from plaudit.learner.memory import BatchSizeFinder
from plaudit.learner.objective import clipped_losses, how_to_aggregate, token_losses
from plaudit.learner.step_statistics import STATISTICS, averaged, measure
from plaudit.parallel.processes import Processes
from plaudit.policy.model import Policy, ResponseOutputs
from plaudit.policy.samples import Samples, on_device, stack_rows
from plaudit.ppo.aggregation import divisor, group_sum
from plaudit.ppo.masked import masked_sum
from plaudit.settings.ppo import PPOHyperparameters


class NonFiniteUpdate(PlauditError, RuntimeError):
    """A loss or gradient was NaN or infinite. No weight has seen it; `samples` are the mini-batch, for inspection."""

    def __init__(self, what: str, *, step: int, epoch: int, rows: Tensor, samples: Samples) -> None:
        super().__init__(f"{what} in step {step}, epoch {epoch}, samples {rows.tolist()} of the batch")
        self.step = step
        self.epoch = epoch
        self.rows = rows
        self.samples = samples


@dataclass(frozen=True)
class Minibatch:
    """Some rows of a batch, as wide as the longest of them. Tensors are [b, T]; `support` is [b, T, ceil(V / 8)]."""

    samples: Samples
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    support: Tensor | None

    @classmethod
    def of(cls, experience: Experience, rows: Tensor) -> "Minibatch":
        """The given rows [b] of the experience."""
        rollout = experience.rollout
        batch = cls(
            samples=rollout.samples,
            logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            values=rollout.values,
            advantages=experience.advantages,
            returns=experience.returns,
            support=rollout.support,
        )
        return batch.rows(rows)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mask(self) -> Tensor:
        """[b, T] bool, True on real tokens."""
        return self.samples.mask

    def rows(self, rows: Tensor | Sequence[int]) -> "Minibatch":
        """Some rows of this mini-batch, in the given order."""
        samples = self.samples.select(rows)
        width, chosen = samples.mask.shape[1], on_device(torch.as_tensor(rows), self.mask.device)

        def of(tensor: Tensor) -> Tensor:
            return tensor[:, :width].index_select(0, chosen)

        return Minibatch(
            samples,
            of(self.logprobs),
            of(self.ref_logprobs),
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


class MinibatchEngine:
    """The optimizer, and the loop that moves the weights: epochs x mini-batches, in groups that fit into memory."""

    def __init__(
        self,
        policy: Policy,
        config: PPOHyperparameters,
        *,
        processes: Processes,
    ) -> None:
        """Call `draw_from` before the first run."""
        self.policy, self.config, self.processes = policy, config, processes
        self._optimizer: torch.optim.Optimizer = make_optimizer(policy, config, processes)
        # With sharded weights, a process that tried again would leave the others waiting in a collective operation.
        share = processes.largest_share(config.mini_batch_size, group=config.responses_per_prompt)
        self.batch_size_finder = BatchSizeFinder(
            min(config.micro_batch_size or share, share), fixed=processes.is_sharded
        )
        # Through fp16 goes the gradient of a sum over tokens: that of their mean would be rounded to 0.
        self._divides_gradients = policy.language_model.dtype == torch.float16
        self._value_only = False
        self._step = 0
        self._temperature = 1.0
        self._updates: UpdateGraphs | None = None

    def draw_from(self, temperature: float, *, record: bool) -> None:
        """Responses are sampled at this temperature from now on.

        `record` updates as CUDA graphs, where a whole mini-batch goes through the model at once.
        """
        self._temperature = temperature
        self._updates = UpdateGraphs(self.parameters(), self._learn) if record else None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, or the optimizer that was put in its place."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        # A recorded update leans on fused Adam: another optimizer may move weights that have to stay.
        self._optimizer, self._updates = optimizer, None

    def parameters(self) -> list[nn.Parameter]:
        """Everything that learns, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _of_the_policy(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]

    def run(
        self, experience: Experience, orders: Iterable[Tensor], *, step: int = 0, value_only: bool = False
    ) -> tuple[dict[str, float], list[list[int]]]:
        """One epoch for each of the `ppo_epochs` orders of samples, unless early stopping ends them.

        Returns the mini-batches' statistics, averaged, and the orders that were taken. `step` is for messages. With
        `value_only` the loss is the value head's, and nothing moves but it and a value model.

        Raises:
            NonFiniteUpdate: a loss or gradient is not finite; no weight has seen it.
        """
        config, self._step, self._value_only = self.config, step, value_only
        self.policy.train()
        history: list[dict[str, float]] = []
        recorded: list[_Recorded] = []
        taken: list[list[int]] = []
        for epoch, order in enumerate(orders):
            taken.append(order.tolist())
            for group in torch.split(order, config.mini_batch_size * config.gradient_accumulation_steps):
                done = self._recorded_step(experience, group, epoch=epoch)
                if done is None:
                    history += self._optimizer_step(experience, group, epoch=epoch)
                else:
                    recorded.append(done)
            if config.early_stopping or epoch == config.ppo_epochs - 1:
                # One copy from the device for all of them.
                history += self._read(recorded, experience)
                recorded.clear()
            if config.early_stopping and history[-1]["ppo/policy/policykl"] > 1.5 * config.target_kl:
                break
        self.policy.eval()
        return averaged(history), taken

    def _optimizer_step(self, experience: Experience, rows: Tensor, *, epoch: int) -> list[dict[str, float]]:
        """Accumulates the gradients of some mini-batches and moves the weights once, unless all were skipped."""
        config = self.config
        history = [
            self._accumulate(experience, minibatch, epoch=epoch)
            for minibatch in torch.split(rows, config.mini_batch_size)
        ]
        if all(statistics["ppo/skipped"] for statistics in history):
            return history
        if self._value_only:
            for parameter in self._of_the_policy():
                parameter.grad = None  # Adam leaves it, and its moments, as they are
        self.processes.all_reduce_gradients(self.parameters())
        norm = self.processes.full_tensor(nn.utils.clip_grad_norm_(self.parameters(), config.max_grad_norm or math.inf))
        if not bool(norm.isfinite()):
            raise self._non_finite(f"gradient norm is {norm.item()}", experience, rows, epoch)
        for statistics in history:
            statistics["ppo/grad_norm"] = norm.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return history

    def _recorded_step(self, experience: Experience, rows: Tensor, *, epoch: int) -> "_Recorded | None":
        """`_optimizer_step` for one mini-batch by a recorded graph, statistics unread; None if there is no graph."""
        if self._updates is None or self._value_only:
            return None
        minibatch = Minibatch.of(experience, rows)
        flat = FlatMinibatch.of(
            minibatch.samples,
            self.policy.mask_dtype,
            logprobs=minibatch.logprobs,
            values=minibatch.values,
            advantages=minibatch.advantages,
            returns=minibatch.returns,
        )
        if self.policy.in_pieces(len(flat.mask)):
            return None
        try:
            return _Recorded(self._updates.run(flat), rows, epoch)
        except RuntimeError as error:
            self._updates = None
            self.optimizer.zero_grad()
            warn_of_no_graphs("updates", error)
            return None

    def _learn(self, minibatch: FlatMinibatch, hold: Tensor) -> Tensor:
        """One mini-batch's update, during which the host reads nothing; returns statistics, the gradient's norm last.

        No weight moves if the mean ratio is over the threshold, if loss or gradient is not finite, or if `hold` > 0.
        """
        config, mask = self.config, minibatch.mask
        new = self.policy.score(minibatch.given, minibatch.tokens, temperature=self._temperature)
        loss = masked_sum(token_losses(minibatch, new, config), mask) / mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters(), config.max_grad_norm or math.inf)
        measured = measure(minibatch, ResponseOutputs(*(output.detach() for output in vars(new).values())), config)
        stays = (
            (measured["ppo/policy/ratio"] > config.ratio_threshold)
            | ~measured["ppo/loss/total"].isfinite()
            | ~norm.isfinite()
        )
        step_unless(self.optimizer, torch.maximum(stays.float(), hold))
        return torch.stack([*measured.values(), norm])

    def _read(self, recorded: Sequence["_Recorded"], experience: Experience) -> list[dict[str, float]]:
        """Reads the statistics of recorded updates. Raises `NonFiniteUpdate` if one held its weights for that."""
        history: list[dict[str, float]] = []
        if not recorded:
            return history
        for done, (*values, norm) in zip(
            recorded, torch.stack([done.statistics for done in recorded]).tolist(), strict=True
        ):
            statistics, skipped = self._check_ratio(dict(zip(STATISTICS, values, strict=True)))
            if not skipped:
                if not math.isfinite(statistics["ppo/loss/total"]):
                    what = f"loss is {statistics['ppo/loss/total']}"
                    raise self._non_finite(what, experience, done.rows, done.epoch)
                if not math.isfinite(norm):
                    raise self._non_finite(f"gradient norm is {norm}", experience, done.rows, done.epoch)
                statistics["ppo/grad_norm"] = norm
            history.append(statistics)
        return history

    def _accumulate(self, experience: Experience, rows: Tensor, *, epoch: int) -> dict[str, float]:
        """Adds a mini-batch's gradient to the accumulated one, unless its mean ratio exceeds `ratio_threshold`."""
        old = Minibatch.of(experience, rows)
        before = [parameter.grad for parameter in self.parameters()]
        own = self.processes.share(len(rows), group=self.config.responses_per_prompt)
        outputs = self.batch_size_finder.run(lambda size: self._backward(old, own, size))
        new = ResponseOutputs(*self.processes.all_gather_rows(outputs, own, old.mask.shape))
        statistics, skipped = self._statistics(old, new)
        if not skipped and not math.isfinite(statistics["ppo/loss/total"]):
            raise self._non_finite(f"loss is {statistics['ppo/loss/total']}", experience, rows, epoch)
        for parameter, earlier in zip(self.parameters(), before, strict=True):
            if skipped or parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad += earlier
        return statistics

    def _backward(self, minibatch: "Minibatch", own: range, size: int) -> Tensor:
        """The gradient of this process's `own` rows, in groups of `size`; returns their outputs [3, b, T].

        Each group's loss is divided by what the whole mini-batch has, so the groups' gradients add up to its gradient.
        """
        self.optimizer.zero_grad()
        how = how_to_aggregate(self.config)
        whole = divisor(minibatch.mask, aggregation=self.config.loss_aggregation)
        whole = whole * self.config.gradient_accumulation_steps
        later = 1.0
        if self._divides_gradients:
            whole, later = 1, float(whole)
        groups = []
        largest = self.processes.largest_share(len(minibatch), group=self.config.responses_per_prompt)
        for start in range(0, largest, size):
            rows = own[start : start + size]
            if not rows:
                if self.processes.is_sharded:
                    self._idle_pass(minibatch)
                continue
            group = minibatch.rows(rows)
            new: ResponseOutputs = self.policy(
                group.samples,
                temperature=self._temperature,
                support=group.support,
            )
            each = (
                self.config.vf_coef * clipped_losses(group, new, self.config)[1]
                if self._value_only
                else token_losses(group, new, self.config, group.ref_logprobs)
            )
            loss = group_sum(each, group.mask, **how) / whole
            loss.backward()  # type: ignore[no-untyped-call]
            groups.append(torch.stack([new.logprobs, new.values, new.entropy]).detach())
        if self._divides_gradients:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(later)
        return stack_rows(groups, dim=2)

    def _idle_pass(self, minibatch: "Minibatch") -> None:
        """A dummy pass: other ranks have a group more, and all ranks take part in each all-gather of the weights."""
        new: ResponseOutputs = self.policy(minibatch.rows(range(1)).samples)
        loss = 0.0 * (new.logprobs.sum() + new.values.sum())
        loss.backward()  # type: ignore[no-untyped-call]

    def _statistics(self, old: "Minibatch", new: ResponseOutputs) -> tuple[dict[str, float], bool]:
        """The statistics of a whole mini-batch, and whether it has to be skipped."""
        measured = measure(old, new, self.config, old.ref_logprobs)
        # One copy from the device for all of them.
        return self._check_ratio(dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True)))

    def _check_ratio(self, statistics: dict[str, float]) -> tuple[dict[str, float], bool]:
        """The statistics of a mini-batch, and whether its mean ratio exceeds `ratio_threshold`."""
        config = self.config
        skipped = statistics["ppo/policy/ratio"] > config.ratio_threshold
        if skipped:
            warnings.warn(
                f"mean ratio {statistics['ppo/policy/ratio']:.2f} exceeds ratio_threshold={config.ratio_threshold}: "
                "mini-batch skipped",
                stacklevel=2,
            )
            statistics |= dict.fromkeys((name for name in statistics if name.startswith("ppo/loss/")), 0.0)
        return statistics | {"ppo/skipped": float(skipped), "ppo/grad_norm": 0.0}, skipped

    def _non_finite(self, what: str, experience: Experience, rows: Tensor, epoch: int) -> NonFiniteUpdate:
        self.optimizer.zero_grad()
        samples = experience.rollout.samples.select(rows)
        return NonFiniteUpdate(what, step=self._step, epoch=epoch, rows=rows, samples=samples)
