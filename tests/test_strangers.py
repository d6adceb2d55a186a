"""Models from strangers: whatever lies in a directory or in the Hub's cache, loading it runs no code."""

import ast
import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import VOCAB, critic_of, gpt2, lora, make_trainer
from fakes import letter_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification

from lmppo.models import load_policy, load_weights
from lmppo.models.critics import load_critic
from lmppo.pretrained import UntrustedModelError, find_source, load_config, load_pretrained, load_tokenizer
from lmppo.rewards import ClassifierReward

ROOT = Path(__file__).parent.parent


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path):
    """A file that attacks write; none may, whatever the test does."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def classifier(vocab_size=VOCAB):
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=vocab_size, num_labels=1, pad_token_id=0, **sizes))


@pytest.fixture
def model_dir(tmp_path):
    """A policy, which is read as language model, reference and critic alike, with its tokenizer."""
    gpt2(seed=2).save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **keys):
    """Other values in a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def to_shards(directory, name):
    """The model under an index that says where its weights are."""
    from safetensors import safe_open

    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    with safe_open(directory / "model-00001-of-00001.safetensors", "pt") as file:
        keys = list(file.keys())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# --- code that comes with a model ------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel, GPT2ForSequenceClassification, PreTrainedTokenizerFast
class StrangeConfig(GPT2Config):
    model_type = "strange"
class StrangeModel(GPT2LMHeadModel):
    config_class = StrangeConfig
class StrangeScorer(GPT2ForSequenceClassification):
    config_class = StrangeConfig
class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "strange.StrangeConfig",
    "AutoModelForCausalLM": "strange.StrangeModel",
    "AutoModelForSequenceClassification": "strange.StrangeScorer",
    "AutoModel": "strange.StrangeModel",
}


def make_strange(directory, canary, model_type="strange"):
    """Give a model's directory code of its own, which it needs if transformers does not know its type."""
    (directory / "strange.py").write_text(CODE.format(canary=str(canary)))
    change(directory / "config.json", model_type=model_type, auto_map=AUTO_MAP)


@pytest.fixture
def strange_dir(model_dir, canary):
    make_strange(model_dir, canary)
    return model_dir


@pytest.fixture
def strange_tokenizer(model_dir, canary):
    (model_dir / "strange.py").write_text(CODE.format(canary=str(canary)))
    auto_map = {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}
    change(model_dir / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="StrangeTokenizer")
    change(model_dir / "config.json", model_type="strange")
    return model_dir


LOADS = {
    "policy": lambda name: load_policy(name),
    "reference": lambda name: make_trainer(name + "-run", ref_model=name),
    "critic": lambda name: load_critic(name, gpt2(), tokenizer=letter_tokenizer()),
    "auto critic": lambda name: load_critic(f"auto:{name}", gpt2(), tokenizer=letter_tokenizer()),
    "classifier": lambda name: ClassifierReward(name),
    "reward by name": lambda name: make_trainer(name + "-run", reward=name),
    "watching classifier": lambda name: make_trainer(name + "-run", watch_funcs=[name]),
    "configuration": lambda name: load_config(name),
    "teacher": lambda name: teacher(name),
    "trunk": lambda name: trunk(name),
    "preference": lambda name: preference(name),
}


def teacher(name):
    from datasets import Dataset
    from transformers import TrainingArguments

    from reward_models.sentiment.teacher import make_teacher

    args = TrainingArguments(output_dir=name + "-teacher", use_cpu=True, report_to="none", max_steps=1)
    make_teacher(
        name, Dataset.from_dict({"text": [], "label": [], "held_out": [], "source": []}), args, sentence_repeats=1
    )


def trunk(name):
    from reward_models.sentiment.training import load_trunk

    load_trunk(name)


def preference(name):
    from reward_models.train_preference import main

    main(["--model_name_or_path", name, "--output_dir", name + "-preference", "--use_cpu", "true"])


@pytest.mark.parametrize("load", LOADS)
def test_code_of_a_model_is_refused_by_name(strange_dir, load):
    with pytest.raises(
        UntrustedModelError, match=r"model' wants to run code.*strange\.StrangeConfig.*trust_remote_code"
    ) as e:
        LOADS[load](str(strange_dir))
    assert str(strange_dir) in str(e.value) and "\n" not in str(e.value)


def test_code_of_a_tokenizer_is_refused_by_name(strange_tokenizer):
    message = r"StrangeTokenizer \(tokenizer_config\.json\).*trust_remote_code"
    with pytest.raises(UntrustedModelError, match=message):
        load_tokenizer(str(strange_tokenizer))
    model = classifier()
    model.config._name_or_path = str(strange_tokenizer)  # where a loaded model came from, and where its tokenizer is
    with pytest.raises(UntrustedModelError, match=message):
        ClassifierReward(model)


def test_trusted_code_runs(model_dir, tmp_path):
    make_strange(model_dir, tmp_path / "ran")
    policy = load_policy(str(model_dir), trust_remote_code=True)
    assert type(policy).__name__ == "StrangeModel" and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    trainer = make_trainer(tmp_path / "run", model=str(model_dir), trust_remote_code=True)
    trainer.train()
    assert type(trainer.actor_critic.policy).__name__ == "StrangeModel"


@pytest.mark.parametrize("trusted", [True, False])
def test_a_class_of_transformers_is_used_where_there_is_one(model_dir, canary, trusted):
    """Many models keep an auto_map of the time before transformers knew them."""
    make_strange(model_dir, canary, model_type="gpt2")
    if not trusted:  # trusted, transformers takes the code, and says so
        assert type(load_policy(str(model_dir))).__module__.startswith("transformers.")
        assert type(load_tokenizer(str(model_dir))).__module__.startswith("transformers.")


@pytest.mark.parametrize("what", ["policy", "auto model", "tokenizer", "trunk"])
def test_nothing_asks_on_a_terminal(model_dir, canary, what):
    """With a terminal attached and somebody who answers y to everything."""
    make_strange(model_dir, canary)
    code = {
        "policy": "from lmppo.models import load_policy; load_policy({name!r})",
        "auto model": "from lmppo.models.token_values import _width; from lmppo.pretrained import load_config\n"
                      "config = load_config({name!r}); print(_width(config)); raise SystemExit('trust_remote_code')",
        "tokenizer": "from lmppo.prompts import load_tokenizer; load_tokenizer({name!r})",
        "trunk": "from reward_models.sentiment.training import load_trunk; load_trunk({name!r})",
    }[what]  # fmt: skip
    if what == "tokenizer":
        change(
            model_dir / "tokenizer_config.json",
            tokenizer_class="X",
            auto_map={"AutoTokenizer": [None, "strange.StrangeTokenizer"]},
        )
    if what == "auto model":
        auto_map = {"AutoModelForCausalLM": "strange.StrangeModel"}
        change(model_dir / "config.json", model_type="bert", auto_map=auto_map, hidden_size=8, num_attention_heads=2)
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 20)
    process = subprocess.run(
        [sys.executable, "-c", code.format(name=str(model_dir))],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, timeout=120, text=True,
    )  # fmt: skip
    os.close(ours), os.close(theirs)
    assert process.returncode and "trust_remote_code" in process.stdout and "[y/N]" not in process.stdout


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_code(model_dir, key):
    change(model_dir / "config.json", **{key: "somebody/kernel"})
    with pytest.raises(UntrustedModelError, match=r"kernel 'somebody/kernel'.*trust_remote_code"):
        load_policy(str(model_dir))


# --- pickles ---------------------------------------------------------------------------------------------------------


def pickled_model(directory, canary, name="pytorch_model.bin"):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Canary(canary)))


WEIGHTS = [name for name in LOADS if name != "configuration"]


@pytest.mark.parametrize("load", WEIGHTS)
def test_pickled_weights_are_refused_before_anything_is_opened(model_dir, canary, load):
    pickled_model(model_dir, canary)
    with pytest.raises(UntrustedModelError, match=r"pickled weights only \(pytorch_model\.bin\).*save_pretrained"):
        LOADS[load](str(model_dir))


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.pt", "model.ckpt"])
def test_other_pickles_are_refused_alike(model_dir, canary, name):
    pickled_model(model_dir, canary, name)
    with pytest.raises(UntrustedModelError, match="pickled weights only"):
        load_policy(str(model_dir))


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5", "flax_model.msgpack"])
def test_other_formats_are_refused_by_name(model_dir, name):
    (model_dir / "model.safetensors").rename(model_dir / name)
    with pytest.raises(UntrustedModelError, match=f"no safetensors weights, only {name}"):
        load_policy(str(model_dir))


def test_a_pickle_beside_safetensors_is_left_alone(model_dir, canary):
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert load_policy(str(model_dir)).num_parameters() == gpt2().num_parameters()


BAD_NAMES = ["pytorch_model.bin", "../evil.bin", "../model/model.safetensors", "a/../../b.safetensors", "{out}/evil.bin",
             "{out}/a.safetensors", "C:\\a.safetensors", "C:a.safetensors", "sub\\a.safetensors", "model.safetensors.bin",
             "a.SAFETENSORS.pt", ""]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("load", ["policy", "critic", "classifier"])
def test_an_index_names_only_safetensors_within_its_directory(model_dir, canary, tmp_path, name, load):
    for place in (model_dir, tmp_path):
        for evil in ("pytorch_model.bin", "evil.bin"):
            (place / evil).write_bytes(pickle.dumps(Canary(canary)))
    to_shards(model_dir, name.format(out=tmp_path))
    with pytest.raises(UntrustedModelError, match=r"model\.safetensors\.index\.json names .* as weights"):
        LOADS[load](str(model_dir))


def test_an_index_of_plain_names_is_loaded(model_dir):
    expected = load_policy(str(model_dir)).state_dict()
    to_shards(model_dir, "model-00001-of-00001.safetensors")
    loaded = load_policy(str(model_dir)).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "../other/model.safetensors",
                                  "../x.safetensors.index.json"])  # fmt: skip
@pytest.mark.parametrize("config", ["config.json", "config.4.0.0.json"])
def test_weights_that_the_configuration_names_are_looked_at_too(model_dir, canary, name, config):
    if config != "config.json":
        shutil.copy(model_dir / "config.json", model_dir / config)
        change(model_dir / "config.json", configuration_files=[config])
    change(model_dir / config, transformers_weights=name)
    (model_dir / Path(name).name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UntrustedModelError, match="transformers_weights names"):
        load_policy(str(model_dir))


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_dir(model_dir, tmp_path):
    policy = load_policy(str(model_dir), lora())
    policy.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_a_sound_base_is_loaded(adapter_dir):
    assert load_policy(str(adapter_dir)).active_adapter == "default"


@pytest.mark.parametrize("load", ["policy", "classifier", "reference"])
def test_the_base_of_an_adapter_is_looked_at_as_well(adapter_dir, model_dir, canary, load):
    pickled_model(model_dir, canary)
    with pytest.raises(UntrustedModelError, match=r"model' holds pickled weights only"):
        LOADS[load](str(adapter_dir))


@pytest.mark.parametrize("load", ["policy", "classifier"])
def test_the_code_of_an_adapters_base_is_refused(adapter_dir, model_dir, canary, load):
    make_strange(model_dir, canary)
    with pytest.raises(UntrustedModelError, match=r"model' wants to run code"):
        LOADS[load](str(adapter_dir))


@pytest.mark.parametrize("load", ["policy", "classifier"])
def test_a_pickled_adapter_is_refused(adapter_dir, canary, load):
    (adapter_dir / "adapter_model.safetensors").unlink()
    (adapter_dir / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UntrustedModelError, match=r"pickled weights only \(adapter_model\.bin\)"):
        LOADS[load](str(adapter_dir))


def test_a_pickled_adapter_within_a_whole_model_is_refused(adapter_dir, model_dir, canary):
    shutil.copy(adapter_dir / "adapter_config.json", model_dir)
    (model_dir / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UntrustedModelError, match=r"pickled weights only \(adapter_model\.bin\)"):
        ClassifierReward(str(model_dir))


def test_an_adapter_of_an_adapter_is_refused(adapter_dir):
    change(adapter_dir / "adapter_config.json", base_model_name_or_path=str(adapter_dir))
    for load in ("policy", "classifier"):
        with pytest.raises(UntrustedModelError, match="is an adapter itself"):
            LOADS[load](str(adapter_dir))


@pytest.mark.parametrize(("key", "value"), [
    ("megatron_config", {"a": 1}), ("shadow_model", "somebody/model"), ("adapters", {"a": "somebody/adapter"}),
    ("tokenizer_name_or_path", "somebody/model"),
])  # fmt: skip
def test_an_adapter_has_nothing_imported_and_names_no_other_models(adapter_dir, canary, key, value):
    (adapter_dir / "strange.py").write_text(CODE.format(canary=str(canary)))
    change(adapter_dir / "adapter_config.json", megatron_core="strange", **{key: value})
    with pytest.raises(UntrustedModelError, match=f"what {key} names"):
        load_policy(str(adapter_dir))


def test_a_checkpoint_with_a_pickled_adapter_is_not_resumed(tmp_path, canary):
    trainer = make_trainer(tmp_path / "run", peft_config=lora(), max_steps=1)
    trainer.train()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "policy" / "adapter_model.safetensors").unlink()
    (checkpoint / "policy" / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    forge_manifest(checkpoint)
    again = make_trainer(tmp_path / "run", peft_config=lora(), max_steps=2)
    with pytest.raises(UntrustedModelError, match="pickled weights only"):
        again.train(resume_from_checkpoint="true")


def forge_manifest(checkpoint):
    """Somebody who may write to the disk rewrites the manifest as well."""
    from lmppo.run.checkpoint import _hashes

    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest | {"files": _hashes(checkpoint)}))


# --- links, and the Hub's cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "vocab.txt"])  # fmt: skip
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_directory_is_refused(model_dir, tmp_path, name, absolute):
    """It would bring a file of the reader's, such as a key, into what is trained and exported."""
    (tmp_path / "private").mkdir()
    private = tmp_path / "private" / name
    shutil.copy(model_dir / name, private) if (model_dir / name).exists() else private.write_text("my key")
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to(private if absolute else Path("..") / "private" / name)
    for load in (load_tokenizer, load_policy):
        with pytest.raises(UntrustedModelError, match=rf"{name} is a link that leads out of the directory.*copy"):
            load(str(model_dir))


def test_a_linked_folder_of_shards_or_templates_is_refused(model_dir, tmp_path):
    to_shards(model_dir, "sub/a.safetensors")
    (tmp_path / "private").mkdir()
    (model_dir / "model-00001-of-00001.safetensors").rename(tmp_path / "private" / "a.safetensors")
    (model_dir / "sub").symlink_to(tmp_path / "private")
    with pytest.raises(UntrustedModelError, match="a.safetensors is a link"):
        load_policy(str(model_dir))


def test_blobs_that_are_no_cache_of_the_hub_are_refused(model_dir, tmp_path):
    """A directory that is laid out as the cache, with its blobs linked to elsewhere."""
    snapshot = tmp_path / "fake" / "snapshots" / "abc"
    shutil.copytree(model_dir, snapshot)
    (tmp_path / "private").mkdir()
    (snapshot / "config.json").rename(tmp_path / "private" / "key")
    (tmp_path / "fake" / "blobs").symlink_to(tmp_path / "private")
    (snapshot / "config.json").symlink_to("../../blobs/key")
    with pytest.raises(UntrustedModelError, match="config.json is a link"):
        load_policy(str(snapshot))


def test_a_pipe_is_refused_and_not_waited_for(model_dir):
    (model_dir / "config.json").unlink()
    os.mkfifo(model_dir / "config.json")
    with pytest.raises(UntrustedModelError, match="config.json is no plain file"):
        load_policy(str(model_dir))


def test_a_link_to_the_directory_itself_and_links_within_are_followed(model_dir, tmp_path):
    (model_dir / "config.json").rename(model_dir / "real.json")
    (model_dir / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(model_dir)
    assert load_policy(str(tmp_path / "link")).num_parameters() == gpt2().num_parameters()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a directory into the Hub's cache, as the id somebody/<name>; there is no network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    assert constants.HF_HUB_OFFLINE

    def put(directory):
        folder, commit = cache / f"models--somebody--{directory.name}", "a" * 40
        snapshot = folder / "snapshots" / commit
        (folder / "blobs").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        snapshot.mkdir(parents=True)
        for path in directory.iterdir():
            path.rename(folder / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        directory.rmdir()
        return f"somebody/{directory.name}"

    return put


def test_a_cached_model_of_the_hub_is_loaded_by_its_id(hub, model_dir):
    name = hub(model_dir)
    policy = load_policy(name)
    assert policy.config._name_or_path == name and load_tokenizer(name).eos_token_id == 0
    assert load_critic(name, gpt2(), tokenizer=letter_tokenizer()) is not None
    assert load_policy(str(find_source(name).directory)).num_parameters() == policy.num_parameters()


def test_a_cached_model_in_shards_is_loaded(hub, model_dir):
    to_shards(model_dir, "model-00001-of-00001.safetensors")
    assert load_policy(hub(model_dir)).num_parameters() == gpt2().num_parameters()


def test_a_cached_adapter_is_loaded_on_its_cached_base(hub, adapter_dir, model_dir):
    change(adapter_dir / "adapter_config.json", base_model_name_or_path="somebody/model")
    hub(model_dir)
    policy = load_policy(hub(adapter_dir))
    assert policy.active_adapter == "default" and policy.config._name_or_path == "somebody/model"


@pytest.mark.parametrize("load", ["policy", "critic", "classifier", "trunk"])
def test_a_model_of_the_hub_is_looked_at_alike(hub, model_dir, canary, load):
    shutil.copytree(model_dir, model_dir.parent / "strange")
    shutil.copytree(model_dir, model_dir.parent / "index")
    pickled_model(model_dir, canary)
    make_strange(model_dir.parent / "strange", canary)
    to_shards(model_dir.parent / "index", "evil.bin")
    (model_dir.parent / "index" / "evil.bin").write_bytes(pickle.dumps(Canary(canary)))
    for directory, message in (
        ("model", "pickled weights"),
        ("strange", "wants to run code"),
        ("index", "names 'evil.bin'"),
    ):
        with pytest.raises(UntrustedModelError, match=f"somebody/{directory}.*{message}"):
            LOADS[load](hub(model_dir.parent / directory))


def test_the_base_of_a_cached_adapter_is_looked_at(hub, adapter_dir, model_dir, canary):
    change(adapter_dir / "adapter_config.json", base_model_name_or_path="somebody/model")
    pickled_model(model_dir, canary)
    hub(model_dir)
    name = hub(adapter_dir)
    for load in ("policy", "classifier"):
        with pytest.raises(UntrustedModelError, match="somebody/model.*pickled weights"):
            LOADS[load](name)


@pytest.mark.parametrize("name", ["config.json", "evil.bin"])
def test_a_file_is_no_model(model_dir, canary, monkeypatch, name):
    """transformers would take the file itself for a configuration, or for weights."""
    (model_dir / "evil.bin").write_bytes(pickle.dumps(Canary(canary)))
    monkeypatch.chdir(model_dir)
    with pytest.raises(OSError, match="neither a"):
        load_weights(AutoModelForCausalLM, name)
    with pytest.raises(OSError, match="neither a directory"):
        load_pretrained(AutoModelForCausalLM, str(model_dir / name))


# --- no way around ---------------------------------------------------------------------------------------------------

# The benchmarks run models that they make themselves, of random weights.
SOURCES = sorted(p for f in ("lmppo", "reward_models", "recipes") for p in (ROOT / f).rglob("*.py"))
SOURCES.append(ROOT / "benchmarks" / "main_job.py")
DOOR = ROOT / "lmppo" / "pretrained.py"
LOADERS = {"from_pretrained", "load_adapter", "load_peft_weights", "snapshot_download", "hf_hub_download", "cached_file",
           "get_class_from_dynamic_module", "pipeline", "from_single_file", "load_checkpoint_in_model",
           "load_checkpoint_and_dispatch", "clone_chat_template", "create_model_from_path", "load_state"}  # fmt: skip
# Of lmppo.models.adapters, which comes back to the door.
OURS = {("lmppo/models/loading.py", "load_adapter"), ("lmppo/models/lora_critic.py", "load_adapter")}


def bypasses(path, source):
    """Calls that open a model without the checks: those of libraries, and those that leave transformers to ask."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            given = {keyword.arg for keyword in node.keywords}
            if (name in LOADERS and (path, name) not in OURS) or (
                name == "from_config" and "trust_remote_code" not in given
            ):
                found.append(name)
            named = [k for k in node.keywords if k.arg == "model" and name.endswith("Trainer")]
            found += [name for k in named if "name_or_path" in ast.unparse(k.value) and name != "PPOTrainer"]
    return found


def test_every_load_goes_through_the_door():
    assert len(SOURCES) > 60
    found = {
        p.relative_to(ROOT).as_posix(): bypasses(p.relative_to(ROOT).as_posix(), p.read_text())
        for p in SOURCES
        if p != DOOR
    }
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize("source", [
    "AutoModel.from_pretrained(name)", "model.load_adapter(path)", "AutoModel.from_config(config)",
    "RewardTrainer(model=arguments.model_name_or_path)", "hub.snapshot_download(name)",
])  # fmt: skip
def test_the_reading_of_the_source_can_fail(source):
    assert bypasses("x.py", source)


def test_a_critic_beside_a_policy_is_looked_at(model_dir, canary, tmp_path):
    critic_of().save_pretrained(model_dir / "critic")
    pickled_model(model_dir / "critic", canary)
    with pytest.raises(UntrustedModelError, match="pickled weights only"):
        make_trainer(tmp_path / "run", model=str(model_dir))


@pytest.mark.parametrize("path", ["some/tokenizer", "."])
def test_a_chat_template_is_a_file(tmp_path, path):
    from reward_models.train_preference import main

    with pytest.raises(ValueError, match="not a .jinja file"):
        main(["--output_dir", str(tmp_path), "--chat_template_path", path])
