"""The trainer: wrong arguments are refused before anything is sampled; every setting does something; callbacks work."""

import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from builders import (
    PROMPTS,
    VOCAB,
    assert_same,
    build_policy_arguments,
    count_a,
    critic_of,
    gpt2,
    lora,
    make_config,
    make_trainer,
    metrics_rows,
    trained,
    weights,
    with_values,
)
from fakes import letter_tokenizer, tiny_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from lmppo import PPOTrainer
from lmppo.checks import NonFiniteError, StepZeroError
from lmppo.groups import GROUP_COST
from lmppo.models.inputs import Aligned
from lmppo.rewards import RewardError
from lmppo.run.checkpoint import list_checkpoints

KINDS = ["shared", "separate", "lora"]


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, complaint",
    [
        ({"train_dataset": None}, ValueError, "train_dataset is missing"),
        ({"args": {"max_steps": 3}}, TypeError, r"args is a dict; expected a lmppo.PPOConfig"),
        ({"train_dataset": []}, ValueError, "data set is empty"),
        ({"train_dataset": [{"text": "a"}]}, ValueError, r"Row 0 .*no `prompt`"),
        ({"eval_dataset": [{"prompt": ""}]}, ValueError, "Row 0.*no tokens"),
        ({"processing_class": tiny_tokenizer()}, ValueError, r"257 tokens and the model's embedding 12 rows.*resize"),
        ({"processing_class": None}, OSError, "No tokenizer could be loaded.*pass processing_class"),
        ({"reward_funcs": []}, ValueError, "reward_funcs is empty"),
        ({"model": "no/such-model"}, OSError, "Could not load a model from 'no/such-model'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, arguments, error, complaint):
    good = {
        "model": gpt2(), "reward_funcs": count_a, "args": make_config(tmp_path / "run"),
        "train_dataset": [{"prompt": "a"}], "processing_class": letter_tokenizer(),
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        PPOTrainer(**(good | arguments))
    assert not (tmp_path / "run").exists()


def test_eval_steps_need_an_eval_dataset(tmp_path):
    with pytest.raises(ValueError, match="eval_steps=2 needs an eval_dataset"):
        make_trainer(tmp_path, eval_steps=2)
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make_trainer(tmp_path).evaluate()


def test_one_weight_for_each_reward_function(tmp_path):
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1"):
        make_trainer(tmp_path, reward_weights=[1.0, 2.0])


def test_a_policy_that_cannot_learn_is_refused(tmp_path):
    """PeftModel.from_pretrained freezes its adapter unless told; a reference that is the policy would move with it."""
    get_peft_model(gpt2(), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no trainable parameters.*is_trainable=True"):
        make_trainer(tmp_path, model=PeftModel.from_pretrained(gpt2(), tmp_path / "adapter"))
    policy = gpt2()
    with pytest.raises(ValueError, match=r"ref_model shares .*wte.weight with the policy.*Leave ref_model out"):
        make_trainer(tmp_path, model=policy, ref_model=policy)


def test_more_processes_than_accelerate_sees_are_refused(tmp_path, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts lonely twins that overwrite each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"started 2 processes, but accelerate sees 1.*ACCELERATE_USE_CPU=true"):
        make_trainer(tmp_path)


# --- tokenizers without special tokens (F51) -------------------------------------------------------------------------


def test_a_tokenizer_without_pad_or_eos_and_a_model_without_eos(tmp_path):
    """Nothing ends a completion then: all are full, none has ended, nothing breaks."""
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    model = gpt2()
    model.generation_config.eos_token_id = None
    row = trained(tmp_path, model=model, tokenizer=tokenizer).state.log_history[-1]
    assert row["eos_rate"] == 0 and row["completion_length/min"] == 8


@pytest.mark.parametrize("of_model, of_tokenizer, expected", [(0, True, (0,)), ([0, 3], True, (0, 3)), (None, True, (0,)),
                                                              (5, False, (5,)), (None, False, ())])  # fmt: skip
def test_where_completions_end(tmp_path, of_model, of_tokenizer, expected):
    model, tokenizer = gpt2(), letter_tokenizer()
    model.generation_config.eos_token_id = of_model
    if not of_tokenizer:
        tokenizer.eos_token = None
    assert make_trainer(tmp_path, model=model, tokenizer=tokenizer).collector.params.eos_token_ids == expected


# --- any data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_data_set_smaller_than_the_batch_trains(tmp_path, size):
    trainer = trained(tmp_path, dataset=[{"prompt": p} for p in PROMPTS[:size]])
    assert trainer.state.epoch == 16 / size


def test_a_streaming_data_set_trains(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": p, "label": 1.0} for p in PROMPTS]).to_iterable_dataset()
    trainer = trained(tmp_path, dataset=data, reward=lambda prompts, completions, label, **kwargs: label)
    assert [row["reward"] for row in trainer.state.log_history] == [1.0, 1.0]
    assert "epoch" not in trainer.state.log_history[0]


def test_rewards_that_are_all_equal_give_finite_updates(tmp_path):
    def constant(prompts, completions, **kwargs):
        return [1.0] * len(prompts)

    trainer = trained(tmp_path, reward=constant, kl_coef=0.0)
    assert all(math.isfinite(value) for row in trainer.state.log_history for value in row.values())


# --- every setting does something ------------------------------------------------------------------------------------

BASE = {"max_steps": 2, "ppo_epochs": 2, "kl_coef": 0.1, "learning_rate": 0.02, "max_grad_norm": 0.3}
TURNS = {
    "seed": 43,
    "rollout_batch_size": 12,
    "num_generations": 2,
    "max_completion_length": 6,
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.7,
    "min_p": 0.2,
    "min_new_tokens": 4,
    "suppress_tokens": [1],
    "bad_words_ids": [[1]],
    "stop_token_ids": [2, 3],
    "stop_strings": ["b", "c"],
    "shuffle_dataset": False,
    "reward_weights": [0.5],
    "kl_coef": 0.5,
    "kl_target": 0.01,
    "truncation": "penalty",
    "estimator": "rewards_to_go",
    "baseline": "auto",
    "gamma": 0.8,
    "lam": 0.5,
    "critic_lam": 1.0,
    "adaptive_lam_alpha": 5.0,
    "objective": "importance_sampled",
    "whiten_advantages": False,
    "ppo_epochs": 3,
    "minibatch_size": 8,
    "clip_range": 0.01,
    "clip_range_high": 0.01,
    "value_clip_range": 0.001,
    "vf_coef": 0.9,
    "ent_coef": 0.1,
    "target_kl": 1e-4,
    "critic_epochs": 1,
    "critic_warmup_steps": 1,
    "learning_rate": 0.01,
    "critic_learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 0.1,
    "max_grad_norm": 0.1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights(trained(tmp_path_factory.mktemp("base"), **BASE))


@pytest.mark.parametrize("name", TURNS)
def test_every_setting_that_should_change_what_is_learned_does(tmp_path, base, name):
    other = weights(trained(tmp_path, **(BASE | {name: TURNS[name]})))
    assert any(not torch.equal(base[n], other[n]) for n in base)


BETA = {"objective": "kl_penalty"}
TRPO = {"objective": "trpo"}
NEEDING_ANOTHER = [
    ("kl_horizon", {"kl_target": 0.01}, 20),
    ("critic_warmup_epochs", {"critic_warmup_steps": 1}, 3),
    ("critic_warmup_explained_variance", {"critic_warmup_steps": 1}, -1e9),
    ("truncation_penalty", {"truncation": "penalty"}, 2.0),
    ("dual_clip", {"clip_range": 0.01, "max_grad_norm": 100.0}, 1.001),
    ("policy_kl_coef", BETA, 30.0),
    ("policy_kl_target", BETA, 1e3),
    ("trpo_max_kl", TRPO, 1e-4),
    ("trpo_cg_steps", TRPO, 1),
    ("trpo_damping", TRPO, 10.0),
    ("trpo_line_search_steps", TRPO | {"trpo_max_kl": 10.0}, 1),  # the whole step overshoots
    ("kl_form", {}, "k2_loss"),
    ("kl_form", {}, "k3_both"),
    ("kl_form", {"kl_form": "k3_both"}, "exact_both"),
    ("kl_form", {"kl_form": "k2_loss"}, "exact_loss"),
    ("kl_form", {"kl_form": "k3_both"}, "k3_loss"),
    ("kl_form", {"kl_form": "exact_both"}, "exact_loss"),
    ("truncation", {}, "bootstrap"),
    ("truncation", {}, "mask"),
    ("baseline", {"estimator": "rewards_to_go"}, "none"),
    ("baseline", {"estimator": "rewards_to_go", "whiten_advantages": False}, "batch_mean"),
    ("baseline", {"estimator": "rewards_to_go", "num_generations": 2}, "leave_one_out"),
    ("objective", {}, "kl_penalty"),
    ("objective", {}, "trpo"),
    ("objective", {"ppo_epochs": 1, "minibatch_size": 8, "clip_range": 0.01}, "policy_gradient"),
]


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("name, start, other", NEEDING_ANOTHER)
def test_settings_that_need_another_one_do_something_with_it(tmp_path, name, start, other):
    runs = [weights(trained(tmp_path / str(i), **(BASE | start | s))) for i, s in enumerate(({}, {name: other}))]
    assert any(not torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@pytest.mark.parametrize(
    "settings",
    [{"logging_steps": 2}, {"save_steps": 1}, {"save_steps": 1, "save_total_limit": 2},
     {"save_steps": 1, "save_rollouts": 3}, {"log_completions": 2},
     {"report_to": ["tensorboard"]}, {"report_to": ["none"]}, {"run_name": "x"}, {"disable_tqdm": False}, {}],
    ids=str,
)  # fmt: skip
def test_what_is_shown_and_saved_changes_nothing_that_is_learned(tmp_path, base, settings):
    """And two runs of the same settings are the same run, to the last bit."""
    assert_same(weights(trained(tmp_path, **(BASE | settings))), base)


@pytest.mark.parametrize("settings", [{}, {"metric_for_best_model": "reward", "log_completions": 2}], ids=str)
def test_evaluating_changes_nothing_that_is_learned(tmp_path, base, settings):
    trainer = trained(tmp_path, **BASE, eval_steps=1, eval_dataset=["kj", "c"], **settings)
    assert_same(weights(trainer), base)


def test_a_reward_function_that_seeds_everything_changes_nothing(tmp_path, base):
    def seeding(prompts, completions, **kwargs):
        torch.manual_seed(0)
        return count_a(prompts, completions)

    assert_same(weights(trained(tmp_path, **BASE, reward=seeding)), base)


def test_micro_batches_change_the_weights_by_rounding_alone(tmp_path, base):
    """Adam divides by the gradient's size, so the rounding error of a tiny gradient is not tiny: eps 0.1 here."""
    runs = [
        weights(trained(tmp_path / str(n), **(BASE | {"adam_epsilon": 0.1, "micro_batch_size": n}))) for n in (1, 3, 8)
    ]
    for run in runs[1:]:
        for name, tensor in run.items():
            torch.testing.assert_close(tensor, runs[0][name], atol=1e-5, rtol=1e-5)


UNEQUAL = ["a", "deadbeef" * 4, "kj", "b", "cafe" * 6, "c", "decade", "abc"]


@pytest.mark.parametrize(
    "settings",
    [
        {"truncation": "bootstrap"},
        {"truncation": "mask", "kl_form": "exact_both"},
        {"truncation": "bootstrap", "critic": critic_of, "kl_form": "k3_both"},
        {"truncation": "mask", "objective": "trpo", "trpo_cg_steps": 3, "trpo_damping": 1.0},
        {"truncation": "bootstrap", "num_layers_unfrozen": 1, "kl_form": "exact_loss"},
    ],
    ids=["bootstrap", "mask", "own critic", "trpo", "frozen layers"],
)
def test_groups_of_rows_of_very_unequal_lengths_change_rounding_alone(tmp_path, monkeypatch, settings):
    """Which rows are read together is nowhere in the numbers: neither in a rollout's nor in what is learned from it."""
    runs, rollouts, groups = [], [], []
    for n, cost, packs in ((8, 10**6, False), (3, 1, False), (1, 128, False), (2, 128, True), (8, 128, True)):
        monkeypatch.setitem(GROUP_COST, "cpu", cost)
        monkeypatch.setattr("lmppo.models.probe.reads_packed", lambda *args, packs=packs: packs)
        made = {name: value() if callable(value) else value for name, value in settings.items()}
        trainer = make_trainer(
            tmp_path / f"{n}-{packs}",
            dataset=[{"prompt": p} for p in UNEQUAL],
            micro_batch_size=n,
            adam_epsilon=0.1,
            max_completion_length=6,
            **made,
        )
        with_values(trainer.actor_critic)
        rollouts.append(trainer.collector.collect(trainer.prompts.next_batch(8), 0).rollout)
        trainer.train()
        runs.append(weights(trainer))
        groups.append([micro.tokens for _, micro in rollouts[-1].micro_batches(n, packs=packs)])
    assert [len(micros) for micros in groups][0] == 1 < min(map(len, groups[1:4])) < max(map(len, groups))
    assert [any(Aligned.of(tokens).packed for tokens in micros) for micros in groups] == [False] * 3 + [True] * 2
    assert rollouts[0].ended.any() and rollouts[0].ended.logical_not().sum() > 2
    assert settings["truncation"] == "mask" or rollouts[0].bootstrap_values.any()
    for run, rollout in zip(runs[1:], rollouts[1:], strict=True):
        for name, tensor in run.items():
            torch.testing.assert_close(tensor, runs[0][name], atol=1e-5, rtol=1e-5)
        assert rollout.tokens.completion_ids.equal(rollouts[0].tokens.completion_ids)
        for name in ("logprobs", "ref_logprobs", "values", "kl_penalty", "bootstrap_values"):
            ours, theirs = getattr(rollout, name), getattr(rollouts[0], name)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- step zero -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_ratio_is_one_and_kl_is_zero(tmp_path, kind):
    row = trained(
        tmp_path, **build_policy_arguments(kind), max_steps=1, ppo_epochs=1, minibatch_size=8
    ).state.log_history[0]
    assert abs(row["kl_to_ref"]) < 1e-4, "the sum over up to 8 tokens"
    assert abs(row["approx_kl"]) < 1e-7 and row["clip_frac"] == 0
    assert row["first_ratio_error"] < 2e-5


def test_train_mode_of_the_users_makes_no_difference(tmp_path, base):
    model = gpt2().train()
    trainer = make_trainer(tmp_path, model=model, **BASE)
    trainer.model.train()
    trainer.train()
    assert_same(weights(trainer), base)


def test_dropout_switched_on_behind_the_trainers_back_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path)
    for module in trainer.actor_critic.modules():
        module.training = True
    before = weights(trainer)
    with pytest.raises(StepZeroError, match="though they are the same weights"):
        trainer.train()
    assert_same(weights(trainer), before)
    assert not list_checkpoints(tmp_path)


def test_dropout_that_starts_during_the_critics_warm_up_is_noticed_at_the_policys_first_step(tmp_path):
    class Disturb(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.register_forward_hook(self.jitter)

        def jitter(self, module, arguments, output):
            if module.training is False and output.logits.requires_grad:
                output.logits = output.logits + 0.01 * torch.randn(output.logits.shape)

    with pytest.raises(StepZeroError, match="so the ratio does not start at 1"):
        trained(tmp_path, critic_warmup_steps=2, max_steps=4, callbacks=[Disturb()])


def test_only_a_given_reference_may_differ_before_the_first_step(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(gpt2(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    row = trained(tmp_path / "a", model=model).state.log_history[0]
    assert abs(row["kl_to_ref"]) < 1e-5, "an adapter that was trained before is part of the reference"
    row = trained(tmp_path / "b", ref_model=gpt2(seed=6)).state.log_history[0]
    assert abs(row["kl_to_ref"]) > 1e-2


def test_the_tolerance_is_a_setting(tmp_path):
    with pytest.raises(StepZeroError):
        trained(tmp_path / "a", step_zero_tolerance=1e-12)
    trained(tmp_path / "b", step_zero_tolerance=1e-4)


# --- broken numbers --------------------------------------------------------------------------------------------------


def test_a_weight_that_breaks_stops_the_run_and_is_never_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.transformer.h[0].attn.c_attn.weight[0, 0] = math.nan

    with pytest.raises(NonFiniteError, match="not finite"):
        trained(tmp_path, max_steps=5, save_steps=1, callbacks=[Break()])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    for path in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert not (tmp_path / "final").exists()


def test_a_broken_reference_stops_the_run_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, ref_model=gpt2(seed=6))
    before = weights(trainer)
    with torch.no_grad():
        trainer.reference.model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert_same(weights(trainer), before)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_broken_reward_stops_the_run_before_the_step(tmp_path, reward):
    trainer = make_trainer(tmp_path, reward=lambda prompts, **kwargs: [reward] * len(prompts))
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"row 0.*NaN or infinite"):
        trainer.train()
    assert_same(weights(trainer), before)


def test_a_reward_function_that_raises_names_itself_and_the_step(tmp_path):
    def flaky(prompts, completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyError("label")
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match=r"'flaky' raised KeyError at step 1"):
        trained(tmp_path, reward=flaky)


# --- the stages by hand ----------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_is_the_ten_lines_of_the_documentation(tmp_path):
    """They learn what the trainer's own loop learns, to the bit."""
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    reference = trained(tmp_path / "a")
    trainer = make_trainer(tmp_path / "b")
    exec(block, {"trainer": trainer, "args": trainer.args})
    assert_same(weights(trainer), weights(reference))


def test_one_step_can_be_taken_without_train(tmp_path):
    reference = trained(tmp_path / "a")
    trainer = make_trainer(tmp_path / "b")
    rows = [trainer.step() for i in range(2)]
    assert_same(weights(trainer), weights(reference))
    assert [row["step"] for row in metrics_rows(tmp_path / "b")] == [1, 2]
    assert rows[0]["reward"] == reference.state.log_history[0]["reward"]


def test_two_trainers_in_one_process_do_not_disturb_each_other(tmp_path, base):
    first, second = make_trainer(tmp_path / "a", **BASE), make_trainer(tmp_path / "b", **BASE)
    for _ in range(2):
        first.step()
        second.step()
    assert_same(weights(first), base)
    assert_same(weights(second), base)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_precision():
    """accelerate keeps the precision of the first Accelerator of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_keeps_float32_weights_and_a_ratio_of_one(tmp_path, other_precision, kind):
    trainer = trained(tmp_path, **build_policy_arguments(kind), bf16=True, max_steps=3)
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}
    row = trainer.state.log_history[0]
    assert row["first_ratio_error"] < 2e-2
    assert all(math.isfinite(value) for row in trainer.state.log_history for value in row.values())


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path):
    gpt2().bfloat16().save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    trainer = PPOTrainer(str(tmp_path / "model"), count_a, make_config(tmp_path / "run"), [{"prompt": "a"}])
    trainer.train()
    assert trainer.processing_class("ab")["input_ids"] == [1, 2]
    assert {p.dtype for p in trainer.actor_critic.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["first_ratio_error"] < 2e-5
    assert (tmp_path / "run" / "run_config.yaml").read_text().count(str(tmp_path / "model")) == 1


@pytest.mark.parametrize("reader", ["ref_model", "critic"])
def test_the_shortest_context_of_all_models_decides(tmp_path, reader):
    short = gpt2(n_positions=12) if reader == "ref_model" else critic_of(n_positions=12)
    with pytest.raises(ValueError, match=f"Row 2 of train_dataset: .* exceed the {reader}'s context of 12"):
        make_trainer(tmp_path, **{reader: short})


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    from fakes import tiny_gpt2

    with pytest.raises(ValueError, match=f"ref_model knows {VOCAB + 4} tokens and the policy {VOCAB}"):
        make_trainer(tmp_path, ref_model=tiny_gpt2(VOCAB + 4))


def test_the_vocabulary_may_be_larger_than_the_tokenizer(tmp_path):
    """Embeddings are often padded to a multiple of 64; their extra tokens are sampled and scored like others."""
    from fakes import tiny_gpt2

    trainer = trained(tmp_path, model=tiny_gpt2(VOCAB + 20))
    assert trainer.state.global_step == 2
