"""On an accelerator: the numbers of the record, which were computed on a CPU, an exact resume, and 16 bits.

These tests need a GPU and are skipped by name without one; docs/distributed.md says where they have been run.
"""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from builders import gpt2, llama, lora, metrics_rows, trained, weights
from test_record import RECORD, RUNS, rows_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


SETTINGS = [
    {},
    {"num_layers_unfrozen": 1},
    {"gradient_checkpointing": True},
    {"critic": "lora", "peft_config": lora()},
    {"frozen_dtype": "bfloat16", "peft_config": lora()},
    {"objective": "trpo", "trpo_cg_steps": 3},
    {"cuda_graphs": True},
]


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


@pytest.mark.parametrize("kind", ["nf4", "nf4, compute in bf16", "int8"])
def test_qlora_starts_at_ratio_one_and_learns(kind, tmp_path):
    kinds = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "nf4, compute in bf16": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }
    gpt2(n_embd=64, n_head=4).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=BitsAndBytesConfig(**kinds[kind]),
        dtype=torch.float32,
        device_map={"": torch.accelerator.current_accelerator().type},
    )
    arguments = {"model": base, "peft_config": lora(), "max_steps": 12, "rollout_batch_size": 32, "minibatch_size": 32}
    rows = metrics_rows(trained(tmp_path / "run", use_cpu=False, **arguments).args.output_dir)
    assert rows[0]["first_ratio_error"] < (1e-4 if kind == "nf4" else 0.1)
    assert rows[-1]["reward"] > rows[0]["reward"]


GRAPHED = {
    "gpt2": {},
    "llama": {"model": llama()},
    "lora in bfloat16": {"peft_config": lora(), "bf16": True},
    "llama in bfloat16": {"model": llama(), "bf16": True},
    "frozen layers": {"num_layers_unfrozen": 1},
    "groups, top-k": {"num_generations": 4, "top_k": 5},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA graphs")
@pytest.mark.parametrize("name", GRAPHED)
def test_a_cuda_graph_samples_the_same_tokens(name, tmp_path):
    settings = {"max_steps": 3, "rollout_batch_size": 16, "max_completion_length": 24, "use_cpu": False}
    settings |= GRAPHED[name]
    plain, graphed = (
        metrics_rows(trained(tmp_path / str(graphs), cuda_graphs=graphs, **copy.deepcopy(settings)).args.output_dir)
        for graphs in (False, True)
    )
    rounding = {"rel": 5e-2, "abs": 5e-2} if "bf16" in settings else {"rel": 2e-3, "abs": 2e-4}
    for row, other in zip(plain[:1] if "bf16" in settings else plain, graphed, strict=False):
        same = {name: x for name, x in row.items() if "time" not in name and name != "tokens_per_second"}
        assert {name: other[name] for name in same} == pytest.approx(same, **rounding)
