r"""How the seconds and the memory of an iteration grow with its sizes.

    python benchmarks/scaling.py --markdown docs/speed.md

One size at a time is changed on a small model, each point in a process of its own. A power law c * x**e is fitted to the
points of each size (least squares of the logarithms); e is given with its standard error. An exponent below 1 says that
part of the cost does not grow with that size at all.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import default_threads, origin, run_job, spread, table, write
from workloads import Workload

BASE = Workload(layers=4, width=128, heads=4, vocab=2048, batch=32, prompt=(16, 16), length=16, epochs=1)
# Field of the workload: its name, and the points.
SIZES: dict[str, tuple[str, Sequence[int]]] = {
    "batch": ("completions", (16, 32, 64, 128, 256)),
    "length": ("tokens of a completion", (16, 32, 64, 128, 224)),
    "vocab": ("vocabulary", (2048, 4096, 8192, 16384, 32768)),
    "width": ("width", (64, 128, 256, 512, 1024)),
    "layers": ("layers", (2, 4, 8, 16, 32)),
}
SMOKE = {"layers": 1, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4}


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The exponent of the power law through some points, and its standard error."""
    coefficients, covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    return float(coefficients[0]), float(np.sqrt(covariance[0, 0]))


def measure(field: str, value: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one point; its memory is what the iteration needs beyond the loaded policy."""
    work = dataclasses.replace(BASE, **((SMOKE if args.smoke else {}) | {field: value}))
    print(f"{field} {value}", file=sys.stderr, flush=True)
    job = {"work": dataclasses.asdict(work), "iterations": args.iterations, "device": args.device}
    return run_job("lmppo", job, threads=args.threads, inline=args.smoke)


def rows_of(field: str, results: dict[int, dict[str, Any]]) -> list[list[str]]:
    """A row of seconds and a row of memory, with their exponents."""
    name, good = SIZES[field][0], {value: r for value, r in results.items() if "error" not in r}
    points = ", ".join(map(str, results))
    series = {
        "seconds": {v: float(np.median([row["seconds"] for row in r["rows"]])) for v, r in good.items()},
        "GB": {v: r["peak_gb"] - r["loaded_gb"] for v, r in good.items()},
    }
    rows = []
    for unit, found in series.items():
        measured = ", ".join(f"{found[v]:.2g}" if v in found else "failed" for v in results)
        fitted = {v: y for v, y in found.items() if y > 0}
        exponent = "too few points"
        if len(fitted) > 2:
            exponent = "{:.2f} ± {:.2f}".format(*power_law(list(fitted), list(fitted.values())))
        rows.append([name, points, unit, measured, exponent])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--iterations", type=int, default=3, help="iterations of a point, after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--markdown", type=Path, help="the page whose table is replaced")
    parser.add_argument("--smoke", action="store_true", help="tiny models, in this process: tries the script")
    args = parser.parse_args(argv)
    results = {
        field: {value: measure(field, value, args) for value in SIZES[field][1][: 3 if args.smoke else None]}
        for field in args.sizes
    }
    rows = [row for field, found in results.items() for row in rows_of(field, found)]
    probes = [row["probe"] for found in results.values() for r in found.values() for row in r.get("rows", [])]
    text = [table(["size", "points", "unit", "measured", "exponent"], rows)]
    text.append(f"The other sizes: {described(BASE)}. Matrix product between the iterations: {spread(probes)} GFLOP/s.")
    write("scaling", results, "\n\n".join([*text, origin(args.threads, args.device)]), args.markdown)


def described(work: Workload) -> str:
    """The sizes of a workload in words."""
    return ", ".join(f"{getattr(work, field)} {name}" for field, (name, _) in SIZES.items())


if __name__ == "__main__":
    main()
