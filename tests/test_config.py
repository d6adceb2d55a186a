"""The configuration: every bad value is refused with its setting's name, and no setting is dead."""

import ast
import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
from trl import TrlParser

import lmppo
from lmppo import PPOConfig
from lmppo.config import KL_FORMS, REPLACED
from lmppo.settings import EstimatorSettings

NAN, INF = math.nan, math.inf
COUNT = (0, -1)
RATE = (-1e-3, NAN, INF)
POSITIVE = (0.0, -1.0, NAN, INF)
UNIT = (-0.1, 1.1, NAN)

BAD = {
    "max_steps": COUNT,
    "seed": (-1,),
    "rollout_batch_size": (*COUNT, 50),  # no multiple of minibatch_size=16
    "num_generations": (*COUNT, 7),  # no divisor of rollout_batch_size=64
    "max_completion_length": COUNT,
    "cpu_threads": (-1,),
    "temperature": POSITIVE,
    "top_k": (-1,),
    "top_p": (0.0, 1.01, NAN),
    "min_p": UNIT,
    "min_new_tokens": (-1, 49),  # above max_completion_length=48
    "kl_coef": RATE,
    "kl_target": POSITIVE,
    "kl_horizon": COUNT,
    "kl_form": ("k1", "k1_loss", "k3_reward"),
    "truncation": ("drop",),
    "truncation_penalty": RATE,
    "estimator": ("gea", ""),
    "baseline": ("critc",),
    "critic_lam": UNIT,
    "adaptive_lam_alpha": POSITIVE,
    "objective": ("ppo",),
    "dual_clip": (1.0, 0.5, NAN, INF),
    "policy_kl_coef": RATE,
    "policy_kl_target": POSITIVE,
    "trpo_max_kl": POSITIVE,
    "trpo_cg_steps": COUNT,
    "trpo_damping": RATE,
    "trpo_line_search_steps": COUNT,
    "critic_epochs": COUNT,
    "critic_warmup_explained_variance": (1.0, NAN),
    "save_rollouts": (-1,),
    "gamma": UNIT,
    "lam": UNIT,
    "ppo_epochs": COUNT,
    "minibatch_size": (*COUNT, 30),
    "micro_batch_size": COUNT,
    "sample_batch_size": COUNT,
    "num_layers_unfrozen": COUNT,
    "frozen_dtype": ("float16", "bf16"),
    "chat_template_kwargs": ("enable_thinking", "[1]", "1"),
    "clip_range": (0.0, 1.0, NAN),
    "clip_range_high": POSITIVE,
    "value_clip_range": POSITIVE,
    "vf_coef": RATE,
    "ent_coef": RATE,
    "target_kl": RATE,
    "critic_warmup_steps": (-1,),
    "critic_warmup_epochs": COUNT,
    "step_zero_tolerance": POSITIVE,
    "learning_rate": RATE,
    "critic_learning_rate": POSITIVE,
    "lr_scheduler_type": ("cosin",),
    "warmup_steps": (-1,),
    "weight_decay": RATE,
    "adam_beta1": (-0.1, 1.0, NAN),
    "adam_beta2": (-0.1, 1.0, NAN),
    "adam_epsilon": POSITIVE,
    "max_grad_norm": POSITIVE,
    "logging_steps": COUNT,
    "eval_steps": COUNT,
    "eval_completions": COUNT,
    "save_steps": COUNT,
    "save_total_limit": (0, 1),
    "log_completions": (-1,),
}
# Any text, any list and any bool is acceptable; reward_weights are checked with the reward functions they belong to, token
# ids with the model's vocabulary.
FREE = {"output_dir", "resume_from_checkpoint", "use_cpu", "bf16", "gradient_checkpointing", "shuffle_dataset",
        "trust_remote_code", "cuda_graphs", "whiten_advantages", "reward_weights", "report_to", "run_name", "disable_tqdm",
        "suppress_tokens", "bad_words_ids", "stop_token_ids", "stop_strings",
        "metric_for_best_model", "greater_is_better"}  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(PPOConfig) if f.name not in REPLACED}


def test_every_setting_with_a_range_is_tested():
    assert set(BAD) | FREE == set(FIELDS)


def refusal(error, name, value):
    """The message with which a setting is refused; empty if it is not."""
    try:
        PPOConfig(**{name: value})
    except error as refused:
        return str(refused)
    return ""


def test_a_bad_value_is_refused_with_its_name_and_itself():
    cases = [(name, value) for name, values in BAD.items() for value in values]
    assert len(cases) > 100
    assert not [(n, v) for n, v in cases if f"{n}={v!r}" not in refusal(ValueError, n, v)]


def test_a_value_of_the_wrong_kind_is_refused_with_its_name():
    messages = {name: refusal(TypeError, name, object()) for name in FIELDS}
    assert not [n for n, text in messages.items() if not re.search(rf"{n}=.* is a object; expected", text)]


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": "1e-5"}, {"max_steps": 10.0}, {"seed": True}, {"report_to": "wandb"}, {"gamma": None},
        {"suppress_tokens": ["a"]}, {"stop_token_ids": [1.0]}, {"stop_token_ids": 5}, {"stop_strings": "end"},
        {"stop_strings": [False]}, {"reward_weights": [True]}, {"bad_words_ids": [3]}, {"bad_words_ids": ["word"]},
    ],
)  # fmt: skip
def test_text_is_no_number_and_a_bool_is_no_count(settings):
    with pytest.raises(TypeError, match=next(iter(settings))):
        PPOConfig(**settings)


def test_whole_numbers_are_fractions_too():
    assert PPOConfig(kl_coef=0, gamma=1, temperature=1).kl_coef == 0


def test_a_misspelled_choice_gets_a_suggestion():
    with pytest.raises(
        ValueError, match=r"estimator='rewards_togo' is not one of gae, .*Did you mean 'rewards_to_go'\?"
    ):
        PPOConfig(estimator="rewards_togo")


WHOLE = {"ppo_epochs": 1, "minibatch_size": 64}
NO_CRITIC = {"estimator": "rewards_to_go", "baseline": "batch_mean"}
# What makes no sense together, and the start of what is said of it; docs/notes.md has the same table ("Legal pairs").
CONTRADICTIONS = [
    ({"baseline": "batch_mean"}, "estimator='gae' needs a critic"),
    ({"estimator": "rewards_to_go", "baseline": "leave_one_out"}, "baseline='leave_one_out' compares completions"),
    (NO_CRITIC | {"truncation": "bootstrap"}, "truncation='bootstrap' needs a critic"),
    ({"estimator": "total_return", "truncation": "bootstrap"}, "truncation='bootstrap' adds a value to later rewards"),
    ({"estimator": "immediate_rewards", "truncation": "bootstrap"}, "truncation='bootstrap' adds a value"),
    (NO_CRITIC | {"critic_warmup_steps": 1}, "critic_warmup_steps and critic_epochs need a critic"),
    (NO_CRITIC | {"critic_epochs": 2}, "critic_warmup_steps and critic_epochs need a critic"),
    ({"estimator": "rewards_to_go", "critic_lam": 1.0}, "critic_lam and adaptive_lam_alpha are GAE's"),
    ({"estimator": "rewards_to_go", "adaptive_lam_alpha": 0.1}, "critic_lam and adaptive_lam_alpha are GAE's"),
    ({"adaptive_lam_alpha": 0.05}, "adaptive_lam_alpha=0.05 raises lam for long completions, and lam=1 cannot be"),
    (
        {"kl_form": "k1_end", "gamma": 0.99},
        "kl_form='k1_end' has the KL of all tokens paid with the last one, which gamma=0.99",
    ),
    ({"kl_form": "k1_end", "truncation": "bootstrap"}, "kl_form='k1_end' has the KL paid with the last token"),
    ({"kl_form": "k1_end", "estimator": "immediate_rewards"}, "kl_form='k1_end' has the KL of all tokens paid"),
    ({"objective": "policy_gradient"}, "objective='policy_gradient' is valid for one step per rollout only"),
    ({"objective": "policy_gradient", "ppo_epochs": 1}, "objective='policy_gradient' is valid for one step"),
    ({"objective": "trpo", "ent_coef": 0.1}, "objective='trpo' takes one step within trpo_max_kl"),
    ({"objective": "trpo", "target_kl": 0.1}, "objective='trpo' takes one step within trpo_max_kl"),
    ({"objective": "trpo", "kl_form": "exact_both"}, "objective='trpo' takes one step"),
    ({"objective": "trpo", "bf16": True}, "objective='trpo' measures KLs that are smaller than the rounding"),
    ({"objective": "trpo", "gradient_checkpointing": True}, "objective='trpo' differentiates twice"),
    (
        WHOLE | {"objective": "policy_gradient", "target_kl": 0.1},
        "objective='policy_gradient' takes its one step at KL",
    ),
    ({"critic_warmup_epochs": 2}, "critic_warmup_epochs and critic_warmup_explained_variance need"),
    ({"critic_warmup_explained_variance": 0.3}, "critic_warmup_epochs and critic_warmup_explained_variance need"),
    ({"metric_for_best_model": "reward"}, "metric_for_best_model='reward' needs evaluations: set eval_steps"),
    ({"greater_is_better": False}, "greater_is_better=False says how to compare a metric: set metric_for_best_model"),
    ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 adapts kl_coef by factors"),
    ({"dual_clip": 3.0, "objective": "kl_penalty"}, "dual_clip belongs to objective='clip'"),
    ({"bad_words_ids": [[3], [4, 5], []]}, r"bad_words_ids has \[4, 5\], \[\]: each word must be one token id"),
    ({"stop_strings": ["a", ""]}, "stop_strings has an empty string"),
    ({"min_new_tokens": 9, "max_completion_length": 8}, "min_new_tokens=9 is above max_completion_length=8"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PPOConfig(**settings)


def all_contradictions(config):
    """Whether each contradiction is there, of every part, by the part and its place in it."""
    parts = [part for part in PPOConfig.__mro__ if "contradictions" in vars(part)]
    return {(part.__name__, i): wrong for part in parts for i, (wrong, _) in enumerate(part.contradictions(config))}


def test_every_refusal_is_tested():
    fired = set()
    for settings, _ in CONTRADICTIONS:
        unchecked = object.__new__(PPOConfig)
        unchecked.__dict__.update(PPOConfig().to_dict() | settings)
        fired |= {name for name, wrong in all_contradictions(unchecked).items() if wrong}
    assert set(all_contradictions(PPOConfig())) - fired <= SIZES


# Sizes that do not divide have a test of their own.
SIZES = {("PPOConfig", 0), ("PPOConfig", 1)}


def test_a_part_can_be_made_by_itself_and_checks_itself():
    part = EstimatorSettings(estimator="rewards_to_go", baseline="none")
    assert not part.uses_critic and not hasattr(part, "learning_rate")
    with pytest.raises(ValueError, match="estimator='gae' needs a critic"):
        EstimatorSettings(baseline="none")
    with pytest.raises(ValueError, match="gamma=2 must be within"):
        EstimatorSettings(gamma=2)
    assert isinstance(PPOConfig(), EstimatorSettings)


def test_it_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().seed = 3


def test_two_configurations_share_no_list():
    assert PPOConfig().report_to is not PPOConfig().report_to


@pytest.mark.parametrize(
    "settings, culprit, hint",
    [
        ({"rollout_batch_size": 64, "minibatch_size": 64}, "rollout_batch_size=64", "try 63"),
        ({"rollout_batch_size": 48, "minibatch_size": 16}, "minibatch_size=16", "try 15"),
        ({"rollout_batch_size": 6, "minibatch_size": 6, "eval_completions": 2}, "eval_completions=2", "try 3"),
    ],
)
def test_sizes_that_do_not_divide_over_the_processes_are_refused(settings, culprit, hint):
    config = PPOConfig(**settings)
    config.check_processes(1)
    with pytest.raises(ValueError, match=rf"{culprit} .* multiple of their number, 3: {hint}"):
        config.check_processes(3)


def test_without_an_evaluation_set_its_completions_need_not_divide():
    PPOConfig(rollout_batch_size=6, minibatch_size=6, eval_completions=2).check_processes(3, evaluates=False)


def read_settings():
    """Attribute names read from anything called args or config, in lmppo outside config.py."""
    read = set()
    for path in Path(lmppo.__file__).parent.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
                if owner in ("args", "config"):
                    read.add(node.attr)
    return read


def test_every_setting_is_read_somewhere():
    """torchtune and TRL ship settings that nothing reads. (test_trainer.py turns each one and sees the run change.)"""
    assert not set(FIELDS) - read_settings()


def test_every_setting_has_a_help_text():
    assert all(f.metadata.get("help") for f in FIELDS.values())


def parse(tmp_path, yaml, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    return TrlParser(PPOConfig).parse_args_and_config(args=["--config", str(path), *flags])[0]


def test_yaml_and_flags(tmp_path):
    yaml = "learning_rate: 1e-5\nmax_steps: 7\nreport_to: [tensorboard]\nvalue_clip_range: null\nseed: 1\n"
    config = parse(tmp_path, yaml, "--seed", "3", "--reward_weights", "1", "0.5", "--whiten_advantages", "false")
    assert config == PPOConfig(
        learning_rate=1e-5, max_steps=7, report_to=["tensorboard"], value_clip_range=None, seed=3,
        reward_weights=[1.0, 0.5], whiten_advantages=False,
    )  # fmt: skip


def test_what_is_forbidden_and_what_ends_in_yaml_and_flags(tmp_path):
    yaml = 'bad_words_ids: [[3], [4]]\nstop_strings: ["\\n", "Human:"]\nstop_token_ids: null\nmin_new_tokens: 4\n'
    config = parse(tmp_path, yaml, "--suppress_tokens", "5", "6", "--min_new_tokens", "2")
    assert config == PPOConfig(
        bad_words_ids=[[3], [4]], stop_strings=["\n", "Human:"], suppress_tokens=[5, 6], min_new_tokens=2
    )
    assert parse(tmp_path, "seed: 1\n", "--stop_strings", "a b", "c").stop_strings == ["a b", "c"]


@pytest.mark.parametrize("written, meant", [("auto", "auto"), ("true", True), ("some/where", "some/where")])
def test_resume_from_checkpoint_in_yaml(tmp_path, written, meant):
    assert parse(tmp_path, f"resume_from_checkpoint: {written}\n").resume_from_checkpoint == meant


def test_an_unknown_key_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="learning_rat"):
        parse(tmp_path, "learning_rat: 1e-5\n")
    with pytest.raises(ValueError, match="learning_rat2"):
        parse(tmp_path, "seed: 1\n", "--learning_rat2", "1e-5")


def test_bad_yaml_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        parse(tmp_path, "gamma: 1.5\n")


# --- the KL penalty's form -------------------------------------------------------------------------------------------

PLACES = {"reward": (True, False), "end": (True, False), "loss": (False, True), "both": (True, True)}


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", KL_FORMS)
def test_a_form_is_an_estimator_and_a_place(form):
    measure, place = form.split("_")
    config = PPOConfig(kl_form=form, kl_coef=0.1)
    assert config.kl_measure == measure and measure in ("k1", "k2", "k3", "exact")
    assert (config.kl_in_reward, config.kl_in_loss) == PLACES[place]
    free = PPOConfig(kl_form=form, kl_coef=0.0)
    assert (free.kl_in_reward, free.kl_in_loss) == (PLACES[place][0], False), "at no price it is no term of the loss"


def test_the_default_form_has_the_name_none(tmp_path):
    assert PPOConfig(kl_form="none").kl_form is None and PPOConfig().kl_form is None
    assert parse(tmp_path, "kl_form: none\n").kl_form is None
    assert parse(tmp_path, "kl_form: k1_reward\n", "--kl_form", "none").kl_form is None
    with pytest.raises(ValueError, match="estimator='none' is not one of"):
        PPOConfig(estimator="none")


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("k2_loss", "the KL of later states is left out"),
        ("k3_loss", "the other direction"),
        ("exact_loss", "the KL of later states is left out: use 'exact_both'"),
    ],
)
def test_a_biased_form_warns_and_says_why(form, reason):
    with pytest.warns(UserWarning, match=f"kl_form='{form}' has a biased gradient: .*{reason}") as caught:
        PPOConfig(kl_form=form)
    assert "Unbiased: k1_reward, k1_end, k3_both, exact_both." in str(caught[0].message)
    assert caught[0].filename == __file__, "the line that made the configuration"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", KL_FORMS)
def test_other_forms_do_not_warn_and_none_does_at_no_price(form):
    PPOConfig(kl_form=form, kl_coef=0.0 if form.endswith("_loss") else 0.1)


# Old pairs of kl_estimator and kl_placement that no form continues: the form to use, and why (test_exact_kl proves it).
DROPPED = {
    ("k2", "reward"): ("k1_reward", r"E\[k2\] is not the KL"),
    ("k3", "reward"): ("k3_both", "lacks the gradient by which k3 itself depends on the policy"),
    ("exact", "reward"): ("exact_both", "only a baseline in the reward"),
    ("k1", "loss"): ("k1_reward", "the expected gradient of k1 in the loss is 0"),
    ("k1", "both"): ("k1_reward", "k1 in the loss adds only noise"),
    ("k2", "both"): ("exact_both", "k2 in the reward is biased"),
}
PAIRS = list(itertools.product(("k1", "k2", "k3", "exact"), ("reward", "loss", "both")))


@pytest.mark.parametrize(("estimator", "place"), PAIRS)
def test_each_old_pair_is_refused_with_the_form_to_use(estimator, place):
    form, why = DROPPED.get((estimator, place), (f"{estimator}_{place}", None))
    assert form in KL_FORMS
    message = f"^kl_estimator='{estimator}', kl_placement='{place}': kl_form has replaced .* set kl_form='{form}'"
    with pytest.raises(ValueError, match=message + (r"\.$" if why is None else f": .*{why}")):
        PPOConfig(kl_estimator=estimator, kl_placement=place)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"kl_estimator": "k1"}, "k1_reward"),
        ({"kl_estimator": "k3"}, "k3_both"),
        ({"kl_placement": "reward"}, "k1_reward"),
        ({"kl_placement": "both"}, "k1_reward"),
    ],
)
def test_one_of_the_two_is_read_with_the_others_old_default(settings, form):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"^{name}='{value}': kl_form has replaced .* set kl_form='{form}'"):
        PPOConfig(**settings)


@pytest.mark.parametrize("settings", [{"kl_estimator": "k4"}, {"kl_placement": 3}, {"kl_estimator": ""}])
def test_what_never_was_a_pair_is_refused_too(settings):
    with pytest.raises(ValueError, match="kl_form has replaced kl_estimator and kl_placement; set kl_form"):
        PPOConfig(**settings)


def test_files_and_flags_with_the_old_names_get_that_error(tmp_path):
    for yaml, flags in (
        ("kl_estimator: exact\nkl_placement: both\n", ()),
        ("seed: 1\n", ("--kl_estimator", "exact", "--kl_placement", "both")),
        ("kl_estimator: exact\n", ("--kl_placement=both",)),
    ):
        with pytest.raises(ValueError, match="kl_form has replaced .* set kl_form='exact_both'"):
            parse(tmp_path, yaml, *flags)
    assert parse(tmp_path, "kl_form: exact_both\n").kl_form == "exact_both"
    assert parse(tmp_path, "seed: 1\n", "--kl_form", "k3_both").kl_form == "k3_both"


def test_the_old_names_are_shown_nowhere():
    text = TrlParser(PPOConfig).format_help()
    assert "--kl_form" in text
    for name in REPLACED:
        assert name in {f.name for f in dataclasses.fields(PPOConfig)}
        assert name not in text and name not in PPOConfig().to_dict() and name not in repr(PPOConfig())
