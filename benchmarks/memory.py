r"""Peak memory of an iteration: measured on small models, and computed for well-known ones.

    python benchmarks/memory.py --markdown docs/memory.md
    python benchmarks/memory.py --only fits --markdown docs/memory.md

Measured is what a process needs beyond its loaded policy: resident memory on a CPU, allocated memory on a GPU; each point is
a process of its own. On a CPU, the C library is told to give freed blocks back. Beside it stands the formula of
footprint.py, by which it is then computed which models fit where.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from footprint import Setting, footprint, kept_per_token, peak
from measuring import GB, default_threads, origin, run_job, table, write
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config
from workloads import Workload

BASE = Workload(layers=4, width=384, heads=6, vocab=8192, batch=16, prompt=(16, 16), length=48, epochs=1)
SMOKE = {"layers": 1, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4}
# What differs from the base: of the workload, of the setting, and how many rows a micro-batch has.
POINTS: dict[str, dict[str, Any]] = {
    "base": {},
    "width 768": {"width": 768},
    "8 layers": {"layers": 8},
    "vocabulary 32768": {"vocab": 32768},
    "micro_batch_size 4": {"micro_batch": 4},
    "completions of 112 tokens": {"length": 112},
    "a critic of its own": {"critic": True},
    "LoRA": {"lora": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "LoRA, gradient_checkpointing, bf16": {"lora": True, "gradient_checkpointing": True, "bf16": True},
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; glibc would keep freed blocks of up to 32 MB
TERMS = ("reference", "critic", "gradients", "optimizer", "activations", "logits", "rollout")


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> PretrainedConfig:
    """A Qwen2.5."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
    return Qwen2Config(**sizes, tie_word_embeddings=tied)


def llama(hidden: int, inner: int, layers: int, tied: bool) -> PretrainedConfig:
    """A Llama 3."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    return LlamaConfig(**sizes, hidden_size=hidden, intermediate_size=inner, tie_word_embeddings=tied)


SHAPES = {
    "GPT-2 124M": GPT2Config(),
    "Qwen2.5-0.5B": qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "Llama-3.2-1B": llama(2048, 8192, 16, tied=True),
    "Qwen2.5-1.5B": qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-7B": qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Llama-3.1-8B": llama(4096, 14336, 32, tied=False),
}
SETTINGS = {
    "all weights, value head": Setting(),
    "all weights, a critic of its own": Setting(critic=True),
    "LoRA": Setting(lora=True),
    "LoRA, `gradient_checkpointing`, `bf16`": Setting(lora=True, gradient_checkpointing=True, bf16=True),
    "the same, `frozen_dtype: bfloat16`": Setting(lora=True, gradient_checkpointing=True, bf16=True, frozen_bf16=True),
}
CARDS = (8, 16, 24, 80)  # GB
USABLE = 0.9  # the rest: the framework, fragments, and whatever else runs
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROLLOUT = {"batch": 64, "prompt": 256, "length": 256}


def measure(name: str, base: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """A point's measured and computed gigabytes beyond the loaded policy."""
    changes = {"micro_batch": base.batch} | POINTS[name]
    work, setting = dataclasses.replace(base, **of(Workload, changes)), Setting(**of(Setting, changes))
    micro_batch = changes["micro_batch"]
    switches = {"gradient_checkpointing": setting.gradient_checkpointing, "bf16": setting.bf16}
    job = {
        "work": dataclasses.asdict(work),
        "iterations": 1,
        "device": args.device,
        "settings": {"micro_batch_size": micro_batch, **switches},
        "lora": setting.lora,
    }
    print(name, file=sys.stderr, flush=True)
    result = run_job("lmppo", job, threads=args.threads, inline=args.smoke, **GIVES_BACK)
    if "error" in result:
        return result
    sizes = {"batch": work.batch, "micro_batch": micro_batch, "prompt": work.prompt[0], "length": work.length}
    sizes["device"] = "cpu" if args.device == "cpu" else "accelerator"
    terms = footprint(work.config, setting, kept_per_token(work.config, setting), **sizes)
    beyond = (peak(terms) - terms["policy"]) / GB
    computed = {"computed_gb": beyond, "terms": {key: value / GB for key, value in terms.items()}}
    return {"peak_gb": result["peak_gb"], "loaded_gb": result["loaded_gb"]} | computed


def of(kind: type, changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the changes that are fields of a dataclass."""
    return {field.name: changes[field.name] for field in dataclasses.fields(kind) if field.name in changes}


def measured_table(points: dict[str, dict[str, Any]]) -> str:
    """One row for each point."""
    rows = []
    for name, point in points.items():
        if "error" in point:
            rows.append([name, f"failed: {point['error']}", "", "", *[""] * len(TERMS)])
            continue
        measured, computed = point["peak_gb"] - point["loaded_gb"], point["computed_gb"]
        ratio = f"{computed / measured:.2f}" if measured > 0 else ""
        rows.append([name, f"{measured:.2f}", f"{computed:.2f}", ratio, *(f"{point['terms'][t]:.2f}" for t in TERMS)])
    return table(["point", "measured GB", "formula GB", "formula / measured", *TERMS], rows)


def fitting(name: str) -> dict[str, dict[str, Any]]:
    """For each setting: gigabytes at ``micro_batch_size=1``, and the largest power of two that each card holds (0: none)."""
    print(name, file=sys.stderr, flush=True)
    config, found = SHAPES[name], {}
    sizes = ROLLOUT | {"device": "accelerator"}
    for label, setting in SETTINGS.items():
        kept = kept_per_token(config, setting)
        needs = {n: peak(footprint(config, setting, kept, micro_batch=n, **sizes)) / GB for n in MICRO_BATCHES}
        largest = {card: max((n for n in needs if needs[n] <= USABLE * card), default=0) for card in CARDS}
        found[label] = {"gb": needs[1], "largest": largest}
    return found


def fits_table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row for each model and setting."""
    header = ["model", "trained", "GB at `micro_batch_size` 1", *(f"{card} GB" for card in CARDS)]
    rows = [
        [name, label, f"{fit['gb']:.1f}", *(str(fit["largest"][card] or "no") for card in CARDS)]
        for name, settings in found.items()
        for label, fit in settings.items()
    ]
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "fits"], help="one of the two tables: measured, or computed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="tiny models, in this process: tries the script itself")
    args = parser.parse_args(argv)
    base = dataclasses.replace(BASE, **SMOKE) if args.smoke else BASE
    if args.only != "fits":
        points = {name: measure(name, base, args) for name in (list(POINTS)[::4] if args.smoke else POINTS)}
        text = f"{measured_table(points)}\n\n{origin(args.threads, args.device)}"
        write("memory", points, text, args.markdown)
    if args.only != "memory":
        found = {name: fitting(name) for name in (list(SHAPES)[:1] if args.smoke else SHAPES)}
        write("fits", found, f"{fits_table(found)}\n\n{origin(args.threads)}", args.markdown)


if __name__ == "__main__":
    main()
