"""The recipe as a user launches it: every YAML, one and two processes, real and local models, resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from trl import TrlParser

from lmppo import PPOConfig
from tests.fakes import tiny_gpt2, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
PPO_CONFIGS = [path for path in CONFIGS if "rollout_batch_size" in yaml.safe_load(path.read_text())]
SMALL = [
    "--rollout_batch_size",
    "8",
    "--minibatch_size",
    "4",
    "--eval_completions",
    "8",
    "--max_completion_length",
    "6",
]
SMALL += ["--save_steps", "1", "--show", "2", "--cpu_threads", "1"]


def launch(config: str, output_dir: Path, *flags: str, launcher: tuple[str, ...] = (), env: dict | None = None) -> str:
    """`accelerate launch` the recipe from the repository root, as the README says; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", *launcher]
    command += ["recipes/ppo_sentiment.py", "--config", config, "--output_dir", str(output_dir), *SMALL, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | (env or {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def local_hub(tmp_path_factory) -> Path:
    """Directories of the same architectures as the Hub's: a GPT-2, a DistilBERT classifier, an IMDb-shaped data set."""
    hub = tmp_path_factory.mktemp("hub")
    tiny_gpt2(n_positions=64).save_pretrained(hub / "gpt2-imdb")
    tiny_tokenizer().save_pretrained(hub / "gpt2-imdb")
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(vocab_size=257, dim=16, n_layers=1, n_heads=2, hidden_dim=32, id2label=labels)
    DistilBertForSequenceClassification(config).save_pretrained(hub / "distilbert-imdb")
    tiny_tokenizer().save_pretrained(hub / "distilbert-imdb")
    texts = [{"text": f"review number {i} of a long film", "label": i % 2} for i in range(24)]
    DatasetDict({"train": Dataset.from_list(texts), "test": Dataset.from_list(texts[:12])}).save_to_disk(hub / "arrow")
    (hub / "imdb").mkdir()
    Dataset.from_list(texts).to_parquet(hub / "imdb" / "train.parquet")
    Dataset.from_list(texts[:12]).to_parquet(hub / "imdb" / "test.parquet")
    Dataset.from_list([{"prompt": f"film {i} is"} for i in range(20)]).to_json(hub / "prompts.jsonl")
    return hub


@pytest.mark.parametrize("path", PPO_CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_is_a_valid_configuration(path):
    sys.path.insert(0, str(ROOT / "recipes"))
    from ppo_sentiment import RecipeArguments

    recipe, args = TrlParser((RecipeArguments, PPOConfig)).parse_args_and_config(["--config", str(path)])
    assert recipe.reward_funcs and recipe.watch_funcs == ["lexicon"] and args.resume_from_checkpoint == "auto"


def test_unknown_keys_and_flags_are_errors(tmp_path):
    sys.path.insert(0, str(ROOT / "recipes"))
    from ppo_sentiment import RecipeArguments

    typo = tmp_path / "typo.yaml"
    typo.write_text((ROOT / "recipes/configs/tiny_reviews.yaml").read_text() + "\nlearning_rat: 1.0\n")
    with pytest.raises(ValueError, match="learning_rat"):
        TrlParser((RecipeArguments, PPOConfig)).parse_args_and_config(["--config", str(typo)])
    with pytest.raises((ValueError, SystemExit)):
        TrlParser((RecipeArguments, PPOConfig)).parse_args_and_config(
            ["--config", str(ROOT / "recipes/configs/tiny_reviews.yaml"), "--no_such_flag", "1"]
        )


def test_main_job_runs_resumes_and_leaves_what_it_promises(tmp_path):
    run = tmp_path / "run"
    printed = launch("recipes/configs/tiny_reviews.yaml", run, "--max_steps", "2")
    critic = "reward_models/tiny-reviews-sentiment"  # by its tokens, as the YAML asks
    assert f"Critic: {critic!r}, which reads the policy's tokens." in printed.splitlines()
    assert yaml.safe_load((run / "run_config.yaml").read_text())["critic"] == critic
    assert [row["step"] for row in rows_of(run)] == [1, 2]
    assert (run / "curves.png").stat().st_size > 10_000
    assert (run / "run_config.yaml").exists() and (run / "checkpoints" / "step-000002" / "MANIFEST.json").exists()
    AutoModelForCausalLM.from_pretrained(run / "final")
    AutoTokenizer.from_pretrained(run / "final")

    printed = launch("recipes/configs/tiny_reviews.yaml", run, "--max_steps", "3")
    assert "Resumed" in printed and [row["step"] for row in rows_of(run)] == [1, 2, 3]
    assert "already" in launch("recipes/configs/tiny_reviews.yaml", run, "--max_steps", "3")


def test_another_reward_takes_one_flag(tmp_path):
    """The function that watches becomes the reward, without a name or a weight to set beside it."""
    launch("recipes/configs/tiny_reviews.yaml", tmp_path / "run", "--max_steps", "1", "--reward_funcs", "lexicon")
    (row,) = rows_of(tmp_path / "run")
    assert row["reward"] == row["rewards/lexicon/mean"] != 0
    assert [name for name in row if name.startswith("rewards/")] == ["rewards/lexicon/mean", "rewards/lexicon/std"]
    settings = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    assert (settings["reward_funcs"], settings["watch_funcs"]) == (["lexicon"], [])


def test_a_policy_of_another_family_takes_one_flag(tmp_path):
    """Its tokens are not those of the critic that the YAML names, so it gets a value head, and that is said."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    command = [sys.executable, "recipes/ppo_sentiment.py", "--config", "recipes/configs/tiny_reviews.yaml"]
    command += ["--model_name_or_path", str(tmp_path / "llama"), "--max_steps", "1", "--rollout_batch_size", "8"]
    command += ["--minibatch_size", "8", "--eval_completions", "8", "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("Critic: ")]
    refused = "Critic: a value head on the policy's trunk, not 'reward_models/tiny-reviews-sentiment': "
    assert len(said) == 1 and said[0].startswith(refused)
    assert "critic" not in yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    (row,) = rows_of(tmp_path / "run")
    assert row["value_loss"] > 0 and row["rewards/tiny-reviews-sentiment/std"] > 0
    head = load_file(tmp_path / "run" / "final" / "value_head.safetensors")["weight"]
    assert (head != 0).any(), "the value head has learned"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config.model_type == "llama"


def test_lora_on_another_family_takes_one_flag(tmp_path):
    """No name of a module is in the YAML: those of GPT-2 are in no other family."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    flags = ("--model_name_or_path", str(tmp_path / "llama"), "--max_steps", "1")
    launch("recipes/configs/tiny_reviews_lora.yaml", tmp_path / "run", *flags)
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / "run/final/adapter/adapter_model.safetensors")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_two_processes_learn_the_same_as_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # Keys' biases have the gradient 0, of which Adam would make steps out of rounding.
    # And a draw within rounding of the border between two tokens would be another token: of this seed there is none.
    flags = ("--max_steps", "2", "--adam_epsilon", "1e-4", "--seed", "1")
    launch("recipes/configs/tiny_reviews.yaml", one, *flags)
    both = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
    printed = launch(
        "recipes/configs/tiny_reviews.yaml",
        two,
        *flags,
        launcher=both,
        env={"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert printed.count("Critic: ") == 1, "said by one process of the two"
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        for name in ("reward", "kl_to_ref", "completion_length", "value_loss", "policy_loss", "explained_variance"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_lora_keeps_the_adapter_and_merges_it(tmp_path):
    launch("recipes/configs/tiny_reviews_lora.yaml", tmp_path / "run", "--max_steps", "1")
    assert (tmp_path / "run/final/adapter/adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").config.model_type == "gpt2"


@pytest.mark.parametrize("dataset", ["imdb", "prompts.jsonl"])
def test_hub_recipe_on_local_directories_of_the_same_architectures(tmp_path, local_hub, dataset):
    launch(
        "recipes/configs/gpt2_imdb.yaml", tmp_path / "run", "--max_steps", "3",
        "--model_name_or_path", str(local_hub / "gpt2-imdb"), "--dataset_name", str(local_hub / dataset),
        "--reward_funcs", f"classifier:{local_hub / 'distilbert-imdb'}", "--eval_steps", "2",
    )  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3 and "eval_reward" in rows[1] and "rewards/lexicon/mean" in rows[0]


STREAMS = [
    {"name": "mood", "reward_funcs": ["lexicon"], "weight": 2.0},
    {"name": "commas", "reward_funcs": ["toy:target_token=12"], "gamma": 0.5, "lam": 0.9},
    {"name": "kl"},
]


def with_streams(path: Path, streams) -> Path:
    """The main job's YAML with reward streams in place of reward functions."""
    settings = yaml.safe_load((ROOT / "recipes/configs/tiny_reviews.yaml").read_text())
    for name in ("reward_funcs", "critic_model_name_or_path"):
        del settings[name]
    path.write_text(yaml.safe_dump(settings | {"reward_streams": streams}))
    return path


def test_reward_streams_from_yaml_dense_rewards_among_them(tmp_path):
    launch(str(with_streams(tmp_path / "streams.yaml", STREAMS)), tmp_path / "run", "--max_steps", "1")
    (row,) = rows_of(tmp_path / "run")
    mood, commas = row["rewards/lexicon/mean"], row["rewards/target_token/mean"]
    assert row["reward"] == pytest.approx(2.0 * mood + commas, rel=1e-5) and mood != 0
    saved = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())["reward_streams"]
    assert saved == [["mood", 2.0, None, None, 1], ["commas", 1.0, 0.5, 0.9, 1], ["kl", 1.0, None, None, 0]]
    head = load_file(tmp_path / "run" / "final" / "value_head.safetensors")["weight"]
    assert len(head) == 3 and (head != 0).any(dim=1).all(), "each stream has taught its output"


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([{"name": "mood", "reward_funcs": "lexicon"}], "'mood': reward_funcs='lexicon' must be a list"),
        ([{"name": "mood", "reward_funcs": None}], "'mood': reward_funcs=None must be a list"),
        (["lexicon"], "'lexicon': expected a mapping"),
        ([{"name": "mood", "reward_funcs": ["lexicom"]}], "lexicom"),
    ],
)
def test_wrong_streams_in_yaml_name_the_culprit(tmp_path, streams, message):
    sys.path.insert(0, str(ROOT / "recipes"))
    from ppo_sentiment import RecipeArguments, make_rewards

    path = with_streams(tmp_path / "streams.yaml", streams)
    recipe, _ = TrlParser((RecipeArguments, PPOConfig)).parse_args_and_config(["--config", str(path)])
    with pytest.raises((TypeError, ValueError), match=message):
        make_rewards(recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward_funcs", "lexicon"),
        ("reward_streams", {"name": "mood"}),
        ("watch_funcs", "lexicon"),
        ("lora_target_modules", "c_attn"),
    ],
)
def test_a_scalar_where_a_list_belongs_is_an_error(tmp_path, name, value):
    sys.path.insert(0, str(ROOT / "recipes"))
    from ppo_sentiment import RecipeArguments

    settings = yaml.safe_load((ROOT / "recipes/configs/tiny_reviews.yaml").read_text()) | {name: value}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(TypeError, match=f"{name}=.* must be a list"):
        TrlParser((RecipeArguments, PPOConfig)).parse_args_and_config(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("name", "value"), [("prompt_tokens", 4), ("reward_funcs", ["toy:token_count=13"]), ("dataset_name", "p.jsonl")]
)
def test_another_data_set_or_reward_is_another_run(tmp_path, name, value):
    """The same names of rewards and the same configuration of the trainer, but not the same run."""
    settings = yaml.safe_load((ROOT / "recipes/configs/tiny_reviews.yaml").read_text())
    settings |= {"reward_funcs": ["toy:token_count=12"], "output_dir": str(tmp_path / "run")}
    settings |= {"critic_model_name_or_path": None, "max_steps": 1, "rollout_batch_size": 8, "minibatch_size": 4}
    settings |= {"eval_completions": 8, "max_completion_length": 4, "show": 0, "cpu_threads": 1}
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "film {i}"}}\n' for i in range(20)))
    value = str(tmp_path / value) if name == "dataset_name" else value
    for step, change in ((1, {}), (2, {name: value})):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings | {"max_steps": step} | change))
        done = subprocess.run(
            [sys.executable, "recipes/ppo_sentiment.py", "--config", str(tmp_path / "a.yaml")],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert (done.returncode == 0) == (step == 1), done.stderr
    assert "run_settings" in done.stderr and len(rows_of(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--reward_funcs", "toy:nothing"], "nothing"),
        (["--rollout_batch_size", "10", "--minibatch_size", "4"], "minibatch_size=4"),
    ],
)
def test_bad_input_names_the_culprit(tmp_path, flags, culprit):
    command = [sys.executable, "recipes/ppo_sentiment.py", "--config", "recipes/configs/tiny_reviews.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run"), *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and culprit in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
