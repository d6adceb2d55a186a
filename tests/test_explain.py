"""Saved rollouts and `lmppo explain`: the numbers are those of the math, and what a model wrote is never obeyed."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from builders import PROMPTS, gpt2, make_samples, trained, with_mask, with_values
from fakes import letter_tokenizer, tiny_tokenizer
from rich.cells import cell_len

from lmppo.cli import main
from lmppo.collector import ScoredRollout
from lmppo.config import PPOConfig, RewardStream
from lmppo.explain import (
    explain,
    find_saved,
    load_saved_rollouts,
    make_report,
    render_page,
    save_rollouts,
    token_texts,
)
from lmppo.explain.page import colour_scale, visible
from lmppo.functional import clip_fraction, clipped_policy_loss, gae, kl_shaped_rewards, masked_whiten, rewards_to_go
from lmppo.models import ActorCritic
from lmppo.records import Experience, Rollout
from lmppo.run.checkpoint import CheckpointError, checkpoint_dir

ROOT = Path(__file__).parent.parent
KEPT = 4
STREAMS = [RewardStream("taste", gamma=0.9, lam=0.5, weight=2.0), RewardStream("kl")]


@dataclasses.dataclass
class Parts:
    """What a trainer has in its hands when it saves."""

    scored: ScoredRollout
    experience: Experience
    rewards: torch.Tensor
    new_logprobs: torch.Tensor
    config: PPOConfig

    def save(self, directory, **kwargs):
        directory.mkdir(parents=True)
        parts = (self.scored, self.experience, self.rewards, self.new_logprobs, self.config)
        save_rollouts(directory, *parts, letter_tokenizer(), **({"rows": KEPT, "streams": STREAMS} | kwargs))
        return directory


def make_parts(**settings) -> Parts:
    """Completions of a tiny GPT-2 with two reward streams; the estimate is put together by hand."""
    config = PPOConfig(kl_coef=0.1, lam=0.8, truncation="bootstrap", **settings)
    samples = make_samples(with_values(ActorCritic(gpt2())), seed=1)
    mask, shape = samples.completion_mask, samples.completion_mask.shape
    assert samples.ended[:KEPT].any() and not samples.ended[:KEPT].all(), "completions of both kinds are wanted"
    draw = torch.Generator().manual_seed(1)

    def noise(*size):
        return torch.randn(*size, generator=draw)

    values = torch.cat([samples.values, noise(*shape, 1)], dim=-1)
    ref_logprobs = samples.logprobs + 0.3 * noise(*shape)
    kl = torch.where(mask, samples.logprobs - ref_logprobs, 0.0)
    rollout = Rollout(
        **vars(samples) | {"values": values},
        ref_logprobs=ref_logprobs,
        ref_support_logprobs=torch.zeros(shape),
        scores=torch.stack([noise(*shape), torch.zeros(shape)], dim=-1),
        kl_penalty=kl,
        bootstrap_values=torch.where(samples.ended[:, None], 0.0, noise(len(mask), 2)),
    )
    streams = [(rollout.scores[..., 0], 0.0), (rollout.scores[..., 1], config.kl_coef)]
    rewards = torch.stack([kl_shaped_rewards(score, kl, mask, kl_coef=coef) for score, coef in streams], dim=-1)
    advantages, returns = zip(
        *(
            gae(
                rewards[..., k],
                values[..., k],
                mask,
                gamma=gamma,
                lam=lam,
                bootstrap_values=rollout.bootstrap_values[:, k],
            )
            for k, (gamma, lam) in enumerate([(0.9, 0.5), (config.gamma, config.lam)])
        ),
        strict=True,
    )
    whitened = masked_whiten(sum(advantages), mask)
    return Parts(
        scored=ScoredRollout(
            rollout,
            PROMPTS,
            letter_tokenizer().batch_decode(rollout.tokens.counted_ids(), skip_special_tokens=True),
            ["f"],
            noise(6, 1),
            {},
            {},
        ),
        experience=Experience.from_rollout(rollout, whitened, torch.stack(returns, dim=-1)),
        rewards=rewards,
        new_logprobs=samples.logprobs + 0.5 * noise(*shape),
        config=config,
    )


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """A run with checkpoints of steps 10 and 20 that hold rollouts, and of step 30 that holds none."""
    root = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        parts.save(checkpoint_dir(root, step))
    checkpoint_dir(root, 30).mkdir()
    return root


@pytest.fixture(scope="module")
def saved(run):
    return load_saved_rollouts(checkpoint_dir(run, 20))


@pytest.fixture(scope="module")
def report(saved):
    return make_report(saved, Path("run/checkpoints/step-000020"))


def column(report, name):
    """A column's numbers, all tokens of all rows in order."""
    return torch.tensor([token[name] for c in report["completions"] for token in c["tokens"]])


def counted(tensor, parts):
    return tensor[:KEPT][parts.scored.rollout.completion_mask[:KEPT]]


def test_what_was_saved_comes_back_to_the_bit(parts, saved):
    rollout, experience = parts.scored.rollout, parts.experience
    for name in ("completion_ids", "ended", "logprobs", "ref_logprobs", "values", "scores", "bootstrap_values"):
        record = rollout.tokens if name == "completion_ids" else rollout
        assert torch.equal(getattr(saved, name), getattr(record, name)[:KEPT]), name
    assert torch.equal(saved.advantages, experience.advantages[:KEPT])
    assert torch.equal(saved.returns, experience.returns[:KEPT])
    assert torch.equal(saved.rewards, parts.rewards[:KEPT]) and torch.equal(saved.mask, saved.learned)
    assert saved.completions == parts.scored.completions[:KEPT] and saved.prompts == PROMPTS[:KEPT]
    assert saved.streams == ["taste", "kl"] and saved.gammas == [0.9, 1.0]
    assert saved.lams == [0.5, 0.8] and saved.weights == [2.0, 1.0]
    assert saved.settings == parts.config.to_dict()


def test_fewer_rows_than_asked_for_are_all_kept(parts, tmp_path):
    assert len(load_saved_rollouts(parts.save(tmp_path / "c", rows=100)).completions) == len(PROMPTS)


def test_the_coefficient_in_force_is_the_one_that_is_shown(parts, tmp_path):
    assert load_saved_rollouts(parts.save(tmp_path / "c", kl_coef=0.25)).settings["kl_coef"] == 0.25


def test_what_does_not_fit_is_refused_when_it_is_saved(parts, tmp_path):
    with pytest.raises(ValueError, match=r"rewards has shape .*\(4, 8, 1\).*expected .*\(4, 8, 2\)"):
        dataclasses.replace(parts, rewards=parts.rewards[..., :1]).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"new_logprobs has shape \(2, 8\)"):
        dataclasses.replace(parts, new_logprobs=parts.new_logprobs[:2]).save(tmp_path / "b")


def test_the_numbers_are_those_of_the_math(parts, report):
    rollout, rewards = parts.scored.rollout, parts.rewards
    expected = {
        "old": rollout.logprobs,
        "new": parts.new_logprobs,
        "ref": rollout.ref_logprobs,
        "kl": rollout.logprobs - rollout.ref_logprobs,
        "reward": rewards.sum(-1),
        "value": rollout.values.sum(-1),
        "advantage": parts.experience.advantages,
        "return": parts.experience.returns.sum(-1),
        "ratio": (parts.new_logprobs - rollout.logprobs).exp(),
        "reward taste": rewards[..., 0],
        "value kl": rollout.values[..., 1],
        "return taste": parts.experience.returns[..., 0],
        "to_go": sum(
            rewards_to_go(
                rewards[..., k],
                rollout.completion_mask,
                gamma=gamma,
                bootstrap_values=rollout.bootstrap_values[:, k],
            )
            for k, gamma in enumerate([0.9, 1.0])
        ),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(column(report, name), counted(tensor, parts), msg=name)
    for row, completion in enumerate(report["completions"]):
        score = rollout.scores[row][rollout.completion_mask[row]].sum().item()
        assert completion["score"] == pytest.approx(score) and completion["ended"] == rollout.ended[row].item()


def test_td_residuals_look_one_token_ahead(parts, report):
    rollout = parts.scored.rollout
    expected = []
    for row in range(KEPT):
        last = int(rollout.tokens.lengths[row]) - 1
        for t in range(last + 1):
            upcoming = rollout.values[row, t + 1] if t < last else rollout.bootstrap_values[row]
            parts_of_sum = parts.rewards[row, t] + torch.tensor([0.9, 1.0]) * upcoming - rollout.values[row, t]
            expected.append(parts_of_sum.sum())
    torch.testing.assert_close(column(report, "td"), torch.stack(expected))
    torch.testing.assert_close(column(report, "td taste") + column(report, "td kl"), torch.stack(expected))


def test_the_formula_of_the_advantage_can_be_followed(parts, tmp_path):
    """Whoever has the report has all that the advantage was made of: each stream's numbers, gamma and lam."""
    saved = load_saved_rollouts(parts.save(tmp_path / "c", rows=len(PROMPTS)))
    report = make_report(saved, tmp_path)
    advantages = []
    for completion in report["completions"]:
        for t in range(len(completion["tokens"])):
            terms = 0.0
            for name, stream in report["streams"].items():
                decay = stream["gamma"] * stream["lam"]
                later = [token[f"td {name}"] for token in completion["tokens"][t:]]
                terms += sum(td * decay**i for i, td in enumerate(later))
            advantages.append(terms)
    raw = torch.tensor(advantages)
    torch.testing.assert_close(column(report, "advantage"), (raw - raw.mean()) / raw.std(correction=0))


@pytest.mark.parametrize("settings", [{}, {"clip_range_high": 0.05}, {"clip_range": 0.05, "dual_clip": 1.1}], ids=str)
def test_a_token_is_clipped_where_the_loss_has_no_gradient(settings, tmp_path):
    parts = make_parts(**settings)
    saved = load_saved_rollouts(parts.save(tmp_path / "c"))
    new = saved.new_logprobs.clone().requires_grad_()
    clips = {name: saved.settings[name] for name in ("clip_range", "clip_range_high", "dual_clip")}
    clipped_policy_loss(new, saved.logprobs, saved.advantages, saved.mask, **clips).sum().backward()
    flat = (new.grad == 0)[saved.mask]
    report = make_report(saved, tmp_path)
    assert torch.equal(column(report, "clipped"), flat) and flat.any() and not flat.all()
    band = {name: clips[name] for name in ("clip_range", "clip_range_high")}
    share = clip_fraction(saved.new_logprobs, saved.logprobs, saved.mask, **band)
    assert column(report, "outside").float().mean() == pytest.approx(share.item())


def test_nothing_is_clipped_without_a_clip(tmp_path):
    parts = make_parts(objective="kl_penalty")
    assert not load_saved_rollouts(parts.save(tmp_path / "c")).clipped.any()


def test_rows_that_were_not_learned_from_are_shown_as_such(parts, tmp_path):
    keep = parts.scored.rollout.completion_mask & parts.scored.rollout.ended[:, None]
    experience = with_mask(parts.experience, keep)
    saved = load_saved_rollouts(dataclasses.replace(parts, experience=experience).save(tmp_path / "c"))
    report = make_report(saved, tmp_path)
    for completion in report["completions"]:
        assert all(token["learned"] == completion["ended"] for token in completion["tokens"])
        assert all(token["td"] is not None for token in completion["tokens"])
        for name in ("new", "ratio", "outside", "clipped"):
            assert all((token[name] is None) != token["learned"] for token in completion["tokens"]), name
    assert render_page(report).count("unlearned") > render_page(make_report(saved, tmp_path, [0])).count("unlearned")


def test_tokens_within_a_gap_are_shown_without_numbers(saved, tmp_path):
    mask = saved.mask.clone()
    row = int(mask.sum(dim=1).argmax())
    mask[row, 1] = False
    report = make_report(dataclasses.replace(saved, mask=mask, learned=mask), tmp_path, [row])
    (completion,) = report["completions"]
    assert completion["tokens"][1]["advantage"] is None and completion["tokens"][1]["text"]
    assert completion["tokens"][0]["td"] == pytest.approx(
        sum(
            (saved.rewards[row, 0, k] + gamma * saved.values[row, 2, k] - saved.values[row, 0, k]).item()
            for k, gamma in enumerate(saved.gammas)
        ),
        abs=1e-5,
    )
    assert page_of(report).tokens.keys() == {f"{row}-{t}" for t in range(len(completion["tokens"]))}


def test_numbers_that_json_does_not_know_are_none(saved, tmp_path):
    values = saved.values.clone()
    row = int(saved.mask.sum(dim=1).argmax())
    values[row, 0, 0] = torch.nan
    report = make_report(dataclasses.replace(saved, values=values), tmp_path)
    assert report["completions"][row]["tokens"][0]["value"] is None
    json.dumps(report, allow_nan=False)
    assert page_of(report).plots == KEPT


# Texts of tokens


def texts_of(tokenizer, text, prompt="a"):
    return token_texts(tokenizer, tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"])


def test_the_last_piece_of_a_character_adds_it():
    tokenizer = tiny_tokenizer()
    assert texts_of(tokenizer, "ab <c\n") == ["a", "b", " ", "<", "c", "\n"]
    assert texts_of(tokenizer, "é") == ["", "é"]
    assert texts_of(tokenizer, "漢a🙂b") == ["", "", "漢", "a", "", "", "", "🙂", "b"]
    assert texts_of(tokenizer, "ok", prompt="é") == ["o", "k"]
    assert texts_of(letter_tokenizer(), "abc") == ["a", "b", "c"]
    end = [tokenizer.eos_token_id]
    assert token_texts(tokenizer, end, end) == [""]
    smile = tokenizer("🙂")["input_ids"]
    assert token_texts(tokenizer, smile[:2], smile[2:]) == ["", "🙂"], "begun by the prompt"
    assert token_texts(tokenizer, smile, [*smile[:2], *end]) == ["", "", ""], "never completed"


def test_a_space_before_a_word_belongs_to_the_word():
    class DropsTheFirstSpace:
        """Decodes as SentencePiece vocabularies do: the space before the first piece is lost."""

        def batch_decode(self, rows, **kwargs):
            return ["".join(["▁the", "▁cat", "s"][i] for i in row).replace("▁", " ").lstrip(" ") for row in rows]

    assert token_texts(DropsTheFirstSpace(), [0], [1, 2, 0]) == [" cat", "s", " the"]


def test_control_characters_are_shown():
    assert visible("a\nb\tc\x1b[31m\u202e\u200dé") == "a⏎\nb⇥\tc\\x1b[31m\\u202e\\u200dé"


# The page


class Page(HTMLParser):
    """The page, read by a parser: what is in it, and whether every element is closed."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes = [], [], []
        self.tokens, self.rows, self.text = {}, {}, []
        self.plots = 0

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "meta":
            return
        known = dict(attrs)
        self.open.append((tag, known))
        if "t" in (known.get("class") or "").split():
            assert known["id"] not in self.tokens
            self.tokens[known["id"]] = ""
        if tag == "tr" and "id" in known:
            self.rows[known["id"]] = []
        self.plots += tag == "svg"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("style", "script"):
            return
        self.text.append(data)
        for tag, known in self.open:
            if tag == "span" and known.get("id") in self.tokens:
                self.tokens[known["id"]] += data
            if tag == "tr" and known.get("id") in self.rows:
                self.rows[known["id"]].append(data)


def page_of(report) -> Page:
    page = Page()
    page.feed(render_page(report))
    page.close()
    assert not page.open, "every element is closed"
    return page


def test_the_page_has_every_token_once_with_its_row_of_numbers(report):
    page = page_of(report)
    tokens = {f"{c['row']}-{t}": token for c in report["completions"] for t, token in enumerate(c["tokens"])}
    assert page.tokens == {name: token["text"] or token["token"] for name, token in tokens.items()}
    for name, token in tokens.items():
        label, *cells = page.rows[f"row-{name}"]
        assert label == (token["text"] or token["token"])
        assert cells[3:8] == [f"{token[n]:.3f}" for n in ("kl", "reward", "value", "td", "advantage")]
        assert cells[list(report["columns"]).index("clipped")] == ("yes" if token["clipped"] else "no")
    assert page.rows.keys() == {f"row-{name}" for name in tokens}
    assert page.plots == KEPT


def test_line_ends_break_the_text_but_not_the_table(saved, tmp_path):
    broken = dataclasses.replace(saved, texts=[["\n\t" for _ in row] for row in saved.texts])
    page = page_of(make_report(broken, tmp_path))
    assert set(page.tokens.values()) == {"⏎\n⇥\t"} and {row[0] for row in page.rows.values()} == {"⏎⇥"}


def test_pieces_of_characters_are_shown_by_their_names(saved, tmp_path):
    pieces = dataclasses.replace(saved, texts=[[""] * len(row) for row in saved.texts])
    report = make_report(pieces, tmp_path)
    assert list(page_of(report).tokens.values()) == [name for row in saved.tokens for name in row]
    assert render_page(report).count(" piece") == sum(map(len, saved.tokens))


def test_the_page_explains_itself(report):
    text = "".join(page_of(report).text)
    for meaning in report["columns"].values():
        assert meaning in text
    for name in ("estimator", "gamma", "lam", "clip_range", "kl_coef", "baseline"):
        assert name in report["settings"] and f"{name}{report['settings'][name]}" in text
    assert "taste (gamma 0.9, lam 0.5, weight 2.0), kl (gamma 1.0, lam 0.8, weight 1.0)" in text
    assert "whitened" in report["columns"]["advantage"]


def test_lam_is_shown_where_it_means_something(saved):
    without = dataclasses.replace(saved, settings=saved.settings | {"estimator": "rewards_to_go"})
    report = make_report(without, Path("run"))
    assert "lam" not in report["settings"] and report["streams"]["taste"] == {"gamma": 0.9, "weight": 2.0}
    text = "".join(page_of(report).text)
    assert "taste (gamma 0.9, weight 2.0), kl (gamma 1.0, weight 1.0)" in text and "lam" not in text


def test_another_measure_of_the_kl_than_k1_has_a_column(saved, report):
    assert "kl_penalty" not in report["columns"] and "kl_form" not in report["settings"]
    other = dataclasses.replace(saved, settings=saved.settings | {"kl_form": "k3_both"}, kl_penalty=saved.logprobs**2)
    report = make_report(other, Path("run"))
    assert report["settings"]["kl_form"] == "k3_both" and "kl_form" in report["columns"]["kl_penalty"]
    assert torch.equal(column(report, "kl_penalty"), (saved.logprobs**2)[saved.mask])


def test_without_whitening_the_page_does_not_speak_of_it(saved, tmp_path):
    raw = dataclasses.replace(saved, settings=saved.settings | {"whiten_advantages": False})
    assert "whitened" not in make_report(raw, tmp_path)["columns"]["advantage"]


def test_colour_follows_the_advantage(report):
    page, scale = render_page(report), colour_scale(report)
    styles = {}
    for completion in report["completions"]:
        for t, token in enumerate(completion["tokens"]):
            tag = page.partition(f'<span id="{completion["row"]}-{t}"')[2].partition(">")[0]
            assert (" up" in tag) == (token["advantage"] > 0) and (" down" in tag) == (token["advantage"] <= 0)
            assert (" clipped" in tag) == token["clipped"]
            styles[abs(token["advantage"])] = float(tag.partition("--a:")[2].partition('"')[0])
    shades = [styles[size] for size in sorted(styles)]
    assert shades == sorted(shades) and shades[-1] == 0.65 and shades[0] < 0.3
    sizes = sorted(styles)
    assert sizes[len(sizes) // 2] < scale <= sizes[-1]
    assert f"≥ +{scale:.2f}" in page


def test_advantages_of_zero_are_no_division_by_zero(saved, tmp_path):
    nothing = dataclasses.replace(saved, advantages=torch.zeros_like(saved.advantages))
    assert 'style="--a:0.000"' in render_page(make_report(nothing, tmp_path))


def test_an_empty_completion_is_a_completion(saved, tmp_path):
    none = torch.zeros_like(saved.mask)
    empty = dataclasses.replace(saved, mask=none, learned=none, tokens=[[]] * KEPT, texts=[[]] * KEPT)
    page = page_of(make_report(empty, tmp_path))
    assert not page.tokens and not page.plots


ATTACK = "<script>alert('1')</script>\"><img src=x onerror=y>&amp;"


def test_nothing_that_a_model_wrote_is_markup(saved):
    texts = [[ATTACK for _ in row] for row in saved.texts]
    texts[1] = ["" for _ in texts[1]]
    attacked = dataclasses.replace(
        saved,
        prompts=[ATTACK] * KEPT,
        texts=texts,
        tokens=[[ATTACK for _ in row] for row in saved.tokens],
        streams=[ATTACK, "kl"],
        settings=saved.settings | {"estimator": ATTACK},
    )
    page = page_of(make_report(attacked, Path(ATTACK)))
    assert set(page.tokens.values()) == {ATTACK}
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(ATTACK) >= KEPT + 2 * len(page.tokens)


def test_the_page_needs_no_network(report):
    html = render_page(report)
    page = page_of(report)
    assert not {"link", "iframe", "img"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert "http" not in html and "url(" not in html and "@import" not in html and "innerHTML" not in html
    assert "prefers-color-scheme: dark" in html


# Finding a checkpoint, and the command


def test_the_newest_checkpoint_with_rollouts_is_taken(run):
    assert find_saved(run) == checkpoint_dir(run, 20)
    assert find_saved(run, 10) == checkpoint_dir(run, 10)
    assert find_saved(checkpoint_dir(run, 10)) == checkpoint_dir(run, 10)


def test_the_page_is_written_into_the_run(run, capsys, tmp_path):
    main(["explain", str(run)])
    written = run / "explain-step-000020.html"
    assert capsys.readouterr().out.strip() == str(written)
    assert page_of(make_report(load_saved_rollouts(checkpoint_dir(run, 20)), checkpoint_dir(run, 20))).tokens
    assert written.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    main(["explain", str(checkpoint_dir(run, 10))])
    assert (run / "explain-step-000010.html").exists() and not list(checkpoint_dir(run, 10).glob("*.html"))
    main(["explain", str(run), "--step", "10", "--row", "2", "--html", str(tmp_path / "x.html")])
    page = Page()
    page.feed((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert {name.partition("-")[0] for name in page.tokens} == {"2"}


def test_json_is_the_report(run, report, capsys):
    main(["explain", str(run), "--format", "json", "--row", "1", "3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["completions"] == [report["completions"][1], report["completions"][3]]
    assert printed["columns"] == report["columns"] and printed["name"] == "step-000020"


def printed_numbers(text):
    """One dictionary per completion: column -> its cells, in order; the streams' columns under their full names."""
    completions, headings, stream = [], [], ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")]
        if line.startswith("row "):
            completions.append({})
            stream = ""
        elif line.startswith("stream "):
            stream = line.removeprefix("stream")
        elif line.startswith("┃"):
            headings = cells[:2] + [heading + stream for heading in cells[2:]]
            assert headings[:2] == ["#", "token"] and not completions[-1].keys() & set(headings[2:])
            completions[-1] |= {heading: [] for heading in headings}
        elif line.startswith("│"):
            for heading, cell in zip(headings, cells, strict=True):
                completions[-1][heading].append(cell)
    return completions


def on_screen(monkeypatch, columns):
    """Standard output is a terminal so wide, or (None) a pipe."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if columns is not None:
        for name, value in {"FORCE_COLOR": "1", "COLUMNS": str(columns), "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)


def printed(capsys, columns):
    """What was printed, without its colours; no line is wider than the screen."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in text and max(map(cell_len, text.splitlines())) <= (columns or 240)
    return text


def with_three_streams(saved):
    """A third stream, and values of six digits."""
    per_stream = ("values", "scores", "rewards", "returns", "bootstrap_values")
    tensors = {name: getattr(saved, name) for name in per_stream}
    third = {"streams": ["a [b] kl"], "gammas": [0.5], "lams": [1.0], "weights": [-0.5]}
    return dataclasses.replace(
        saved,
        **{name: torch.cat([x, 1e5 * x[..., :1]], dim=-1) for name, x in tensors.items()},
        **{name: getattr(saved, name) + values for name, values in third.items()},
    )


@pytest.mark.parametrize("columns", [80, 100, None])
@pytest.mark.parametrize("change", [lambda saved: saved, with_three_streams], ids=["two", "three"])
def test_the_table_has_every_number_whole(saved, tmp_path, capsys, monkeypatch, change, columns):
    on_screen(monkeypatch, columns)
    monkeypatch.setattr("lmppo.explain.report.load_saved_rollouts", lambda directory: change(saved))
    (tmp_path / "rollouts.json").touch()
    explain(tmp_path, format="table")
    report, text = make_report(change(saved), tmp_path), printed(capsys, columns)
    shown = printed_numbers(text)
    assert len(shown) == KEPT
    for completion, columns_shown in zip(report["completions"], shown, strict=True):
        tokens = completion["tokens"]
        assert columns_shown.pop("#") == [str(t) for t in range(len(tokens))]
        assert columns_shown.pop("token") == [token["text"] or token["token"] for token in tokens]
        for name, cells in columns_shown.items():
            numbers = [token[name] for token in tokens]
            assert cells == [{True: "yes", False: "no"}[n] if isinstance(n, bool) else f"{n:.3f}" for n in numbers]
        assert columns_shown.keys() == report["columns"].keys()
        assert f"score {completion['score']:.3f}, kl {completion['kl']:.3f}" in text
    assert "taste (gamma 0.9, lam 0.5, weight 2.0)" in " ".join(text.split())


def test_long_tokens_are_folded_and_numbers_are_not(saved, tmp_path, capsys, monkeypatch):
    on_screen(monkeypatch, 80)
    nasty = dataclasses.replace(saved, texts=[["漢" * 30 for _ in row] for row in saved.texts])
    monkeypatch.setattr("lmppo.explain.report.load_saved_rollouts", lambda directory: nasty)
    (tmp_path / "rollouts.json").touch()
    explain(tmp_path, rows=[0], format="table")
    (shown,) = printed_numbers(printed(capsys, 80))
    assert "".join(shown["token"]) == "漢" * 30 * len(saved.texts[0])
    assert [cell for cell in shown["advantage"] if cell] == [
        f"{token['advantage']:.3f}" for token in make_report(nasty, tmp_path)["completions"][0]["tokens"]
    ]


def test_the_table_shows_control_characters(saved, tmp_path, capsys, monkeypatch):
    nasty = dataclasses.replace(saved, prompts=["\x1b[31m"] * KEPT, texts=[["\x1b[2J" for _ in r] for r in saved.texts])
    monkeypatch.setattr("lmppo.explain.report.load_saved_rollouts", lambda directory: nasty)
    (tmp_path / "rollouts.json").touch()
    explain(tmp_path, format="table")
    assert "\x1b" not in (output := capsys.readouterr().out) and "\\x1b[2J" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run 'nowhere'"),
        (["{empty}"], "has no checkpoint"),
        (["{run}", "--step", "15"], "no checkpoint for step 15. It has step-000010, step-000020, step-000030"),
        (["{run}", "--step", "30"], "no saved rollouts: train with save_rollouts=N"),
        (["{bare}"], "None of the 1 checkpoints .* train with save_rollouts=N"),
        (["{run}", "--row", "0", "4"], "no row 4: it has 4 saved rows, 0 to 3"),
        (["{run}", "--row", "-1"], "no row -1"),
        (["{run}/checkpoints/step-000010", "--step", "10"], "is a checkpoint: omit --step"),
        (["{run}", "--html", "{empty}/no/such/page.html"], "No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_a_remedy(run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    checkpoint_dir(tmp_path / "bare", 7).mkdir(parents=True)
    places = {"run": run, "empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    with pytest.raises(SystemExit, match=message) as caught:
        main(["explain", *(a.format(**places) for a in arguments)])
    assert str(caught.value).startswith("lmppo explain: ") and "\n" not in str(caught.value)


def test_html_goes_with_html_only(run, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", str(run), "--html", "x.html", "--format", "json"])
    assert caught.value.code == 2 and "--format json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format_version": 2}', None], ids=str)
def test_damage_is_named(parts, tmp_path, damage):
    directory = parts.save(tmp_path / "c")
    if damage is None:
        (directory / "rollouts.safetensors").write_bytes(b"x")
    else:
        (directory / "rollouts.json").write_text(damage)
    with pytest.raises(CheckpointError, match="are damaged"):
        load_saved_rollouts(directory)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, r"saved by a newer lmppo \(format 3\): upgrade"),
        (1, r"saved by an earlier lmppo \(format 1\), .* use that version, or train again with save_rollouts=N"),
    ],
)
def test_files_of_another_format_are_refused_with_a_remedy(parts, tmp_path, version, message):
    directory = parts.save(tmp_path / "c")
    texts = json.loads((directory / "rollouts.json").read_text())
    assert texts["format_version"] == 2
    (directory / "rollouts.json").write_text(json.dumps(texts | {"format_version": version}))
    with pytest.raises(CheckpointError, match=message):
        load_saved_rollouts(directory)
    with pytest.raises(SystemExit, match=message) as caught:
        main(["explain", str(directory)])
    assert "\n" not in str(caught.value)


def test_the_command_is_installed_and_help_is_quick():
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lmppo"].partition(
        ":"
    )
    assert getattr(importlib.import_module(module), function) is main
    code = "import sys; sys.argv[1:] = ['explain', '--help']; import runpy\n"
    code += "try: runpy.run_module('lmppo', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--html PATH" in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_from_the_trainer_to_the_page(tmp_path):
    """`save_rollouts` keeps completions with each checkpoint, and the command shows the newest."""
    trainer = trained(tmp_path, save_rollouts=3, save_steps=1, max_steps=2, kl_coef=0.1)
    saved = load_saved_rollouts(checkpoint_dir(tmp_path, 2))
    row = trainer.state.log_history[-1]
    assert len(saved.completions) == 3 and saved.settings["kl_coef"] == 0.1
    model = trainer.actor_critic.policy
    for i in range(3):
        n = int(saved.mask[i].sum())
        prompt = letter_tokenizer()(saved.prompts[i])["input_ids"]
        ids = torch.tensor([prompt + saved.completion_ids[i, :n].tolist()])
        with torch.no_grad():
            now = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = now.gather(-1, saved.completion_ids[i, :n, None])[:, 0]
        torch.testing.assert_close(saved.new_logprobs[i, :n], expected, atol=1e-5, rtol=1e-5)
    assert row["step"] == 2
    assert main(["explain", str(tmp_path)]) in (None, 0)
    assert "<html" in (tmp_path / "explain-step-000002.html").read_text()
