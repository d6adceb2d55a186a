"""The benchmarks run, their tables go where they belong, and their formulas count what is there."""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lmppo import PPOConfig, PPOTrainer
from lmppo.prompts import load_tokenizer
from reward_models import load

ROOT = Path(__file__).parent.parent
TABLES = {
    "speed": ("speed",),
    "memory": ("memory", "fits"),
    "scaling": ("scaling",),
    "profile_iteration": ("profile",),
    "startup": ("startup",),
    "main_job": ("main-job",),
    "defaults": ("defaults-chain",),
    "learn": ("learn",),
}
QUICK = {
    "speed": ["--workloads", "W3", "W4", "--rounds", "2", "--iterations", "1", "--mkl"],
    "scaling": ["--sizes", "batch", "layers", "--iterations", "1"],
    "profile_iteration": ["--workloads", "W2", "W4", "--iterations", "1"],
}
CHAIN = {"vocab": 3, "prompt": 2, "length": 3, "layers": 1, "width": 8, "heads": 2, "pretraining": 5}
RUN = {"iterations": 2, "batch": 4, "minibatch": 2, "epochs": 2, "group": 2}
TINY = {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4, "prompt": (5, 5)}


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)


def module(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("script", TABLES)
def test_a_script_runs_and_replaces_its_tables(script, tmp_path):
    page = tmp_path / "page.md"
    markers = [f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->" for name in TABLES[script]]
    page.write_text("\n".join(["before", *markers, "after"]) + "\n")
    module(script).main(["--smoke", "--threads", "1", "--markdown", str(page), *QUICK.get(script, [])])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    for name in TABLES[script]:
        inside = text.partition(f"<!-- bench:{name} -->")[2].partition(f"<!-- /bench:{name} -->")[0]
        assert "| --- |" in inside and "threads: 1" in inside and f"torch {torch.__version__}" in inside
        assert json.loads(Path(f"runs/benchmarks/{name}.json").read_text())


def test_the_pages_have_places_for_all_tables():
    places = {"docs/speed.md": ("speed", "scaling", "profile", "startup"), "docs/memory.md": ("memory", "fits")}
    places["docs/results.md"] = ("main-job", "defaults-chain", "defaults-long-chain", "defaults-lexicon", "learn")
    found = {name for names in places.values() for name in names}
    assert found - {"defaults-long-chain", "defaults-lexicon"} == {name for names in TABLES.values() for name in names}
    for page, names in places.items():
        text = (ROOT / page).read_text()
        assert [name for name in names if text.count(f"<!-- bench:{name} -->") == 1] == list(names)
        assert [name for name in names if text.count(f"<!-- /bench:{name} -->") == 1] == list(names)


def test_a_page_without_a_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:speed -->\n")
    with pytest.raises(ValueError, match="/bench:speed"):
        module("measuring").write("speed", {}, "text", page)
    assert page.read_text() == "<!-- bench:speed -->\n"


def test_a_job_in_a_process_of_its_own(tmp_path):
    work = {**TINY, "eos_probability": 0.2, "unfrozen": 1, "epochs": 2}
    result = module("measuring").run_job("lmppo", {"work": work, "iterations": 2}, threads=1)
    assert result["threads"] == 1 and result["peak_gb"] > result["loaded_gb"] > 0.1
    assert len(result["rows"]) == 2
    for row in result["rows"]:
        assert 0 < row["generate"] and 0 < row["reference"] and 0 < row["update"] and row["probe"] > 0
        assert row["generate"] + row["reference"] + row["update"] < row["seconds"]
        assert 4 <= row["tokens"] <= 16


SLEEPER = """
import json, sys, time
sys.path.insert(0, sys.argv[0].rpartition("/")[0] + "/benchmarks")
from measuring import Recorder
recorder = Recorder()
for i in range(4):
    print("whatever a library prints")
    time.sleep(0.05)
    recorder.stop(i)
print(json.dumps(recorder.result()))
"""


def test_no_iteration_runs_beside_that_of_another_process(tmp_path, monkeypatch):
    measuring = module("measuring")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.setattr(measuring, "HERE", tmp_path)
    for name in ("run_a.py", "run_b.py"):
        (tmp_path / name).write_text(SLEEPER)
    jobs = dict.fromkeys(("a", "b", "of_nobody"), {})
    results = measuring.run_in_turns(jobs, threads=1, pythons=dict.fromkeys(jobs, sys.executable))
    assert "run_of_nobody.py" in results["of_nobody"]["error"]
    rows = [(row["ended"], row["seconds"], name) for name in "ab" for row in results[name]["rows"]]
    order = sorted(rows)
    assert [name for *_, name in order] == ["a", "b"] * 3
    for before, (ended, seconds, _) in zip(order, order[1:], strict=False):
        assert 0.05 < seconds < 10 and ended - seconds > before[0]


def test_a_system_that_fails_is_shown():
    speed, measuring = module("speed"), module("measuring")
    failed = measuring.run_job("of_nobody", {}, threads=1)
    assert "run_of_nobody.py" in failed["error"]
    good = {"rows": [{"seconds": 2.0, "tokens": 8, "probe": 1.0}], "peak_gb": 1.0, "loaded_gb": 0.5}
    slower = good | {"rows": [{"seconds": 6.0, "tokens": 8, "probe": 1.0}]}
    rows = speed.rows_of(
        "W2", {"lmppo": [good, failed], "trl_classic": [slower, good], "trl_experimental": [failed] * 2}
    )
    assert rows[0][2].startswith("2; 1 of 2 failed: ")
    assert rows[1][2:5] == ["4 (2..6)", "3", "3"], (
        "ratios are those of iterations side by side, in rounds that both have"
    )
    assert rows[2][2].startswith("2 of 2 failed: ") and failed["error"] in rows[2][2]


def test_memory_is_what_a_process_holds():
    measuring = module("measuring")
    before = measuring.memory_now("cpu")
    measuring.reset_peak("cpu")
    with mmap.mmap(-1, 200_000_000) as block:  # given back at once, unlike what torch frees
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert measuring.peak_memory("cpu") - before == pytest.approx(200e6, rel=0.1)
    measuring.reset_peak("cpu")
    assert measuring.peak_memory("cpu") - before < 100e6


@pytest.mark.parametrize("setting", [{}, {"critic": True}, {"lora": True}], ids=["shared", "critic", "lora"])
def test_the_formula_counts_what_a_trainer_holds(setting):
    footprint, run_lmppo, workloads = module("footprint"), module("run_lmppo"), module("workloads")
    work = workloads.Workload(**TINY)
    model = workloads.make_model(work)
    critic = {"critic": run_lmppo.make_critic(work)} if "critic" in setting else {}
    trainer = run_lmppo.make_trainer(
        model,
        work,
        lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
        settings={"use_cpu": True},
        lora="lora" in setting,
        **critic,
    )
    trainer.step()
    part = trainer.actor_critic
    policy = {p.data_ptr(): p for p in part.policy.parameters()}
    learning = [p for p in part.parameters() if p.grad is not None]
    moments = [t for state in trainer.optimizer.state.values() for name, t in state.items() if name != "step"]
    own = [p for p in trainer.reference.model.parameters() if p.data_ptr() not in policy]
    held = {
        "policy": policy.values(),
        "critic": [p for p in part.parameters() if p.data_ptr() not in policy],
        "gradients": learning,
        "optimizer": moments,
        "reference": [] if "lora" in setting else own,  # its copy of the adapter is a percent of a percent
    }
    sizes = {"batch": work.batch, "micro_batch": work.batch, "prompt": 5, "length": work.length}
    terms = footprint.footprint(work.config, footprint.Setting(**setting), 0.0, **sizes)
    assert {name: terms[name] for name in held} == {name: sum(4 * t.numel() for t in ts) for name, ts in held.items()}


def test_the_formula_counts_well_known_models():
    """The sizes that the models' cards give."""
    footprint, memory = module("footprint"), module("memory")
    known = (124_439_808, 494_032_768, 1_235_814_400, 1_543_714_304, 7_615_616_512, 8_030_261_248)
    counts = [footprint.parameters(config, footprint.Setting())["policy"] for config in memory.SHAPES.values()]
    assert tuple(counts) == known


def test_what_autograd_keeps_of_a_gpt2():
    """At least what products and attention read; at most that and every step of GELU and the norms. By the critic twice."""
    footprint, workloads = module("footprint"), module("workloads")
    config = workloads.Workload(**(TINY | {"width": 64})).config
    kept = footprint.kept_per_token(config, footprint.Setting())
    assert 14 <= kept / (4 * 64) <= 32
    both = footprint.kept_per_token(config, footprint.Setting(critic=True))
    assert both == pytest.approx(2 * kept, rel=0.02)


def test_useful_arithmetic_is_that_of_a_forward_pass():
    """Against torch's counter, which counts attention to later tokens as well."""
    workloads = module("workloads")
    work = workloads.Workload(**TINY, epochs=3)
    config = work.config
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    read = 5 + 4 - 1
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, read, dtype=torch.long), logits_to_keep=4)
    later = 4 * read * 4 * 2 * 16 * (read - (5 + 4) / 2)
    flops = workloads.useful_flops(work)
    assert flops["reference"] == flops["generate"] == counter.get_total_flops() - later
    assert flops["update"] == 9 * flops["reference"]
    head = 4 * 4 * 2 * 16 * work.vocab
    with FlopCounterMode(display=False) as counter:
        model.transformer(torch.zeros(4, read, dtype=torch.long))
    critic, own = counter.get_total_flops() - later, workloads.useful_flops(dataclasses.replace(work, critic=True))
    assert own["generate"] == flops["generate"] + critic and own["reference"] == flops["reference"]
    assert own["update"] == flops["update"] + 9 * critic
    frozen = workloads.useful_flops(dataclasses.replace(work, unfrozen=1))
    assert frozen["generate"] == flops["generate"]
    assert frozen["reference"] == (flops["reference"] - head) / work.layers + head
    assert frozen["update"] == work.epochs * (3 * frozen["reference"] - head)


def test_the_completions_of_w3_end_as_often_as_said():
    workloads = module("workloads")
    work = dataclasses.replace(workloads.WORKLOADS["W3"], layers=2)
    model = workloads.make_model(work)
    with torch.no_grad():
        ends = model(torch.tensor([workloads.make_prompts(work, 1)[0]])).logits.softmax(dim=-1)[0, :, 0]
    assert ends.mean().item() == pytest.approx(1 / 14, rel=0.15)


def test_a_power_law_is_found():
    scaling = module("scaling")
    exponent, error = scaling.power_law([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exponent == pytest.approx(1.5) and error == pytest.approx(0.0, abs=1e-6)
    _, error = scaling.power_law([1, 2, 4, 8], [1, 2, 3, 8])
    assert 0.05 < error < 0.5


def test_the_first_of_n_draws_is_the_recipes_evaluation(tmp_path, monkeypatch):
    """The same prompts, tokens, rewards and shares of distinct pairs; choosing among draws starts from there."""
    best_of_n, job = module("best_of_n"), yaml.safe_load((ROOT / "recipes/configs/tiny_reviews.yaml").read_text())
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    tokenizer = load_tokenizer(str(ROOT / job["model_name_or_path"]))
    train, held_out = module("prompt_data").load_prompts(job["dataset_name"], tokenizer, job["prompt_tokens"])
    settings = {name: job[name] for name in ("max_completion_length", "kl_coef", "seed")}
    trainer = PPOTrainer(
        model=str(ROOT / job["model_name_or_path"]),
        reward_funcs=[load(name) for name in job["reward_funcs"]],
        watch_funcs=[load(name) for name in job["watch_funcs"]],
        args=PPOConfig(output_dir=str(tmp_path), eval_completions=6, use_cpu=True, **settings),
        train_dataset=train,
        eval_dataset=held_out,
    )
    expected = trainer.evaluate()
    prompts = [list(row) for row in held_out["prompt"][:6]]
    one = best_of_n.measure([1], prompts, job["max_completion_length"], job["kl_coef"], 0)[1]
    names = {"kl": "kl_to_ref", "reward": "reward", "objective": "rlhf_reward", "distinct_2": "distinct_2"}
    names["vader"] = "rewards/lexicon/mean"
    assert {name: one[name] for name in names} == pytest.approx(
        {name: expected[f"eval_{metric}"] for name, metric in names.items()}, abs=1e-4
    )
    many = best_of_n.measure([1, 2, 4], prompts, job["max_completion_length"], job["kl_coef"], 0)
    assert many[1]["distinct_2"] == one["distinct_2"] and many[1]["reward"] < many[2]["reward"] < many[4]["reward"]
    assert many[4]["objective"] == pytest.approx(many[4]["reward"] - job["kl_coef"] * (math.log(4) - 3 / 4))


def test_the_best_of_each_group_is_kept():
    best_of_n = module("best_of_n")
    rewards = torch.tensor([[1.0, 5.0], [3.0, 2.0], [-1.0, 0.0], [-2.0, 4.0]])
    assert best_of_n.best_draws(rewards, 1).tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert best_of_n.best_draws(rewards, 2).tolist() == [[1, 0], [2, 3]]
    assert best_of_n.best_draws(rewards, 4).tolist() == [[1, 0]]


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_bound_is_the_kl_where_no_two_samples_are_equal(n):
    """Of a uniform number, the density of the largest of n is n * u^(n - 1)."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert module("best_of_n").kl_bound(n) == pytest.approx(
        (density * density.log()).nan_to_num().mean().item(), abs=1e-6
    )


def test_sizes_that_do_not_divide_the_largest_are_refused(capsys):
    with pytest.raises(SystemExit):
        module("main_job").main(["--sizes", "3", "4"])
    assert "--sizes [3, 4]: each must be 1 or more and divide the largest." in capsys.readouterr().err


def test_the_environments_of_the_others_are_made_once(tmp_path, monkeypatch):
    environments, calls = module("environments"), []

    def run(command, check):
        calls.append(command)
        Path(command[-1] if "venv" in command else tmp_path).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    python = environments.python_of("trl_classic", tmp_path)
    assert python == tmp_path / "trl_classic" / "bin" / "python" and "trl==0.11.4" in calls[1]
    environments.python_of("trl_classic", tmp_path)
    assert len(calls) == 2
    assert environments.python_of("lmppo", tmp_path) == sys.executable


@pytest.fixture
def chain():
    return module("chain_task").Chain(**CHAIN)


def every(number, vocab):
    """All rows of so many tokens."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=number)))


def paths(chain):
    """All prompts with all completions; under the chain: the probability of the prompt, and of the completion after it."""
    tokens = every(chain.prompt + chain.length, chain.vocab)
    steps = chain.transitions[tokens[:, :-1], tokens[:, 1:]]
    start = steps[:, : chain.prompt - 1].prod(dim=1) / chain.vocab
    return tokens, start, steps[:, chain.prompt - 1 :].prod(dim=1)


def test_the_chains_completions_earn_0_on_average_with_a_standard_deviation_of_1_5(chain):
    tokens, start, rest = paths(chain)
    assert (start * rest).sum().item() == pytest.approx(1.0)
    rewards = chain.rewards(tokens[:, chain.prompt :]).double()
    mean = (start * rest * rewards).sum()
    assert mean.item() == pytest.approx(0.0, abs=1e-6)
    assert (start * rest * (rewards - mean) ** 2).sum().sqrt().item() == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("price", [0.2, 0.5, 2.0])
def test_the_optimum_is_that_of_all_completions(chain, price):
    """The best policy is proportional to p * exp(reward / price): its reward, its KL, and that no other is better."""
    tokens, start, rest = paths(chain)
    rewards = chain.rewards(tokens[:, chain.prompt :]).double()
    of_prompt = (chain.vocab**chain.prompt, -1)  # the prompt's tokens come first
    logits = (rest.log() + rewards / price).view(of_prompt)
    best = logits.softmax(dim=1)
    reward = (start.view(of_prompt) * best * rewards.view(of_prompt)).sum().item()
    kl = (start.view(of_prompt) * best * (best.log() - rest.log().view(of_prompt))).sum().item()
    expected = {"objective": reward - price * kl, "kl": kl, "reward": reward}
    assert chain.optimum(price) == pytest.approx(expected, abs=1e-5)
    other = (logits + 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).softmax(dim=1)
    gain = rewards.view(of_prompt) - price * (other.log() - rest.log().view(of_prompt))
    assert (start.view(of_prompt) * other * gain).sum().item() < expected["objective"]


def models_of(chain, folder):
    """The chain's model, and another one."""
    chain.make_model(folder / "model")
    model, other = (module("learn_task").load_model(folder / "model") for _ in range(2))
    with torch.no_grad():
        other.lm_head.weight.mul_(-20.0)
    return model, other


def completions_of(model, chain):
    """All prompts with all completions; the probability of the completion under the model."""
    tokens = every(chain.prompt + chain.length, chain.vocab)
    with torch.no_grad():
        logprobs = model(input_ids=tokens).logits.double().log_softmax(dim=-1)[:, :-1]
    return tokens, logprobs.gather(2, tokens[:, 1:, None])[:, chain.prompt - 1 :, 0].sum(dim=1).exp()


def test_the_kl_along_samples_is_that_of_all_completions(chain, tmp_path):
    reference, model = models_of(chain, tmp_path)
    tokens, new = completions_of(model, chain)
    _, old = completions_of(reference, chain)
    along = module("learn_task").kl_along(model, reference, tokens, chain.prompt).double()
    expected = (new * (new / old).log()).sum().item()
    assert (new * along).sum().item() == pytest.approx(expected, abs=1e-4) and expected > 0.1


def test_best_of_n_is_the_mean_of_the_largest(chain, tmp_path):
    """Against the distribution of all completions: P(the largest <= r) = P(one <= r)^n. 0.06: four standard errors."""
    learn_task = module("learn_task")
    _, model = models_of(chain, tmp_path)
    tokens, probabilities = completions_of(model, chain)
    n_prompts = 2500
    found = learn_task.best_of(model, chain, [1, 4], n_prompts)
    rewards = chain.rewards(tokens[:, chain.prompt :]).double()
    expected = {1: 0.0, 4: 0.0}
    for prompt in chain.prompts(n_prompts, learn_task.HELD_OUT):
        rows = (tokens[:, : chain.prompt] == torch.tensor(prompt)).all(dim=1)
        ordered, at = rewards[rows].sort()
        for n in expected:
            up_to = probabilities[rows][at].cumsum(dim=0) ** n
            expected[n] += (ordered * up_to.diff(prepend=torch.zeros(1))).sum().item() / n_prompts
    assert found == pytest.approx(expected, abs=0.06) and expected[4] > expected[1] + 0.5


def test_one_prompt_and_seed_give_one_task(chain):
    again = module("chain_task").Chain(**CHAIN)
    assert torch.equal(again.transitions, chain.transitions) and torch.equal(again.scores, chain.scores)
    assert again.prompts(5, 3) == chain.prompts(5, 3) != chain.prompts(5, 4)


@pytest.mark.parametrize("method", ["rloo", "grpo", None], ids=str)
def test_a_run_has_the_samples_and_steps_of_the_task(method, tmp_path):
    """That of another version of trl is checked where it runs: a run with other numbers fails."""
    task = module("chain_task").Chain(**CHAIN, **RUN)
    task.make_model(tmp_path / "model")
    job = {"task": task.job, "model": str(tmp_path / "model"), "output": str(tmp_path / "policy")}
    job |= {"price": 0.5, "learning_rate": 1e-3, "seed": 0, "method": method}
    result = module("run_learn_trl_current" if method else "run_learn_lmppo").run(job)
    assert result["samples"] == 8 and result["optimizer_steps"] == 8 and len(result["curve"]) == 2
    assert result["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-6) and result["curve"][1]["kl"] > 1e-6
    assert result["curve"][0]["seconds"] < result["curve"][1]["seconds"] < result["seconds"]
    measured = module("learn").measure(tmp_path / "policy", tmp_path / "model", task, 0.5)
    assert measured["kl"] > 1e-6
    assert measured["objective"] == pytest.approx(measured["reward"] - 0.5 * measured["kl"], abs=1e-5)


@pytest.fixture
def reviews(tmp_path):
    task = module("review_task").Reviews(folder=str(tmp_path), length=5, **RUN)
    task.make_model(tmp_path / "model")
    return task


def test_the_reviews_are_the_main_jobs(reviews, tmp_path):
    """Its policy, in float32; its prompts, held-out ones apart; VADER's score of the text that its tokenizer gives."""
    learn_task, policy = module("learn_task"), module("review_task").POLICY
    kept, shipped = learn_task.load_model(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(policy)
    assert kept.dtype == torch.float32
    assert all(torch.equal(p, q.float()) for p, q in zip(kept.parameters(), shipped.parameters(), strict=True))
    training, held_out = (reviews.prompts(3000, seed) for seed in (learn_task.TRAINING, learn_task.HELD_OUT))
    assert {len(ids) for ids in training + held_out} == {8}
    shared = {tuple(ids) for ids in training} & {tuple(ids) for ids in held_out}
    assert len(shared) < 0.01 * len(training)
    tokenizer, texts = (
        AutoTokenizer.from_pretrained(policy),
        [" a wonderful film", " dull, bad and boring", " the film"],
    )
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = [reviews.rewards(torch.tensor([row])).item() for row in ids]
    assert found == pytest.approx(load("lexicon")(prompts=texts, completions=texts, completion_ids=ids))
    assert found[0] > 0.5 > -0.5 > found[1] and found[2] == 0
    width = min(len(row) for row in ids)
    batch = torch.tensor([row[-width:] for row in ids])
    assert reviews.rewards(batch).tolist() == [reviews.rewards(row[None]).item() for row in batch]
    assert len(set(reviews.rewards(batch).tolist())) > 1


def test_a_run_may_have_a_critic_of_its_own(reviews, tmp_path, monkeypatch):
    runner, made = module("run_learn_lmppo"), []
    monkeypatch.setattr(runner, "PPOTrainer", lambda **arguments: made.append(PPOTrainer(**arguments)) or made[-1])
    job = {"task": reviews.job, "model": str(tmp_path / "model"), "output": str(tmp_path / "policy")}
    for own_critic in (True, False):
        runner.run(job | {"price": 0.03, "learning_rate": 1e-3, "seed": 0, "own_critic": own_critic})
    assert [trainer.actor_critic.critic is not None for trainer in made] == [True, False]


@pytest.mark.parametrize("method", ["rloo", None], ids=str)
def test_a_run_on_reviews(method, reviews, tmp_path):
    job = {"task": reviews.job, "model": str(tmp_path / "model"), "output": str(tmp_path / "policy")}
    job |= {"price": 0.03, "learning_rate": 1e-3, "seed": 0, "method": method}
    result = module("run_learn_trl_current" if method else "run_learn_lmppo").run(job)
    assert result["samples"] == 8
    assert result["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-5) and result["curve"][1]["kl"] > 1e-5
    measured = module("learn").measure(tmp_path / "policy", tmp_path / "model", reviews, 0.03, draws=1)
    assert measured["kl"] > 1e-6 and -1 <= measured["reward"] <= 1


def test_a_run_with_other_samples_or_steps_fails(chain, tmp_path):
    chain.make_model(tmp_path / "model")
    curve = module("learn_task").Curve(chain, str(tmp_path / "model"))
    curve.start()
    with pytest.raises(RuntimeError, match=r"were \(0, 0\); expected \(60, 960\)"):
        curve.result(curve.policy, str(tmp_path / "policy"))


def test_runs_that_are_there_are_not_repeated(tmp_path, monkeypatch):
    """One that failed is, and counts for nothing."""
    learn, jobs = module("learn"), []

    def run_job(runner, job, **_):
        jobs.append((runner, job["price"], job["learning_rate"], job["seed"]))
        good = {"reward": 1000 * job["learning_rate"] + job["seed"], "kl": 1.0, "seconds": 1.0, "curve": []}
        return {"error": "no"} if job["learning_rate"] > 5e-4 else good

    monkeypatch.setattr(learn, "run_job", run_job)
    monkeypatch.setattr(learn, "python_of", lambda *_: "python")
    monkeypatch.setattr(learn, "measure", lambda *_: {})
    fixed = {"folder": tmp_path, "venvs": tmp_path, "threads": 1, "jobs": 1, "smoke": False, "settings": {}}
    args = argparse.Namespace(systems=["grpo"], prices=[0.5], rates=[1e-4, 3e-4, 1e-3], seeds=[0, 1], **fixed)
    first = learn.perform_all(learn.SMOKE, args)
    grid = [("learn_trl_current", 0.5, rate, 0) for rate in args.rates]
    assert jobs == [*grid, ("learn_trl_current", 0.5, 3e-4, 1)]
    assert [run["reward"] for run in learn.of_all_seeds(first, "grpo", 0.5)] == pytest.approx([0.3, 1.3])
    rows = learn.by_price(first, {1: 0.0}, learn.SMOKE, args)
    assert rows[-1] == [
        "0.5",
        "trl 1.16.0, `GRPOTrainer`",
        "0.0003",
        "0.8 (0.3..1.3)",
        "1 (1..1)",
        "0.3 (-0.2..0.8)",
        "1 (1..1)",
    ]
    assert learn.by_rate(first, args) == [["trl 1.16.0, `GRPOTrainer`", "-0.4", "-0.2", "failed"]]
    again = learn.perform_all(learn.SMOKE, args)
    assert jobs[4:] == [grid[2]] and [run["reward"] for run in again.values() if "reward" in run] == [
        run["reward"] for run in first.values() if "reward" in run
    ]


def test_runs_of_lmppo_with_other_settings_are_repeated(tmp_path, monkeypatch):
    learn, jobs = module("learn"), []
    monkeypatch.setattr(
        learn, "run_job", lambda _, job, **__: jobs.append(job["settings"]) or {"reward": 0.0, "kl": 1.0}
    )
    monkeypatch.setattr(learn, "measure", lambda *_: {})
    fixed = {"folder": tmp_path, "venvs": tmp_path, "threads": 1, "smoke": False}
    for lam in (0.9, 0.9, 0.5, 0.5):
        learn.perform(
            learn.Setting("lmppo", 0.5, 1e-3, 0), learn.SMOKE, argparse.Namespace(settings={"lam": lam}, **fixed)
        )
    assert jobs == [{"lam": 0.9}, {"lam": 0.5}]


def test_the_reward_between_two_points():
    """Exact for normal rewards, whose best reward is sqrt(2 * KL) standard deviations; unknown beyond the points."""
    learn = module("learn")
    points = [{"kl": kl, "reward": 1.5 * math.sqrt(2 * kl)} for kl in (5.0, 0.0, 1.0)]
    assert learn.reward_at(3.0, points) == pytest.approx(1.5 * math.sqrt(6.0))
    assert learn.reward_at(5.0, points) == pytest.approx(1.5 * math.sqrt(10.0))
    assert math.isnan(learn.reward_at(5.1, points))


def test_the_lexicon_task_has_the_default_wherever_the_recipe_has_another_setting():
    """What the recipe sets for its own task must not stand for a default."""
    lexicon = module("defaults").LEXICON
    recipe = yaml.safe_load((ROOT / "recipes" / "configs" / "tiny_reviews.yaml").read_text())
    sizes = {"output_dir", "resume_from_checkpoint", "cpu_threads", "micro_batch_size", "max_completion_length", "save_steps",
             "learning_rate", "seed"}  # fmt: skip
    assert {field.name for field in dataclasses.fields(PPOConfig)} & set(recipe) - sizes <= set(lexicon)
    default = PPOConfig()
    for name in ("lam", "target_kl", "critic_learning_rate"):
        assert lexicon[name] == ("none" if getattr(default, name) is None else getattr(default, name))
