"""Reward streams: what users give of them, made whole and checked against the configuration."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lmppo.config import RewardStream
from lmppo.settings import StreamSettings


def make_streams(reward_funcs: Any, reward_streams: Any, args: StreamSettings) -> list[RewardStream]:
    """The reward streams of a run: those given, or one with all reward functions.

    Raises:
        ValueError: Both or neither are given, there is no function, or a stream has a key that does not exist or has no
            effect under this configuration.
        TypeError: ``reward_streams`` is no list, or a value of a stream is of the wrong kind.
    """
    if (reward_funcs is None) == (reward_streams is None):
        raise ValueError("give either reward_funcs or reward_streams: one of the two, and not both.")
    if reward_streams is None:
        functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("reward_funcs is empty: give at least one reward function.")
        return [RewardStream("reward", functions)]
    streams = as_streams(reward_streams)
    if not any(stream.reward_funcs for stream in streams):
        raise ValueError("reward_streams has no stream with reward_funcs: give at least one.")
    for stream in streams:
        _check_effect(stream, args)
    payer = streams[kl_stream(streams)]
    if args.kl_form == "k1_end" and payer.gamma not in (None, 1):
        raise ValueError(
            f"reward stream {payer.name!r} pays for the KL, and its gamma={payer.gamma:g} would discount what "
            f"kl_form='k1_end' has paid with the last token: set kl_form='k1_reward'."
        )
    return streams


def as_streams(given: Any) -> list[RewardStream]:
    """Reward streams from :class:`RewardStream` objects or from mappings with their fields, as YAML gives them.

    Raises:
        ValueError: A stream is no mapping, has no name, or has a key that does not exist.
        TypeError: ``given`` is no list, or a value of a stream is of the wrong kind.
    """
    if not isinstance(given, list | tuple):
        raise TypeError(f"reward_streams={given!r} is a {type(given).__name__}; expected a list of streams.")
    return [stream if isinstance(stream, RewardStream) else _as_stream(stream) for stream in given]


def _as_stream(given: Any) -> RewardStream:
    known = [f.name for f in dataclasses.fields(RewardStream)]
    if not isinstance(given, dict) or not set(given) <= set(known) or "name" not in given:
        raise ValueError(f"reward stream {given!r}: expected a mapping with `name` and any of {', '.join(known[1:])}.")
    return RewardStream(**given)


def _check_effect(stream: RewardStream, args: StreamSettings) -> None:
    """Refuse what the estimator, or the place of the KL penalty, would leave without effect."""
    if stream.lam is not None and args.estimator != "gae":
        raise ValueError(
            f"reward stream {stream.name!r}: lam={stream.lam} is GAE's, and estimator={args.estimator!r} has no lambda: "
            f"leave it out, or set estimator='gae'."
        )
    if stream.gamma is not None and args.estimator == "immediate_rewards":
        raise ValueError(
            f"reward stream {stream.name!r}: gamma={stream.gamma} discounts later rewards, which "
            f"estimator='immediate_rewards' does not use: leave it out, or choose another estimator."
        )
    if stream.name == "kl" and not args.kl_in_reward:
        raise ValueError(
            f"reward stream 'kl' holds the KL penalty of the reward, and kl_form={args.kl_form!r} has none there: leave "
            f"the stream out, or set kl_form='k1_reward', 'k1_end', 'k3_both' or 'exact_both'."
        )


def default_streams(n_streams: int) -> list[RewardStream]:
    """Streams that leave discount and lambda to the configuration."""
    return [RewardStream(f"stream_{k}") for k in range(n_streams)]


def kl_stream(streams: Sequence[RewardStream]) -> int:
    """The stream that pays for the KL to the reference: the one named ``kl``, else the first."""
    return next((k for k, stream in enumerate(streams) if stream.name == "kl"), 0)
