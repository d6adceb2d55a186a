"""num_layers_unfrozen: the same numbers as a plain run in which the same weights are frozen, from fewer computations."""

import pytest
import torch
from builders import MODELS, VOCAB, assert_same, critic_of, gpt2, llama, lora, make_trainer, metrics_rows, weights
from transformers import BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from lmppo.models import LanguageModel, Reference, UnsupportedModelError

ENDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, initializer_range=0.2, **SIZES, **ENDS))


def opt():
    """Its embedding is narrower than its layers, with projections between."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=8, init_std=0.2, **SIZES, **ENDS))


def bloom():
    """A norm after the embedding, and biases of attention that are computed outside the layers."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=3, n_head=2, initializer_range=0.2, **ENDS))


FAMILIES = {**MODELS, "neox": neox, "opt": opt, "bloom": bloom}


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def frozen_by_hand(trainer_of, names):
    """The policy with all but some weights frozen by their flags, as a user would without the setting."""
    model = trainer_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


SETTINGS = {
    "value head": {},
    "own critic, bootstrap": {"critic": critic_of, "truncation": "bootstrap"},
    "exact KL": {"kl_form": "exact_both", "ent_coef": 0.1},
    "trpo": {"objective": "trpo", "trpo_cg_steps": 3, "trpo_damping": 1.0},
    "top-p, warm-up": {"top_p": 0.9, "critic_warmup_steps": 1},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_is_the_run_with_the_same_weights_frozen_by_hand(tmp_path, family, settings):
    rows, ends = [], []
    for name in ("setting", "by hand"):
        rest = {"adam_epsilon": 1e-3, **SETTINGS[settings]}
        rest |= {"critic": critic_of(family)} if "critic" in rest else {}
        if name == "setting":
            trainer = make_trainer(tmp_path / name, model=FAMILIES[family](), num_layers_unfrozen=1, **rest)
            names = trained_names(trainer.actor_critic.policy)
        else:
            trainer = make_trainer(tmp_path / name, model=frozen_by_hand(FAMILIES[family], names), **rest)
        trainer.train()
        rows.append(
            [{k: v for k, v in row.items() if k != "first_ratio_error"} for row in metrics_rows(tmp_path / name)]
        )
        ends.append(weights(trainer))
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_above_the_boundary_is_trained(tmp_path, family):
    model = FAMILIES[family]()
    n_layers = model.config.num_hidden_layers
    trainer = make_trainer(tmp_path, model=model, num_layers_unfrozen=1)
    names = trained_names(trainer.actor_critic.policy)
    top = {n for n, _ in model.named_parameters() if f".{n_layers - 1}." in n}
    assert top <= names
    assert not [n for n in names for i in range(n_layers - 1) if f".{i}." in n]
    assert model.get_input_embeddings().weight.requires_grad is False
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.requires_grad is not tied
    assert names - top, "the final norm at least"


def test_the_reference_shares_what_is_frozen_and_has_its_own_of_the_rest(tmp_path):
    trainer = make_trainer(tmp_path, model=llama(), num_layers_unfrozen=1)
    policy, reference = trainer.actor_critic.policy, dict(trainer.reference.model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (reference[name].data_ptr() == parameter.data_ptr()) is not parameter.requires_grad, name


@pytest.mark.parametrize("settings", [{}, {"num_generations": 2}, {"sample_batch_size": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_lower_layers_compute_is_taken_from_the_sampler(tmp_path, family, settings):
    """Of rows that end at different times, of prompts that are read once, of padded prompts: what they give of the row."""
    trainer = make_trainer(tmp_path, model=FAMILIES[family](), num_layers_unfrozen=1, **settings)
    trainer.run.open(None)
    trainer.step()
    tokens = trainer.last_step.experience.tokens
    language_model = trainer.actor_critic.language_model
    lengths = tokens.attention_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 1 and tokens.below.isfinite().all()
    expected = language_model.read_below(tokens)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(tokens.below[row, : n - 1], expected[row, : n - 1], atol=1e-5, rtol=1e-4)


def test_lower_layers_run_in_the_sampler_alone(tmp_path, monkeypatch):
    """For no reference, no old policy, no epoch and no micro-batch of the update."""
    trainer = make_trainer(tmp_path, model=gpt2(), num_layers_unfrozen=1, ppo_epochs=3, micro_batch_size=8)
    runs = {"policy": 0, "reference": 0}
    layers = {"policy": trainer.actor_critic.policy, "reference": trainer.reference.model}
    for name, model in layers.items():
        layer = model.transformer.h[0]
        layer.attn.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    sampled = []
    original = trainer.collector._sample
    monkeypatch.setattr(trainer.collector, "_sample", lambda *a: (original(*a), sampled.append(runs["policy"]))[0])
    trainer.run.open(None)
    trainer.step()
    assert runs == {"policy": sampled[0], "reference": 0} and sampled[0] > 0


def test_an_adapter_on_the_top_layers_is_right(tmp_path):
    rows = []
    for layers in ({}, {"num_layers_unfrozen": 1}):
        output = tmp_path / str(len(rows))
        adapter = lora(layers_to_transform=[1], layers_pattern="h")
        make_trainer(output, model=gpt2(), peft_config=adapter, adam_epsilon=1e-3, **layers).train()
        rows.append([{k: v for k, v in row.items() if k != "first_ratio_error"} for row in metrics_rows(output)])
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_an_adapter_below_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"the adapter has weights below those layers, such as .*h\.0\..*layers_to_trans"
    ):
        make_trainer(tmp_path, model=gpt2(), peft_config=lora(), num_layers_unfrozen=1)


@pytest.mark.parametrize("n", [2, 7])
def test_a_model_without_lower_layers_is_refused(tmp_path, n):
    with pytest.raises(
        ValueError, match=f"num_layers_unfrozen={n}: model is a GPT2LMHeadModel of 2 layers; give 1 to 1"
    ):
        make_trainer(tmp_path, model=gpt2(), num_layers_unfrozen=n)


def test_layers_that_hand_on_something_else_are_refused():
    """Gemma 3n's hand on states of four axes."""
    model = gpt2().eval()
    frozen = LanguageModel(model, num_layers_unfrozen=1).frozen
    model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output.unsqueeze(0))
    with pytest.raises(
        UnsupportedModelError, match="does not work for model, a GPT2LMHeadModel: its layers hand on some"
    ):
        frozen.compute(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_a_reference_that_is_given_reads_for_itself(tmp_path):
    other = gpt2(seed=5)
    trainer = make_trainer(tmp_path, model=gpt2(), ref_model=other, num_layers_unfrozen=1)
    trainer.run.open(None)
    trainer.step()
    tokens = trainer.last_step.experience.tokens
    assert tokens.below is not None
    expected = Reference(gpt2(), gpt2(seed=5)).logits(tokens)
    torch.testing.assert_close(trainer.reference.logits(tokens), expected)


def test_what_is_frozen_already_stays_so(tmp_path):
    model = gpt2()
    model.transformer.ln_f.requires_grad_(False)
    trainer = make_trainer(tmp_path, model=model, num_layers_unfrozen=1)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {"transformer.ln_f.weight", "transformer.wte.weight", "transformer.h.0.ln_1.weight"} <= before.keys()
    trainer.train()
    assert_same({n: p for n, p in model.named_parameters() if n in before}, before)
