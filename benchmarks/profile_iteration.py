r"""Where the time of an iteration goes, and how far it is from the machine's limit.

    python benchmarks/profile_iteration.py --markdown docs/speed.md

The first table shows what a product with a layer's weights reaches by its number of rows: sampling has as many as there are
completions. The limit of a phase is its useful arithmetic (no padding, logits of completion tokens only) at the rate of a
matrix product of 1024 x 1024 that is measured beside it. The operations are those of one more iteration, under torch's
profiler.
(Not named profile.py, which would stand in for Python's own module of that name.)
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import GB, default_threads, origin, probe, synchronize, table, write
from run_lmppo import Measured
from workloads import WORKLOADS, Workload, useful_flops

SMOKE = {"layers": 1, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4}
PROFILED = ["W1", "W2", "W4", "W2-critic"]
ROWS = (1, 4, 16, 64, 256, 1024)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "attention", "gemm")


def products(device: str, width: int = 768, copies: int = 24) -> list[dict[str, float]]:
    """GB/s of weights and GFLOP/s of products ``(rows, width) @ (width, 4 * width)``; medians of 9.

    Each with weights of its own, one after the other, as in a pass over the layers of a model.
    """
    weights = torch.randn(copies, width, 4 * width, device=device)
    found = []
    for rows in ROWS:
        states, seconds = torch.randn(rows, width, device=device), []
        for _ in range(9):
            synchronize(device)
            started = time.perf_counter()
            for weight in weights:
                torch.mm(states, weight)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        once = median(seconds) / copies
        flop = 2 * rows * weights[0].numel()
        found.append({"rows": rows, "weights": weights[0].nbytes / GB / once, "gflop": flop / 1e9 / once})
    return found


def limits(measured: Measured) -> list[dict[str, Any]]:
    """For each phase: its useful GFLOP, its seconds, and its bound."""
    rows = measured.recorder.rows[measured.recorder.warmup :]
    rate = median([*(row["probe"] for row in rows), probe(measured.recorder.device)])
    found = []
    for phase, flops in useful_flops(measured.work).items():
        seconds, bound = median(row[phase] for row in rows), flops / 1e9 / rate
        found.append({"phase": phase, "gflop": flops / 1e9, "seconds": seconds, "bound": bound})
    totals = {key: sum(row[key] for row in found) for key in ("gflop", "bound")}
    return [*found, {"phase": "all", "seconds": median(row["seconds"] for row in rows), **totals, "rate": rate}]


def operations(measured: Measured, top: int = 15) -> list[dict[str, Any]]:
    """The operations of one more iteration that take most time by themselves, and the share of all matrix products."""
    kinds = torch.profiler.ProfilerActivity
    on_gpu = measured.recorder.device == "cuda"
    turns = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    activities = [kinds.CPU, *([kinds.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, schedule=turns) as profile:
        for _ in range(2):  # the first is left out: the profiler's own memory changes what is cached
            measured.trainer.step()  # without the probe
            profile.step()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: (getattr(event, field) / 1e6, event.count) for event in profile.key_averages()}
    whole = sum(seconds for seconds, _ in times.values())
    products = sum(seconds for name, (seconds, _) in times.items() if any(part in name for part in PRODUCTS))
    ranked = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    found = [{"name": n, "share": s / whole, "seconds": s, "calls": calls} for n, (s, calls) in ranked]
    return [*found, {"name": "all matrix products and attention", "share": products / whole, "seconds": products}]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*PROFILED, "W3"], default=PROFILED)
    parser.add_argument("--iterations", type=int, default=3, help="counted iterations, after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="tiny models: tries the script")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    few = products(args.device, **({"width": 16, "copies": 2} if args.smoke else {}))
    results = {}
    for name in args.workloads:
        work: Workload = dataclasses.replace(WORKLOADS[name], **(SMOKE if args.smoke else {}))
        measured = Measured(work, args.iterations + 1, args.device)
        for _ in range(1 + args.iterations):
            measured.step()
        results[name] = {"limits": limits(measured), "operations": operations(measured)}
    shown = [products_table(few), *tables(results), origin(args.threads, args.device)]
    write("profile", {"products": few, **results}, "\n\n".join(shown), args.markdown)


def products_table(found: list[dict[str, float]]) -> str:
    """What products of few rows reach."""
    header = ["rows of a product with weights 768 x 3072", "GB/s of weights read", "GFLOP/s"]
    return table(header, [[str(row["rows"]), f"{row['weights']:.3g}", f"{row['gflop']:.3g}"] for row in found])


def tables(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """The limits of all workloads, and the operations of each."""
    header = ["workload", "phase", "useful GFLOP", "seconds", "bound in seconds", "seconds / bound"]
    rows = [
        [name, *(str(row["phase"]), f"{row['gflop']:.3g}", f"{row['seconds']:.3g}", f"{row['bound']:.3g}")]
        + [f"{row['seconds'] / row['bound']:.2f}"]
        for name, result in results.items()
        for row in result["limits"]
    ]
    rates = ", ".join(f"{name} {result['limits'][-1]['rate']:.0f}" for name, result in results.items())
    parts = [table(header, rows), f"Matrix product of 1024 x 1024, GFLOP/s: {rates}."]
    for name, result in results.items():
        rows = [
            [f"`{row['name']}`" if "calls" in row else row["name"], f"{100 * row['share']:.1f}"]
            + [f"{row['seconds']:.3g}", str(row.get("calls", ""))]
            for row in result["operations"]
        ]
        parts.append(table([f"operation, {name}", "% of the time", "seconds", "calls"], rows))
    return parts


if __name__ == "__main__":
    main()
