"""It learns: rewards rise with every estimator, and with the KL penalty the policy goes where theory says it must."""

import pytest
import torch
from builders import build_policy_arguments, critic_of, make_trainer, share_of_a


def learn(output_dir, **settings):
    small = {
        "max_steps": 25, "rollout_batch_size": 32, "minibatch_size": 16, "micro_batch_size": 16, "ppo_epochs": 2,
        "learning_rate": 1e-2, "kl_coef": 0.0,
    }  # fmt: skip
    trainer = make_trainer(output_dir, **(small | settings))
    for _ in range(trainer.args.max_steps):
        trainer.step()
    rewards = [row["reward"] for row in trainer.state.log_history]
    return trainer, rewards[0], sum(rewards[-3:]) / 3


@pytest.mark.parametrize("estimator", ["gae", "rewards_to_go", "total_return", "immediate_rewards"])
def test_the_reward_rises_with_every_estimator(tmp_path, estimator):
    """A reward on every token, so that the bandit's estimator, which looks no further, can learn it too."""

    def one_for_each_a(prompts, completions, completion_ids, **kwargs):
        return [[1.0 if token == 1 else 0.0 for token in ids] for ids in completion_ids]

    _, start, end = learn(tmp_path, reward=one_for_each_a, estimator=estimator, max_steps=15)
    assert start < 1.0
    assert end > 4.0, "of at most 8"


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_a_score_at_the_end_is_learned_whatever_the_critic_is(tmp_path, kind):
    rate = {"learning_rate": 0.05} if kind == "lora" else {}
    _, start, end = learn(tmp_path, reward=share_of_a, **build_policy_arguments(kind), **rate)
    assert start < 0.15
    assert end > 0.5


def test_a_critic_learns_to_explain_the_returns(tmp_path):
    """A score that the prompt alone decides is foreseen, from the first token on; a policy that is frozen stays."""

    def length_of_prompt(prompts, completions, **kwargs):
        return [len(prompt) / 4 for prompt in prompts]

    trainer, _, _ = learn(
        tmp_path, reward=length_of_prompt, critic=critic_of(), critic_warmup_steps=8, critic_warmup_epochs=4, lam=1.0,
        critic_learning_rate=1e-2, value_clip_range=None, max_grad_norm=10.0, max_steps=8,
    )  # fmt: skip
    explained = [row["explained_variance"] for row in trainer.state.log_history]
    assert explained[0] < 0.2, "a random critic explains nothing"
    assert sum(explained[-3:]) / 3 > 0.8
    assert all(abs(row["kl_to_ref"]) < 1e-4 for row in trainer.state.log_history)


# --- the optimum is known --------------------------------------------------------------------------------------------

SCORES = [0.0, 0.9, 0.3, 1.0, 0.1, 0.6, 0.5, 0.2, 0.8, 0.4, 0.7, 0.05]


def score_of_token(prompts, completions, completion_ids, **kwargs):
    return [SCORES[ids[0]] for ids in completion_ids]


def distribution(model):
    """Exact log-probabilities of the one token after the prompt "a"."""
    with torch.no_grad():
        return model(torch.tensor([[1]])).logits[0, -1].double().log_softmax(-1)


def kl(p, q):
    return (p.exp() * (p - q)).sum().item()


def bandit(output_dir, kl_coef, **settings):
    """The trained policy, and the optimum of E[score] - kl_coef * KL: pi* ~ pi_ref exp(score / kl_coef)."""
    trainer, _, _ = learn(
        output_dir, reward=score_of_token, dataset=["a"], max_completion_length=1, max_steps=25, kl_coef=kl_coef,
        rollout_batch_size=256, minibatch_size=128, micro_batch_size=128, learning_rate=5e-3,
        lr_scheduler_type="linear", value_clip_range=None, **settings,
    )  # fmt: skip
    reference = distribution(trainer.reference.model)
    optimum = (reference + torch.tensor(SCORES, dtype=torch.float64) / kl_coef).log_softmax(-1)
    return distribution(trainer.actor_critic.policy), optimum, reference


@pytest.mark.parametrize("settings", [{}, {"whiten_advantages": False, "estimator": "rewards_to_go"}], ids=str)
def test_the_kl_penalty_leads_to_its_closed_form(tmp_path, settings):
    policy, optimum, reference = bandit(tmp_path, 0.5, **settings)
    assert kl(reference, optimum) > 0.2, "it had some way to go"
    assert kl(policy, optimum) < 0.005


def test_another_kl_coefficient_leads_elsewhere(tmp_path):
    """The test above can fail: with 0.25 the policy is at 0.25's optimum, and not at 0.5's."""
    policy, own_optimum, reference = bandit(tmp_path, 0.25)
    other = (reference + torch.tensor(SCORES, dtype=torch.float64) / 0.5).log_softmax(-1)
    assert kl(policy, own_optimum) < 0.005
    assert kl(policy, other) > 0.05
