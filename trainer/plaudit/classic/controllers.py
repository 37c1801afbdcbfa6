"""The KL coefficient's controllers and the running moments of scores, as objects that programs read and replace."""

from typing import Any

from torch import Tensor

from plaudit.ppo import kl, rewards


class AdaptiveKLController:
    """Steers the KL coefficient, `value`, so that the summed KL of a sample stays near `target`."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        """`horizon` is in samples."""
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """After a step of `n_steps` samples whose mean KL was `current` (`ppo.kl.adapt_coefficient`)."""
        self.value = kl.adapt_coefficient(
            self.value, float(current), target=self.target, horizon=self.horizon, samples=n_steps
        )


class FixedKLController:
    """A KL coefficient, `value`, that stays what it is."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Changes nothing."""


class RunningMoments:
    """Mean and standard deviation of a stream of numbers (`ppo.rewards.RunningMoments`, which is immutable)."""

    def __init__(self, accelerator: Any = None) -> None:
        """`accelerator` is accepted and unused: give `update` the numbers of all processes."""
        self._moments = rewards.RunningMoments()

    @property
    def mean(self) -> float:
        """Of everything so far."""
        return self._moments.mean

    @property
    def std(self) -> float:
        """Unbiased; 1 before there are two numbers."""
        return self._moments.std

    @property
    def var(self) -> float:
        """With the divisor n."""
        return self._moments.var

    @property
    def count(self) -> float:
        """How many numbers there were."""
        return self._moments.count

    def update(self, xs: Tensor) -> tuple[float, float]:
        """Takes in a batch; returns the batch's own mean and standard deviation."""
        self._moments = self._moments.update(xs)
        own = rewards.RunningMoments().update(xs)
        return own.mean, own.std
