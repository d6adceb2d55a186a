"""The update, against PPO written out token by token with plain autograd and torch's AdamW."""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from builders import (
    EOS,
    MODELS,
    PROMPTS,
    assert_same,
    build_model,
    encode,
    gpt2,
    make_config,
    make_experience,
    make_samples,
    read,
    supports,
    with_mask,
    with_values,
)

from lmppo import PPOConfig
from lmppo.checks import NonFiniteError, StepZeroError
from lmppo.loss import Penalties, ppo_loss
from lmppo.models import ActorCritic
from lmppo.optimizer import make_optimizer
from lmppo.records import Experience, Tokens
from lmppo.support import Support
from lmppo.trpo import trpo_update
from lmppo.update import accumulate_gradients, critic_epochs, critic_update, kl_limit, minibatch_rows, ppo_update

KINDS = ["shared", "separate", "lora"]
ROWS = PROMPTS * 2
ACCELERATOR = Accelerator(cpu=True)


def config(**settings):
    small = {"rollout_batch_size": 12, "minibatch_size": 6, "micro_batch_size": 4, "adam_epsilon": 1e-4}
    return make_config("unused", **(small | settings))


def setting(family="gpt2", kind="shared", **sampling):
    """A model and what it may learn from: ragged completions, one of them with a gap."""
    model = build_model(family, kind)
    experience = make_experience(make_samples(model, ROWS, **sampling))
    mask = experience.completion_mask.clone()
    longest = int(mask.sum(1).argmax())
    mask[longest, 1:3] = False  # read, but not trained on
    return model, with_mask(experience, mask)


def update(model, experience, *, iteration=0, optimizer=None, tolerance=None, **settings):
    settings = config(**settings)
    optimizer = make_optimizer(model, settings) if optimizer is None else optimizer
    parts = (experience, settings, ACCELERATOR)
    if iteration < settings.critic_warmup_steps:
        epochs = critic_epochs(settings, warmup=True)
        return critic_update(model, optimizer, *parts, iteration=iteration, epochs=epochs)
    if settings.objective == "trpo":
        stats = trpo_update(model, *parts, iteration=iteration, first_ratio_tolerance=tolerance)
        epochs = critic_epochs(settings)
        return critic_update(model, optimizer, *parts, iteration=iteration, epochs=epochs) | stats
    return ppo_update(model, optimizer, *parts, iteration=iteration, first_ratio_tolerance=tolerance)


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class CountingAdamW(torch.optim.AdamW):
    """AdamW that records the gradient norm at each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norms = []

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(math.sqrt(sum(g.double().square().sum().item() for g in grads)))
        return super().step(closure)


def counting_optimizer(model):
    groups = [{"params": model.policy_parameters()}, {"params": model.critic_parameters()}]
    return CountingAdamW(groups, lr=1e-3)


# --- the brute-force reference ---------------------------------------------------------------------------------------


def loss_by_definition(model, experience, rows, settings, seen):
    """The mean over the minibatch's counted tokens of policy + value - entropy terms, one token after the other."""
    n_tokens = int(experience.completion_mask[rows].sum())
    high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
    total = 0.0
    for row in rows.tolist():
        prompt = experience.tokens.prompt_ids[row][experience.tokens.prompt_mask[row]]
        mask = experience.completion_mask[row]
        n_read = int(mask.nonzero().max()) + 1  # a gap is read; what follows the last counted token is padding
        ids = torch.cat([prompt, experience.tokens.completion_ids[row, :n_read]])[None]
        out = model.policy(input_ids=ids, output_hidden_states=True)
        states = range(len(prompt) - 1, len(prompt) - 1 + n_read)
        for t, state in enumerate(states):
            if not mask[t]:
                continue
            if model.critic is not None:
                value = model.critic(input_ids=ids).logits[0, state, 0]
            else:
                value = model.value_head(out.hidden_states[-1][0, state])[0]
            support = supports(experience)[row, t].expand(out.logits.shape[-1]).nonzero()[:, 0]
            z = out.logits[0, state][support] / settings.temperature
            p = torch.softmax(z, dim=0)
            token = int((support == experience.tokens.completion_ids[row, t]).nonzero())
            ratio = p[token] / experience.old_logprobs[row, t].exp()
            advantage = experience.advantages[row, t]
            clipped = torch.clamp(ratio, 1 - settings.clip_range, 1 + high)
            policy_loss = -torch.min(ratio * advantage, clipped * advantage)
            old, target = experience.old_values[row, t, 0], experience.returns[row, t, 0]
            value_loss = 0.5 * (value - target) ** 2
            if settings.value_clip_range is not None:
                near = torch.clamp(value, old - settings.value_clip_range, old + settings.value_clip_range)
                value_loss = torch.max(value_loss, 0.5 * (near - target) ** 2)
            entropy = -(p * p.log()).sum()
            total = total + policy_loss + settings.vf_coef * value_loss - settings.ent_coef * entropy
            seen.append(
                {
                    "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "ratio": ratio,
                    "approx_kl": ratio - 1 - ratio.log(),
                    "clip_frac": ((ratio < 1 - settings.clip_range) | (ratio > 1 + high)).float(),
                    "value_clip_frac": ((value - old).abs() > (settings.value_clip_range or torch.inf)).float(),
                }
            )  # fmt: skip
    return total / n_tokens


def update_by_definition(model, experience, settings, iteration):
    optimizer = torch.optim.AdamW(
        [
            {"params": model.policy_parameters(), "lr": settings.learning_rate},
            {"params": model.critic_parameters(), "lr": settings.learning_rate},
        ],
        betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon, weight_decay=settings.weight_decay,
    )  # fmt: skip
    steps = []
    for epoch in range(settings.ppo_epochs):
        for rows in minibatch_rows(
            len(experience.completion_mask),
            settings.minibatch_size,
            seed=settings.seed,
            iteration=iteration,
            epoch=epoch,
        ):
            seen = []
            optimizer.zero_grad()
            loss_by_definition(model, experience, rows, settings, seen).backward()
            parts = (
                {"grad_norm": model}
                if model.critic is None
                else {"grad_norm": model.policy, "critic/grad_norm": model.critic}
            )
            norms = {}
            for name, part in parts.items():
                parameters = [p for p in part.parameters() if p.grad is not None]
                norms[name] = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
                for p in parameters:
                    p.grad.mul_(min(1.0, settings.max_grad_norm / norms[name]))
            optimizer.step()
            means = {name: sum(token[name].item() for token in seen) / len(seen) for name in seen[0]}
            steps.append(means | norms)
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


@pytest.mark.parametrize(
    "family, kind, sampling, settings",
    [
        ("gpt2", "shared", {}, {"max_grad_norm": 0.5}),
        ("gpt2", "separate", {"temperature": 0.7}, {"temperature": 0.7, "ent_coef": 0.05, "weight_decay": 0.1}),
        ("gpt2", "lora", {"top_k": 5}, {"top_k": 5, "ent_coef": 0.02, "value_clip_range": None}),
        ("llama", "shared", {"top_p": 0.8}, {"top_p": 0.8, "clip_range": 0.05, "clip_range_high": 0.4, "vf_coef": 0.7}),
        ("llama", "separate", {"min_p": 0.2}, {"min_p": 0.2, "value_clip_range": 0.02, "adam_beta1": 0.5}),
    ],
    ids=lambda value: str(value),
)
def test_it_is_ppo_as_defined(family, kind, sampling, settings):
    """Weights and metrics after two epochs of two minibatches, with clips that are reached."""
    model, experience = setting(family, kind, **sampling)
    twin = copy.deepcopy(model)
    settings = {"learning_rate": 0.02} | settings
    stats = update(model, experience, iteration=3, **settings)
    expected = update_by_definition(twin, experience, config(**settings), 3)
    assert expected["clip_frac"] > 0
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(model.parameters(), build_model(family, kind).parameters(), strict=True)
    )
    assert moved > 0.02
    for (name, weight), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, right, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert {name: stats[name] for name in expected} == pytest.approx(expected, abs=1e-4, rel=1e-3)


# --- gradients do not depend on how a minibatch is cut ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_micro_batches_change_no_gradient(family, kind):
    """With uneven lengths, a mean of means would differ (TRL's did)."""
    model, experience = setting(family, kind)
    experience = dataclasses.replace(experience, old_logprobs=experience.old_logprobs + 0.1)
    results = {}
    for size in (12, 1, 5, 7):
        model.zero_grad()
        stats = accumulate_gradients(
            model, experience, config(micro_batch_size=size, ent_coef=0.1), ACCELERATOR, Penalties()
        )
        results[size] = gradients(model), stats
    lengths = experience.completion_mask.sum(1)
    assert lengths.min() == 1 and lengths.max() > 5
    for size in (1, 5, 7):
        for name, gradient in results[12][0].items():
            torch.testing.assert_close(results[size][0][name], gradient, atol=2e-6, rtol=1e-4)
        assert results[size][1] == pytest.approx(results[12][1], abs=1e-5)


def test_padding_changes_no_gradient_and_no_metric():
    model, experience = setting()

    def widen(tensor, axes):
        filler = tensor.new_zeros(len(tensor), 3, *tensor.shape[2:])
        return torch.cat([filler, tensor] if axes[1] == "P" else [tensor, filler], dim=1)

    results = []
    for record in (experience, experience.map(widen)):
        model.zero_grad()
        total = int(record.completion_mask.sum())
        loss, sums = ppo_loss(model, record, config(ent_coef=0.1), Penalties(), token_count=total)  # untrimmed
        loss.backward()
        results.append((loss, sums, gradients(model)))
    (loss, sums, grads), (wide_loss, wide_sums, wide_grads) = results
    torch.testing.assert_close(loss, wide_loss)
    for name in sums:
        torch.testing.assert_close(sums[name], wide_sums[name], atol=1e-4, rtol=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], wide_grads[name], atol=2e-6, rtol=1e-4)


def test_what_is_not_counted_changes_nothing_to_the_last_bit():
    """NaN and 1e30 at masked positions, in every number the update sees."""
    results = []
    for poison in (None, torch.nan, 1e30):
        model, experience = setting()
        if poison is not None:
            mask = experience.completion_mask
            experience = dataclasses.replace(
                experience,
                **{
                    name: torch.where(mask if tensor.ndim == 2 else mask[..., None], tensor, poison)
                    for name in ("old_logprobs", "old_values", "advantages", "returns")
                    for tensor in [getattr(experience, name)]
                },
            )
        stats = update(model, experience)
        results.append((state_of(model), stats))
    for state, stats in results[1:]:
        assert_same(state, results[0][0])
        assert stats == results[0][1]


def test_the_experience_is_left_as_it_was():
    model, experience = setting()
    before, after = [], []
    experience.map(lambda tensor, axes: before.append(tensor.clone()) or tensor)
    update(model, experience)
    experience.map(lambda tensor, axes: after.append(tensor) or tensor)
    assert len(before) > 8
    assert_same(dict(enumerate(after)), dict(enumerate(before)))


def test_a_minibatch_in_which_nothing_counts_teaches_nothing():
    """Not even by the momentum of the steps before, nor does it enter the means."""
    model, experience = setting()
    settings = config(ppo_epochs=1, minibatch_size=4)
    optimizer = make_optimizer(model, settings)
    ppo_update(model, optimizer, experience, settings, ACCELERATOR, iteration=0)
    before = state_of(model)
    nothing = with_mask(experience, torch.zeros_like(experience.completion_mask))
    assert ppo_update(model, optimizer, nothing, settings, ACCELERATOR, iteration=1)["optimizer_steps"] == 0
    assert_same(state_of(model), before)

    (rows, *others) = minibatch_rows(12, 4, seed=settings.seed, iteration=2, epoch=0)
    some = experience.completion_mask.clone()
    some[torch.cat(others)] = False
    stats = ppo_update(model, optimizer, with_mask(experience, some), settings, ACCELERATOR, iteration=2)
    assert stats["optimizer_steps"] == 1 and stats["ratio"] > 0.5 and some[rows].any()


def test_eos_is_trained_although_it_is_also_the_pad():
    """TRL masked it. One-token completions that say only EOS, and that was good: EOS becomes likelier."""
    model = with_values(ActorCritic(gpt2()))
    ids, mask = encode("ab", "c")
    tokens, counted = torch.full((2, 1), EOS), torch.ones(2, 1, dtype=torch.bool)

    def logprob():
        with torch.no_grad():
            return read(model, ids, mask, tokens, counted)[0].log_softmax(-1)[:, 0, EOS]

    before = logprob()
    zeros = torch.zeros(2, 1, 1)
    experience = Experience(
        Tokens(ids, mask, tokens, counted), Support.of_all(2, 1), before[:, None], before[:, None],
        torch.zeros(2, 1), zeros, torch.ones(2, 1), zeros,
    )  # fmt: skip
    update(model, experience, rollout_batch_size=2, minibatch_size=2)
    assert (logprob() > before + 0.01).all()


# --- the number of steps, and the norm at each -----------------------------------------------------------------------


@pytest.mark.parametrize("minibatch, epochs", [(12, 1), (6, 2), (4, 3), (3, 1)])
@pytest.mark.parametrize("micro", [1, 4, 12])
def test_epochs_times_minibatches_steps_each_clipped(minibatch, epochs, micro):
    """Real optimizer steps are counted; TRL took fewer, and clipped only the last."""
    model, experience = setting()
    optimizer = counting_optimizer(model)
    stats = update(
        model, experience, optimizer=optimizer, minibatch_size=minibatch, ppo_epochs=epochs, micro_batch_size=micro,
        max_grad_norm=0.01,
    )  # fmt: skip
    assert len(optimizer.norms) == stats["optimizer_steps"] == epochs * 12 // minibatch
    assert optimizer.norms == pytest.approx([0.01] * len(optimizer.norms), rel=1e-3), "each one had to be clipped"
    assert stats["grad_norm"] > 0.1, "logged before clipping"
    assert stats["early_stop"] == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_errors_of_a_critic_of_its_own_do_not_scale_the_policys_step(family):
    """Rewards 50 times as large: whitened advantages stay, the critic's gradient does not."""
    moved, norms = {}, {}
    for factor in (1.0, 50.0):
        model, experience = setting(family, "separate")
        before = [p.detach().clone() for p in model.policy_parameters()]
        experience = dataclasses.replace(experience, returns=factor * experience.returns)
        stats = update(model, experience, value_clip_range=None, vf_coef=10.0, max_grad_norm=0.1)
        moved[factor] = [p.detach() - old for p, old in zip(model.policy_parameters(), before, strict=True)]
        norms[factor] = stats
    assert norms[50.0]["critic/grad_norm"] > 20 * norms[1.0]["critic/grad_norm"] > 2, "both are clipped"
    assert norms[50.0]["grad_norm"] == norms[1.0]["grad_norm"] > 0.1
    assert all(torch.equal(a, b) for a, b in zip(moved[1.0], moved[50.0], strict=True))


def test_only_who_learns_has_a_norm():
    model, experience = setting(kind="separate")
    names = {"grad_norm", "critic/grad_norm"}
    assert names & update(model, experience, critic_warmup_steps=1).keys() == {"critic/grad_norm"}
    assert names & update(model, experience, ppo_epochs=1, critic_epochs=3).keys() == names
    model, experience = setting()
    assert names & update(model, experience).keys() == {"grad_norm"}


def test_a_small_gradient_is_not_stretched():
    model, experience = setting()
    optimizer = counting_optimizer(model)
    stats = update(model, experience, optimizer=optimizer, max_grad_norm=1e6)
    assert sum(optimizer.norms) / len(optimizer.norms) == pytest.approx(stats["grad_norm"], rel=1e-5)


def test_minibatches_cover_every_row_once_per_epoch_in_a_new_order():
    epochs = [minibatch_rows(12, 5, seed=1, iteration=i, epoch=e) for i in range(2) for e in range(2)]
    for rows in epochs:
        assert [len(r) for r in rows] == [5, 5, 2]
        assert torch.cat(rows).sort().values.equal(torch.arange(12))
    assert len({tuple(torch.cat(rows).tolist()) for rows in epochs}) == 4
    again = minibatch_rows(12, 5, seed=1, iteration=1, epoch=1)
    assert torch.cat(again).equal(torch.cat(epochs[3]))


def test_a_target_kl_stops_before_the_step_that_is_too_late():
    """Against the approx_kl of every minibatch of a run that does not stop."""
    settings = {"learning_rate": 0.05, "ppo_epochs": 4}
    model, experience = setting()
    seen = []
    original = make_optimizer(model, config(**settings))
    for epoch in range(4):
        for rows in minibatch_rows(12, 6, seed=42, iteration=0, epoch=epoch):
            part = experience.rows(rows)
            original.zero_grad()
            seen.append(accumulate_gradients(model, part, config(**settings), ACCELERATOR, Penalties()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            original.step()
    kls = [stats["approx_kl"] for stats in seen]
    target = max(kls) / 3
    expected = next(i for i, kl in enumerate(kls) if kl > 1.5 * target)
    assert 0 < expected < 7
    model, experience = setting()
    optimizer = counting_optimizer(model)
    for group in optimizer.param_groups:
        group.update(lr=0.05, eps=1e-4, weight_decay=0.0)
    stats = update(model, experience, optimizer=optimizer, target_kl=target, **settings)
    assert len(optimizer.norms) == stats["optimizer_steps"] == 8 - 1, "the critic misses one step"
    assert stats["early_stop"] == 1
    assert stats["approx_kl"] == pytest.approx(sum(kls[:expected]) / expected, rel=1e-3)
    assert all(p.grad is None for p in model.policy_parameters()), "the gradient of the step not taken is gone"


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_stop_the_policy_stays_and_the_critic_goes_on(kind):
    """The policy is what one step makes of it; the critic's parameters move on, with weight decay as well."""
    states, steps, stats = [], [], {"grad_norm": 0.0}
    for target, epochs in ((0.0, 1), (1e-9, 4)):
        model, experience = setting("gpt2", kind)
        before = state_of(model)
        rest = {"ppo_epochs": epochs, "minibatch_size": 12, "weight_decay": 0.1}
        norm, stats = stats["grad_norm"], update(model, experience, target_kl=target, **rest)
        steps.append(stats["optimizer_steps"])
        states.append(state_of(model))
    critic = {name for name in before if name.startswith(("value_head", "critic"))}
    moved = {name for name in before if not torch.equal(*(state[name] for state in states))}
    assert moved and moved <= critic
    assert steps == [1, 3] and stats["early_stop"] == stats["policy_steps"] == 1 and stats["value_loss"] > 0
    assert stats["grad_norm"] == pytest.approx(norm), "of the policy's step alone"


def test_without_a_critic_the_stop_ends_the_update():
    model, experience = setting()
    stats = update(model, experience, target_kl=1e-9, ppo_epochs=4, estimator="rewards_to_go", baseline="batch_mean")
    assert stats["optimizer_steps"] == 1 and stats["early_stop"] == 1


def test_a_rollout_of_another_policy_is_not_learned_from_at_all():
    """Every step is too late, and what was seen is reported."""
    model, experience = setting()
    far = dataclasses.replace(experience, old_logprobs=experience.old_logprobs - 1)
    before = state_of(model)
    stats = update(model, far, target_kl=0.01, estimator="rewards_to_go", baseline="batch_mean")
    assert stats["optimizer_steps"] == 0 and stats["early_stop"] == 1 and stats["approx_kl"] > 0.015
    assert_same(before, state_of(model))
    with_critic = update(model, far, target_kl=0.01)
    assert with_critic["policy_steps"] == 0 and with_critic["optimizer_steps"] == 2 * 2 - 1
    for name in ("approx_kl", "first_ratio_error", "policy_loss", "entropy", "ratio", "clip_frac"):
        assert with_critic[name] == pytest.approx(stats[name]), name
    assert with_critic["first_ratio_error"] > 0.5


@pytest.mark.parametrize(
    "settings, limit",
    [({}, 0.015), ({"target_kl": 0.1}, 0.15), ({"target_kl": 0.0}, math.inf), ({"objective": "kl_penalty"}, math.inf),
     ({"objective": "kl_penalty", "target_kl": 0.2}, 0.3), ({"objective": "trpo"}, math.inf),
     ({"objective": "importance_sampled"}, math.inf)],
)  # fmt: skip
def test_the_limit_is_the_clipped_objectives_default(settings, limit):
    assert kl_limit(PPOConfig(**settings)) == pytest.approx(limit)


# --- the critic's warm-up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_warm_up_only_the_critic_learns(kind):
    """Bit for bit, with weight decay, and though a target_kl is set."""
    model, experience = setting("gpt2", kind)
    before = state_of(model)
    optimizer = make_optimizer(model, config(weight_decay=0.1))
    warm = {"critic_warmup_steps": 2, "critic_warmup_epochs": 3, "weight_decay": 0.1, "target_kl": 1e-9}
    stats = update(model, experience, iteration=1, optimizer=optimizer, **warm)
    after = state_of(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    critic = {name for name in before if name.startswith(("value_head", "critic"))}
    assert changed and changed <= critic
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.critic_parameters()}
    assert stats["optimizer_steps"] == 3 * 2 and stats["value_loss"] > 0
    stats = update(model, experience, iteration=2, optimizer=optimizer, **(warm | {"target_kl": 0.0}))
    assert stats["optimizer_steps"] == 2 * 2
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state_of(model).items() if name not in critic)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_warm_up_the_critic_learns_its_targets(kind):
    model, experience = setting("gpt2", kind)
    optimizer = make_optimizer(model, config(learning_rate=0.05))
    losses = [
        update(model, experience, iteration=i, optimizer=optimizer, critic_warmup_steps=99, value_clip_range=None,
               learning_rate=0.05, max_grad_norm=100.0)["value_loss"]
        for i in range(12)
    ]  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]


# --- broken numbers stop the run before the step ---------------------------------------------------------------------


@pytest.mark.parametrize("field", ["advantages", "returns", "old_logprobs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_number_in_the_experience_steps_nothing(field, value):
    model, experience = setting()
    tensor = getattr(experience, field).clone()
    tensor[2, 0] = value
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"Iteration 0: the loss or its gradient is not finite"):
        update(model, dataclasses.replace(experience, **{field: tensor}), minibatch_size=12)
    assert_same(state_of(model), before)


def test_a_broken_weight_steps_nothing():
    model, experience = setting()
    with torch.no_grad():
        model.policy.transformer.h[1].mlp.c_fc.weight[0, 0] = math.inf
    before = {name: tensor for name, tensor in state_of(model).items() if tensor.isfinite().all()}
    optimizer = counting_optimizer(model)
    with pytest.raises(NonFiniteError):
        update(model, experience, optimizer=optimizer)
    assert not optimizer.norms
    assert_same({name: tensor for name, tensor in state_of(model).items() if name in before}, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_gradient_names_its_parameter_and_steps_nothing(value):
    """The loss is finite; one gradient is not. The parameter is named although clipping would spread the NaN."""
    model, experience = setting()
    model.policy.transformer.h[1].mlp.c_fc.weight.register_hook(lambda gradient: gradient * value)
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"first parameter: policy\.transformer\.h\.1\.mlp\.c_fc\.weight"):
        update(model, experience)
    assert_same(state_of(model), before)


# --- step zero -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"temperature": 1.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_the_first_minibatch_has_ratio_one(family, kind, sampling):
    """Left padding, right padding, pad == eos, dropout in the configuration: approx_kl is 0, up to float32 rounding."""
    model = build_model(family, kind)
    experience = make_experience(make_samples(model, ROWS, **sampling))
    assert experience.completion_mask.sum(1).unique().numel() > 1
    once = {"ppo_epochs": 1, "minibatch_size": 12, "micro_batch_size": 5}
    stats = update(model, experience, tolerance=2e-5, **once, **sampling)
    assert stats["first_ratio_error"] < 2e-5
    assert stats["ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(stats["approx_kl"]) < 1e-7
    assert stats["clip_frac"] == 0
    assert stats["value_clip_frac"] == 0


def force_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.training = True


def scale_weights(model):
    with torch.no_grad():
        model.policy.transformer.ln_f.weight.mul_(1.01)


@pytest.mark.parametrize("disturb", [force_dropout, scale_weights])
def test_a_model_that_is_not_the_one_that_sampled_is_noticed(disturb):
    model, experience = setting()
    disturb(model)
    before = state_of(model)
    with pytest.raises(
        StepZeroError, match=r"(?s)differ from the rollout's by up to .* nats.*dropout.*step_zero_tolerance"
    ):
        update(model, experience, tolerance=2e-5)
    assert_same(state_of(model), before)


def test_another_temperature_is_noticed():
    model, experience = setting(temperature=0.9)
    with pytest.raises(StepZeroError):
        update(model, experience, tolerance=2e-5, temperature=1.0)
    update(model, experience, tolerance=2e-5, temperature=0.9)


def test_the_whole_log_ratio_is_watched_not_its_mean():
    """One token off in one row is enough."""
    model, experience = setting()
    old = experience.old_logprobs.clone()
    old[-1, 0] += 1e-4
    with pytest.raises(StepZeroError, match=r"up to (1\.00e-04|9\.99e-05) nats"):
        update(model, dataclasses.replace(experience, old_logprobs=old), tolerance=2e-5, minibatch_size=12)
