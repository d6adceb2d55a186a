"""A critic that is an adapter on the policy's base: it learns as a separate model does, and no weight is there twice."""

import copy
import re
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from builders import (
    MODELS,
    PROMPTS,
    alone,
    assert_same,
    gpt2,
    llama,
    make_config,
    make_experience,
    make_samples,
    make_trainer,
    metrics_rows,
    trained,
    weights,
    with_values,
)
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmppo.loss import Penalties
from lmppo.models import ActorCritic, load_policy, lora_critic, score_values
from lmppo.models.language_model import freeze_lower_layers
from lmppo.models.lora_critic import with_lora_critic
from lmppo.models.recomputation import prepare_recomputation
from lmppo.run.checkpoint import CheckpointError, checkpoint_dir
from lmppo.update import accumulate_gradients, critic_update

TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
CLOSE = {"atol": 2e-6, "rtol": 1e-4}


def lora(family="gpt2", **kwargs):
    return LoraConfig(**({"r": 2, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | kwargs))


def adapters_of(model):
    return [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]


def build(family="gpt2", num_layers_unfrozen=None, **kwargs):
    """A policy and a LoRA critic, whose adapters do something, and not the same."""
    policy = load_policy(MODELS[family](), lora(family, **kwargs))
    if num_layers_unfrozen is not None:
        freeze_lower_layers(policy, num_layers_unfrozen)
    model = with_values(with_lora_critic(policy, num_layers_unfrozen=num_layers_unfrozen))
    torch.manual_seed(3)
    for parameter in adapters_of(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def values_alone(critic, head, samples):
    """Each row's values by the plain model: no padding, no masks, no positions given."""
    for row in range(len(samples)):
        prompt = alone(samples.tokens.prompt_ids, samples.tokens.prompt_mask, row)
        completion = alone(samples.tokens.completion_ids, samples.completion_mask, row)
        hidden = critic(input_ids=torch.cat([prompt, completion])[None], output_hidden_states=True).hidden_states[-1]
        yield (hidden[0] @ head.weight.T + head.bias)[len(prompt) - 1 :]


def storage(model, *, trained=None):
    return {p.data_ptr() for p in model.parameters() if trained is None or p.requires_grad == trained}


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_values_are_those_of_each_row_read_alone_by_a_separate_model(family):
    model = build(family)
    critic, head = copy.deepcopy(model.critic), copy.deepcopy(model.value_head)
    samples = make_samples(model)
    scored, last = score_values(model, samples, 2), model.last_values(samples.tokens)
    assert torch.equal(samples.values, score_values(model, samples, len(PROMPTS)))
    with torch.no_grad():
        for row, expected in enumerate(values_alone(critic, head, samples)):
            torch.testing.assert_close(scored[row, : len(expected) - 1], expected[:-1], **CLOSE)
            torch.testing.assert_close(last[row], expected[-1], **CLOSE)
    with torch.no_grad():
        for parameter in adapters_of(model.policy):
            parameter.zero_()
    assert torch.equal(score_values(model, samples, 2), scored), "the policy's adapter has no part in it"


def test_it_starts_as_the_base_at_zero_whatever_the_policys_adapter_has_learned():
    policy = load_policy(gpt2(), lora(init_lora_weights=False))
    model = with_lora_critic(policy, n_streams=3)
    samples = make_samples(model)
    assert samples.values.shape[-1] == 3 and samples.values.eq(0).all()
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        assert not torch.allclose(policy(ids).logits, gpt2().eval()(ids).logits, atol=1e-2)
        torch.testing.assert_close(model.critic(ids).logits, gpt2().eval()(ids).logits)
    ours, theirs = (m.peft_config["default"].to_dict() for m in (model.critic, policy))
    assert {name for name in ours if ours[name] != theirs[name]} == {"init_lora_weights"}


@pytest.mark.parametrize("n_rows", [8, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_those_of_two_separate_models(family, checkpointing, n_rows, tmp_path):
    model = build(family)
    policy, critic, head = (copy.deepcopy(m) for m in (model.policy, model.critic, model.value_head))
    experience = make_experience(make_samples(model))
    config = make_config(
        tmp_path, micro_batch_size=n_rows, gradient_checkpointing=checkpointing, value_clip_range=None, ent_coef=0.1
    )
    prepare_recomputation(model, config)
    accelerator = Accelerator(cpu=True)
    accumulate_gradients(model, experience, config, accelerator, Penalties())
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    accumulate_gradients(ActorCritic(policy), experience, config, accelerator, Penalties(), heads=["logits"])
    total = torch.zeros(())
    for row, values in enumerate(values_alone(critic, head, experience)):
        total = total + 0.5 * (values[:-1, 0] - experience.returns[row, : len(values) - 1, 0]).pow(2).sum()
    (config.vf_coef * total / experience.completion_mask.sum()).backward()
    parts = {"policy": policy, "critic": critic, "value_head": head}
    theirs = {f"{part}.{n}": p.grad for part, m in parts.items() for n, p in m.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(ours[name], gradient, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def separate(model, copied=()):
    """In place of a view: a model that shares nothing."""
    return copy.deepcopy(model).requires_grad_(False).eval()


RUNS = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True, "micro_batch_size": 2},
    "warm-up, own passes": {"critic_warmup_steps": 1, "critic_epochs": 3, "critic_learning_rate": 3e-2},
    "trpo": {"objective": "trpo", "trpo_max_kl": 0.02, "trpo_damping": 1.0, "trpo_cg_steps": 3},
    "bootstrap, exact KL": {"truncation": "bootstrap", "kl_form": "exact_both", "max_grad_norm": 0.05},
    "top layer": {"num_layers_unfrozen": 1, "peft_config": {"layers_to_transform": [1]}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_a_separate_model_to_the_bit(name, tmp_path, monkeypatch):
    settings = {
        "critic": "lora",
        "max_steps": 3,
        **RUNS[name],
        "peft_config": lora(**RUNS[name].get("peft_config", {})),
    }
    ours = trained(tmp_path / "ours", **settings)
    base = storage(ours.actor_critic.policy)
    trained_by_critic = storage(ours.actor_critic.critic, trained=True)
    biases = {p.data_ptr() for n, p in ours.actor_critic.critic.named_parameters() if "bias" in n}
    assert storage(ours.actor_critic.critic) - base == trained_by_critic | biases, "all else is shared"
    assert storage(ours.reference.model) <= base and not storage(ours.reference.model) & trained_by_critic
    monkeypatch.setattr(lora_critic, "frozen_view", separate)
    theirs = trained(tmp_path / "theirs", **settings)
    assert not storage(theirs.actor_critic.critic) & storage(theirs.actor_critic.policy)
    assert metrics_rows(tmp_path / "ours") == metrics_rows(tmp_path / "theirs")
    assert_same(weights(ours), weights(theirs))
    rows = metrics_rows(tmp_path / "ours")
    assert all(row["critic/grad_norm"] > 0 for row in rows) and rows[0]["value/mean"] == 0 != rows[1]["value/mean"]


def test_only_the_top_layers_are_read_again_where_the_others_are_frozen():
    model = build("llama", num_layers_unfrozen=1, layers_to_transform=[1])
    assert all(".layers.1." in name for name, p in model.critic.named_parameters() if p.requires_grad)
    tokens = make_samples(model).tokens
    expected, last = model.values(tokens), model.last_values(tokens)
    below = copy.copy(tokens)
    object.__setattr__(below, "below", model.language_model.read_below(tokens))
    runs = []
    layer = model.critic.get_base_model().model.layers[0].self_attn
    layer.register_forward_hook(lambda *args: runs.append(1))
    torch.testing.assert_close(model.values(below), expected, **CLOSE)
    assert runs == []
    torch.testing.assert_close(
        model.last_values(below), last, **CLOSE
    )  # of which the lower layers have not read the last


# --- what learns -----------------------------------------------------------------------------------------------------

KINDS = {
    "biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "modules to save": {"modules_to_save": ["ln_f", "lm_head"]},
    "the embedding": {"target_modules": ["wte", "c_attn"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "the head": {"target_modules": ["lm_head", "c_attn"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "ranks": {"rank_pattern": {"c_proj": 4}, "alpha_pattern": {"c_proj": 1}},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_that_is_trained_is_shared(name, tmp_path):
    """The critic learns, and policy and reference stay; then the policy learns, and the critic and the reference stay."""
    trainer = make_trainer(tmp_path, critic="lora", peft_config=lora(**KINDS[name]))
    model = trainer.actor_critic
    assert not storage(model.critic, trained=True) & storage(model.policy)
    assert not storage(model.policy, trained=True) & storage(model.critic)
    reached = {n.rpartition("default")[0] or n for n, p in model.critic.named_parameters() if p.requires_grad}
    wanted = {n.rpartition("default")[0] or n for n, p in model.policy.named_parameters() if p.requires_grad}
    assert reached == {n for n in wanted if "lm_head" not in n}, "values do not depend on the language model's head"

    experience = make_experience(make_samples(model))
    update = partial(critic_update, trainer.model, trainer.optimizer, experience, trainer.args, trainer.accelerator)
    logits, values, ref = (f(experience.tokens) for f in (model.logits, model.values, trainer.reference.logits))
    update(iteration=0, epochs=3)
    assert torch.equal(model.logits(experience.tokens), logits) and not torch.equal(
        model.values(experience.tokens), values
    )
    values = model.values(experience.tokens)
    with torch.no_grad():
        for parameter in model.policy_parameters():
            parameter += 0.1
    assert torch.equal(model.values(experience.tokens), values) and not torch.equal(
        model.logits(experience.tokens), logits
    )
    assert torch.equal(trainer.reference.logits(experience.tokens), ref)


@pytest.mark.parametrize("name", ["biases", "modules to save", "the head", "dora"])
def test_runs_of_all_kinds_are_resumed_exactly(name, tmp_path):
    settings = {"critic": "lora", "peft_config": lora(**KINDS[name])}
    whole = trained(tmp_path / "whole", max_steps=3, **settings)
    trained(tmp_path / "parts", max_steps=2, **settings)
    parts = trained(tmp_path / "parts", max_steps=3, resume_from_checkpoint="true", **settings)
    assert_same(weights(parts), weights(whole))
    assert metrics_rows(tmp_path / "parts") == metrics_rows(tmp_path / "whole")


def test_weights_of_the_base_that_the_policy_trains_beside_its_adapter_are_copied(tmp_path):
    policy = get_peft_model(gpt2(), lora())
    policy.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    model = make_trainer(tmp_path, model=policy, critic="lora").actor_critic
    assert not storage(model.policy, trained=True) & storage(model.critic)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    gpt2().save_pretrained(root / "base")
    trainer = trained(
        root / "run", model=str(root / "base"), critic="lora", peft_config=lora(), critic_learning_rate=3e-2
    )
    return root / "run" / "final", trainer


def test_files_are_an_adapter_and_its_head(final):
    folder, trainer = final
    for place in (folder, checkpoint_dir(trainer.args.output_dir, 2)):
        assert not (place / "value_head.safetensors").exists()
        base = AutoModelForCausalLM.from_pretrained(folder.parent.parent / "base")
        critic = PeftModel.from_pretrained(base, place / "critic").eval()
        ids = torch.arange(1, 8)[None]
        with torch.no_grad():
            torch.testing.assert_close(critic(ids).logits, trainer.actor_critic.critic(ids).logits)
        head = load_file(place / "critic" / "value_head.safetensors")
        assert head["weight"].any() and torch.equal(head["weight"], trainer.actor_critic.value_head.weight)
    assert "critic: lora" in (folder.parent / "run_config.yaml").read_text().splitlines()


def test_a_run_goes_on_with_both_adapters(final, tmp_path, capsys):
    folder, trainer = final
    again = make_trainer(tmp_path, model=str(folder / "adapter"), critic="lora").actor_critic
    assert f"Critic: taken over from {folder / 'critic'}." in capsys.readouterr().out
    samples = make_samples(again)
    assert samples.values.any() and torch.equal(samples.values, trainer.actor_critic.values(samples.tokens))
    assert all(p.requires_grad for n, p in again.critic.named_parameters() if "lora" in n)


STREAMS = [{"name": n, "reward_funcs": [lambda completions, **kwargs: [0.0] * len(completions)]} for n in ("a", "b")]
OTHERS = {
    "merged": ("", {"peft_config": lora()}, "is an adapter on '.*base', and the policy's is on '.*final'. To go on"),
    "merged and adapted": (
        "adapter",
        {"peft_config": lora()},
        "and the policy's is on '.*base' with '.*' merged into it",
    ),
    "two streams": ("adapter", {"reward_streams": STREAMS}, "It has 1 outputs; expected 2"),
    "top layer": (
        "adapter",
        {"num_layers_unfrozen": 1, "peft_config": lora(layers_to_transform=[1])},
        "merged into it",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_not_taken_over_and_a_line_says_why(final, name, tmp_path, capsys):
    within, settings, why = OTHERS[name]
    model = make_trainer(tmp_path, model=str(final[0] / within), critic="lora", **settings).actor_critic
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Critic: ")]
    assert line.startswith(f"Critic: a new adapter, as the one in {final[0] / 'critic'} does not fit. ")
    assert re.search(why, line), line
    assert make_samples(model).values.eq(0).all()


def test_a_run_that_asks_for_no_critic_says_that_an_adapter_is_left_there(final, tmp_path, capsys):
    model = make_trainer(tmp_path, model=str(final[0])).actor_critic
    assert model.critic is None and model.value_head.weight.eq(0).all()
    assert "is an adapter, which critic='lora' takes over." in capsys.readouterr().out


def test_another_kind_of_critic_is_another_run(final):
    settings = {"model": str(final[0].parent.parent / "base"), "peft_config": lora(), "critic_learning_rate": 3e-2}
    with pytest.raises(CheckpointError, match="critic: was 'lora', now None"):
        trained(final[0].parent, resume_from_checkpoint="auto", **settings)


# --- what is refused -------------------------------------------------------------------------------------------------


def frozen_adapter(folder):
    get_peft_model(gpt2(), lora()).save_pretrained(folder)
    return PeftModel.from_pretrained(gpt2(), folder)


def test_policies_without_a_lora_adapter_are_refused(tmp_path):
    refused = partial(make_trainer, tmp_path / "run", critic="lora")
    with pytest.raises(ValueError, match=r"critic='lora' is .* the model has no adapter: give peft_config=LoraConfig"):
        refused()
    with pytest.raises(ValueError, match="the model's adapter is of the method LOHA: give peft_config=LoraConfig"):
        refused(model=llama(), peft_config=LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base weights"):
        refused(model=get_peft_model(gpt2(), lora(init_lora_weights="pissa")))
    with pytest.raises(ValueError, match="no trainable parameters. Load an adapter with .* is_trainable=True"):
        refused(model=frozen_adapter(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="baseline='none' uses no critic"):
        refused(peft_config=lora(), estimator="rewards_to_go", baseline="none", truncation="mask")
