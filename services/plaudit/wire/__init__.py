"""The messages between the programs. Pydantic and the standard library only."""

from plaudit.wire.rewards import (
    FINAL_PROBLEMS,
    LIVEZ_PATH,
    MAX_ITEMS_PER_REQUEST,
    MAX_TEXT_CHARS,
    MODEL_PATH,
    PROBLEM_CONTENT_TYPE,
    READYZ_PATH,
    REWARDS_PATH,
    Join,
    Limits,
    ModelInfo,
    Problem,
    RewardItem,
    RewardRequest,
    RewardResponse,
    problem_type,
)

__all__ = [
    "FINAL_PROBLEMS",
    "LIVEZ_PATH",
    "MAX_ITEMS_PER_REQUEST",
    "MAX_TEXT_CHARS",
    "MODEL_PATH",
    "PROBLEM_CONTENT_TYPE",
    "READYZ_PATH",
    "REWARDS_PATH",
    "Join",
    "Limits",
    "ModelInfo",
    "Problem",
    "RewardItem",
    "RewardRequest",
    "RewardResponse",
    "problem_type",
]
