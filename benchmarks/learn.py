r"""What lmppo and trl's trainers learn from the same number of samples.

    python benchmarks/learn.py --markdown docs/results.md
    python benchmarks/learn.py --task review --markdown docs/results.md
    python benchmarks/learn.py --systems lmppo --prices 0.5 --seeds 0

The task is that of chain_task.py, whose best answer is known, or that of review_task.py, with the main job's policy. Every
system runs at each price of a nat of KL with each learning rate and the first seed; then, for each price, with all seeds at
the learning rate that came out best by the objective at that price. One function measures the policies that all of them have
saved, on the same held-out prompts. Every run is a process of its own. Runs that are there already (a JSON file each, in
runs/benchmarks/learn or learn-review) are not repeated, except those of lmppo whose settings were others; where code has
changed, delete its files. The first use makes a virtual environment for each version of trl.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from chain_task import Chain
from environments import python_of
from learn_task import HELD_OUT, Task, best_of, kl_along, load_model, sample
from measuring import RESULTS, origin, run_job, spread, table, write
from review_task import Reviews

from lmppo import PPOConfig


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        label: Its name in tables.
        runner: Its script, ``run_<runner>.py``.
        venv: Its environment.
        job: What the script is told besides.
        settings: Settings of lmppo that are not the defaults.
    """

    label: str
    runner: str
    venv: str
    job: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


SYSTEMS = {
    "trl_classic": System("trl 0.11.4, `PPOTrainer`", "learn_trl_classic", "trl_classic"),
    "trl_experimental": System("trl 1.12.0, `experimental.ppo`", "learn_trl_experimental", "trl_experimental"),
    "rloo": System("trl 1.16.0, `RLOOTrainer`", "learn_trl_current", "trl_current", {"method": "rloo"}),
    "grpo": System("trl 1.16.0, `GRPOTrainer`", "learn_trl_current", "trl_current", {"method": "grpo"}),
    "lmppo": System("lmppo", "learn_lmppo", "lmppo"),
    "lmppo_critic": System(
        "lmppo, a critic of its own, `lam` 0.95", "learn_lmppo", "lmppo", {"own_critic": True}, {"lam": 0.95}
    ),
}
RATES = (1e-4, 3e-4, 1e-3)
PRICES = {"chain": (0.3, 0.5, 1.0), "review": (0.03,)}
SIZES = (1, 4, 16, 64, 256)
NATS = (2.0, 4.0, 6.0)
SMOKE = Chain(
    vocab=8, length=4, width=16, heads=2, layers=1, pretraining=20, iterations=2, batch=8, minibatch=4, group=4
)
Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is run: a system with a price, a learning rate and a seed."""

    system: str
    price: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.system}-{self.price:g}-{self.rate:g}-{self.seed}"


def measure(policy: Path, reference: Path, task: Task, price: float, draws: int = 4) -> dict[str, float]:
    """Mean reward and KL to the reference of a saved policy, over some completions of each of 512 held-out prompts."""
    models = load_model(policy), load_model(reference)
    prompts = torch.tensor(task.prompts(512, HELD_OUT) * draws)
    tokens = sample(models[0], prompts, task.length, torch.Generator().manual_seed(0))
    rewards = task.rewards(tokens[:, task.prompt :])
    kl = torch.cat([kl_along(*models, part, task.prompt) for part in tokens.split(64)])
    return {"reward": rewards.mean().item(), "kl": kl.mean().item(), "objective": (rewards - price * kl).mean().item()}


def perform(setting: Setting, task: Task, args: argparse.Namespace) -> Run:
    """The result of a setting, from its file if it is there; one that failed has ``error`` and is not kept."""
    kept, system = args.folder / f"{setting.name}.json", SYSTEMS[setting.system]
    ours = {**system.settings, **args.settings} if system.venv == "lmppo" else None
    settings = {} if ours is None else settings_of_lmppo(ours)
    if kept.exists() and (found := json.loads(kept.read_text()))["settings"] == settings:
        return found
    print(setting.name, file=sys.stderr, flush=True)
    policy = args.folder / setting.name
    job = {"task": task.job, "model": str(args.folder / "model"), "output": str(policy)}
    job |= {"price": setting.price, "learning_rate": setting.rate, "seed": setting.seed, **system.job}
    if ours is not None:
        job["settings"] = ours
    python = python_of(system.venv, args.venvs)
    result = run_job(system.runner, job, threads=args.threads, python=python, inline=args.smoke)
    if "error" not in result:
        try:
            result |= measure(policy, args.folder / "model", task, setting.price)
        except RuntimeError as error:  # a policy whose probabilities are no numbers any more
            result = {"error": str(error)}
    if "error" in result:
        print(f"{setting.name} failed: {result['error']}", file=sys.stderr, flush=True)
        return result
    kept.write_text(json.dumps({**dataclasses.asdict(setting), "settings": settings, **result}) + "\n")
    return result


def settings_of_lmppo(settings: dict[str, Any]) -> dict[str, str]:
    """All settings of lmppo but what the runs set: other defaults are other runs."""
    config = PPOConfig(**settings)
    return {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)}


def worth(run: Run, price: float) -> float:
    """The objective at a price; nothing is worth less than a run that failed."""
    return -math.inf if "error" in run else run["reward"] - price * run["kl"]


def perform_all(task: Task, args: argparse.Namespace) -> dict[Setting, Run]:
    """The runs with the first seed, then those of the best learning rates with all seeds."""
    grid = [Setting(s, p, r, args.seeds[0]) for s in args.systems for p in args.prices for r in args.rates]
    for system in args.systems:
        python_of(SYSTEMS[system].venv, args.venvs)  # made before the runs, that would make it at the same time
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(grid, pool.map(lambda s: perform(s, task, args), grid), strict=True))
        chosen = [best_rate(runs, s, p) for s in args.systems for p in args.prices]
        again = [dataclasses.replace(c, seed=seed) for c in chosen for seed in args.seeds[1:]]
        return runs | dict(zip(again, pool.map(lambda s: perform(s, task, args), again), strict=True))


def best_rate(runs: dict[Setting, Run], system: str, price: float) -> Setting:
    """The setting of a system and a price whose first seed has the best objective."""
    first = next(iter(runs)).seed
    mine = [s for s in runs if (s.system, s.price, s.seed) == (system, price, first)]
    return max(mine, key=lambda s: worth(runs[s], price))


def of_all_seeds(runs: dict[Setting, Run], system: str, price: float) -> list[Run]:
    """The runs of a system and a price at its best learning rate, without those that failed."""
    rate = best_rate(runs, system, price).rate
    mine = [run for s, run in runs.items() if (s.system, s.price, s.rate) == (system, price, rate)]
    return [run for run in mine if "error" not in run]


def kl_of_best(n: int) -> float:
    """Nats that best-of-n is away from what it chooses from, at most."""
    return math.log(n) - (n - 1) / n


def reward_at(nats: float, points: Iterable[dict[str, float]]) -> float:
    """The reward at a KL, between the points on its both sides: linear in the root of the KL, as it is for normal rewards.

    NaN beyond the points.
    """
    points = sorted(points, key=lambda point: point["kl"])
    for left, right in zip(points, points[1:], strict=False):
        if left["kl"] <= nats <= right["kl"]:
            low, at, high = (math.sqrt(x) for x in (left["kl"], nats, right["kl"]))
            share = (at - low) / (high - low) if high > low else 0.0
            return left["reward"] + share * (right["reward"] - left["reward"])
    return math.nan


def frontiers(runs: dict[Setting, Run], best: dict[int, float], task: Task) -> dict[str, list[dict[str, float]]]:
    """Reward and KL of each system at its prices, means over seeds; of best-of-n; of the optimum at many prices."""
    known: dict[str, list[dict[str, float]]] = {}
    for system in dict.fromkeys(s.system for s in runs):
        prices = dict.fromkeys(s.price for s in runs if s.system == system)
        groups = [group for price in prices if (group := of_all_seeds(runs, system, price))]
        known[SYSTEMS[system].label] = [{k: mean(r[k] for r in group) for k in ("reward", "kl")} for group in groups]
    known["best of n"] = [{"reward": reward, "kl": kl_of_best(n)} for n, reward in best.items()]
    at_best = [task.optimum(1.1**i) for i in range(-15, 40)]
    return known | ({} if None in at_best else {"the optimum": at_best})


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def cells_of(run: dict[str, float], price: float) -> list[str]:
    """Reward, KL and objective of what is known without runs."""
    return [f"{run['reward']:.3g}", f"{run['kl']:.3g}", f"{run['reward'] - price * run['kl']:.3g}", ""]


def by_price(runs: dict[Setting, Run], best: dict[int, float], task: Task, args: argparse.Namespace) -> list[list[str]]:
    """The rows of each price: the optimum where it is known, best-of-n, the systems."""
    rows = []
    for price in args.prices:
        if at_best := task.optimum(price):
            rows.append([f"{price:g}", "the optimum", "", *cells_of(at_best, price)])
        n = max(best, key=lambda n: best[n] - price * kl_of_best(n))
        rows.append([f"{price:g}", f"best of {n}", "", *cells_of({"reward": best[n], "kl": kl_of_best(n)}, price)])
        for system in args.systems:
            chosen, group = best_rate(runs, system, price), of_all_seeds(runs, system, price)
            errors = [
                run["error"] for s, run in runs.items() if (s.system, s.price) == (system, price) and "error" in run
            ]
            numbers = [[r["reward"] for r in group], [r["kl"] for r in group], [worth(r, price) for r in group]]
            numbers.append([r["seconds"] for r in group])
            shown = [spread(values) for values in numbers] if group else [errors[0], "", "", ""]
            rows.append([f"{price:g}", SYSTEMS[system].label, f"{chosen.rate:g}", *shown])
    return rows


def by_rate(runs: dict[Setting, Run], args: argparse.Namespace) -> list[list[str]]:
    """The rows of the first seed's objectives, with a column for each price and learning rate."""
    rows = []
    for system in args.systems:
        found = [worth(runs[Setting(system, p, r, args.seeds[0])], p) for p in args.prices for r in args.rates]
        rows.append([SYSTEMS[system].label, *(f"{x:.3g}" if math.isfinite(x) else "failed" for x in found)])
    return rows


def markdown(runs: dict[Setting, Run], best: dict[int, float], task: Task, args: argparse.Namespace) -> str:
    """The tables, and where they come from."""
    header = ["price", "system", "learning rate", "reward", "KL", "objective", "seconds"]
    parts = [table(header, by_price(runs, best, task, args))]
    if len(args.prices) > 1:
        known = frontiers(runs, best, task)
        curves = {name: [{"reward": best[1], "kl": 0.0}, *points] for name, points in known.items()}
        rows = [[name, *(at(nats, points) for nats in NATS)] for name, points in curves.items()]
        parts.append(table(["reward at a KL of", *(f"{nats:g} nats" for nats in NATS)], rows))
    columns = [f"{price:g}, {rate:g}" for price in args.prices for rate in args.rates]
    parts.append(table(["objective at price, learning rate", *columns], by_rate(runs, args)))
    seeds = ", ".join(map(str, args.seeds))
    parts.append(f"Medians (least..most); seeds: {seeds}; runs at a time: {args.jobs}. {origin(args.threads)}")
    return "\n\n".join(parts)


def at(nats: float, points: Iterable[dict[str, float]]) -> str:
    """The reward at a KL, for a table; nothing beyond the points."""
    reward = reward_at(nats, points)
    return "" if math.isnan(reward) else f"{reward:.3g}"


def curve_of(group: list[Run], read: Callable[[dict[str, float]], float], window: int = 5) -> list[float]:
    """A number of each iteration, the mean over runs and over the last few iterations."""
    means = [mean(read(row) for row in rows) for rows in zip(*(run["curve"] for run in group), strict=True)]
    return [mean(means[max(0, i + 1 - window) : i + 1]) for i in range(len(means))]


def draw(runs: dict[Setting, Run], best: dict[int, float], task: Task, args: argparse.Namespace) -> None:
    """Reward against KL; the objective against samples and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    left, *others = figure.subplots(1, 3)
    reached = max((run["kl"] for run in runs.values() if "kl" in run), default=1.0)
    for name, points in frontiers(runs, best, task).items():
        points = [point for point in sorted(points, key=lambda p: p["kl"]) if point["kl"] <= 1.1 * reached + 1]
        style = {"best of n": "k:", "the optimum": "k-"}.get(name, "o-")
        left.plot([p["kl"] for p in points], [p["reward"] for p in points], style, label=name.replace("`", ""))
    left.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))  # as reward_at has it
    left.set(title="reward against KL, held-out prompts", xlabel="KL to the reference (nats)", ylabel="reward")
    left.set_xlim(left=0)
    left.legend(fontsize="small")
    price = args.prices[(len(args.prices) - 1) // 2]  # the middle one
    for system in args.systems:
        if group := of_all_seeds(runs, system, price):
            objective = curve_of(group, lambda row: row["reward"] - price * row["kl"])
            samples = [task.batch * (i + 1) for i in range(len(objective))]
            seconds = curve_of(group, lambda row: row["seconds"], window=1)
            for axis, x in zip(others, (samples, seconds), strict=True):
                axis.plot(x, objective, label=SYSTEMS[system].label.replace("`", ""))
    for axis, title in zip(others, ("samples", "seconds"), strict=True):
        if at_best := task.optimum(price):
            axis.axhline(at_best["objective"], color="k", label="the optimum")
        axis.set(title=f"reward - {price:g} * KL against {title}, while training", xlabel=title, ylabel="objective")
    for axis in (left, *others):
        axis.grid(alpha=0.3)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=100)


def prepare(task: Task, args: argparse.Namespace) -> dict[int, float]:
    """The model, trained if it is not there, and the rewards of best-of-n from it."""
    args.folder.mkdir(parents=True, exist_ok=True)
    kept, model = args.folder / "best-of-n.json", args.folder / "model"
    if not kept.exists():
        task.make_model(model)
        sizes, prompts = (SIZES[:2], 4) if args.smoke else (SIZES, 256)
        kept.write_text(json.dumps(best_of(load_model(model), task, sizes, prompts)) + "\n")
    return {int(n): reward for n, reward in json.loads(kept.read_text()).items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--task", choices=PRICES, default="chain")
    parser.add_argument("--prices", nargs="+", type=float, help="of a nat of KL")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of lmppo")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument(
        "--venvs", type=Path, default=RESULTS / "venvs", help="where trl's environments are or are made"
    )
    parser.add_argument("--picture", type=Path, help="default: among the docs with --markdown, else beside the results")
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="a tiny task and lmppo alone, in this process")
    args = parser.parse_args(argv)
    args.settings = {name: yaml.safe_load(value) for name, value in (s.split("=", 1) for s in args.settings)}
    args.name = "learn" if args.task == "chain" else f"learn-{args.task}"
    args.prices = args.prices or list(PRICES[args.task])
    args.folder = args.folder or RESULTS / args.name
    args.picture = args.picture or (Path("docs/images") if args.markdown else RESULTS) / f"{args.name}.png"
    if args.smoke:
        args.systems, args.seeds = ["lmppo"], args.seeds[:2]
        args.prices, args.rates = args.prices[:2], args.rates[:2]
        args.folder = RESULTS / "learn-smoke"
        args.picture = args.folder / "learn.png"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run, measure, print, draw, write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.folder = args.folder.absolute()
    task = SMOKE if args.smoke else Chain() if args.task == "chain" else Reviews(folder=str(args.folder))
    best = prepare(task, args)
    runs = perform_all(task, args)
    draw(runs, best, task, args)
    kept = [{**dataclasses.asdict(setting), **run} for setting, run in runs.items()]
    result = {"task": task.job, "best of n": best, "runs": kept}
    write(args.name, result, markdown(runs, best, task, args), args.markdown)


if __name__ == "__main__":
    main()
