"""Rewards over HTTP. What fails is an exception, never a number: a made-up one trains a policy as a real one does."""

from trainer.reward_client.client import RewardClient, Scores
from trainer.reward_client.errors import RewardError, RewardRejected, RewardUnavailable

__all__ = ["RewardClient", "RewardError", "RewardRejected", "RewardUnavailable", "Scores"]
