"""Passwords and tokens: not one byte of them in what a run writes, prints or raises."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from builders import VOCAB, count_a, critic_of, gpt2, lora, make_config, make_trainer
from fakes import letter_tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

from lmppo.redaction import scrub, scrub_error, scrub_files, scrubbed
from lmppo.rewards import ClassifierReward
from lmppo.run.directory import changed_settings

ROOT = Path(__file__).parent.parent
CANARY = "s3cr3tc4n4ry"
URL = f"https://user:{CANARY}@host.example/some/model"


@pytest.mark.parametrize("text", [
    "https://user:{}@host/m", "https:/user:{}@host/m", "https://{}@host/m", "s3://key:{}@bucket", "user:{}@host",
    "https://user:{}/with@slash@host/m", "postgres+psycopg://u:{}@host:5432/db", "https://host/data?token={}&page=2",
    "https://host/x.json?a=1&X-Amz-Signature={}", "hub_token='{}'", '{{"WANDB_API_KEY": "{}"}}', "--hub_token {}",
    "['--hub_token', '{}']", "password: {}", "Authorization: Bearer {}", "hf_{}0123456789", "ghp_{}0123456789",
    "sk-proj-{}0123456789", "reason: password={}", "https: api_key={}", "token={}", "['--token', '{}']",
    "--wandb-api-key {}", "--hub_token={}",
])  # fmt: skip
def test_what_is_taken_out_of_a_text(text):
    clean = scrub(f"before {text.format(CANARY)} after")
    assert CANARY not in clean and clean.startswith("before ") and clean.endswith(" after")


@pytest.mark.parametrize("text", [
    "recipes/models/tiny-reviews-gpt2", "package.module:function", "path/to/file.py:function", "org/model",
    "http://localhost:6006/runs", "https://github.com/huggingface/trl/pull/7020", "eos_token='<|endoftext|>'",
    "classifier:org/model?output=logit&label=1", "C:\\models\\gpt2", "max_steps=3 must be at least 1.", "10 tokens: a, b",
    "auto:reward_models/tiny", "see https://host/@user/page", "arXiv 1707.06347", "the token: a",
    "toy:target_token=13", "classifier:org/m?output=logit&label=key", "org/hf_pretrained_model", "sk-learn-and-more-models",
    "{'image_token': '<image>'}", "max_tokens=10&author=me",
])  # fmt: skip
def test_what_stays_as_it_is(text):
    assert scrub(text) == text


def test_settings_are_scrubbed_by_their_names_as_well():
    given = {
        "hub_token": CANARY, "WANDB_API_KEY": CANARY, "token": CANARY, "env": {"AWS_SECRET_ACCESS_KEY": CANARY},
        "credentials": {"user": CANARY}, "list": [URL, {"password": CANARY}], "eos_token": "<s>", "prompt_tokens": 8,
        "pad_token": None, "hf_token": None, URL: 1,
    }  # fmt: skip
    clean = scrub(given)
    assert CANARY not in json.dumps(clean)
    kept = {name: clean[name] for name in ("eos_token", "prompt_tokens", "pad_token", "hf_token")}
    assert kept == {"eos_token": "<s>", "prompt_tokens": 8, "pad_token": None, "hf_token": None}
    assert given["hub_token"] == CANARY, "what is given stays as it is"


def test_an_error_and_its_causes_are_scrubbed():
    def fail():
        try:
            open(f"/nowhere/{URL}")
        except OSError as error:
            raise ValueError(f"not at {URL}") from error

    with pytest.raises(ValueError, match=r"not at https://\*\*\*@host.example") as caught:
        scrubbed(fail)()
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    looped = ValueError(URL)
    looped.__cause__, looped.__context__ = KeyError(URL), looped
    scrub_error(looped)
    assert CANARY not in f"{looped} {looped.__cause__}"


def test_descriptions_of_models_are_scrubbed_and_others_left(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps({"a": URL}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text(f"base_model: {URL}")
    scrub_files(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": "https://***@host.example/some/model"}
    assert CANARY in (tmp_path / "tokenizer.json").read_text()  # its texts are tokens
    assert CANARY not in (tmp_path / "adapter" / "README.md").read_text()


# --- every byte of a run ---------------------------------------------------------------------------------------------


def named(model):
    """A model that says it is from a URL with a password in it."""
    model.config._name_or_path = model.name_or_path = URL
    return model


def classifier():
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=VOCAB, num_labels=1, pad_token_id=0, **sizes)
    return named(GPT2ForSequenceClassification(config))


SECRETS = {
    "model_name_or_path": URL, "dataset_name": f"https://host/rows.jsonl?token={CANARY}", "hub_token": CANARY,
    "env": {"WANDB_API_KEY": CANARY}, "reward_funcs": [f"classifier:{URL}"], "note": f"password={CANARY}",
}  # fmt: skip


def trainer_with_secrets(directory, **rest):
    named_tokenizer = letter_tokenizer()
    named_tokenizer.name_or_path = URL
    reward = ClassifierReward(classifier(), letter_tokenizer(), output="logit")
    settings = {
        "model": named(gpt2()), "reward": [count_a, reward], "run_settings": SECRETS, "run_name": f"user:{CANARY}@host",
        "report_to": ["tensorboard"], "save_rollouts": 2, "log_completions": 2, "max_steps": 1,
    }  # fmt: skip
    return make_trainer(directory, tokenizer=named_tokenizer, **settings | rest)


def assert_clean(directory, *texts):
    """Neither the texts nor any byte or name below the directory hold the canary."""
    for text in texts:
        assert CANARY not in text
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert CANARY not in path.relative_to(directory).as_posix()
        assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["plain", "critic", "lora"])
def test_no_byte_of_a_run_holds_a_secret(tmp_path, capfd, kind):
    critic = named(critic_of())
    kinds = {"plain": {}, "critic": {"critic": critic}, "lora": {"peft_config": lora()}}[kind]
    trainer_with_secrets(tmp_path / "run", **kinds).train()
    out, err = capfd.readouterr()
    assert_clean(tmp_path, out, err)
    written = yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())
    assert written["model_name_or_path"] == "https://***@host.example/some/model"
    assert written["run_settings"]["hub_token"] == "***" and "***" in written["run_name"]
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_a_run_goes_on_with_another_password_and_says_nothing_of_it(tmp_path, capfd):
    trainer_with_secrets(tmp_path / "run").train()
    others = SECRETS | {"hub_token": "another-one", "note": f"password={CANARY}2"}
    trainer_with_secrets(tmp_path / "run", run_settings=others, max_steps=2, resume_from_checkpoint="auto").train()
    out, err = capfd.readouterr()
    assert "another-one" not in out + err
    assert_clean(tmp_path, out, err)


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_the_comparison_of_settings_shows_no_secret(tmp_path, capfd, resume):
    trainer_with_secrets(tmp_path / "run").train()
    again = trainer_with_secrets(
        tmp_path / "run", run_settings=SECRETS | {"dataset_name": f"{URL}2"}, learning_rate=1e-3, max_steps=2,
    )  # fmt: skip
    if resume == "auto":
        with pytest.raises(RuntimeError, match="holds a run with other settings") as caught:
            again.train(resume_from_checkpoint="auto")
        assert CANARY not in "".join(traceback.format_exception(caught.value))
    else:
        again.train(resume_from_checkpoint="true")
    out, err = capfd.readouterr()
    assert resume == "auto" or "Resuming with another learning_rate" in out
    assert_clean(tmp_path, out, err)


def test_settings_that_an_earlier_version_has_written_are_scrubbed_before_they_are_shown():
    changed = changed_settings({"model_name_or_path": URL, "seed": 1}, {"model_name_or_path": f"{URL}2", "seed": 1})
    assert changed and CANARY not in repr(changed)
    assert not changed_settings({"model_name_or_path": URL}, scrub({"model_name_or_path": URL}))


@pytest.mark.parametrize("arguments", [
    {"model": URL}, {"critic": URL}, {"critic": f"auto:{URL}"}, {"ref_model": URL}, {"reward": URL}, {"watch_funcs": [URL]},
    {"reward": f"user:{CANARY}@host"}, {"objective": URL}, {"resume_from_checkpoint": URL}, {"callbacks": URL},
    {"reward_streams": [{"name": "a", "reward_funcs": [URL]}]},
    {"reward_streams": [{"name": "a", "token": CANARY, "x": URL}]},
    {"report_to": URL},
])  # fmt: skip
def test_what_fails_says_no_secret(tmp_path, capfd, arguments):
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)) as caught:
        make_trainer(tmp_path / "run", **arguments).train()
    out, err = capfd.readouterr()
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + out + err
    assert "***" in str(caught.value)


def test_a_setting_of_the_wrong_kind_says_no_secret(tmp_path):
    with pytest.raises(TypeError, match=r"max_steps='https://\*\*\*@host") as caught:
        make_config(tmp_path, max_steps=URL)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


RECIPE = ["--model_name_or_path", "recipes/models/tiny-reviews-gpt2", "--reward_funcs",
          "toy:length=4", "--max_steps", "1", "--use_cpu", "true"]  # fmt: skip


@pytest.mark.parametrize("flags", [
    ["--model_name_or_path", URL], ["--hub_token", CANARY], ["--max_steps", URL],
])  # fmt: skip
def test_the_command_line_shows_no_secret(tmp_path, flags):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "This movie"}\n{"prompt": "I"}\n')
    command = [
        sys.executable,
        str(ROOT / "recipes" / "ppo_sentiment.py"),
        *RECIPE,
        "--dataset_name",
        str(rows),
        "--output_dir",
        str(tmp_path / "run"),
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode and "***" in done.stderr
    assert CANARY not in done.stdout + done.stderr
