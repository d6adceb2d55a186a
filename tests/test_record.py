"""What fixed seeds give, against a record: a change that should move no number moves none.

    python tests/test_record.py        # writes the record anew, where a change of the numbers is meant

The record holds metrics, to be compared up to the rounding of other machines, not hashes of floats.
"""

import json
import math
import sys
from pathlib import Path

import pytest
from builders import count_a, critic_of, llama, lora, metrics_rows, share_of_a, trained

RECORD = Path(__file__).parent / "data" / "record.json"
STREAMS = [
    {"name": "count", "reward_funcs": [count_a], "gamma": 0.9},
    {"name": "share", "reward_funcs": [share_of_a], "weight": 0.5, "lam": 0.8},
    {"name": "kl"},
]
# Fresh arguments for every run: a trainer trains the models that it is given.
RUNS = {
    "shared": dict,
    "separate critic": lambda: {"critic": critic_of()},
    "lora": lambda: {"peft_config": lora()},
    "llama, top-p": lambda: {"model": llama(), "top_p": 0.9},
    "top-k and min-p, bootstrap": lambda: {"top_k": 5, "min_p": 0.05, "temperature": 1.3, "truncation": "bootstrap"},
    "streams": lambda: {"reward_streams": STREAMS},
    "trpo": lambda: {"objective": "trpo", "trpo_max_kl": 0.02, "trpo_damping": 1.0, "trpo_cg_steps": 3},
    "kl penalty, warm-up": lambda: {"objective": "kl_penalty", "critic_epochs": 3, "critic_warmup_steps": 1},
    "frozen lower layers": lambda: {"num_layers_unfrozen": 1},
    "exact KL in reward and loss": lambda: {"kl_form": "exact_both", "kl_target": 0.05, "kl_horizon": 40},
    "without a critic": lambda: {
        "estimator": "rewards_to_go", "baseline": "leave_one_out", "num_generations": 2, "truncation": "mask",
    },
}  # fmt: skip


def rows_of(name, output_dir, **more):
    """Three steps, the last after a resume; Adam's epsilon keeps it from making much of small differences."""
    settings = {"adam_epsilon": 1e-3, "save_steps": 1, **more}
    trained(output_dir, max_steps=2, **settings, **RUNS[name]())
    trained(output_dir, max_steps=3, resume_from_checkpoint="true", **settings, **RUNS[name]())
    return [{k: v for k, v in row.items() if k != "first_ratio_error"} for row in metrics_rows(output_dir)]


@pytest.mark.parametrize("name", RUNS)
def test_fixed_seeds_give_the_recorded_metrics(name, tmp_path):
    expected = json.loads(RECORD.read_text())[name]
    rows = rows_of(name, tmp_path)
    assert len(rows) == len(expected) == 3
    for row, recorded in zip(rows, expected, strict=True):
        assert row.keys() == recorded.keys()
        assert row == pytest.approx(recorded, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    import tempfile

    record = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as directory:
            record[run] = rows_of(run, directory)
    assert all(math.isfinite(v) for rows in record.values() for row in rows for v in row.values())
    rounded = {n: [{k: float(f"{v:.7g}") for k, v in row.items()} for row in rows] for n, rows in record.items()}
    RECORD.write_text(json.dumps(rounded, indent=1) + "\n")
    sys.exit(0)
