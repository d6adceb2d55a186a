"""The lab: its measurements against enumeration and autograd, and the whole of it in its quick form."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmppo.functional.exact import completion_logprobs, enumerate_completions, expected_return, state_logits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "lab"))

import estimators as measured_estimators  # noqa: E402
import measure  # noqa: E402
import problem as task  # noqa: E402
import reuse  # noqa: E402
import training  # noqa: E402
import truncation  # noqa: E402
from estimators import estimators, language_model  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def problem():
    return language_model()


def test_the_pay_of_every_completion_is_as_the_task_says():
    for ids, earned in zip(task.COMPLETIONS.ids.tolist(), task.on_grid(task.pay).tolist(), strict=True):
        text = "".join(task.TOKENS[i] for i in ids).split(task.TOKENS[task.END])[0]
        assert sum(earned) == pytest.approx(text.count("ab") + 0.3 * text.count("c"), abs=1e-6)
    assert torch.allclose(task.at_the_end(task.on_grid(task.pay)).sum(dim=1), task.on_grid(task.pay).sum(dim=1))


def test_the_true_gradient_is_that_of_the_models_parameters(problem):
    """Autograd through the whole model, all completions at once: the same length, and the same slope along a step."""
    model = task.make_model().double()
    logits = state_logits(lambda ids: task.next_logits(model, ids), task.COMPLETIONS)
    logprobs = completion_logprobs(logits, task.COMPLETIONS)
    gradients = torch.autograd.grad(
        expected_return(task.COMPLETIONS, logprobs, task.on_grid(task.pay)), list(model.parameters()), retain_graph=True
    )
    length = torch.cat([g.flatten() for g in gradients]).norm()
    assert problem.true_gradient().norm().item() == pytest.approx(length.item(), rel=1e-9)
    assert torch.allclose(problem.logprobs, logprobs.detach(), atol=1e-12)
    # One completion's estimate: the score of its tokens, times weights of 1.
    score = torch.autograd.grad(logprobs[100].sum(), list(model.parameters()))
    estimate = problem.gradients(task.MASK[100].double().view(1, 1, -1), torch.tensor([[100]]))
    assert estimate.norm().item() == pytest.approx(torch.cat([g.flatten() for g in score]).norm().item(), rel=1e-9)


def test_what_is_measured_is_what_enumeration_says(problem):
    """Within four standard errors, for every estimator that looks at one completion at a time."""
    rows = measured_estimators.table(problem, [16], batches=300)
    compared = [row for row in rows.values() if "exact" in row]
    assert len(compared) > 15
    for name, row in rows.items():
        measured, exact = row["16"], row.get("exact")
        if exact:
            assert abs(measured["bias2"] - exact["bias2"]) < 4 * measured["bias2_error"] + 1e-12, name
            assert abs(measured["variance"] - exact["variance"] / 16) < 5 * measured["variance_error"], name
    assert rows["gae lam 0.5, wrong critic"]["exact"]["bias2"] > 0.01
    assert rows["rewards_to_go, true critic"]["exact"]["bias2"] < 1e-20
    biases = [rows[f"gae lam 0.5, {name}"]["exact"]["bias2"] for name in ("adaptive, wrong critic", "wrong critic")]
    assert biases[0] < biases[1] / 2, "a longer look ahead for longer completions"
    assert 1e-8 < rows["gae lam 0.5, adaptive, true critic"]["exact"]["bias2"] < 0.01, "a bias of its own"


def test_the_measured_bias_has_the_error_it_claims(problem):
    """Repeated with other batches, the unbiased rows scatter around 0 by about one standard error."""
    weights = estimators(problem)["rewards_to_go, none"]
    measured = [measure.measure(problem, weights, batches=50, size=size) for size in range(10, 40)]
    scores = torch.tensor([m.bias2 / m.bias2_error for m in measured])
    assert scores.mean().abs() < 4 / math.sqrt(len(scores))
    assert 0.4 < scores.std() < 1.8


def test_bandits():
    rows = measured_estimators.bandits(32, batches=300)
    assert abs(rows["stateless, immediate_rewards"]["bias2"]) < 4 * rows["stateless, immediate_rewards"]["bias2_error"]
    assert rows["stateful, immediate_rewards"]["bias2"] > 20 * rows["stateful, immediate_rewards"]["bias2_error"]
    assert rows["stateless, rewards_to_go"]["variance"] > 3 * rows["stateless, immediate_rewards"]["variance"]


def test_the_trainer_starts_at_the_reference_and_learns(tmp_path):
    trainer = training.make_trainer(str(tmp_path), seed=0)
    assert training.share_of_the_way(trainer) == pytest.approx(0.0, abs=1e-6)
    for _ in range(6):
        trainer.step()
    assert 0.3 < training.share_of_the_way(trainer) < 1.0


def test_the_variants_are_those_they_claim_to_be(tmp_path):
    """Each is PPO's clip with another setting, and starts from the same share and no KL."""
    with pytest.warns(UserWarning, match="biased gradient"):
        trainers = {
            name: training.make_trainer(str(tmp_path), seed=0, **settings)
            for name, settings in training.VARIANTS.items()
        }
    assert {trainer.args.objective for trainer in trainers.values()} == {"clip"}
    assert [s.name for s in training.VARIANTS["a stream for the KL"]["reward_streams"]] == ["score", "kl"]
    for name, trainer in trainers.items():
        assert training.share_and_kl(trainer) == pytest.approx((0.0, 0.0), abs=1e-6), name
        trainer.step()
        assert training.share_and_kl(trainer)[1] > 0, name
    settings = training.OBJECTIVES["clip, asymmetric and dual"]
    args = training.make_trainer(str(tmp_path), seed=0, **settings).args
    assert args.clip_range_high > args.clip_range and args.dual_clip > 1


def test_every_truncation_mode_is_right_about_its_own_target(problem):
    rows = truncation.truncation(problem)
    exact = {name for name, row in rows.items() if row["bias2"] < 1e-20}
    assert exact == {"end, true critic", "bootstrap, true critic", "penalty, true critic", "mask, total_return, none"}
    assert all(row["bias2"] > 0.005 for name, row in rows.items() if name not in exact)


def test_what_bootstrapping_aims_at_is_the_pay_of_six_tokens(problem):
    """Its rewards, the value of the last state among them, have that gradient through the first five tokens."""
    six = enumerate_completions(vocab_size=len(task.TOKENS), horizon=6, eos=task.END)
    model = task.make_model().double()
    logprobs = completion_logprobs(state_logits(lambda ids: task.next_logits(model, ids), six), six)
    logprobs = torch.cat([logprobs[:, :5], logprobs[:, 5:].detach()], dim=1)
    earned = torch.where(six.mask, torch.tensor([task.pay(ids) for ids in six.ids.tolist()]).double(), 0.0)
    expected = torch.autograd.grad(expected_return(six, logprobs, earned), list(model.parameters()))
    after = truncation.value_after_the_cut()
    rewards = problem.rewards + truncation.LAST_OF_CUT * after.unsqueeze(1)
    length = torch.cat([g.flatten() for g in expected]).norm().item()
    aim = dataclasses.replace(problem, rewards=rewards).true_gradient()
    assert aim.norm().item() == pytest.approx(length, rel=1e-9)
    assert length != pytest.approx(problem.true_gradient().norm().item(), rel=0.01)


def test_the_true_values_of_streams_are_those_of_rollouts(tmp_path):
    """V of the first state is the mean discounted return of sampled completions."""
    trainer = training.make_trainer(str(tmp_path), seed=0, rollout_batch_size=2048)
    values = reuse.true_values(training.exact_logprobs(trainer.actor_critic.policy))[0, 0]
    ids = trainer.collector.collect(trainer.prompts.next_batch(2048), 0).rollout.tokens.completion_ids.tolist()
    for k, (pay, gamma) in enumerate(((task.pay_pairs, 1.0), (task.pay_cs, 0.5))):
        returns = torch.tensor([sum(gamma**t * x for t, x in enumerate(pay(row))) for row in ids])
        assert abs(returns.mean() - values[k]) < 4 * returns.std() / math.sqrt(len(ids))


def test_the_recipe_in_its_quick_form(tmp_path):
    command = [sys.executable, "recipes/lab/estimator_lab.py", "--quick", "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lab = json.loads((tmp_path / "lab.json").read_text())
    pictures = {path.name for path in tmp_path.glob("lab-*.png")}
    names = ("estimators", "sizes", "knobs", "bandits", "dense", "objectives", "reuse", "streams")
    assert pictures == {f"lab-{name}.png" for name in names}
    assert pictures <= {path.name for path in (ROOT / "docs" / "images").iterdir()}, "the walk shows them all"
    text = (tmp_path / "lab.md").read_text()
    assert text in done.stdout
    assert all(f"| {name} |" in text for name in [*lab["dense"], *lab["bandits"], *lab["objectives"]])
    assert all(f"| {name} |" in text for name in [*lab["variants"], *lab["truncation"]])
