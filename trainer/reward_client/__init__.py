"""Rewards over HTTP. What fails is an exception, never a number: a made-up one trains a policy as a real one does."""

from trainer.reward_client.client import RewardClient, Scores
from trainer.reward_client.errors import RewardError, RewardRejected, RewardUnavailable
from trainer.reward_client.remote_reward import RemoteReward

__all__ = ["RemoteReward", "RewardClient", "RewardError", "RewardRejected", "RewardUnavailable", "Scores"]
