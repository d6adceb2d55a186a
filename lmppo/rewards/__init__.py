"""Rewards: trl's reward-function protocol, classifiers as reward functions, and one checked call for several of them."""

from lmppo.rewards.classifier import ClassifierReward
from lmppo.rewards.protocol import REWARD_ARGUMENTS, RewardError, RewardFn, completion_text
from lmppo.rewards.reward_set import RewardSet, Scores
from lmppo.rewards.streams import RewardStream, as_streams, default_streams, kl_stream, make_streams

__all__ = [
    "REWARD_ARGUMENTS",
    "ClassifierReward",
    "RewardError",
    "RewardFn",
    "RewardSet",
    "RewardStream",
    "Scores",
    "as_streams",
    "completion_text",
    "default_streams",
    "kl_stream",
    "make_streams",
]
