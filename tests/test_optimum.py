"""The real trainer against a problem whose optimum is known: every objective closes 99 % of the way there.

The policy is a one-layer GPT-2 that writes at most three letters out of three, so that all its completions can be
listed, and the return it strives for, ``E[score] - kl_coef * KL(policy || reference)``, is computed exactly, from the
logits it has learned. No sampling enters the judgement. The best policy is ``pi* ~ pi_ref exp(score / kl_coef)``.
"""

import pytest
import torch
from accelerate import Accelerator
from builders import critic_of, make_config, make_trainer
from fakes import letter_tokenizer, tiny_gpt2

from lmppo.functional import kl_shaped_rewards
from lmppo.functional.exact import (
    action_values,
    completion_logprobs,
    enumerate_completions,
    expectation,
    optimal_policy,
    sequence_kl,
    state_logits,
    state_values,
)
from lmppo.models import ActorCritic
from lmppo.records import Experience, Tokens
from lmppo.support import Support
from lmppo.trpo import trpo_update

KL_COEF = 0.5
EOS = 0
COMPLETIONS = enumerate_completions(vocab_size=4, horizon=3, eos=EOS)
GENERATOR = torch.Generator().manual_seed(7)
TABLE = {tuple(ids[:n].tolist()): torch.rand((), generator=GENERATOR, dtype=torch.float64).item()
         for ids, n in zip(COMPLETIONS.ids, COMPLETIONS.mask.sum(1), strict=True)}  # fmt: skip
SCORES = torch.tensor(list(TABLE.values()), dtype=torch.float64)


def score(prompts, completions, completion_ids, **kwargs):
    """A random number for each of the completions, so that no token decides alone."""
    return [TABLE[tuple(ids)] for ids in completion_ids]


def exact_logprobs(model):
    """``(N, 3)`` what the model says of every completion of the prompt "a"."""

    def policy(prefixes):
        ids = torch.cat([torch.ones(len(prefixes), 1, dtype=torch.long), prefixes], dim=1)
        with torch.no_grad():
            return model(ids).logits[:, -1].double()

    return completion_logprobs(state_logits(policy, COMPLETIONS), COMPLETIONS)


def share_of_the_way(trainer):
    """(J - J_ref) / (J* - J_ref), all three exact."""
    reference = exact_logprobs(trainer.reference.model)
    policy = exact_logprobs(trainer.actor_critic.policy)
    best = optimal_policy(COMPLETIONS, reference, SCORES, kl_coef=KL_COEF)[1]
    start = expectation(reference, SCORES)
    reached = expectation(policy, SCORES) - KL_COEF * sequence_kl(policy, reference)
    assert best - start > 0.02, "there is some way to go"
    return ((reached - start) / (best - start)).item()


def run(output_dir, **settings):
    sizes = {
        "max_completion_length": 3, "rollout_batch_size": 512, "minibatch_size": 256, "micro_batch_size": 512,
        "max_steps": 120, "learning_rate": 4e-3, "lr_scheduler_type": "linear", "ppo_epochs": 2,
        "value_clip_range": None, "lam": 1.0, "kl_coef": KL_COEF,
    }  # fmt: skip
    trainer = make_trainer(
        output_dir,
        reward=score,
        dataset=["a"],
        model=tiny_gpt2(4, n_layer=1),
        tokenizer=letter_tokenizer("abc"),
        **(sizes | settings),
    )
    for _ in range(trainer.args.max_steps):
        trainer.step()
    return trainer


def test_at_the_optimum_every_completion_earns_the_same_less_its_kl():
    """So that with the KL paid at the end no token has an advantage, whatever was sampled: nothing is left but to stay."""
    reference = completion_logprobs(
        torch.randn(*COMPLETIONS.ids.shape, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
        COMPLETIONS,
    )
    prefixes = {}  # the reference is a function of the prefix: of completions that begin alike, the first one's
    for i, ids in enumerate(COMPLETIONS.ids.tolist()):
        for t in range(3):
            reference[i, t] = prefixes.setdefault(tuple(ids[: t + 1]), reference[i, t])
    best, value = optimal_policy(COMPLETIONS, reference, SCORES, kl_coef=KL_COEF)
    paid = torch.where(COMPLETIONS.mask, best - reference, 0.0).sum(dim=1)
    assert paid.std() > 0.1
    torch.testing.assert_close(SCORES - KL_COEF * paid, value.expand_as(SCORES))


WHOLE = {"minibatch_size": 512, "ppo_epochs": 1}
OBJECTIVES = {
    "clip": {},
    "kl_penalty": {"objective": "kl_penalty"},
    "policy_gradient": {"objective": "policy_gradient", **WHOLE, "max_steps": 250},
    "trpo": {
        "objective": "trpo",
        "trpo_max_kl": 2e-3,
        "vf_coef": 1.0,
        "critic_epochs": 4,
        "critic_learning_rate": 1e-2,
        "max_steps": 60,
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_goes_to_the_optimum(tmp_path, name):
    assert share_of_the_way(run(tmp_path, **OBJECTIVES[name])) > 0.99


VARIANTS = {
    "the default place of the KL": {"kl_form": None},
    "exact KL in both": {"kl_form": "exact_both"},
    "no critic": {"estimator": "total_return", "baseline": "batch_mean"},
    "leave one out": {"estimator": "rewards_to_go", "baseline": "leave_one_out", "num_generations": 8},
    "critic of its own": {"critic": lambda: critic_of(vocab_size=4)},
    "streams": {"reward_streams": [{"name": "score", "reward_funcs": [score]}, {"name": "kl"}]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_and_so_does_every_way_to_estimate_it(tmp_path, name):
    settings = {key: value() if callable(value) else value for key, value in VARIANTS[name].items()}
    assert share_of_the_way(run(tmp_path, **settings)) > 0.99


@pytest.mark.parametrize("max_kl", [1e-3, 1e-2])
def test_a_trpo_update_stays_in_its_ball_and_improves_the_true_return(tmp_path, max_kl):
    """Both measured over all completions. The ball is held on the batch, so its true size is off by sampling error."""
    trainer = run(tmp_path, objective="trpo", trpo_max_kl=max_kl, max_steps=1, rollout_batch_size=4096,
                  minibatch_size=512)  # fmt: skip
    old = exact_logprobs(trainer.reference.model)  # the reference is the policy as it was
    new = exact_logprobs(trainer.actor_critic.policy)
    tokens = expectation(old, COMPLETIONS.mask.double().sum(dim=1))
    per_token = sequence_kl(old, new) / tokens
    assert 0.7 * max_kl < per_token < 1.1 * max_kl
    assert expectation(new, SCORES) - KL_COEF * sequence_kl(new, old) > expectation(old, SCORES)


@pytest.mark.parametrize("max_kl", [1e-3, 1e-2, 5e-2])
def test_of_all_completions_a_trpo_update_stays_in_its_ball_exactly(max_kl):
    """No sampling error: a policy that begins uniform, and a batch that holds each completion as often as it does."""
    model = ActorCritic(tiny_gpt2(4, n_layer=1, tie_word_embeddings=False).double())
    torch.nn.init.zeros_(model.policy.lm_head.weight)
    old = exact_logprobs(model.policy)
    mask, lengths = COMPLETIONS.mask, COMPLETIONS.mask.sum(dim=1)
    rewards = kl_shaped_rewards(SCORES, torch.zeros_like(old), mask, kl_coef=0.0)
    advantages = action_values(COMPLETIONS, old, rewards) - state_values(COMPLETIONS, old, rewards)
    rows = torch.arange(len(mask)).repeat_interleave(4 ** (3 - lengths))
    assert len(rows) == 4**3
    prompt = torch.ones(len(rows), 1, dtype=torch.long)
    nothing = torch.zeros(*mask[rows].shape, 1)
    experience = Experience(
        tokens=Tokens(prompt, prompt.bool(), COMPLETIONS.ids[rows], mask[rows]),
        support=Support.of_all(*mask[rows].shape), old_logprobs=old[rows], ref_logprobs=old[rows],
        ref_support_logprobs=torch.zeros_like(old[rows]), old_values=nothing, advantages=advantages[rows], returns=nothing,
    )  # fmt: skip
    config = make_config("unused", objective="trpo", trpo_max_kl=max_kl, micro_batch_size=64)
    stats = trpo_update(model, experience, config, Accelerator(cpu=True), iteration=0)
    new = exact_logprobs(model.policy)
    per_token = (sequence_kl(old, new) / expectation(old, lengths.double())).item()
    assert 0.5 * max_kl < per_token <= max_kl * (1 + 1e-9)
    assert stats["trpo/kl"] == pytest.approx(per_token, rel=1e-9)
    assert expectation(new, SCORES) - KL_COEF * sequence_kl(new, old) > expectation(old, SCORES)


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", ["k3_loss", "exact_loss"])
def test_a_biased_penalty_goes_elsewhere(tmp_path, form):
    """The tests above can fail."""
    assert share_of_the_way(run(tmp_path, kl_form=form)) < 0.98
