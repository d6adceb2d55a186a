"""On an accelerator: the numbers of the record, which were computed on a CPU, an exact resume, and 16 bits.

These tests need a GPU and are skipped by name without one; docs/distributed.md says where they have been run.
"""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from builders import lora, metrics_rows, trained, weights
from test_record import RECORD, RUNS, rows_of

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, such as a GPU")


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", RUNS)
def test_fixed_seeds_give_what_they_give_on_a_cpu(name, tmp_path):
    rows = rows_of(name, tmp_path, use_cpu=False)
    for row, recorded in zip(rows, json.loads(RECORD.read_text())[name], strict=True):
        assert row.keys() == recorded.keys()
        assert row == pytest.approx(recorded, rel=2e-3, abs=2e-4)


SETTINGS = [{}, {"num_layers_unfrozen": 1}, {"gradient_checkpointing": True}, {"critic": "lora", "peft_config": lora()}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_run_is_the_run_that_was_not_killed(settings, tmp_path):
    whole = trained(tmp_path / "whole", max_steps=4, use_cpu=False, **settings)
    trained(tmp_path / "parts", max_steps=2, use_cpu=False, **settings)
    parts = trained(tmp_path / "parts", max_steps=4, use_cpu=False, resume_from_checkpoint="true", **settings)
    rows = [
        [{k: v for k, v in row.items() if "time" not in k and k != "tokens_per_second"} for row in metrics_rows(run)]
        for run in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert rows[0] == rows[1]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name


@pytest.mark.parametrize("kind", ["shared", "lora"])
def test_bfloat16_starts_at_ratio_one_and_kl_zero(kind, tmp_path):
    arguments = {"peft_config": lora()} if kind == "lora" else {}
    rows = metrics_rows(trained(tmp_path, bf16=True, use_cpu=False, **arguments).args.output_dir)
    assert len(rows) == 2
    assert rows[0]["first_ratio_error"] < 1e-2
    assert abs(rows[0]["kl_to_ref"]) < 1e-1


def test_the_models_and_the_optimizer_are_on_the_accelerator(tmp_path):
    trainer = trained(tmp_path, use_cpu=False)
    kind = torch.accelerator.current_accelerator().type
    modules = (trainer.actor_critic, trainer.reference.model)
    assert {p.device.type for module in modules for p in module.parameters()} == {kind}
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].device.type for state in states} == {kind}
