#!/usr/bin/env python3
"""Does lmppo train every causal language model of transformers, with the right numbers?

    OMP_NUM_THREADS=1 python tests/families/sweep.py [--only llama,mamba] [--checks abcdef] [--json out]

One line per family, one tiny random model each (hidden 32, 2 layers, vocabulary 96). Exit status 1 if any family has a
FAULT, 2 if a family could not be built. What is checked:

a  PPOTrainer, token-id prompts of several lengths, shared value head, 2 iterations: step-zero checks, finite metrics,
   policy moved, reference did not.
b  log-probabilities and values against the plain model fed one row at a time, without padding, masks, positions or
   cache (``model(input_ids)``), within 1e-4: the sampler with rows that go on, the sampler with rows that end and are
   dropped, and the update's forward pass, packed (p) where the model's rows can be.
c  a LoRA adapter (all-linear): a, b on the trained adapter, and final/ holds the merged weights.
d  a critic of its own of the same family (AutoModelForTokenClassification): a, and its values against single rows.
e  b again with prompts and completions well past the sliding window (or chunk); only families with one.
f  checkpoint at 2 of 4 steps, resumed in a fresh trainer: identical weights; final/ loads in plain transformers with
   identical logits; tied embeddings are still tied.
"""

import argparse
import contextlib
import copy
import inspect
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

torch.set_num_threads(1)
import transformers  # noqa: E402
from families import FAMILIES, GENERIC, WINDOW, V  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,  # noqa: E402
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from lmppo import PPOConfig, PPOTrainer  # noqa: E402
from lmppo.checks import StepZeroError  # noqa: E402
from lmppo.context import usable_context  # noqa: E402
from lmppo.models import ActorCritic, load_policy  # noqa: E402
from lmppo.prompts import pad_left  # noqa: E402
from lmppo.records import Tokens  # noqa: E402
from lmppo.sampling import SamplingParams, sample, uniform_noise  # noqa: E402

RUNS = Path(tempfile.mkdtemp(prefix="sweep-"))
PACKED: list[bool] = []  # whether this family's rows were packed
TOLERANCE = 1e-4
EOS = list(range(80, 92))  # 12 of 96 tokens end a completion: about one in eight
LENGTHS = [1, 3, 12, 5, 2, 7, 4, 9]
LORA = "llama gpt2 qwen2 mistral gemma2 phi3 gpt_neox opt bloom falcon cohere olmo2 mixtral stablelm mamba jamba bart".split()
RESUME = (
    "gpt2 llama llama:tied gemma2 gemma3_text qwen2 qwen3_moe mixtral gpt_neox opt bloom falcon mpt phi3 deepseek_v3 "
    "gpt_oss cohere2 gptj starcoder2 granitemoe olmoe glm4_moe qwen2_moe nanochat"
).split()


# --- tiny models -----------------------------------------------------------------------------------------------------


def tokenizer():
    vocab = {f"t{i}": i for i in range(V)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="t3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    )


def make_config(family, **more):
    model_type = family.split(":")[0]
    cls = type(AutoConfig.for_model(model_type)) if model_type not in {"gpt-sw3"} else transformers.GPT2Config
    fields = set(getattr(cls, "__dataclass_fields__", {}))
    own = dict(FAMILIES.get(family, {}))
    kwargs = {k: v for k, v in GENERIC.items() if k in fields} | own | more
    if isinstance(kwargs.get("text_config"), dict) and "_like" in kwargs["text_config"]:
        kwargs["text_config"] = make_config(kwargs["text_config"]["_like"]).to_dict()
    return cls(**kwargs)


def randomise(model, seed):
    """Weights large enough that context, positions and biases all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            if p.ndim >= 2 and not name.endswith(("A_log",)):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def build(family, seed=0, auto=AutoModelForCausalLM, **more):
    config = make_config(family, **more)
    torch.manual_seed(seed)
    if auto is AutoModelForCausalLM:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.split(":")[0]]
        model = AutoModelForCausalLM.from_config(config)
        assert type(model).__name__ == name, type(model).__name__
    else:
        model = auto.from_config(config)
    randomise(model, seed + 1)
    model.eval()
    return model


def prompts(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 80, (n,), generator=generator).tolist() for n in lengths]


def even(prompts, completions, completion_ids, **kwargs):
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def make_trainer(out, model, **settings):
    names = ("critic", "peft_config", "ref_model")
    rest = {n: settings.pop(n) for n in names if n in settings}
    shutil.rmtree(out, ignore_errors=True) if not settings.pop("keep", False) else None
    base = dict(
        max_steps=2,
        rollout_batch_size=8,
        minibatch_size=4,
        micro_batch_size=3,
        max_completion_length=8,
        ppo_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",  # a linear one knows how many steps are to come, and check f goes on for more
        disable_tqdm=True,
        use_cpu=True,
    )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = EOS
    args = PPOConfig(output_dir=str(out), **(base | settings))
    return PPOTrainer(model, even, args, [{"prompt": p} for p in prompts()], processing_class=tokenizer(), **rest)


# --- checks ----------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A number is not what it must be."""


def train_two(out, model, **settings):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    initial = copy.deepcopy(model)
    trainer = make_trainer(out, model, **settings)
    state = trainer.train()
    rows = state.log_history
    bad = [k for row in rows for k, v in row.items() if isinstance(v, float) and not torch.isfinite(torch.tensor(v))]
    if bad:
        raise Wrong(f"metrics not finite: {sorted(set(bad))}")
    first = rows[0]["first_ratio_error"]
    if first > 2e-5 or rows[1]["first_ratio_error"] > 1e-4:
        raise Wrong(f"first_ratio_error {first:.1e}, then {rows[1]['first_ratio_error']:.1e}")
    if abs(rows[0]["kl_to_ref"]) > 1e-4:
        raise Wrong(f"kl_to_ref at iteration 0 is {rows[0]['kl_to_ref']:.1e}")
    policy = trainer.actor_critic.policy
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    if "peft_config" not in settings:
        unread = ("vision", "cross_attn", "multi_modal", "audio", "embed_vision")  # what text does not reach
        trainable = {n: p for n, p in trainable.items() if not any(u in n for u in unread)}
        moved = [n for n, p in trainable.items() if not torch.equal(p, before[n])]
        if len(moved) < 0.5 * len(trainable):
            still = [n for n in trainable if n not in moved]
            raise Wrong(f"only {len(moved)} of {len(trainable)} parameters moved; still: {still[:4]}")
        ids = torch.tensor([prompts()[2]])
        empty = Tokens(ids[:, :8], torch.ones(1, 8, dtype=torch.bool), ids[:, 8:], torch.ones(1, 4, dtype=torch.bool))
        drift = (trainer.reference.logits(empty) - initial(input_ids=ids).logits[:, 7:-1]).abs().max()
        if drift > TOLERANCE:
            raise Wrong(f"the reference moved: its logits are off by {drift:.1e}")
    return trainer, rows


@torch.no_grad()
def alone(model, ids):
    """Log-probabilities (S, V) and last hidden states (S, H) of one row: the plain model, nothing but input_ids."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    hidden = (getattr(out, "hidden_states", None) or [None])[-1]
    if hidden is None or hidden.ndim != 3:  # of Gemma3n: one for each of its streams, which the trunk joins
        hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state
    return out.logits[0].float().log_softmax(-1), hidden[0]


@torch.no_grad()
def compare(actor_critic, plain, rows, n_time, eos, noise_seed=0):
    """Largest differences of sampler and forward pass from single rows."""
    ids, mask = pad_left(rows, max(map(len, rows)))
    params = SamplingParams(n_time, tuple(eos))
    s = sample(actor_critic, ids, mask, uniform_noise(noise_seed, 0, range(len(rows)), n_time), params)
    values, forward = actor_critic.values(s.tokens), actor_critic.logits(s.tokens).float().log_softmax(-1)
    last = actor_critic.last_values(s.tokens)
    worst = {"sampler": 0.0, "forward": 0.0, "values": 0.0}
    if actor_critic.packs:  # in lines, in which the longest row has room for others
        longest, context = int(s.tokens.attention_mask.sum(dim=1).max()), usable_context(plain)
        line_length = 2 * longest if context is None else min(2 * longest, context.length)
        lines = replace(s.tokens, line_length=line_length)
        packed = actor_critic.logits(lines).float().log_softmax(-1)
        worst["packed"] = (packed - forward)[s.completion_mask].abs().max().item()
        worst["packed values"] = (actor_critic.values(lines) - values).abs().max().item()
        PACKED.append(True)
    context, lengths = 0.0, []
    for i, prompt in enumerate(rows):
        completion = s.tokens.completion_ids[i][s.completion_mask[i]].tolist()
        lengths.append(len(completion))
        logp, hidden = alone(plain, prompt + completion)
        states = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        expected = logp[states]
        picked = expected[torch.arange(len(completion)), torch.tensor(completion)]
        n = len(completion)
        worst["sampler"] = max(worst["sampler"], (s.logprobs[i, :n] - picked).abs().max().item())
        worst["forward"] = max(worst["forward"], (forward[i, :n] - expected).abs().max().item())
        if actor_critic.critic is None:
            v = actor_critic.values_of(hidden)
        else:
            v = actor_critic.critic(input_ids=torch.tensor([prompt + completion])).logits[0]
        differences = [s.values[i, :n] - v[states], values[i, :n] - v[states], last[i] - v[-1]]
        worst["values"] = max(worst["values"], *(d.abs().max().item() for d in differences))
        if len(prompt) > 1:  # does the model look at what came before at all?
            other, _ = alone(plain, [(prompt[0] + 7) % 70 + 5, *prompt[1:], *completion])
            context = max(context, (other[states] - expected).abs().max().item())
    return worst, context, lengths


def check_numbers(model, rows, n_time, actor_critic=None):
    if actor_critic is None:
        actor_critic = ActorCritic(model)
        torch.manual_seed(5)
        torch.nn.init.normal_(actor_critic.value_head.weight, std=0.3)
    problems, notes = [], []
    for label, eos in (("", ()), ("dropping rows: ", EOS)):
        try:
            worst, context, lengths = compare(actor_critic, model, rows, n_time, eos)
            if eos and len(set(lengths)) < 2:
                worst, context, lengths = compare(actor_critic, model, rows, n_time, eos, noise_seed=1)
            if eos and len(set(lengths)) < 2:
                problems.append("test is blind: no row ended before another")
        except Exception as error:
            problems.append(label + describe(error))
            continue
        wrong = [f"{k} off by {v:.1e}" for k, v in worst.items() if not v <= TOLERANCE]
        if wrong:
            problems.append(label + ", ".join(wrong))
        if context < 1e-3:
            problems.append(f"test is blind: context changes log-probabilities by {context:.0e} only")
        notes.append(max(worst.values()))
    if problems:
        raise Wrong("; ".join(problems))
    return f"{max(notes):.0e}"


def check_a(family):
    _, rows = train_two(RUNS / family / "a", build(family))
    return f"{rows[0]['first_ratio_error']:.0e}"


def check_b(family):
    return check_numbers(load_policy(build(family)), prompts(), 10)


def check_c(family):
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = build(family)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer, _ = train_two(RUNS / family / "c", model, peft_config=peft, learning_rate=3e-2)
    policy = trainer.actor_critic.policy
    after = {n.replace(".base_layer", ""): p for n, p in policy.get_base_model().named_parameters()}
    for n, p in base.items():
        if n not in after or not torch.equal(after[n], p):
            raise Wrong(f"base weight {n} {'moved' if n in after else 'is missing'}")
    with torch.no_grad(), policy.disable_adapter():
        off = policy(input_ids=torch.tensor([prompts()[2]])).logits
    with torch.no_grad():
        on = policy(input_ids=torch.tensor([prompts()[2]])).logits
    if (on - off).abs().max() < 1e-3:
        raise Wrong("the adapter does nothing after training")
    note = check_numbers(policy, prompts(), 10)
    final = AutoModelForCausalLM.from_pretrained(RUNS / family / "c" / "final").eval()
    with torch.no_grad():
        merged = final(input_ids=torch.tensor([prompts()[2]])).logits
    if (merged - on).abs().max() > 1e-4:
        raise Wrong(f"final/ differs from the adapter's policy by {(merged - on).abs().max():.1e}")
    return note


def check_d(family):
    model = build(family)
    critic = build(family, seed=7, auto=AutoModelForTokenClassification, num_labels=1)
    trainer, _ = train_two(RUNS / family / "d", model, critic=critic)
    return check_numbers(trainer.actor_critic.policy, prompts(), 10, actor_critic=trainer.actor_critic)


def check_e(family):
    if WINDOW not in _windows(make_config(family)):
        return None
    return check_numbers(load_policy(build(family)), prompts([1, 20, 6, 7, 13, 2]), 24)


def _windows(config):
    names = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "sliding_window_size")
    found = {getattr(config.get_text_config(), n, None) for n in names}
    return found | ({WINDOW} if getattr(config, "local_attention", None) == 2 * WINDOW else set())


def check_f(family):
    out = RUNS / family
    whole = make_trainer(out / "f1", build(family), max_steps=4)
    whole.train()
    make_trainer(out / "f2", build(family), max_steps=2).train()
    resumed = make_trainer(out / "f2", build(family), max_steps=4, keep=True)
    with contextlib.redirect_stdout(io.StringIO()):
        resumed.train(resume_from_checkpoint=True)
    one, two = whole.actor_critic.state_dict(), resumed.actor_critic.state_dict()
    different = [n for n in one if not torch.equal(one[n], two[n])]
    if different:
        raise Wrong(f"resumed weights differ: {len(different)} of {len(one)}, {different[:3]}")
    policy = whole.actor_critic.policy
    final = AutoModelForCausalLM.from_pretrained(out / "f1" / "final").eval()
    ids = torch.tensor([prompts()[2]])
    with torch.no_grad():
        left, right = policy(input_ids=ids).logits, final(input_ids=ids).logits
    saved, mine = final.state_dict(), policy.state_dict()
    different = [n for n in mine if n not in saved or not torch.equal(mine[n], saved[n])]
    if different or (left - right).abs().max() > 1e-5:
        raise Wrong(
            f"final/ gives other logits in plain transformers: {(left - right).abs().max():.1e}, {different[:3]}"
        )
    if getattr(policy.config.get_text_config(), "tie_word_embeddings", False) and policy.get_output_embeddings():
        for name, m in (("policy", policy), ("final", final)):
            if m.get_output_embeddings().weight.data_ptr() != m.get_input_embeddings().weight.data_ptr():
                raise Wrong(f"{name}: embeddings are no longer tied")
    return "tied" if getattr(policy.config.get_text_config(), "tie_word_embeddings", False) else "ok"


CHECKS = {"a": check_a, "b": check_b, "c": check_c, "d": check_d, "e": check_e, "f": check_f}


# --- report ----------------------------------------------------------------------------------------------------------


def describe(error):
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/lmppo/" in f.filename]
    last = frames[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    if ours and ours[-1] is not last:
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} -> {where}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {where}: {text[:400]}"


def is_refusal(error):
    """Raised on purpose by lmppo while the trainer was built, before anything was sampled."""
    frames = traceback.extract_tb(error.__traceback__)
    built = any(f.filename.endswith("lmppo/trainer.py") and f.name == "__init__" for f in frames)
    on_purpose = "/lmppo/" in frames[-1].filename and (frames[-1].line or "").startswith("raise")
    return built and on_purpose and "context of -" not in str(error)


@torch.no_grad()
def transformers_alone(family):
    """Without lmppo: does the family's own cache agree with its full pass, and a left-padded row with the bare row?"""
    model, ids = build(family), prompts([14])[0]
    try:
        full, _ = alone(model, ids)
    except Exception as error:
        return f"the plain model cannot be run: {describe(error)}"
    positions = "position_ids" in inspect.signature(model.forward).parameters

    def step(start, stop, **cache):
        where = {"position_ids": torch.arange(start, stop)[None]} if positions else {}
        mask = torch.ones(1, stop, dtype=torch.long)
        return model(input_ids=torch.tensor([ids[start:stop]]), attention_mask=mask, use_cache=True, **where, **cache)

    try:
        out = step(0, 5)
        name = next(n for n in ("past_key_values", "cache_params", "state") if out.get(n) is not None)
        steps = [out.logits[0, -1]]
        for t in range(5, 14):
            out = step(t, t + 1, **{name: out[name]})
            steps.append(out.logits[0, -1])
        cached = f"{(torch.stack(steps).log_softmax(-1) - full[4:]).abs().max():.0e}"
    except StopIteration:
        cached = "impossible (no cache)"
    except Exception as error:
        cached = type(error).__name__
    try:
        padded = torch.tensor([[0, 0, 0, *ids]])
        inputs = {"input_ids": padded, "attention_mask": torch.tensor([[0] * 3 + [1] * 14]), "use_cache": False}
        if positions:
            inputs["position_ids"] = torch.tensor([[0, 0, 0, *range(14)]])
        off = (model(**inputs).logits[0, -14:].log_softmax(-1) - full).abs().max().item()
        padding = f"{off:.0e}"
    except Exception as error:
        padding = type(error).__name__
    return f"cached against full pass {cached}, left-padded against bare row {padding}"


def does_training_notice(family):
    """Numbers are wrong: does PPOTrainer stop when one micro-batch holds the whole rollout and no row ends early?"""
    model = build(family)
    trainer = make_trainer(RUNS / family / "s", model, minibatch_size=8, micro_batch_size=8)
    trainer.collector.params = SamplingParams(8, ())
    try:
        trainer.train()
    except StepZeroError:
        return "caught by the step-zero check"
    except Exception as error:
        return "crash: " + describe(error)
    return "NOT NOTICED: two iterations trained on wrong numbers"


class Alarm(Exception):
    pass


def on_alarm(*_):
    raise Alarm("took more than 300 s")


def run_family(family, checks, seconds=0):
    """The state and a note of each check; a check that takes longer than so many seconds is at fault (0: none is)."""
    results = {}
    try:
        model = build(family)
    except Exception as error:
        return {"build": ("nobuild", describe(error))}
    has_critic = True
    try:
        AutoModelForTokenClassification.from_config(make_config(family, num_labels=1))
    except Exception:
        has_critic = False
    del model
    PACKED.clear()
    for name in checks:
        if name == "c" and family not in LORA or name == "f" and family not in RESUME or name == "d" and not has_critic:
            continue
        signal.alarm(seconds)
        try:
            note = CHECKS[name](family)
            results[name] = ("-", "") if note is None else ("ok", note)
        except Exception as error:
            if isinstance(error, Wrong):
                results[name] = ("FAULT", str(error))
            elif is_refusal(error):
                results[name] = ("refused", describe(error))
            elif isinstance(error, StepZeroError):
                results[name] = ("FAULT", "step-zero: " + describe(error))
            else:
                results[name] = ("FAULT", describe(error))
            if os.environ.get("SWEEP_TRACE"):
                traceback.print_exc()
        finally:
            signal.alarm(0)
        if name == "a" and results[name][0] == "refused":
            break
        if name == "b" and results[name][0] == "FAULT":
            results["transformers alone"] = ("-", transformers_alone(family))
        if name == "b" and results[name][0] == "FAULT" and "off by" in results[name][1]:
            try:
                results["b+"] = ("FAULT", does_training_notice(family))
            except Exception as error:
                results["b+"] = ("FAULT", describe(error))
    if PACKED:
        results["p"] = ("ok", "")
    shutil.rmtree(RUNS / family, ignore_errors=True)
    return results


def verdict_of(results):
    states = [s for s, _ in results.values()]
    return next((v for v in ("nobuild", "FAULT", "refused") if v in states), "right")


INTRODUCTION = """# Models

Every causal language model of transformers, as a tiny random model of two layers, in float32 on a CPU. "right": the
log-probabilities and values of padded batches, sampled over the cache (also when rows end before others) and read again by
the update, are those of the plain model on each row alone; the largest difference stands beside it. Checked too, where a
letter says so: (c) a LoRA adapter on all linear layers, (d) a critic of its own of the same family, (e) past its sliding
window, (f) exact resume and `final/`, (p) packed rows. "refused": `PPOTrainer` says so when it is built, before any work.

A model that is not here (code from the Hub, a new family) is probed in the same way when the trainer is built.

Made by `make families` on {date}: transformers {transformers}, torch {torch}. {summary}

| family | verdict | checked | largest difference, or why |
|---|---|---|---|
"""


def as_markdown(table):
    verdicts = {family: verdict_of(results) for family, results in table.items()}
    counts = {v: list(verdicts.values()).count(v) for v in dict.fromkeys(verdicts.values())}
    lines = []
    for family, results in sorted(table.items()):
        checked = "".join(k for k, (state, _) in results.items() if state == "ok")
        if verdicts[family] == "right":
            why = f"{max(float(note) for k, (_, note) in results.items() if k in 'abde' and note):.0e}"
        else:
            texts = [note for state, note in results.values() if state == verdicts[family] and note]
            why = texts[0].split(": ", 1)[-1].replace("|", "/")
        lines.append(f"| {family} | {verdicts[family]} | {checked} | {why} |\n")
    summary = f"{len(table)} configurations: " + ", ".join(f"{n} {v}" for v, n in counts.items()) + "."
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    return INTRODUCTION.format(summary=summary, **versions) + "".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--checks", default="abcdef")
    parser.add_argument("--json", default="")
    parser.add_argument("--markdown", default="", help="write the table for people to read here")
    parser.add_argument("--everywhere", action="store_true", help="c and f for every family")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(FAMILIES)
    if args.everywhere:
        LORA[:], RESUME[:] = chosen, chosen
    signal.signal(signal.SIGALRM, on_alarm)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    table, counts = {}, {"right": 0, "refused": 0, "FAULT": 0, "nobuild": 0}
    started = time.time()
    for family in chosen:
        t = time.time()
        results = table[family] = run_family(family, args.checks, seconds=300)
        verdict = verdict_of(results)
        counts[verdict] += 1
        cells = " ".join(f"{k}={s if s != 'ok' else n}" for k, (s, n) in results.items() if " " not in k)
        print(f"{verdict:8s} {family:24s} {cells}  ({time.time() - t:.1f} s)", flush=True)
        for k, (s, n) in results.items():
            if s != "ok" and n:
                print(f"           {k}: {n}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(table, indent=1))
        if args.markdown:
            Path(args.markdown).write_text(as_markdown(table))
    print(f"{len(chosen)} families: {counts}; {time.time() - started:.0f} s; transformers {transformers.__version__}")
    return 1 if counts["FAULT"] else 2 if counts["nobuild"] else 0


if __name__ == "__main__":
    sys.exit(main())
