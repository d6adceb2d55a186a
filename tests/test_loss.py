"""Which loss each objective puts on a token, who learns in which epoch, and the KL to the reference as a loss."""

import math

import pytest
import torch
from builders import assert_same, critic_of, gpt2, make_trainer, row_alone, trained, weights
from test_update import ACCELERATOR, ROWS, config, setting, state_of, update

from lmppo.loss import Penalties, ppo_loss
from lmppo.models import ActorCritic, Reference
from lmppo.update import logprobs_now, ppo_update

CLIP = {"clip_range": 0.1, "clip_range_high": 0.3}


def tokens(model, experience):
    """(row, t, log pi now, log pi old, advantage, log pi ref) of every counted token, from each row alone."""
    found = []
    for row in range(len(ROWS)):
        mask = experience.completion_mask[row]
        n_read = int(mask.nonzero().max()) + 1
        prompt = experience.tokens.prompt_ids[row][experience.tokens.prompt_mask[row]]
        completion = experience.tokens.completion_ids[row, :n_read]
        logits, _ = row_alone(model, prompt, completion)
        now = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        found += [
            (now[t].item(), experience.old_logprobs[row, t].item(), experience.advantages[row, t].item(),
             experience.ref_logprobs[row, t].item())
            for t in range(n_read) if mask[t]
        ]  # fmt: skip
    return found


def objective_by_definition(name, now, old, advantage):
    ratio = math.exp(now - old)
    clipped = min(max(ratio, 0.9), 1.3)
    clip = -min(ratio * advantage, clipped * advantage)
    return {
        "clip": clip,
        "dual clip": min(clip, -1.2 * advantage) if advantage < 0 else clip,
        "importance_sampled": -ratio * advantage,
        "policy_gradient": -now * advantage,
        "kl_penalty": -ratio * advantage + 0.7 * (ratio - 1 - math.log(ratio)),
    }[name]


@pytest.mark.parametrize("name", ["clip", "dual clip", "importance_sampled", "policy_gradient", "kl_penalty"])
def test_each_objective_is_its_definition(name):
    model, experience = setting()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    whole = {"ppo_epochs": 1, "minibatch_size": 12} if name == "policy_gradient" else {}
    dual = {"dual_clip": 1.2} if name == "dual clip" else {}
    settings = config(objective="clip" if dual else name, **CLIP, **whole, **dual)
    count = int(experience.completion_mask.sum())
    loss, _ = ppo_loss(model, experience, settings, Penalties(beta=0.7), heads=["logits"], token_count=count)
    expected = [objective_by_definition(name, now, old, a) for now, old, a, _ in tokens(model, experience)]
    assert loss.item() == pytest.approx(sum(expected) / count, abs=1e-5)


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", ["k2_loss", "k3_loss", "k3_both"])
def test_a_sampled_kl_in_the_loss_is_its_definition(form):
    model, experience = setting()
    settings = config(kl_form=form, **CLIP)
    count = int(experience.completion_mask.sum())
    alone, _ = ppo_loss(model, experience, settings, Penalties(), heads=["logits"], token_count=count)
    with_kl, sums = ppo_loss(model, experience, settings, Penalties(kl_coef=0.4), heads=["logits"], token_count=count)
    differences = [now - ref for now, _, _, ref in tokens(model, experience)]
    per_token = {"k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[form.partition("_")[0]]
    expected = sum(map(per_token, differences))
    assert sums["kl_loss"].item() == pytest.approx(expected, abs=1e-3)
    assert (with_kl - alone).item() == pytest.approx(0.4 * expected / count, abs=1e-5)


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", ["exact_both", "exact_loss"])
def test_the_exact_kl_in_the_loss_is_the_sum_over_the_vocabulary(form):
    model, experience = setting()
    other = gpt2(seed=6)
    settings = config(kl_form=form, temperature=0.7)
    count = int(experience.completion_mask.sum())
    penalties = Penalties(kl_coef=0.4, reference=Reference(model.policy, other))
    _, sums = ppo_loss(model, experience, settings, penalties, heads=["logits"], token_count=count)
    expected = 0.0
    for row in range(len(ROWS)):
        mask = experience.completion_mask[row]
        n_read = int(mask.nonzero().max()) + 1
        prompt, completion = (
            experience.tokens.prompt_ids[row][experience.tokens.prompt_mask[row]],
            experience.tokens.completion_ids[row, :n_read],
        )
        p, q = ((row_alone(m, prompt, completion)[0] / 0.7).softmax(-1) for m in (model, ActorCritic(other)))
        expected += (p * (p / q).log()).sum(-1)[mask[:n_read]].sum().item()
    assert sums["kl_loss"].item() == pytest.approx(expected, rel=1e-4)


# --- who learns when -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "frozen", "policy", "critic"),
    [
        ({}, False, [1, 1], [1, 1]),
        ({"critic_epochs": 4}, False, [1, 1, 0, 0], [1, 1, 1, 1]),
        ({"critic_epochs": 1}, False, [1, 1], [1, 0]),
        ({"critic_epochs": 3}, True, [0, 0, 0], [1, 1, 1]),
        ({"critic_epochs": 3, "critic_warmup_steps": 1, "critic_warmup_epochs": 1}, True, [0], [1]),
        ({"objective": "trpo"}, False, [0, 0], [1, 1]),
        ({"estimator": "rewards_to_go", "baseline": "none"}, False, [1, 1], [0, 0]),
    ],
    ids=str,
)
def test_who_learns_in_which_epoch(settings, frozen, policy, critic, monkeypatch):
    """By the heads that are asked for in each minibatch; TRPO's own passes ask for none."""
    model, experience = setting()
    seen = []
    forward = ActorCritic.forward

    def spy(self, tokens, heads, *of_logits):
        seen.append([int("logits" in heads), int("values" in heads)])
        return forward(self, tokens, heads, *of_logits)

    monkeypatch.setattr(ActorCritic, "forward", spy)
    update(
        model,
        experience,
        minibatch_size=12,
        micro_batch_size=12,
        **({"critic_warmup_steps": 1} if frozen else {}) | settings,
    )
    epochs = [heads for heads in zip(policy, critic, strict=True) if any(heads)]
    assert seen == [list(heads) for heads in epochs]


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_the_critics_extra_epochs_leave_the_policy_alone(kind):
    """What the policy is after its own epochs does not depend on how long the critic goes on."""
    states = []
    for critic_epochs in (2, 4):
        model, experience = setting("gpt2", kind)
        stats = update(model, experience, critic_epochs=critic_epochs)
        assert stats["optimizer_steps"] == critic_epochs * 2
        states.append({n: p.clone() for n, p in model.policy.named_parameters()})
    assert_same(*states)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_without_a_critic_nothing_of_it_moves(kind):
    model, experience = setting("gpt2", kind)
    before = state_of(model)
    stats = update(model, experience, estimator="rewards_to_go", baseline="none")
    after = state_of(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("value_head", "critic")) for name in changed)
    assert "value_loss" not in stats


def test_trpo_and_a_critic_of_a_shared_trunk(tmp_path):
    """The policy's step leaves the critic alone, and the critic's passes move nothing but the head."""
    model, experience = setting()
    before = state_of(model)
    settings = {"objective": "trpo", "trpo_max_kl": 1e-3, "trpo_damping": 0.1}
    stats = update(model, experience, **settings)
    assert stats["optimizer_steps"] == 2 * 2 and 0 < stats["trpo/kl"] <= 1e-3
    model_again, _ = setting()
    update(model_again, experience, **settings, critic_epochs=1)
    for name, tensor in state_of(model).items():
        if not name.startswith("value_head"):
            torch.testing.assert_close(tensor, state_of(model_again)[name], atol=0, rtol=0)
    assert any(not torch.equal(before[n], t) for n, t in state_of(model).items() if not n.startswith("value_head"))


def test_log_probabilities_after_the_update_are_those_of_the_new_policy():
    model, experience = setting()
    update(model, experience)
    new = logprobs_now(model, experience, config(), ACCELERATOR)
    expected = [now for now, _, _, _ in tokens(model, experience)]
    assert new[experience.completion_mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert new[~experience.completion_mask].eq(0).all()


# --- in the trainer --------------------------------------------------------------------------------------------------


def test_beta_is_halved_and_doubled_logged_and_resumed(tmp_path):
    settings = {"objective": "kl_penalty", "max_steps": 3, "policy_kl_coef": 4.0}
    small = trained(tmp_path / "small", policy_kl_target=1e3, **settings)
    assert [row["policy_kl_coef"] for row in small.state.log_history] == [4.0, 2.0, 1.0]
    large = trained(tmp_path / "large", policy_kl_target=1e-9, **settings)
    assert [row["policy_kl_coef"] for row in large.state.log_history] == [4.0, 8.0, 16.0]
    on = make_trainer(
        tmp_path / "large", policy_kl_target=1e-9, **(settings | {"max_steps": 4}), resume_from_checkpoint="auto"
    )
    on.train()
    assert on.state.log_history[-1]["policy_kl_coef"] == 32.0


def test_beta_answers_to_the_kl_of_the_whole_update(tmp_path):
    """Not to the mean over its minibatches, the first of which is taken at KL 0."""
    settings = {"objective": "kl_penalty", "max_steps": 1, "ppo_epochs": 4}
    free = make_trainer(tmp_path / "free", policy_kl_target=None, **settings)
    row = free.step()
    rollout, seen = free.last_step.scored.rollout, free.last_step.experience
    total, count = 0.0, 0
    for i, mask in enumerate(rollout.completion_mask):
        prompt, completion = (
            rollout.tokens.prompt_ids[i][rollout.tokens.prompt_mask[i]],
            rollout.tokens.completion_ids[i][mask],
        )
        logits, _ = row_alone(free.actor_critic, prompt, completion)
        now = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        d = now - seen.old_logprobs[i][mask]
        total, count = total + (d.exp() - 1 - d).sum().item(), count + len(d)
    assert row["policy_kl"] == pytest.approx(total / count, rel=1e-3)
    assert row["policy_kl"] > 1.2 * row["approx_kl"]
    target = (row["policy_kl"] * row["approx_kl"]) ** 0.5 / 1.5  # 1.5 times it lies between the two
    adapted = make_trainer(tmp_path / "adapted", policy_kl_target=target, **settings)
    adapted.step()
    assert adapted.control.beta.coef == 2 * free.control.beta.coef


def good_prompts(prompts, completions, **kwargs):
    """A reward that a critic can learn to foresee: it depends on the prompt alone."""
    return [2.0 * prompt.startswith("a") for prompt in prompts]


def test_a_warm_up_ends_when_the_critic_explains_enough(tmp_path):
    """The batch that is explained well enough is the first that the policy learns from."""
    trainer = trained(
        tmp_path, reward=good_prompts, critic=critic_of(), max_steps=6, critic_warmup_steps=6, critic_warmup_epochs=4,
        critic_warmup_explained_variance=0.3, critic_learning_rate=1e-2, value_clip_range=None, lam=1.0, max_grad_norm=10.0,
    )  # fmt: skip
    rows = trainer.state.log_history
    first = next(i for i, row in enumerate(rows) if row["critic/explained_variance"] >= 0.3)
    assert 0 < first < len(rows) - 1
    assert ["policy_loss" in row for row in rows] == [i >= first for i in range(len(rows))]


def test_a_warm_up_that_ended_early_stays_ended_after_a_resume(tmp_path):
    settings = {"critic_warmup_steps": 9, "critic_warmup_explained_variance": -1e9}
    whole = trained(tmp_path / "whole", max_steps=3, **settings)
    assert all("policy_loss" in row for row in whole.state.log_history)
    trained(tmp_path / "parts", max_steps=1, **settings)
    parts = trained(tmp_path / "parts", max_steps=3, resume_from_checkpoint="auto", **settings)
    assert_same(weights(whole), weights(parts))


@pytest.mark.parametrize("whiten", [True, False])
def test_a_penalty_in_the_loss_has_the_advantages_unit(tmp_path, monkeypatch, whiten):
    """Whitening divides the advantages by their deviation; the KL beside them is divided too."""
    seen = {}

    def spy(model, optimizer, experience, config, accelerator, **kwargs):
        seen.update(kwargs, experience=experience)
        return ppo_update(model, optimizer, experience, config, accelerator, **kwargs)

    monkeypatch.setattr("lmppo.trainer.ppo_update", spy)
    trainer = make_trainer(tmp_path, kl_form="exact_both", kl_coef=0.3, max_steps=1, whiten_advantages=whiten)
    row = trainer.step()
    deviation = row["advantage/std"] if whiten else 1.0
    assert seen["penalties"].kl_coef == pytest.approx(0.3 / deviation, rel=1e-4)
    assert seen["penalties"].reference is trainer.reference
    counted = seen["experience"].advantages[seen["experience"].completion_mask]
    assert counted.std(correction=0).item() == pytest.approx(row["advantage/std"] / deviation, rel=1e-4)
