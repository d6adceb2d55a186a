"""Checkpoints: whole or refused, and what was saved is what comes back, to the last bit."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from builders import (
    alone,
    assert_same,
    build_policy_arguments,
    critic_of,
    gpt2,
    lora,
    make_samples,
    make_trainer,
    optimizer_state,
    row_alone,
    weights,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from lmppo.run.checkpoint import (
    CheckpointError,
    FormatError,
    checkpoint_dir,
    list_checkpoints,
    load_checkpoint,
    newest_valid_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)

KINDS = ["shared", "separate", "lora", "lora critic"]


def train(output_dir, kind="shared", **settings):
    trainer = make_trainer(output_dir, **(build_policy_arguments(kind) | settings))
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """A finished run of two steps, of each kind, with both checkpoints."""
    trainer = train(tmp_path_factory.mktemp(request.param), request.param, save_steps=1)
    return request.param, trainer


@pytest.fixture
def copied(tmp_path_factory, tmp_path):
    """A finished run with checkpoints 1 and 2, to be damaged."""
    source = tmp_path_factory.getbasetemp() / "to-be-damaged"
    if not source.exists():
        train(source, save_steps=1)
    return shutil.copytree(source, tmp_path / "run")


# --- what is in a checkpoint -----------------------------------------------------------------------------------------


def test_the_layout(trained):
    kind, trainer = trained
    folder = checkpoint_dir(trainer.args.output_dir, 2)
    assert folder.name == "step-000002"
    names = {path.name for path in folder.iterdir()}
    critic = "critic" if kind in ("separate", "lora critic") else "value_head.safetensors"
    assert names == {"policy", critic, "optimizer.safetensors", "state.json", "trainer_state.json", "MANIFEST.json"}
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}, "nothing that could run code when it is loaded"
    weights_file = "adapter_model.safetensors" if "lora" in kind else "model.safetensors"
    assert (folder / "policy" / weights_file).exists()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert set(manifest["files"]) == on_disk
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_tied_weights_are_saved_once(trained):
    kind, trainer = trained
    if "lora" not in kind:
        saved = load_file(checkpoint_dir(trainer.args.output_dir, 2) / "policy" / "model.safetensors")
        assert "transformer.wte.weight" in saved and "lm_head.weight" not in saved


def test_only_an_adapter_is_saved_of_an_adapted_model(trained):
    kind, trainer = trained
    if "lora" in kind:
        saved = load_file(checkpoint_dir(trainer.args.output_dir, 2) / "policy" / "adapter_model.safetensors")
        assert saved and all("lora_" in name for name in saved)


def test_everything_comes_back_to_the_last_bit(trained, tmp_path):
    """Policy, critic and optimizer, into a trainer whose own are different."""
    kind, trainer = trained
    fresh = train(tmp_path, kind, seed=9, max_steps=1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(fresh).values(), weights(trainer).values(), strict=True))
    state = load_checkpoint(checkpoint_dir(trainer.args.output_dir, 2), fresh.actor_critic, fresh.optimizer.optimizer)
    assert_same(weights(fresh), weights(trainer))
    assert_same(optimizer_state(fresh), optimizer_state(trainer))
    assert len(optimizer_state(fresh)) == 3 * sum(p.requires_grad for p in fresh.actor_critic.parameters())
    assert state["step"] == 2
    assert state["prompts"] == {"drawn": 16}
    assert state["num_tokens"] == trainer.run.num_tokens
    assert state["settings"]["learning_rate"] == 1e-2
    if "lora" not in kind:
        policy = fresh.actor_critic.policy
        assert policy.lm_head.weight is policy.transformer.wte.weight, "still tied"


def test_the_value_head_is_among_it(trained):
    kind, trainer = trained
    if kind != "separate":
        place = "critic/value_head.safetensors" if kind == "lora critic" else "value_head.safetensors"
        saved = load_file(checkpoint_dir(trainer.args.output_dir, 2) / place)
        assert saved["weight"].abs().max() > 0
        assert torch.equal(saved["weight"], trainer.actor_critic.value_head.weight)
        assert saved["weight"].dtype == torch.float32


# --- damage ----------------------------------------------------------------------------------------------------------

FILES = ["policy/model.safetensors", "policy/config.json", "policy/tokenizer.json", "value_head.safetensors",
         "optimizer.safetensors", "state.json"]  # fmt: skip


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "first byte": lambda path: flip_bit(path, 0),
    "middle byte": lambda path: flip_bit(path, 0.5),
    "last byte": lambda path: flip_bit(path, 1),
    "4 bytes lost": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "half lost": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_noticed_and_named(copied, name):
    newest = checkpoint_dir(copied, 2)
    intact = (newest / name).read_bytes()
    for kind, damage in DAMAGE.items():
        damage(newest / name)
        with pytest.raises(CheckpointError, match=rf"step-000002: {name} is not the file that was saved"):
            verify_checkpoint(newest)
        assert newest_valid_checkpoint(copied)[0].name == "step-000001", kind
        (newest / name).write_bytes(intact)
    verify_checkpoint(newest)
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-000002: {name} is missing"):
        verify_checkpoint(newest)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "{}", '{"format_version": 2}', b"\xff\xfe"])
def test_without_a_manifest_it_is_no_checkpoint(copied, content):
    manifest = checkpoint_dir(copied, 2) / "MANIFEST.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match="no complete checkpoint: MANIFEST.json is missing or unreadable"):
        verify_checkpoint(checkpoint_dir(copied, 2))


def test_no_flipped_bit_of_the_manifest_lets_other_weights_through(copied):
    """Whatever bit flips, the checkpoint is refused, or it is the one that was saved."""
    newest = checkpoint_dir(copied, 2)
    intact = (newest / "MANIFEST.json").read_bytes()
    refused = 0
    for position in range(0, len(intact), 7):
        data = bytearray(intact)
        data[position] ^= 0x04
        (newest / "MANIFEST.json").write_bytes(data)
        try:
            verify_checkpoint(newest)
        except CheckpointError:
            refused += 1
        else:
            text = data.decode()
            assert json.loads(text)["files"] == json.loads(intact)["files"] or json.loads(text)["files"].keys() < {
                *json.loads(intact)["files"]
            }
    assert refused > 0.8 * len(intact) / 7


def test_a_manifest_that_lists_nothing_protects_nothing_and_is_refused(copied):
    newest = checkpoint_dir(copied, 2)
    (newest / "MANIFEST.json").write_text('{"format_version": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="optimizer.safetensors is not the file that was saved"):
        verify_checkpoint(newest)


def test_a_file_of_another_checkpoint_is_noticed(copied):
    shutil.copy(checkpoint_dir(copied, 1) / "optimizer.safetensors", checkpoint_dir(copied, 2))
    with pytest.raises(CheckpointError, match="optimizer.safetensors is not the file that was saved"):
        verify_checkpoint(checkpoint_dir(copied, 2))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (999, r"step-000002 was made by a newer lmppo \(format 999\): upgrade lmppo to resume it\.$"),
        (
            1,
            r"step-000002 was made by an earlier lmppo \(format 1\), which this one cannot continue: choose another ",
        ),
    ],
)
def test_another_format_is_refused_and_not_taken_for_damage(copied, version, message):
    """Nor is an older checkpoint taken in its place."""
    manifest = checkpoint_dir(copied, 2) / "MANIFEST.json"
    assert json.loads(manifest.read_text())["format_version"] == 2
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": version}))
    for look in (lambda: verify_checkpoint(checkpoint_dir(copied, 2)), lambda: newest_valid_checkpoint(copied)):
        with pytest.raises(FormatError, match=message):
            look()


def test_an_unknown_file_beside_the_others_is_ignored(copied):
    (checkpoint_dir(copied, 2) / "notes.txt").write_text("mine")
    verify_checkpoint(checkpoint_dir(copied, 2))


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_new_one(trained, tmp_path, monkeypatch):
    _, trainer = trained
    target = checkpoint_dir(tmp_path, 1)
    arguments = (trainer.actor_critic, trainer.optimizer.optimizer, {"step": 1}, trainer.processing_class)
    save_checkpoint(target, *arguments)
    before = (target / "MANIFEST.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lmppo.run.checkpoint.save_file", fail)
    for place in (target, checkpoint_dir(tmp_path, 2)):
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(place, *arguments)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    verify_checkpoint(target)
    assert (target / "MANIFEST.json").read_bytes() == before
    monkeypatch.undo()
    save_checkpoint(checkpoint_dir(tmp_path, 2), *arguments)
    assert newest_valid_checkpoint(tmp_path)[0].name == "step-000002"


# --- finding and pruning ---------------------------------------------------------------------------------------------


def make_dirs(root, *steps):
    for step in steps:
        checkpoint_dir(root, step).mkdir(parents=True)
        (checkpoint_dir(root, step) / "MANIFEST.json").write_text("{}")


def test_checkpoints_are_ordered_by_number_not_by_name_or_time(tmp_path):
    make_dirs(tmp_path, 9, 10, 100, 1_000_000, 999_999)
    os.utime(checkpoint_dir(tmp_path, 9), (2e9, 2e9))
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-000009", "step-000010", "step-000100", "step-999999", "step-1000000"
    ]  # fmt: skip


def test_links_and_foreign_names_are_no_checkpoints(tmp_path):
    make_dirs(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    (folder / "step-000008").symlink_to(tmp_path)
    for name in ("step-7", "step-000006.bak", ".tmp-step-000007", "final"):
        (folder / name).mkdir()
    (folder / "step-000009").write_text("a file")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000005"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_pruning_keeps_the_newest_and_touches_nothing_else(tmp_path):
    make_dirs(tmp_path, 1, 2, 3, 4)
    (checkpoint_dir(tmp_path, 1) / "MANIFEST.json").unlink()  # not ours
    (tmp_path / "checkpoints" / "keep-me").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step-000001", "step-000003", "step-000004", "keep-me"
    }  # fmt: skip
    prune_checkpoints(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 3


def test_save_total_limit(tmp_path):
    train(tmp_path, max_steps=5, save_steps=1, save_total_limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]


# --- checkpoints of another model ------------------------------------------------------------------------------------


def test_weights_of_another_shape_are_named(copied, tmp_path):
    other = make_trainer(tmp_path / "other", model=gpt2(n_embd=8))
    with pytest.raises(CheckpointError, match=r"policy does not fit this model: .*transformer\..* differ"):
        load_checkpoint(checkpoint_dir(copied, 2), other.actor_critic, other.optimizer.optimizer)


@pytest.mark.parametrize("change", [{"r": 4}, {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_fc"]}])
def test_an_adapter_of_another_shape_is_named(tmp_path, change):
    """A missing adapter weight would stay at its first value, silently."""
    train(tmp_path / "a", "lora", max_steps=1)
    config = lora()
    for name, value in change.items():
        setattr(config, name, value)
    other = make_trainer(tmp_path / "b", peft_config=config)
    with pytest.raises(CheckpointError, match=r"policy does not fit this model: .*lora_A"):
        load_checkpoint(checkpoint_dir(tmp_path / "a", 1), other.actor_critic, other.optimizer.optimizer)


def test_an_adapter_of_any_name_comes_back(tmp_path):
    def adapted(seed):
        torch.manual_seed(seed)
        return get_peft_model(gpt2(), lora(), adapter_name="mine")

    trained = train(tmp_path / "a", model=adapted(0), max_steps=1)
    fresh = make_trainer(tmp_path / "b", model=adapted(1))
    load_checkpoint(checkpoint_dir(tmp_path / "a", 1), fresh.actor_critic, fresh.optimizer.optimizer)
    assert_same(weights(fresh), weights(trained))


# --- final/ ----------------------------------------------------------------------------------------------------------


def test_final_is_a_plain_hugging_face_model(trained):
    """AutoModel and AutoTokenizer load it, and its logits are the trained policy's (an adapter is merged)."""
    kind, trainer = trained
    final = os.path.join(trainer.args.output_dir, "final")
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "GPT2LMHeadModel"
    ids = tokenizer("abcdef", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.actor_critic.policy(ids).logits, atol=2e-6, rtol=1e-5)
        assert (model(ids).logits - gpt2()(ids).logits).abs().max() > 0.01, "it has learned something"
        if "lora" in kind:
            adapted = PeftModel.from_pretrained(gpt2(), os.path.join(final, "adapter"))
            torch.testing.assert_close(
                adapted(ids).logits, trainer.actor_critic.policy(ids).logits, atol=2e-6, rtol=1e-5
            )
    trainer.actor_critic.policy(ids)  # merging a copy left the trainer's own adapter as it was
    assert hasattr(trainer.actor_critic.policy, "peft_config") == ("lora" in kind)


def test_final_holds_the_critic(trained):
    kind, trainer = trained
    final = os.path.join(trainer.args.output_dir, "final")
    samples = make_samples(trainer.actor_critic)
    prompt, completion = (
        alone(ids, mask, 2)
        for ids, mask in (
            (samples.tokens.prompt_ids, samples.tokens.prompt_mask),
            (samples.tokens.completion_ids, samples.completion_mask),
        )
    )
    _, values = row_alone(trainer.actor_critic, prompt, completion)
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        if kind == "separate":
            critic = AutoModelForTokenClassification.from_pretrained(os.path.join(final, "critic"))
            again = critic(ids).logits[0]
        else:
            critic = PeftModel.from_pretrained(gpt2(), os.path.join(final, "critic")) if kind == "lora critic" else None
            head = load_file(os.path.join(final, "critic" if critic else "", "value_head.safetensors"))
            model = critic or AutoModelForCausalLM.from_pretrained(final)
            again = model(ids, output_hidden_states=True).hidden_states[-1][0] @ head["weight"].T + head["bias"]
    torch.testing.assert_close(again[len(prompt) - 1 : -1], values, atol=5e-6, rtol=1e-5)


def test_saving_a_model_deletes_nothing(copied, tmp_path):
    """save_model(args.output_dir) is a common line: the run in that directory must survive it."""
    trainer = make_trainer(copied, resume_from_checkpoint="auto")
    trainer.train()
    (copied / "notes.txt").write_text("mine")
    trainer.save_model(copied)
    trainer.save_model(copied)
    assert len(list_checkpoints(copied)) == 2
    assert (copied / "notes.txt").exists() and (copied / "metrics.jsonl").exists()
    AutoModelForCausalLM.from_pretrained(copied)
    assert not list(copied.parent.glob(".tmp-*"))
    trainer.save_model(tmp_path / "new" / "place")
    AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "place")


def test_a_critic_of_its_own_is_saved_by_name(tmp_path):
    critic_of().save_pretrained(tmp_path / "critic")
    trainer = train(tmp_path / "run", critic=str(tmp_path / "critic"), max_steps=1)
    fresh = make_trainer(tmp_path / "b", critic=critic_of(seed=7))
    load_checkpoint(checkpoint_dir(tmp_path / "run", 1), fresh.actor_critic, fresh.optimizer.optimizer)
    assert_same(weights(fresh), weights(trainer))
