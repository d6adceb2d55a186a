"""The lab, third part: one rollout used again and again, and a critic with one output for each kind of reward."""

import copy
import dataclasses
import tempfile
from typing import Any

import torch
from problem import COMPLETIONS, MASK, PROMPT, TOKENS, cs, make_critic, on_grid, pairs, pay_cs, pay_pairs
from torch import Tensor
from training import ROLLOUT_SIZE, exact_logprobs, make_trainer, share_of_the_way

from lmppo import RewardStream
from lmppo.estimators import estimate, shape_rewards
from lmppo.functional.exact import sequence_kl, state_values
from lmppo.loss import Penalties
from lmppo.optimizer import make_optimizer
from lmppo.records import Experience, Tokens
from lmppo.update import ppo_update

REUSES = ("clip", "kl_penalty", "importance_sampled")
STREAMS = [RewardStream("pairs", [pairs], gamma=1.0), RewardStream("cs", [cs], gamma=0.5)]
TRUE_REWARDS = [on_grid(pay_pairs), on_grid(pay_cs)]


def reuse(passes: int, seeds: int, steps: int = 10) -> dict[str, dict[str, list[list[float]]]]:
    """Where more and more passes over one rollout carry a policy that has learned for some steps, by objective.

    The share of the way to the optimum, and KL(old || new), after each pass; all objectives from the same rollout.
    """
    result: dict[str, dict[str, list[list[float]]]] = {name: {"share": [], "kl": []} for name in REUSES}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(directory, seed=seed)
            for _ in range(steps):
                trainer.step()
        args, old = trainer.args, copy.deepcopy(trainer.actor_critic.state_dict())
        old_logprobs = exact_logprobs(trainer.actor_critic.policy)
        rollout = trainer.collector.collect(trainer.prompts.next_batch(ROLLOUT_SIZE), steps).rollout
        estimated = estimate(rollout, shape_rewards(rollout, args, kl_coef=args.kl_coef), args)
        experience = Experience.from_rollout(rollout, estimated.advantages, estimated.returns)
        for name in REUSES:
            trainer.actor_critic.load_state_dict(old)
            once = dataclasses.replace(args, objective=name, ppo_epochs=1)
            optimizer = trainer.accelerator.prepare(make_optimizer(trainer.actor_critic, once))
            shares, kls = [share_of_the_way(trainer)], [0.0]
            for i in range(passes):
                ppo_update(
                    trainer.model, optimizer, experience, once, trainer.accelerator,
                    iteration=i, penalties=Penalties(beta=once.policy_kl_coef),
                )  # fmt: skip
                shares.append(share_of_the_way(trainer))
                kls.append(sequence_kl(old_logprobs, exact_logprobs(trainer.actor_critic.policy)).item())
            result[name]["share"].append(shares)
            result[name]["kl"].append(kls)
    return result


def streams(steps: int) -> dict[str, dict[str, Any]]:
    """A critic output for each stream against that stream's true values, while the policy is frozen.

    ``error``: after each step, the root mean square error over the states that are visited, over the true values'
    standard deviation. ``states``: true value and critic's value of each state at the end.
    """
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            directory, seed=0, max_steps=steps, critic_warmup_steps=steps, critic_learning_rate=3e-3,
            lr_scheduler_type="linear", rollout_batch_size=512, minibatch_size=128, max_grad_norm=10.0, kl_coef=0.0,
            critic=make_critic(len(STREAMS)), reward_streams=STREAMS,
        )  # fmt: skip
        logprobs = exact_logprobs(trainer.actor_critic.policy)
        truth = true_values(logprobs)
        visits = torch.where(MASK, logprobs.sum(dim=1, keepdim=True).exp(), 0.0).unsqueeze(-1)
        visits = visits / visits.sum()
        spread = (visits * (truth - (visits * truth).sum(dim=(0, 1))).square()).sum(dim=(0, 1))
        values = critic_values(trainer.actor_critic)
        errors = []
        for _ in range(steps):
            trainer.step()
            values = critic_values(trainer.actor_critic)
            errors.append(((visits * (values - truth).square()).sum(dim=(0, 1)) / spread).sqrt())
    return {
        stream.name: {
            "error": [row[k].item() for row in errors],
            "states": torch.stack([truth[..., k][MASK], values[..., k][MASK]], dim=1).unique(dim=0).tolist(),
        }
        for k, stream in enumerate(STREAMS)
    }


def true_values(logprobs: Tensor) -> Tensor:
    """``(N, T, K)`` each stream's, by its own gamma."""
    gammas = [1.0 if stream.gamma is None else stream.gamma for stream in STREAMS]
    values = [state_values(COMPLETIONS, logprobs, r, gamma=g) for r, g in zip(TRUE_REWARDS, gammas, strict=True)]
    return torch.stack(values, dim=-1)


@torch.no_grad()
def critic_values(model: Any) -> Tensor:
    """``(N, T, K)`` of every state of every completion."""
    prompt = torch.full((len(MASK), 1), TOKENS.index(PROMPT))
    tokens = Tokens(prompt, torch.ones_like(prompt, dtype=torch.bool), COMPLETIONS.ids, MASK)
    return model.values(tokens)
