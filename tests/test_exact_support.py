"""The way from a rollout to the gradient, with tokens left out: every form of the KL to the reference, by enumeration.

A GPT-2 of four tokens whose completions are all listed, in place of sampling, goes through the collector, the estimator
and the loss; their expected gradient is compared with the one of ``J - beta KL``, found from the definition prefix by
prefix. Policy and reference are at a temperature, the policy renormalized over the tokens left.
"""

import math

import pytest
import torch
from builders import EOS, gpt2, llama, make_trainer, trained
from fakes import letter_tokenizer, tiny_gpt2

import lmppo.collector
from lmppo.checks import NonFiniteError, StepZeroError
from lmppo.config import KL_FORMS
from lmppo.estimators import estimate, shape_rewards
from lmppo.loss import Penalties, ppo_loss
from lmppo.metrics import completion_columns, rollout_metrics
from lmppo.records import Experience, Samples, Tokens
from lmppo.support import Support, pack

BETA, TEMPERATURE, HORIZON, VOCAB = 0.3, 0.7, 3, 4
SUPPORTS = {
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.4},
    "suppress": {"suppress_tokens": [3]},
    "min length": {"min_new_tokens": 1, "bad_words_ids": [[3]]},
    "stop": {"stop_token_ids": [2], "suppress_tokens": [1]},
    "min length, stop, min-p": {"min_new_tokens": 1, "stop_token_ids": [3], "min_p": 0.4},
}
ENDS = {"stop": (EOS, 2), "min length, stop, min-p": (EOS, 3)}


def kept_by(name, chances, t):
    """(V,) the tokens left at position t, by the definition: what is forbidden, then what is unlikely."""
    asked, kept = SUPPORTS[name], torch.ones_like(chances, dtype=torch.bool)
    kept[asked.get("suppress_tokens", []) + [i for word in asked.get("bad_words_ids", []) for i in word]] = False
    if t < asked.get("min_new_tokens", 0):
        kept[list(ENDS.get(name, (EOS,)))] = False
    chances = torch.where(kept, chances, 0.0) / chances[kept].sum()
    if "top_k" in asked:
        return chances >= chances.sort(descending=True).values[1]
    if "min_p" in asked:
        return chances >= 0.4 * chances.max()
    if "top_p" not in asked:
        return kept
    order = chances.argsort(descending=True)
    before = chances[order].cumsum(0) - chances[order]
    return kept.scatter(0, order, before < 0.7) & kept


def score(ids):
    """Any function of the completion."""
    return math.sin(sum((i + 1) * (t + 2.0) for t, i in enumerate(ids)))


def reward(prompts, completions, completion_ids, **kwargs):
    return [score(ids) for ids in completion_ids]


class Listed:
    """All completions that a policy can write after a prompt, its states read one by one."""

    def __init__(self, name, policy, reference, prompt):
        self.rows, self.kept, self.logprobs, self.ref_logprobs, self.kl, self.reverse = [], [], [], [], [], []
        self._grow(name, policy, reference, prompt, [], [], [], [], [], [])

    def _grow(self, name, policy, reference, prompt, ids, kept, logprobs, refs, kl, reverse):
        if len(ids) == HORIZON or set(ENDS.get(name, (EOS,))) & set(ids):
            for found, new in zip(vars(self).values(), (ids, kept, logprobs, refs, kl, reverse), strict=True):
                found.append(new)
            return
        context = torch.tensor([prompt + ids])
        z = policy(context).logits[0, -1] / TEMPERATURE
        q = (reference(context).logits[0, -1].detach() / TEMPERATURE).log_softmax(-1)
        left = kept_by(name, z.detach().softmax(-1), len(ids))
        p = z - z[left].logsumexp(0)  # of use where a token is left
        of_state = (p[left].exp() * (p[left] - q[left])).sum()
        other_way = -(q[left].exp() * p[left]).sum()
        for token in left.nonzero()[:, 0].tolist():
            longer = ([*ids, token], [*kept, left], [*logprobs, p[token]], [*refs, q[token]],
                      [*kl, of_state], [*reverse, other_way])  # fmt: skip
            self._grow(name, policy, reference, prompt, *longer)

    @property
    def chances(self):
        return torch.stack([torch.stack(row).sum().exp() for row in self.logprobs])

    def sums(self, numbers):
        return torch.stack([torch.stack(row).sum() for row in numbers])

    @property
    def true_kl(self):
        """sum_n P_n log(P_n / Q_n)."""
        return (self.chances * (self.sums(self.logprobs) - self.sums(self.ref_logprobs))).sum()

    @property
    def true_return(self):
        return (self.chances * torch.tensor([score(ids) for ids in self.rows])).sum()

    def own(self, numbers):
        """The states' own part: how often a state is reached is held fixed."""
        return (self.chances.detach() * self.sums(numbers)).sum()

    def samples(self, prompt, ends):
        """As the sampler would have returned them, had it drawn each once."""
        n = len(self.rows)
        ids, mask = torch.zeros(n, HORIZON, dtype=torch.long), torch.zeros(n, HORIZON, dtype=torch.bool)
        logprobs, support = torch.zeros(n, HORIZON), Support.of_bits(n, HORIZON, VOCAB)
        for i, row in enumerate(self.rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
            logprobs[i, : len(row)] = torch.stack(self.logprobs[i]).detach()
            support.entries[i, : len(row)] = pack(torch.stack(self.kept[i]))
        prompts = torch.tensor([prompt] * n)
        tokens = Tokens(prompts, torch.ones_like(prompts, dtype=torch.bool), ids, mask)
        ended = torch.tensor([row[-1] in ends for row in self.rows])
        return Samples(tokens, support, logprobs, torch.zeros(n, HORIZON, 1), ended, torch.ones(n))


def gradient(value, model):
    """Of all parameters that the value depends on, as one vector."""
    found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True, retain_graph=True)
    return torch.cat([g.flatten() for g in found])


@pytest.fixture
def listed_of(monkeypatch, tmp_path):
    """A function that makes a trainer and the list of completions that it is given in place of samples."""

    def make(name, **settings):
        models = [tiny_gpt2(VOCAB, seed=seed, n_layer=1, n_embd=8, initializer_range=0.25).eval() for seed in (4, 1)]
        prompt = [1, 2]
        listed = Listed(name, *models, prompt)
        monkeypatch.setattr(
            lmppo.collector, "sample", lambda *args, values: listed.samples(prompt, ENDS.get(name, (EOS,)))
        )
        trainer = make_trainer(
            tmp_path, model=models[0], ref_model=models[1], reward=reward, dataset=[{"prompt": prompt}],
            tokenizer=letter_tokenizer("abc"), max_completion_length=HORIZON, temperature=TEMPERATURE, kl_coef=BETA,
            objective="policy_gradient", ppo_epochs=1, minibatch_size=8, estimator="rewards_to_go", baseline="none",
            whiten_advantages=False, **SUPPORTS[name], **settings,
        )  # fmt: skip
        scored = trainer.collector.collect(trainer.prompts.next_batch(len(listed.rows)), 0)
        return trainer, listed, scored

    return make


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", KL_FORMS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_the_expected_gradient_of_every_form(listed_of, name, form):
    """Those in the reward, or in both, have the gradient of the penalty; the losses each state's own part of it.

    The loss's own KL is also reported: k3 and exact have the true mean there too.
    """
    trainer, listed, scored = listed_of(name, kl_form=form)
    args, rollout, policy = trainer.args, scored.rollout, trainer.actor_critic.policy
    assert len(set(map(len, listed.rows))) > 1 and len(listed.rows) < VOCAB**HORIZON / 2
    estimated = estimate(rollout, shape_rewards(rollout, args, kl_coef=BETA), args)
    experience = Experience.from_rollout(rollout, estimated.advantages, estimated.returns)
    penalties = Penalties(kl_coef=BETA if args.kl_in_loss else 0.0, reference=trainer.reference)
    found = kl_loss = 0.0
    for row, chance in enumerate(listed.chances.detach()):
        one = experience.rows(slice(row, row + 1)).trim()
        loss, sums = ppo_loss(trainer.actor_critic, one, args, penalties, heads=["logits"], token_count=1)
        found = found - chance * gradient(loss, policy)
        kl_loss += chance * sums.get("kl_loss", 0.0)
    penalty = listed.true_kl
    if form.endswith("_loss"):
        penalty = listed.own(listed.reverse if form == "k3_loss" else listed.kl)
    truth = gradient(listed.true_return - BETA * penalty, policy)
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-5)
    if args.kl_in_loss and form != "k2_loss":
        assert kl_loss.item() == pytest.approx(listed.true_kl.item(), rel=1e-4)
    without = gradient(listed.true_return, policy)
    assert (truth - without).norm() > 0.01 * without.norm(), "the penalty is seen"


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", ["k1_reward", "k3_both", "exact_both"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_what_is_logged_and_paid_has_the_true_mean(listed_of, name, form):
    """kl_to_ref, the column of each completion, and the KL that the reward pays for."""
    _, listed, scored = listed_of(name, kl_form=form)
    truth, chances = listed.true_kl.item(), listed.chances.detach()
    for of_completion in (
        scored.rollout.kl_to_ref.sum(dim=1),
        scored.rollout.kl_penalty.sum(dim=1),
        torch.tensor(completion_columns(scored)["kl"]),
    ):
        assert (chances * of_completion).sum().item() == pytest.approx(truth, rel=1e-4)
    metrics = rollout_metrics(scored, kl_coef=BETA)
    assert metrics["kl_to_ref"] == pytest.approx(scored.rollout.kl_to_ref.sum(dim=1).mean().item())
    assert metrics["rlhf_reward"] == pytest.approx(metrics["reward"] - BETA * metrics["kl_to_ref"])


# --- before the first step -------------------------------------------------------------------------------------------


LEFT_OUT = [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"min_new_tokens": 5, "suppress_tokens": [2, 7]},
            {"min_new_tokens": 3, "stop_token_ids": [4], "top_k": 5}]  # fmt: skip


def first_rollout(trainer):
    return trainer.collector.collect(trainer.prompts.next_batch(trainer.args.rollout_batch_size), 0).rollout


@pytest.mark.parametrize("family", [gpt2, llama])
@pytest.mark.parametrize("form", ["k1_reward", "k3_both", "exact_both"])
@pytest.mark.parametrize("settings", LEFT_OUT, ids=str)
def test_every_token_costs_the_kept_mass(tmp_path, family, form, settings):
    """From the policy alone, row by row: minus the log of the probability of the tokens left, of all tokens."""
    trainer = make_trainer(tmp_path, model=family(), temperature=0.8, kl_form=form, **settings)
    rollout = first_rollout(trainer)
    kept = rollout.support.allowed()
    for row, mask in enumerate(rollout.completion_mask):
        prompt = rollout.tokens.prompt_ids[row][rollout.tokens.prompt_mask[row]]
        ids = torch.cat([prompt, rollout.tokens.completion_ids[row][mask]])
        with torch.no_grad():
            logits = trainer.actor_critic.policy(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        cost = -((logits / 0.8).softmax(-1) * kept[row][mask]).sum(-1).log()
        for measured in (rollout.kl_to_ref, rollout.kl_penalty, rollout.kl_of_support):
            torch.testing.assert_close(measured[row][mask], cost, atol=1e-5, rtol=1e-5)
    assert rollout.kl_of_support.max() > 0.1


@pytest.mark.parametrize("settings", LEFT_OUT, ids=str)
def test_the_check_before_the_first_step_knows_the_kept_mass(tmp_path, settings):
    """It lets the cost of the support pass, at a tolerance far below it, and still sees dropout."""
    trained(tmp_path / "right", max_steps=1, step_zero_tolerance=2e-5, **settings)
    trainer = make_trainer(tmp_path / "dropout", **settings)
    for module in trainer.actor_critic.modules():
        module.training = True
    with pytest.raises(StepZeroError, match="though they are the same weights"):
        trainer.train()


def test_a_target_below_what_leaving_out_tokens_costs_warns_once(tmp_path, recwarn):
    cost = first_rollout(make_trainer(tmp_path / "cost", top_p=0.8)).kl_of_support.sum(dim=1).mean().item()

    def warnings_of(name, **settings):
        recwarn.clear()
        trained(tmp_path / name, max_steps=2, **settings)
        return [str(w.message) for w in recwarn if "kl_target" in str(w.message)]

    (message,) = warnings_of("below", top_p=0.8, kl_target=0.9 * cost)
    assert f"kl_target={0.9 * cost} is below {cost:.3g} nats per completion" in message
    assert not warnings_of("above", top_p=0.8, kl_target=1.1 * cost)
    assert not warnings_of("all tokens", kl_target=1e-3)


# --- far from the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_policy_that_has_collapsed_pays_for_it(tmp_path, settings):
    """One token is left in each state: its KL is minus the log of the reference's chance of it, of all tokens."""
    certain = llama()
    certain.lm_head.weight.data.mul_(1e4)
    other = llama(seed=6)
    trainer = make_trainer(tmp_path, model=certain, ref_model=other, eval_dataset=["a", "bc"], **settings)
    rollout = first_rollout(trainer)
    assert rollout.support.allowed()[rollout.completion_mask].sum(-1).eq(1).all()
    for row, mask in enumerate(rollout.completion_mask):
        prompt = rollout.tokens.prompt_ids[row][rollout.tokens.prompt_mask[row]]
        completion = rollout.tokens.completion_ids[row][mask]
        with torch.no_grad():
            logits = other(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        cost = -logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        torch.testing.assert_close(rollout.kl_to_ref[row][mask], cost, atol=1e-5, rtol=1e-5)
    assert trainer.evaluate()["eval_kl_to_ref"] > 1.0


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", KL_FORMS)
@pytest.mark.parametrize("settings", [{}, {"top_k": 6}], ids=str)
def test_a_reference_that_rules_out_a_sampled_token_is_refused_by_row_and_token(tmp_path, form, settings):
    rollout = first_rollout(make_trainer(tmp_path / "free", **settings))
    forbidden = int(rollout.tokens.completion_ids[3, 0])

    def forbid(module, arguments, output):
        output.logits[..., forbidden] = -math.inf

    reference = gpt2(seed=6)
    reference.register_forward_hook(forbid)
    trainer = make_trainer(tmp_path, ref_model=reference, kl_form=form, micro_batch_size=3, **settings)
    found = (rollout.tokens.completion_ids == forbidden) & rollout.completion_mask
    if form.startswith("exact"):  # refused as soon as it could have been sampled
        allowed = rollout.support.allowed()
        found = rollout.completion_mask if allowed is None else rollout.completion_mask & allowed[..., forbidden]
    row, t = found.nonzero()[0].tolist()
    token = int(rollout.tokens.completion_ids[row, t])
    named = rf"Row {row} of the batch: its token {t} \(counted from 0\), with the id {token}, .*reference"
    with pytest.raises(NonFiniteError, match=named):
        trainer.train()
