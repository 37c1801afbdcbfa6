"""One PPO step: a rollout in, weights moved. `PPOStepper` is the step API for rewards from any source."""

from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.stepper import PPOStepper, StepResult

__all__ = ["NonFiniteUpdate", "PPOStepper", "StepResult"]
