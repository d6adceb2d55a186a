"""Every method of the notes on one small language model whose answers are exact: tables and pictures, on a CPU.

    python recipes/lab/estimator_lab.py --output_dir runs/estimator-lab

Writes lab.md (the tables), lab.json (every number) and lab-*.png; docs/notes.md explains them.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import figures
import plots
import torch
from estimators import bandits, curves, language_model, table
from problem import at_the_end, dense
from report import report
from reuse import reuse, streams
from training import OBJECTIVES, VARIANTS, learn, optimum_kl
from transformers.utils.logging import disable_progress_bar
from truncation import truncation


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to sample and train."""

    sizes: list[int]
    batches: int
    steps: int
    seeds: int
    passes: int
    stream_steps: int


FULL = Effort(sizes=[16, 64, 256], batches=1000, steps=30, seeds=3, passes=40, stream_steps=50)
QUICK = Effort(sizes=[16, 64], batches=50, steps=2, seeds=1, passes=2, stream_steps=2)


def run(effort: Effort) -> dict[str, Any]:
    """All numbers of the lab."""
    problem = language_model()
    sparse_problem = dataclasses.replace(problem, rewards=at_the_end(problem.rewards))
    middle = effort.sizes[1]
    objectives = {
        name: learn(effort.steps, effort.seeds, **({"objective": name} | settings))
        for name, settings in OBJECTIVES.items()
    }
    variants = {name: learn(effort.steps, effort.seeds, **settings) for name, settings in VARIANTS.items()}
    return {
        "effort": dataclasses.asdict(effort),
        "true_gradient_length": problem.true_gradient().norm().item(),
        "dense": table(problem, effort.sizes, effort.batches),
        "sparse": table(sparse_problem, effort.sizes, effort.batches),
        "knobs": curves(problem, middle, effort.batches),
        "bandits": bandits(middle, effort.batches),
        "objectives": objectives,
        "variants": {"unchanged": objectives["clip"]} | variants,
        "optimum_kl": optimum_kl(),
        "truncation": truncation(problem),
        "rewards": {"sparse": objectives["clip"], "dense": learn(effort.steps, effort.seeds, reward=dense)},
        "reuse": reuse(effort.passes, effort.seeds),
        "streams": streams(effort.stream_steps),
    }


def draw(lab: dict[str, Any], directory: Path) -> None:
    """All pictures."""
    sizes = lab["effort"]["sizes"]
    plots.draw_estimators(lab["dense"], sizes[1], directory / "lab-estimators.png")
    plots.draw_sizes(lab["dense"], sizes, directory / "lab-sizes.png")
    plots.draw_knobs(lab["knobs"], sizes[1], directory / "lab-knobs.png")
    plots.draw_bandits(lab["bandits"], sizes[1], directory / "lab-bandits.png")
    tables = {pay: lab[pay] for pay in ("sparse", "dense")}
    figures.draw_dense(tables, lab["rewards"], sizes[1], directory / "lab-dense.png")
    figures.draw_objectives(lab["objectives"], directory / "lab-objectives.png")
    figures.draw_reuse(lab["reuse"], directory / "lab-reuse.png")
    figures.draw_streams(lab["streams"], directory / "lab-streams.png")


def main() -> None:
    """Run the lab, print its tables, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimator-lab"))
    parser.add_argument(
        "--quick", action="store_true", help="A small version of everything: a few seconds, rough numbers."
    )
    args = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)  # the model is too small for several threads
    disable_progress_bar()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lab = run(QUICK if args.quick else FULL)
    text = report(lab)
    lab["seconds"] = time.perf_counter() - started
    (args.output_dir / "lab.json").write_text(json.dumps(lab, indent=1) + "\n")
    (args.output_dir / "lab.md").write_text(text)
    draw(lab, args.output_dir)
    print(text)
    print(f"{args.output_dir}: lab.md, lab.json and pictures, in {time.perf_counter() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
