"""Seconds and memory of one process, runs in processes of their own, and tables in Markdown.

Imported under the packages of every system that is measured, and so without anything of lmppo.
"""

import importlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = Path("runs/benchmarks")
GB = 1e9
TAKES_TURNS, TURN = "BENCHMARK_TAKES_TURNS", "It is the next one's turn."
"""The variable of a process that waits for a line after each iteration, and what it prints before."""


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def probe(device: str, size: int = 1024) -> float:
    """GFLOP/s of a float32 matrix product (median of 16): the machine's speed at this moment."""
    left, right = torch.randn(2, size, size, device=device)
    out, seconds = torch.empty_like(left), []
    for _ in range(16):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def memory_now(device: str) -> int:
    """Bytes in use: resident in memory, or allocated on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak(device: str) -> None:
    """Begin to look for the most bytes in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """A field of Linux's /proc/self/status, in bytes (getrusage counts the parent's memory as the child's)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def default_threads() -> int:
    """What ``OMP_NUM_THREADS`` says, else all cores of this process."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


class Recorder:
    """What one process measures of its iterations; made when the models are loaded.

    Args:
        device: ``cpu`` or ``cuda``.
        warmup: Iterations that are not counted.
    """

    def __init__(self, device: str = "cpu", warmup: int = 1) -> None:
        self.device = device
        self.warmup = warmup
        self.rows: list[dict[str, float]] = []
        self.loaded = memory_now(device)
        reset_peak(device)
        self.start()

    def start(self) -> None:
        """An iteration begins."""
        synchronize(self.device)
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the iteration began."""
        synchronize(self.device)
        return time.perf_counter() - self.started

    def stop(self, tokens: int, **phases: float) -> None:
        """The iteration has ended; the next one begins after the probe."""
        row = {"seconds": self.elapsed(), "ended": time.monotonic(), "tokens": tokens, **phases}
        self.rows.append(row | {"probe": probe(self.device)})
        if TAKES_TURNS in os.environ:
            print(TURN, flush=True)
            sys.stdin.readline()
        self.start()

    def result(self) -> dict[str, Any]:
        """The counted iterations, memory, and what they were run with."""
        return {
            "rows": self.rows[self.warmup :],
            "loaded_gb": self.loaded / GB,
            "peak_gb": peak_memory(self.device) / GB,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }


def run_job(
    system: str,
    job: dict[str, Any],
    *,
    threads: int,
    python: str | Path = sys.executable,
    inline: bool = False,
    **environment: str,
) -> dict[str, Any]:
    """The result of a job in a process of its own, or the last line that it printed as ``error``.

    Args:
        system: Picks the script, ``run_<system>.py``.
        job: What the script is to do.
        threads: CPU threads.
        python: The interpreter of the system's environment.
        inline: Run it in this process instead, where memory means nothing: to try the scripts.
        **environment: Further environment variables.
    """
    if inline:
        return importlib.import_module(f"run_{system}").run(job)
    return run_in_turns({system: job}, threads=threads, pythons={system: python}, **environment)[system]


def run_in_turns(
    jobs: dict[str, dict[str, Any]], *, threads: int, pythons: dict[str, str | Path], **environment: str
) -> dict[str, dict[str, Any]]:
    """The results of jobs in processes that take turns, iteration by iteration, so that none runs beside another.

    What slows the machine for some seconds then slows an iteration of each. All are in memory at the same time.

    Args:
        jobs: By system; see :func:`run_job`.
        threads: CPU threads.
        pythons: The interpreter of each system's environment.
        **environment: Further environment variables.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent), TAKES_TURNS: "1"}
    processes = {
        system: _Process(
            [str(pythons[system]), str(HERE / f"run_{system}.py"), json.dumps(job)],
            os.environ | offline | environment | own,
        )
        for system, job in jobs.items()
    }
    while not all([process.ended or process.go_on() for process in processes.values()]):
        pass
    return {system: process.result() for system, process in processes.items()}


class _Process:
    """A process that prints :data:`TURN` after each iteration, and its result as the last line."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment
        self.process: Any = None
        self.ended = False

    def go_on(self) -> bool:
        """Run until an iteration has ended, the first one from loading on; True if nothing is left to run."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.process = subprocess.Popen(self.command, text=True, env=self.environment, **pipes)
        else:
            print(file=self.process.stdin, flush=True)
        self.last = ""
        for line in self.process.stdout:
            if line.rstrip() == TURN:
                return False
            self.last = line
        self.ended = True
        return True

    def result(self) -> dict[str, Any]:
        """What it printed, or the last line of its errors."""
        status = self.process.wait()
        if status == 0:
            return json.loads(self.last)
        self.errors.seek(0)
        errors = self.errors.read()
        print(errors, file=sys.stderr, flush=True)
        return {"error": (errors.strip().splitlines() or [f"exit status {status}"])[-1]}


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Median (least to most), each with so many significant digits."""
    values = list(values)
    median, *ends = (f"{x:.{digits}g}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({ends[0]}..{ends[1]})" if len(values) > 1 else median


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def origin(threads: int, device: str = "cpu") -> str:
    """Where numbers come from: the command, the date, the machine and the versions."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, threads: {threads}"
    return f"(`{command}`, {time.strftime('%Y-%m-%d')}; {machine}; Python {platform.python_version()}, {versions}.)"


def _processor() -> str:
    """The CPU's name, with the number of cores that this process may use."""
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def write(name: str, result: Any, markdown: str, page: Path | None) -> None:
    """Print Markdown, keep the result as JSON in ``runs/benchmarks/``, and put the Markdown between a page's markers.

    Raises:
        ValueError: The page has no such markers.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(markdown, flush=True)
    if page is not None:
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = page.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no place for these tables: add a line {begin} and a line {end}.")
        page.write_text(f"{before}{begin}\n{markdown}\n{end}{after}")
