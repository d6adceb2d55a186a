"""What a launcher's environment, or an Accelerator made before, must not do to the numbers of a run."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from builders import assert_same, make_trainer, metrics_rows, trained, weights


@pytest.fixture
def own_state():
    """accelerate keeps what the first Accelerator of a process was made with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accumulation_from_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4.* set it to 1 .*micro_batch_size"):
        make_trainer(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    make_trainer(tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
def test_accumulation_of_another_accelerator_changes_no_gradient(tmp_path, own_state, when):
    """As transformers' Trainer makes one, for stages before this one in the same process."""
    expected = trained(tmp_path / "alone")
    if when == "before":
        Accelerator(cpu=True, gradient_accumulation_steps=4)
    trainer = make_trainer(tmp_path / "other")
    if when == "after":
        Accelerator(cpu=True, gradient_accumulation_steps=4)
    trainer.train()
    assert metrics_rows(tmp_path / "other") == metrics_rows(tmp_path / "alone")
    assert_same(weights(trainer), weights(expected))


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
@pytest.mark.parametrize("source", ["the launcher", "an Accelerator"])
def test_other_precisions_are_refused(tmp_path, own_state, monkeypatch, precision, source):
    if source == "the launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    else:
        Accelerator(cpu=True)
        AcceleratorState._shared_state["_mixed_precision"] = precision  # a CPU refuses to make such a one
    with pytest.raises(ValueError, match=f"mixed_precision='{precision}', and lmppo runs in .* to 'no', or to 'bf16'"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("source", ["the launcher", "an Accelerator"])
def test_bfloat16_from_elsewhere_is_told_and_refused_for_trpo(tmp_path, own_state, monkeypatch, capsys, source):
    if source == "the launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    else:
        Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision='bf16', whose rounding is .*objective='trpo'.* to 'no'"):
        make_trainer(tmp_path, objective="trpo")
    assert make_trainer(tmp_path).accelerator.mixed_precision == "bf16"
    assert "Forward passes run in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["TP", "CP", "SP", "DP_SHARD"])
def test_sharding_by_a_parallelism_config_is_refused(tmp_path, own_state, monkeypatch, kind):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    with pytest.raises(RuntimeError, match=f"PARALLELISM_CONFIG_{kind}_SIZE=2, which shards .*plain data parallelism"):
        make_trainer(tmp_path)


def test_processes_on_the_cpu_of_a_machine_with_gpus_are_refused(tmp_path, own_state, monkeypatch):
    """accelerate's barrier gives gloo the number of a GPU for each process, and torch fails where there is none."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="machine with GPUs: .*Hide them, with CUDA_VISIBLE_DEVICES="):
        make_trainer(tmp_path)
