"""The lab, second part: the real trainer on the same task, judged by the exact return of the policy it has made."""

import functools
import statistics
import tempfile
import time
from typing import Any

import torch
from problem import (
    COMPLETIONS,
    HORIZON,
    KL_COEF,
    PROMPT,
    make_model,
    make_tokenizer,
    next_logits,
    on_grid,
    pay,
    sparse,
)
from torch import Tensor

from lmppo import PPOConfig, PPOTrainer, RewardStream
from lmppo.functional.exact import completion_logprobs, expectation, optimal_policy, sequence_kl, state_logits

SCORES = on_grid(pay).sum(dim=1)
ROLLOUT_SIZE = 64
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip, asymmetric and dual": {"objective": "clip", "clip_range_high": 0.28, "dual_clip": 3.0},
    "kl_penalty": {},
    "importance_sampled": {},
    "policy_gradient": {"ppo_epochs": 1, "minibatch_size": ROLLOUT_SIZE, "learning_rate": 1e-2},
    "trpo": {"critic_epochs": 4},
}
EXACT = {"kl_form": "exact_both"}
VARIANTS: dict[str, dict[str, Any]] = {
    "one pass": {"ppo_epochs": 1},
    "a stream for the KL": {"reward_streams": [RewardStream("score", [sparse]), RewardStream("kl")]},
    "exact KL in both": EXACT,
    "exact KL in both, one pass": EXACT | {"ppo_epochs": 1},
    "exact KL in both, clip 0.5": EXACT | {"clip_range": 0.5},
    "k2 in the loss": {"kl_form": "k2_loss"},
    "critic_lam 1": {"critic_lam": 1.0},
}
"""PPO's clip with one thing changed; unchanged, it has k1 in the reward, four passes, and GAE's 0.95 for its critic too."""


def make_trainer(directory: str, *, seed: int, reward: Any = sparse, **rest: Any) -> PPOTrainer:
    """The library's trainer; ``rest`` holds a critic, reward streams, and settings of the configuration."""
    arguments = {name: rest.pop(name) for name in ("critic", "reward_streams") if name in rest}
    settings = {
        "rollout_batch_size": ROLLOUT_SIZE, "minibatch_size": 16, "micro_batch_size": ROLLOUT_SIZE,
        "max_completion_length": HORIZON, "learning_rate": 3e-3, "critic_learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "kl_coef": KL_COEF, "lam": 0.95, "kl_form": "k1_reward", "target_kl": 0.0,
    } | rest  # fmt: skip
    return PPOTrainer(
        model=make_model(),
        reward_funcs=None if "reward_streams" in arguments else reward,
        args=PPOConfig(output_dir=directory, seed=seed, use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=[PROMPT],
        processing_class=make_tokenizer(),
        **arguments,
    )


@torch.no_grad()
def exact_logprobs(model: Any) -> Tensor:
    """``(N, T)`` float64 what a model says of every completion."""
    return completion_logprobs(state_logits(lambda ids: next_logits(model, ids).double(), COMPLETIONS), COMPLETIONS)


@functools.cache
def reference() -> tuple[Tensor, Tensor]:
    """``(N, T)`` log-probabilities of the model before training, and J*, the best that can be made of it."""
    logprobs = exact_logprobs(make_model())
    return logprobs, optimal_policy(COMPLETIONS, logprobs, SCORES, kl_coef=KL_COEF)[1]


def optimum_kl() -> float:
    """KL(pi* || reference): how far from the model before training the best policy is."""
    logprobs, _ = reference()
    return sequence_kl(optimal_policy(COMPLETIONS, logprobs, SCORES, kl_coef=KL_COEF)[0], logprobs).item()


def share_and_kl(trainer: PPOTrainer) -> tuple[float, float]:
    """``(J - J_ref) / (J* - J_ref)`` with J = E[score] - kl_coef * KL(policy || reference), and that KL; all exact."""
    ref_logprobs, best = reference()
    policy = exact_logprobs(trainer.actor_critic.policy)
    start, kl = expectation(ref_logprobs, SCORES), sequence_kl(policy, ref_logprobs)
    reached = expectation(policy, SCORES) - KL_COEF * kl
    return ((reached - start) / (best - start)).item(), kl.item()


def share_of_the_way(trainer: PPOTrainer) -> float:
    """The first of these."""
    return share_and_kl(trainer)[0]


def learn(steps: int, seeds: int, **settings: Any) -> dict[str, Any]:
    """Curves of several seeds over the completions sampled, and a step's median CPU seconds (of one thread)."""
    shares, kls, seconds = [], [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(directory, seed=seed, max_steps=steps, **settings)
            curve = [share_and_kl(trainer)]
            for _ in range(steps):
                started = time.process_time()  # other work on the machine does not count
                trainer.step()
                seconds.append(time.process_time() - started)
                curve.append(share_and_kl(trainer))
        for curves, numbers in zip((shares, kls), zip(*curve, strict=True), strict=True):
            curves.append(list(numbers))
    samples = [ROLLOUT_SIZE * i for i in range(steps + 1)]
    return {"samples": samples, "share": shares, "kl": kls, "seconds_per_step": statistics.median(seconds)}
