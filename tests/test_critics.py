"""A critic that is a model of its own: what it starts as, and whether it reads the policy's tokens."""

import copy
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from builders import MODELS, VOCAB, critic_of, encode, gpt2, make_trainer, read, trained
from fakes import LETTERS, letter_tokenizer, tiny_gpt2, tiny_tokenizer
from transformers import (
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

from lmppo.models import ActorCritic
from lmppo.models.critics import load_critic

# --- what it starts as -----------------------------------------------------------------------------------------------


def values_of(critic):
    ids, mask = encode("abc", "d")
    return read(ActorCritic(gpt2(), critic), ids, mask, ids, mask)[1]


@pytest.mark.parametrize("family", MODELS)
def test_a_critic_from_a_language_model_starts_at_zero_on_its_trunk(tmp_path, family):
    MODELS[family](seed=4).save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path), MODELS[family]())
    assert values_of(critic).eq(0).all()
    trunk = MODELS[family](seed=4).base_model.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in critic.base_model.state_dict().items())


def test_a_critic_from_a_reward_model_starts_with_its_score(tmp_path):
    torch.manual_seed(2)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    scorer = GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB, num_labels=1, pad_token_id=0, **sizes))
    scorer.save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path), gpt2())
    ids = torch.tensor([[1, 2, 3, 4]])  # the state before a completion's first token is the whole prompt
    with torch.no_grad():
        value = read(ActorCritic(gpt2(), critic), ids, ids.bool(), torch.tensor([[5]]), torch.tensor([[True]]))[1]
        torch.testing.assert_close(value[0, 0], scorer.eval()(input_ids=ids).logits[0])


def test_a_critic_from_a_classifier_of_two_labels_starts_with_its_log_odds(tmp_path):
    torch.manual_seed(2)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    scorer = GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB, num_labels=2, pad_token_id=0, **sizes))
    scorer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        values = read(ActorCritic(gpt2(), load_critic(str(tmp_path), gpt2())), ids, ids.bool(), ids, ids.bool())[1]
        p = scorer.eval()(input_ids=ids).logits[0].softmax(-1)
    torch.testing.assert_close(values[0, 0, 0], (p[1] / p[0]).log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_labels", [1, 2])
def test_values_are_the_rewards_of_the_prefixes_and_survive_saving(tmp_path, n_labels, capsys):
    torch.manual_seed(0)
    config = tiny_gpt2().config
    config.num_labels = n_labels
    config.problem_type = "single_label_classification" if n_labels == 2 else None
    scorer = GPT2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(tmp_path / "scorer")
    policy = tiny_gpt2(seed=1)
    capsys.readouterr()
    critic = load_critic(str(tmp_path / "scorer"), policy)
    assert "MISSING" not in capsys.readouterr().err, "no alarm about a head that is set right here"

    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        _, values = read(ActorCritic(policy, critic), ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
        for t in range(5):
            logits = scorer(input_ids=ids[:, : 4 + t]).logits
            reward = logits[:, -1] - logits[:, 0] if n_labels == 2 else logits[:, 0]
            torch.testing.assert_close(values[:, t, 0], reward, atol=1e-5, rtol=1e-5)
    critic.save_pretrained(tmp_path / "critic")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, critic(input_ids=ids).logits)


def test_a_saved_critic_comes_back_whole(tmp_path):
    critic = critic_of()
    critic.save_pretrained(tmp_path)
    torch.testing.assert_close(values_of(load_critic(str(tmp_path), gpt2())), values_of(copy.deepcopy(critic)))


def test_a_critic_with_several_labels_is_refused():
    critic = critic_of()
    critic.config.num_labels = 3
    with pytest.raises(ValueError, match="critic has 3 labels; expected 1"):
        load_critic(critic, gpt2())


def test_a_named_critic_with_the_wrong_number_of_labels_is_refused(tmp_path):
    """It would get a random head otherwise."""
    critic_of(num_labels=1).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="has 1 labels; expected 3, one per reward stream"):
        load_critic(str(tmp_path / "one"), gpt2(), n_streams=3)
    assert load_critic(str(tmp_path / "one"), gpt2()).config.num_labels == 1


# --- whether it reads the policy's tokens ----------------------------------------------------------------------------


def saved(path: Path, tokenizer=None, **settings) -> str:
    """A critic in a directory, with a tokenizer beside it if one is given."""
    critic_of(**settings).save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)


def load(critic, **kwargs):
    """The critic for a policy that reads `<|endoftext|>` and eleven letters."""
    return load_critic(critic, gpt2(), tokenizer=letter_tokenizer(), **kwargs)


SWAPPED = "bacdefghijk"
FITS = {"the same tokens": (None, 12), "a token added for padding": ("<pad>", 13), "room for more": (None, 40)}
DIFFERS = {
    "two ids swapped": (SWAPPED, 12, r"2 of the policy's 12 tokens .*'a' is 1, and 2 there; 'b' is 2, and 1 there"),
    "a token it lacks": (LETTERS[:-1], 12, r"1 of the policy's 12 tokens .*\('k' is 11, and unknown there\)"),
    "more at the end": (LETTERS + "lm", 14, r"cuts text into 2 tokens that the policy's lacks \('l', 'm'\)"),
    "one more in front": ("x" + LETTERS, 13, r"11 of the policy's 12 tokens .*'a' is 1, and 2 there"),
}


@pytest.mark.parametrize("auto", ["", "auto:"])
@pytest.mark.parametrize("case", FITS)
def test_a_critic_that_knows_the_policys_tokens_is_used(tmp_path, capsys, case, auto):
    added, rows = FITS[case]
    tokenizer = letter_tokenizer() if added is None else letter_tokenizer(pad_token=added)
    assert len(tokenizer) == 12 + (added is not None)
    path = saved(tmp_path / "critic", tokenizer, vocab_size=rows)
    torch.testing.assert_close(values_of(load(auto + path)), values_of(critic_of(vocab_size=rows)))
    assert capsys.readouterr().out == (f"Critic: {path!r}, which reads the policy's tokens.\n" if auto else "")


@pytest.mark.parametrize("case", DIFFERS)
def test_a_critic_of_other_tokens_is_refused_whatever_its_size(tmp_path, case):
    letters, rows, message = DIFFERS[case]
    path = saved(tmp_path / "critic", letter_tokenizer(letters), vocab_size=rows)
    with pytest.raises(ValueError, match=rf"critic '{path}' .*{message}.*Leave critic out.*'auto:{path}'"):
        load(path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "critic")


@pytest.mark.parametrize("case", DIFFERS)
def test_a_critic_of_other_tokens_is_left_where_it_is_only_asked_for_if_it_fits(tmp_path, capsys, case):
    letters, rows, message = DIFFERS[case]
    path = saved(tmp_path / "critic", letter_tokenizer(letters), vocab_size=rows)
    assert load("auto:" + path) is None
    printed = capsys.readouterr().out
    assert (
        printed.startswith(f"Critic: a value head on the policy's trunk, not {path!r}: ") and printed.count("\n") == 1
    )
    assert re.search(message, printed)


def test_a_larger_critic_of_another_family_is_refused(tmp_path):
    """The case that sizes alone let pass: the critic knows more tokens, and every id means something else."""
    path = saved(tmp_path / "critic", tiny_tokenizer(), vocab_size=257)
    with pytest.raises(ValueError, match="11 of the policy's 12 tokens"):
        load(path)


@pytest.mark.parametrize("auto", ["", "auto:"])
@pytest.mark.parametrize("name", ["no-such-directory", "no/such-model", "a/path/that/is/nowhere", ""])
def test_a_name_that_leads_nowhere_is_an_error(tmp_path, monkeypatch, auto, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"Could not load a model configuration from '{name}'"):
        load(auto + name)


@pytest.mark.parametrize("family", MODELS)
def test_without_a_tokenizer_beside_it_auto_is_the_value_head(tmp_path, capsys, family):
    path = saved(tmp_path / "critic", family=family)
    assert load("auto:" + path) is None
    assert f"not {path!r}: their tokens could not be compared, as no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("rows, line", [(12, ""), (13, "Critic: it knows 13 tokens and the policy 12; their tokens")])
def test_without_a_tokenizer_beside_it_sizes_decide_and_unequal_ones_are_told(tmp_path, capsys, family, rows, line):
    path = saved(tmp_path / "critic", family=family, vocab_size=rows)
    for critic in (path, critic_of(family, vocab_size=rows)):
        assert load(critic).get_input_embeddings().num_embeddings == rows
        printed = capsys.readouterr().out
        assert printed.startswith(line) and printed.count("\n") == bool(line)


def test_a_loaded_critic_is_compared_by_the_tokenizer_it_came_with(tmp_path):
    same = GPT2ForTokenClassification.from_pretrained(saved(tmp_path / "same", letter_tokenizer()))
    torch.testing.assert_close(values_of(load(same)), values_of(same))
    other = GPT2ForTokenClassification.from_pretrained(saved(tmp_path / "other", letter_tokenizer(SWAPPED)))
    with pytest.raises(ValueError, match="2 of the policy's 12 tokens"):
        load(other)


def test_the_policys_tokenizer_is_the_one_beside_its_weights_unless_given(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "policy")
    letter_tokenizer().save_pretrained(tmp_path / "policy")
    policy = type(gpt2()).from_pretrained(tmp_path / "policy")
    same, other = saved(tmp_path / "a", letter_tokenizer()), saved(tmp_path / "b", letter_tokenizer(SWAPPED))
    assert load_critic("auto:" + same, policy) is not None and load_critic("auto:" + other, policy) is None
    assert load_critic("auto:" + other, policy, tokenizer=letter_tokenizer(SWAPPED)) is not None
    capsys.readouterr()
    assert load_critic("auto:" + same, gpt2()) is None
    assert "the policy has no tokenizer" in capsys.readouterr().out


def test_a_critic_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"critic knows 5 tokens and the policy 12.*tokenizer"):
        load_critic(critic_of(vocab_size=5), gpt2())


@pytest.mark.parametrize("auto", ["", "auto:"])
def test_a_critic_with_too_few_rows_for_its_own_tokenizer_is_refused(tmp_path, auto):
    path = saved(tmp_path / "critic", letter_tokenizer(), vocab_size=5)
    with pytest.raises(ValueError, match=r"critic knows 5 tokens and the policy 12"):
        load(auto + path)


def test_auto_does_not_forgive_the_wrong_number_of_labels(tmp_path):
    path = saved(tmp_path / "critic", letter_tokenizer())
    with pytest.raises(ValueError, match="has 1 labels; expected 3"):
        load("auto:" + path, n_streams=3)


class Hub(BaseHTTPRequestHandler):
    """A Hub that has nothing, and counts who asks."""

    asked: list[str] = []

    def answer(self):
        self.asked.append(self.path)
        self.send_error(404)

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


ASK = """
import sys
from builders import critic_of, gpt2
from fakes import letter_tokenizer
from lmppo.models.critics import load_critic
critic = critic_of()
critic.config._name_or_path = "someone/a-model"
load_critic(critic if sys.argv[1] == "object" else "someone/a-model", gpt2(), tokenizer=letter_tokenizer())
"""


@pytest.mark.parametrize("kind", ["object", "name"])
def test_for_a_critic_in_memory_the_hub_is_not_asked(tmp_path, kind):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    done = subprocess.run([sys.executable, "-c", ASK, kind], env=environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert (done.returncode == 0) == (kind == "object"), done.stderr
    assert bool(Hub.asked) == (kind == "name"), "a name is looked up there, so the server does count"


# --- in a run --------------------------------------------------------------------------------------------------------


def test_the_run_records_the_critic_it_used(tmp_path, capsys):
    path = saved(tmp_path / "critic", letter_tokenizer())
    trainer = trained(tmp_path / "used", critic="auto:" + path, max_steps=1)
    assert trainer.actor_critic.critic is not None and trainer.actor_critic.value_head is None
    assert yaml.safe_load((tmp_path / "used" / "run_config.yaml").read_text())["critic"] == path

    other = saved(tmp_path / "other", letter_tokenizer(SWAPPED))
    trainer = trained(tmp_path / "head", critic="auto:" + other, max_steps=1)
    assert trainer.actor_critic.critic is None and trainer.actor_critic.value_head is not None
    assert "critic" not in yaml.safe_load((tmp_path / "head" / "run_config.yaml").read_text())
    with pytest.raises(ValueError, match="2 of the policy's 12 tokens"):
        make_trainer(tmp_path / "refused", critic=other)
