r"""Where the time of an iteration goes, and how far it is from the machine's limit.

    python benchmarks/profile_iteration.py --markdown docs/speed.md

The first table shows what a product with a layer's weights reaches by its number of rows: sampling has as many as there are
completions. The limit of a phase is its useful arithmetic (no padding, logits of completion tokens only) at the rate of a
matrix product of 1024 x 1024 that is measured beside it. The operations are those of further iterations, each operation
with a clock around it: torch's profiler keeps records between the tensors, which costs large ones their memory's place.
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
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import WORKLOADS, Workload, useful_flops

from lmppo.matrix_products import suits_onednn, use_onednn

SMOKE = {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4}
PROFILED = ["W1", "W2", "W3", "W4", "W2-critic"]
ROWS = (1, 4, 16, 64, 256, 1024)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "attention")


def products(device: str, width: int = 768, copies: int = 24) -> list[dict[str, float]]:
    """GB/s of weights and GFLOP/s of products ``(rows, width) @ (width, 4 * width)``; medians of 9.

    Each with weights of its own, one after the other, as in a pass over the layers of a model; by torch's own choice of a
    library, and as lmppo has it (see :func:`lmppo.matrix_products.use_onednn`).
    """
    if device == "cpu" and suits_onednn():
        use_onednn()
    weights = torch.randn(copies, width, 4 * width, device=device)
    found = []
    for rows in ROWS:
        states, row = torch.randn(rows, width, device=device), {"rows": float(rows)}
        for name, own in (("torch", True), ("lmppo", False)):
            with mkldnn.flags(enabled=not own, allow_tf32=None):
                once = median(_seconds(states, weights, device) for _ in range(9)) / copies
            row |= {
                f"{name}_gb": weights[0].nbytes / GB / once,
                f"{name}_gflop": 2e-9 * rows * weights[0].numel() / once,
            }
        found.append(row)
    return found


def _seconds(states: torch.Tensor, weights: torch.Tensor, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for weight in weights:
        torch.mm(states, weight)
    synchronize(device)
    return time.perf_counter() - started


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


class Operations(TorchDispatchMode):
    """Seconds and calls of every operation of torch that runs within; each is waited for.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        synchronize(self.device)
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize(self.device)
        self.seconds.setdefault(func._schema.name, []).append(time.perf_counter() - started)
        return result


def measure(work: Workload, iterations: int, device: str) -> dict[str, list[dict[str, Any]]]:
    """Limits and operations of a workload; iterations without and with a clock around every operation take turns."""
    measured, operations = Measured(work, 2 * iterations, device), Operations(device)
    measured.step()
    for _ in range(iterations):
        measured.step()
        with operations:
            measured.trainer.step()
    found = limits(measured)
    return {"limits": found, "operations": shares(operations, iterations, found[-1]["seconds"])}


def shares(operations: Operations, iterations: int, whole: float, top: int = 15) -> list[dict[str, Any]]:
    """The operations that take most of an iteration's ``whole`` seconds, and what is left beside all of them."""
    times = {name: (sum(s) / iterations, len(s) // iterations) for name, s in operations.seconds.items()}
    ranked = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    found: list[dict[str, Any]] = [{"name": n, "seconds": s, "calls": calls} for n, (s, calls) in ranked]
    everything = sum(seconds for seconds, _ in times.values())
    products = sum(seconds for name, (seconds, _) in times.items() if any(part in name for part in PRODUCTS))
    found.append({"name": "all matrix products and attention", "seconds": products})
    found.append({"name": "all other operations", "seconds": everything - products})
    found.append({"name": "beside operations: Python, autograd", "seconds": whole - everything})
    return [{**row, "share": row["seconds"] / whole} for row in found]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=PROFILED, default=PROFILED)
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
        work: Workload = WORKLOADS[name]
        if args.smoke:
            work = dataclasses.replace(work, **SMOKE, unfrozen=work.unfrozen and 1)
        results[name] = measure(work, args.iterations, args.device)
    shown = [products_table(few), *tables(results), origin(args.threads, args.device)]
    write("profile", {"products": few, **results}, "\n\n".join(shown), args.markdown)


def products_table(found: list[dict[str, float]]) -> str:
    """What products of few rows reach."""
    header = ["rows of a product with weights 768 x 3072"]
    header += [f"{unit}, {name}" for name in ("torch", "lmppo") for unit in ("GB/s of weights read", "GFLOP/s")]
    keys = ("torch_gb", "torch_gflop", "lmppo_gb", "lmppo_gflop")
    return table(header, [[f"{row['rows']:.0f}", *(f"{row[key]:.3g}" for key in keys)] for row in found])


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
        parts.append(table([f"operation, {name}", "% of an iteration", "seconds", "calls"], rows))
    return parts


if __name__ == "__main__":
    main()
