"""frozen_dtype: the run in which the same weights were rounded beforehand, to the bit, from half their memory."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from builders import (
    MODELS,
    VOCAB,
    assert_same,
    critic_of,
    gpt2,
    llama,
    lora,
    make_trainer,
    metrics_rows,
    optimizer_state,
    weights,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lmppo.models import Reference
from lmppo.models.frozen_weights import store_frozen
from lmppo.models.held import HeldInBFloat16, plain

BF16 = {"frozen_dtype": "bfloat16"}
STEADY = {"adam_epsilon": 1e-3}


@pytest.fixture(autouse=True)
def any_precision():
    """A process has one precision, that of its first trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rounded(model, names=None):
    """The model with matrices (of these names) that bfloat16 holds: what it is to compute with, in plain float32."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and (names is None or name in names):
            parameter.data = parameter.data.bfloat16().float()
    return model


def held_in(model):
    return {name for name, p in model.named_parameters() if isinstance(p, HeldInBFloat16)}


def frozen_critic(family="gpt2"):
    """A critic of which the embedding is not trained."""
    critic = critic_of(family)
    critic.get_input_embeddings().requires_grad_(False)
    return critic


RUNS = {
    "adapter": lambda family: {"peft_config": lora(family)},
    "adapter, bf16": lambda family: {"peft_config": lora(family), "bf16": True},
    "adapter on all layers": lambda family: {"peft_config": LoraConfig(r=2, target_modules="all-linear")},
    "a critic of this kind": lambda family: {
        "peft_config": lora(family, bias="lora_only"), "critic": "lora", "gradient_checkpointing": True,
    },
    "trpo": lambda family: {"peft_config": lora(family), "objective": "trpo", "trpo_cg_steps": 3, "trpo_damping": 1.0},
    "exact KL": lambda family: {"peft_config": lora(family), "kl_form": "exact_both"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_learns_what_it_does_on_a_rounded_base(tmp_path, family, name):
    ends = []
    for model, settings in ((MODELS[family](), BF16), (rounded(MODELS[family]()), {})):
        trainer = make_trainer(tmp_path / str(len(ends)), model=model, **settings, **STEADY, **RUNS[name](family))
        trainer.train()
        ends.append(trainer)
    ours, theirs = ends
    rows = [metrics_rows(trainer.args.output_dir) for trainer in ends]
    assert rows[0] == rows[1] and abs(rows[0][0]["kl_to_ref"]) < 1e-5
    assert_same(weights(ours), weights(theirs))
    policy = ours.actor_critic.policy
    assert all("lora" not in name for name in held_in(policy))
    assert held_in(policy) == {n for n, p in policy.named_parameters() if p.ndim >= 2 and not p.requires_grad}
    if ours.actor_critic.critic is not None:
        shared = {p.held.data_ptr() for p in policy.parameters() if isinstance(p, HeldInBFloat16)}
        critic = [p for p in ours.actor_critic.critic.parameters() if not p.requires_grad and p.ndim >= 2]
        assert critic and all(p.held.data_ptr() in shared for p in critic)


@pytest.mark.parametrize("family", MODELS)
def test_frozen_layers_and_the_reference(tmp_path, family):
    """The lower layers are rounded in policy and reference; the reference's own copy of the others, there alone."""
    ours = make_trainer(
        tmp_path / "ours", model=MODELS[family](), critic=frozen_critic(family), num_layers_unfrozen=1, **BF16, **STEADY
    )
    below, own_critic = held_in(ours.actor_critic.policy), held_in(ours.actor_critic.critic)
    assert below and own_critic and not any("layers.1." in name or "h.1." in name for name in below)
    ours.train()
    theirs = make_trainer(
        tmp_path / "theirs",
        model=rounded(MODELS[family](), below),
        critic=rounded(frozen_critic(family), own_critic),
        num_layers_unfrozen=1,
        ref_model=rounded(MODELS[family]()),
        **STEADY,
    )
    theirs.train()
    assert held_in(ours.reference.model) == {n for n, p in ours.reference.model.named_parameters() if p.ndim >= 2}
    rows = zip(metrics_rows(tmp_path / "ours"), metrics_rows(tmp_path / "theirs"), strict=True)
    for one, other in rows:
        one.pop("critic/explained_variance_within_prompts", None)  # divides by a variance of almost 0
        other.pop("critic/explained_variance_within_prompts", None)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, weights(theirs)[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_a_full_fine_tune_with_its_reference_in_half(tmp_path, family, given, capsys):
    settings = {"ref_model": MODELS[family](seed=4)} if given else {}
    ours = make_trainer(tmp_path / "ours", model=MODELS[family](), **settings, **BF16, **STEADY)
    assert "The reference: " in capsys.readouterr().out and not held_in(ours.actor_critic)
    ours.train()
    other = rounded(MODELS[family](seed=4) if given else MODELS[family]())
    theirs = make_trainer(tmp_path / "theirs", model=MODELS[family](), ref_model=other, **STEADY)
    theirs.train()
    rows = metrics_rows(tmp_path / "ours")
    assert rows == metrics_rows(tmp_path / "theirs")
    assert given or 1e-5 < abs(rows[0]["kl_to_ref"]) < 0.02, "it does not start at 0"
    assert rows[0]["first_ratio_error"] < 1e-5
    if given:
        assert not held_in(settings["ref_model"]), "what was passed stays as it is"


def test_what_bfloat16_holds_starts_at_kl_zero_and_without_a_word(tmp_path, capsys):
    trainer = make_trainer(tmp_path, model=gpt2().bfloat16(), **BF16)
    assert "rounded" not in capsys.readouterr().out and held_in(trainer.reference.model)
    assert not trainer.reference.rounded and trainer._kl_starts_at_zero
    assert abs(trainer.step()["kl_to_ref"]) < 1e-6


def test_what_rounding_costs_at_the_start():
    """The figures of docs/configuration.md: nats per token between a policy and its rounded copy."""
    sizes = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    for config, build in (
        (GPT2Config(n_embd=128, n_layer=6, n_head=4, n_positions=64, **sizes), GPT2LMHeadModel),
        (LlamaConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, **sizes),
         LlamaForCausalLM),
    ):  # fmt: skip
        for spread, limit in ((0.02, 2e-6), (0.06, 1e-4)):
            torch.manual_seed(0)
            config.initializer_range = spread
            model = build(config).eval()
            reference, ids = Reference(model, frozen_dtype="bfloat16"), torch.randint(1000, (4, 64))
            with torch.no_grad():
                ours, theirs = (m(ids).logits.log_softmax(-1) for m in (model, reference.model))
            assert 1e-8 < (ours.exp() * (ours - theirs)).sum(-1).mean() < limit


def sizes(model):
    """Bytes of the numbers that a model holds, each once."""
    return sum(getattr(p, "held", p).nbytes for p in dict.fromkeys(model.parameters()))


def saved_bytes(trainer):
    """Bytes that autograd keeps in a step, beside the weights."""
    own = {getattr(p, "held", p).untyped_storage().data_ptr() for p in trainer.actor_critic.parameters()}
    kept = {}

    def keep(tensor):
        storage = getattr(tensor, "held", tensor).untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step()
    return sum(n for place, (_, n) in kept.items() if place not in own)


@pytest.mark.parametrize("family", MODELS)
def test_the_memory_of_what_is_frozen_is_half(tmp_path, family):
    trainers = [
        make_trainer(tmp_path / kind, model=MODELS[family](), peft_config=lora(family), frozen_dtype=kind)
        for kind in ("float32", "bfloat16")
    ]
    full, half = (sizes(trainer.actor_critic.policy) for trainer in trainers)
    matrices = sum(
        p.numel() for p in trainers[0].actor_critic.policy.parameters() if p.ndim >= 2 and not p.requires_grad
    )
    assert full - half == 2 * matrices > 0.4 * full
    full, half = (saved_bytes(trainer) for trainer in trainers)
    assert half == full, "no float32 copy of a weight outlives its product"


@pytest.mark.parametrize("name", ["layers", "adapter", "a critic of this kind"])
def test_a_resumed_run_is_the_run(tmp_path, name):
    def build(folder, **more):
        settings = {"num_layers_unfrozen": 1} if name == "layers" else RUNS[name]("llama")
        return make_trainer(tmp_path / folder, model=llama(), save_steps=1, **BF16, **settings, **more)

    whole = build("whole", max_steps=3)
    whole.train()
    build("parts", max_steps=2).train()
    parts = build("parts", max_steps=3)
    parts.train(resume_from_checkpoint=True)
    assert metrics_rows(tmp_path / "whole") == metrics_rows(tmp_path / "parts")
    assert_same(weights(whole), weights(parts))
    assert_same(optimizer_state(whole), optimizer_state(parts))


@pytest.mark.parametrize("name", ["layers", "adapter", "embedding"])
def test_what_is_exported_is_the_policy(tmp_path, name, capsys):
    settings = {
        "layers": {"num_layers_unfrozen": 1},
        "adapter": {"peft_config": lora("llama")},
        "embedding": {"peft_config": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")},
    }[name]
    trainer = make_trainer(tmp_path / "run", model=llama(), **BF16, **settings)
    assert (
        "model: " in (line := capsys.readouterr().out) and "rounded to bfloat16, also where they are exported" in line
    )
    trainer.train()
    policy, ids = trainer.actor_critic.policy, torch.tensor([[3, 1, 4, 1, 5]])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()]
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}
    if name != "layers":
        models += [PeftModel.from_pretrained(rounded(llama()), tmp_path / "run" / "final" / "adapter").eval()]
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(model(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_an_adapter_trains_whole_starts_unrounded(tmp_path):
    """Its original stays in float32, of which a critic's copy is made."""
    adapter = lora("llama", modules_to_save=["gate_proj"])
    trainer = make_trainer(tmp_path, model=llama(), peft_config=adapter, critic="lora", **BF16)
    assert held_in(trainer.actor_critic.policy)
    for part in (trainer.actor_critic.policy, trainer.actor_critic.critic):
        copies = [p for name, p in part.named_parameters() if "modules_to_save" in name]
        layers = llama().model.layers
        assert all(torch.equal(p, layer.mlp.gate_proj.weight) for p, layer in zip(copies, layers, strict=True))


def test_an_adapter_that_has_measured_the_base_starts_at_kl_zero(tmp_path):
    """DoRA has the norms of weights that are rounded afterwards: the reference has a copy of it."""
    trainer = make_trainer(tmp_path, model=llama(), peft_config=lora("llama", use_dora=True), critic="lora", **BF16)
    assert abs(trainer.step()["kl_to_ref"]) < 1e-6


def mixtral():
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_key_value_heads=1, **sizes, **ends))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize("build", [gpt2, llama, mixtral, mamba])
def test_any_use_of_a_weight_is_that_of_the_rounded_one(build):
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    expected = rounded(copy.deepcopy(model))
    assert store_frozen(model, "bfloat16", "model", "")
    ids, found = torch.tensor([[1, 5, 3, 7, 2]]), []
    for one in (model, copy.deepcopy(model), expected):
        states = one.get_input_embeddings()(ids).requires_grad_()
        logits = one(inputs_embeds=states).logits
        found.append(
            (logits.detach(), one(input_ids=ids).logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), states))
        )
    for ours in found[:2]:
        assert all(torch.equal(a, b) for a, b in zip(ours, found[2], strict=True))


def test_the_tensor(tmp_path):
    numbers = torch.randn(4, 6)
    held, wide = HeldInBFloat16(numbers.bfloat16()), numbers.bfloat16().float()
    assert held.dtype == torch.float32 and held.held.dtype == torch.bfloat16 and "HeldInBFloat16" in repr(held)
    for view in (lambda x: x.t(), lambda x: x[1:3], lambda x: x.view(2, 12), lambda x: x.unbind()[2]):
        assert isinstance(view(held), HeldInBFloat16) and torch.equal(plain(view(held)), view(wide))
        assert view(held).held.untyped_storage().data_ptr() == held.held.untyped_storage().data_ptr()
    for use in (lambda x: x + 1, lambda x: x.t() @ x, lambda x: x.view(torch.int32), lambda x: x[torch.tensor([3, 0])]):
        assert type(use(held)) is torch.Tensor and torch.equal(use(held), use(wide))
    assert torch.equal(held.to(torch.bfloat16), numbers.bfloat16()) and torch.equal(held.double(), wide.double())
    assert held.to("meta").held.is_meta and torch.equal(plain(held.clone()), wide)
    held.mul_(3.7)
    assert torch.equal(plain(held), (wide * 3.7).bfloat16().float())
    held.copy_(numbers)
    assert torch.equal(plain(held), wide) and plain(numbers) is numbers
    with pytest.raises(TypeError, match="save_model"):
        save_file({"held": held}, tmp_path / "held.safetensors")
    with pytest.raises(TypeError, match="_foreach_mul_"):
        torch._foreach_mul_([held], 2.0)
