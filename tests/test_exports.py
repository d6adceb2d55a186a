"""What is exported is the policy; what cannot be exported is found out before the first step."""

import copy
import json
from pathlib import Path

import pytest
import torch
from builders import (
    assert_same,
    count_a,
    critic_of,
    gpt2,
    llama,
    lora,
    make_trainer,
    optimizer_state,
    trained,
    weights,
)
from fakes import letter_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_references import CASES
from transformers import AutoModelForCausalLM

from lmppo.models import ActorCritic
from lmppo.models.activations import use_fused_gelu
from lmppo.models.adapters import copy_to, merge_adapter
from lmppo.run.checkpoint import checkpoint_dir, load_checkpoint, optimizer_tensors, save_checkpoint
from lmppo.run.directory import discard_unsaved
from lmppo.run.export import ExportError, compare_export, old_of

STREAMS = [{"name": "a", "reward_funcs": [count_a]}, {"name": "b", "reward_funcs": [count_a]}]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
# One of each kind; the sums are the same for the others.
KINDS = [
    "bias all", "dora", "tied head", "tied embedding", "modules_to_save", "token rows", "ia3", "vera", "starts at random",
    "half frozen", "norms beside an adapter", "adapter with another name",
]  # fmt: skip


def logits(model):
    """By the activation functions of the policy that is trained, so that its weights alone decide about every bit."""
    use_fused_gelu(model)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", KINDS)
def test_export_and_checkpoint_hold_all_that_is_trained(name, tmp_path):
    model, peft_config = CASES[name][0]()
    plain = copy.deepcopy(model) if peft_config is not None else None
    trainer = trained(tmp_path / "a", model=model, peft_config=peft_config, max_steps=1, learning_rate=3e-2)
    final, live = tmp_path / "a" / "final", logits(trainer.actor_critic.policy)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(final)), live, atol=5e-6, rtol=1e-5)
    if plain is not None:
        assert (live - logits(plain)).abs().max() > 0.01, "it has learned something"
        assert torch.equal(logits(PeftModel.from_pretrained(plain, final / "adapter")), live)
    model, peft_config = CASES[name][0]()
    fresh = make_trainer(tmp_path / "b", model=model, peft_config=peft_config, seed=9)
    load_checkpoint(checkpoint_dir(tmp_path / "a", 1), fresh.actor_critic, fresh.optimizer.optimizer)
    assert_same(weights(fresh), weights(trainer))
    assert_same(optimizer_state(fresh), optimizer_state(trainer))
    assert torch.equal(logits(fresh.actor_critic.policy), live)


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_what_is_merged_into_a_shared_weight_is_untied(target, tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn", target], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = trained(tmp_path, peft_config=config, max_steps=1)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["tie_word_embeddings"] is False
    base = trainer.actor_critic.policy.get_base_model()
    assert base.config.tie_word_embeddings, "the policy itself stays tied"
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


def test_weights_beside_an_adapter_are_in_the_merged_model_alone(tmp_path, capsys):
    trained(tmp_path, model=CASES["norms beside an adapter"][0]()[0], max_steps=1)
    assert "Export: the merged model alone; the adapter by itself lacks base_model.model.transformer.h.0.ln_1" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "final" / "adapter").exists()
    beside = load_file(checkpoint_dir(tmp_path, 1) / "policy" / "trained_beside.safetensors")
    assert beside and all("ln_" in name for name in beside)


def unmergeable():
    return LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")  # the base has no bias


def test_an_adapter_that_cannot_be_merged_is_exported_alone_and_said_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path, model=llama(), peft_config=unmergeable(), max_steps=1)
    assert "Export: the adapter alone, in adapter/; it cannot be merged, as peft says:" in capsys.readouterr().out
    trainer.train()
    final = tmp_path / "final"
    assert not (final / "config.json").exists() and (final / "value_head.safetensors").exists()
    adapted = PeftModel.from_pretrained(llama(), final / "adapter")
    assert torch.equal(logits(adapted), logits(trainer.actor_critic.policy))


def test_what_nothing_could_hold_is_refused(tmp_path):
    model = get_peft_model(llama(), unmergeable())
    model.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Nothing could be exported: .*lacks base_model\.model\.model\.norm\.weight"):
        make_trainer(tmp_path, model=model)


def test_an_adapter_on_a_merged_one_is_in_the_merged_model_alone(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "base")
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(init_lora_weights=False))
    first.save_pretrained(tmp_path / "first")
    trainer = trained(tmp_path / "run", model=str(tmp_path / "first"), peft_config=lora(), max_steps=1)
    assert "lacks the adapter '" in capsys.readouterr().out
    assert not (tmp_path / "run" / "final" / "adapter").exists()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    torch.testing.assert_close(logits(final), logits(trainer.actor_critic.policy), atol=5e-6, rtol=1e-5)


def test_a_copy_for_the_export_takes_nothing_where_the_policy_is():
    policy = get_peft_model(gpt2(), lora())
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    away = copy_to(policy, "meta")
    assert {t.device.type for t in [*away.parameters(), *away.buffers()]} == {"meta"}
    merge_adapter(copy_to(policy, "cpu"))
    assert_same(dict(policy.state_dict()), before)


# --- found out when the trainer is built -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_generation_config_that_cannot_be_saved_is_refused(tmp_path, kind):
    model = gpt2()
    model.generation_config.temperature = 0.9  # as Llama-2-chat was published: without do_sample
    with pytest.raises(ValueError, match=r"model\.generation_config cannot be saved.*temperature.*before the trainer"):
        make_trainer(tmp_path, model=model, peft_config=lora() if kind == "lora" else None)
    model.generation_config.do_sample = True
    make_trainer(tmp_path, model=model if kind == "full" else gpt2())


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path, monkeypatch):
    tokenizer = letter_tokenizer()

    def fail(*args, **kwargs):
        raise NotImplementedError("no files")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(ValueError, match="processing_class cannot be saved.*no files Correct the tokenizer before"):
        make_trainer(tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_model_of_a_short_context_is_compared_within_it(tmp_path, peft_config):
    rows = [{"prompt": "ab"}]
    short = gpt2(n_positions=8)
    trainer = trained(tmp_path, model=short, peft_config=peft_config, dataset=rows, max_completion_length=6)
    assert compare_export(trainer.actor_critic.policy, tmp_path / "final") == ""


# --- compared with the policy ----------------------------------------------------------------------------------------


def damaged(auto_class, name):
    model = auto_class.from_pretrained(name)
    model.get_output_embeddings().weight.data[3] *= 1.1
    return model


def test_an_export_that_is_not_the_policy_is_not_kept(tmp_path, monkeypatch):
    trainer = trained(tmp_path, max_steps=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}
    monkeypatch.setattr("lmppo.run.export.load_weights", damaged)
    trainer.step()
    with pytest.raises(ExportError, match=r"differs from the policy by up to .* nats .*checkpoint holds the trained"):
        trainer.save_model(tmp_path / "final")
    assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before


def test_of_a_merged_export_that_is_not_the_policy_the_adapter_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmppo.run.export.load_weights", damaged)
    trainer = trained(tmp_path, peft_config=lora(), max_steps=1)
    assert "The adapter alone is exported, in adapter/." in capsys.readouterr().out
    assert not (tmp_path / "final" / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(gpt2(), tmp_path / "final" / "adapter")
    assert torch.equal(logits(adapted), logits(trainer.actor_critic.policy))


# --- the place of an earlier export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [1, 2])
def test_an_export_is_never_torn(tmp_path, monkeypatch, failing):
    """Stopped at any moment, ``final/`` is the old one or the new one, or is put back by the next start."""
    trainer = trained(tmp_path, max_steps=1)
    final = tmp_path / "final"
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    trainer.step()
    rename, calls = Path.rename, []

    def stop(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(final)
    monkeypatch.undo()
    assert final.exists() != old_of(final).exists()
    discard_unsaved(tmp_path)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    trainer.save_model(final)
    assert (final / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert {path.name for path in final.iterdir()} == set(before)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "final", "metrics.jsonl", "run_config.yaml"}


@pytest.mark.parametrize("own_file", [False, True])
def test_what_an_earlier_export_left_and_this_one_has_not_is_gone(tmp_path, own_file):
    final = tmp_path / "final"
    make_trainer(tmp_path / "a", critic=critic_of(), peft_config=lora()).save_model(final)
    assert (final / "critic").is_dir() and (final / "adapter").is_dir()
    if own_file:
        (final / "notes.txt").write_text("mine")
    make_trainer(tmp_path / "b").save_model(final)
    assert not (final / "critic").exists() and not (final / "adapter").exists()
    assert (final / "value_head.safetensors").exists() and (final / "notes.txt").exists() == own_file
    assert not list(tmp_path.glob(".*"))


# --- compiled models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_run_goes_on_with_and_without_compilation(tmp_path, monkeypatch, compiled_first):
    """torch.compile puts ``_orig_mod`` into the names of weights."""
    for step, compiled in ((1, compiled_first), (2, not compiled_first)):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER" if compiled else "NO")
        trainer = trained(tmp_path / "run", max_steps=step, resume_from_checkpoint="auto")
        assert trainer.state.global_step == step
    names = [*load_file(checkpoint_dir(tmp_path / "run", 2) / "optimizer.safetensors")]
    assert names and not any("_orig_mod" in name for name in names)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    whole = trained(tmp_path / "whole", max_steps=2)
    ours, theirs = optimizer_state(whole), optimizer_state(trainer)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-3, msg=name)  # compiled sums round anew


def test_names_in_files_do_not_depend_on_compiling(tmp_path):
    model = torch.compile(ActorCritic(gpt2()), backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path / "step-000001", model, optimizer, {"step": 1}, letter_tokenizer())
    plain = ActorCritic(gpt2(seed=1))
    fresh = torch.optim.AdamW(plain.parameters())
    load_checkpoint(tmp_path / "step-000001", plain, fresh)
    assert_same(optimizer_tensors(plain, fresh), optimizer_tensors(model, optimizer))
    assert_same(dict(plain.policy.state_dict()), dict(model.policy.state_dict()))


# --- staged training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    """What runs with a value head, with a critic of its own, and with an adapter have exported."""
    root = tmp_path_factory.mktemp("finals")
    gpt2().save_pretrained(root / "base")
    for name, rest in {"head": {}, "critic": {"critic": critic_of()}, "adapter": {"peft_config": lora()}}.items():
        trained(root / name, max_steps=1, critic_learning_rate=3e-2, model=str(root / "base"), **rest)
    return {name: root / name / "final" for name in ("head", "critic", "adapter")}


@pytest.mark.parametrize("place", ["head", "adapter", "adapter/adapter"])
def test_a_value_head_is_taken_over(finals, tmp_path, capsys, place):
    name, _, within = place.partition("/")
    trainer = make_trainer(tmp_path, model=str(finals[name] / within))
    saved = load_file(finals[name] / "value_head.safetensors")
    assert saved["weight"].abs().max() > 0
    assert_same(dict(trainer.actor_critic.value_head.state_dict()), saved)
    assert "Critic: the value head is taken over from " in capsys.readouterr().out


def test_a_critic_of_its_own_is_taken_over(finals, tmp_path, capsys):
    trainer = make_trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(finals["critic"]))
    saved = load_file(finals["critic"] / "critic" / "model.safetensors")
    own = trainer.actor_critic.critic.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())
    assert "Critic: taken over from " in capsys.readouterr().out


def test_a_critic_that_is_named_wins(finals, tmp_path, capsys):
    named = critic_of(seed=7)
    trainer = make_trainer(tmp_path, model=str(finals["critic"]), critic=named)
    assert_same(dict(trainer.actor_critic.critic.state_dict()), dict(named.state_dict()))
    assert "taken over" not in capsys.readouterr().out


def test_what_does_not_fit_is_not_taken_over_and_a_line_says_why(finals, tmp_path, capsys):
    for name, why in (("head", "does not fit: {'"), ("critic", "does not fit. critic '")):
        trainer = make_trainer(tmp_path / name, model=str(finals[name]), reward_streams=STREAMS)
        assert trainer.actor_critic.value_head.weight.eq(0).all()
        out = capsys.readouterr().out
        assert "Critic: a new value head, as the " in out and why in out


def test_without_a_critic_nothing_is_taken_over(finals, tmp_path, capsys):
    settings = {"estimator": "rewards_to_go", "baseline": "none", "truncation": "mask"}
    trainer = make_trainer(tmp_path, model=str(finals["critic"]), **settings)
    assert trainer.actor_critic.critic is None and "Critic" not in capsys.readouterr().out
