"""An error on one process is raised on all; here processes are threads that gather over a barrier."""

import threading
from types import SimpleNamespace

import pytest
import torch
from builders import make_trainer

from lmppo import processes
from lmppo.checks import NonFiniteError
from lmppo.processes import raised_together
from lmppo.rewards import RewardError


def run_two(monkeypatch, errors):
    """What each of two processes raises where the block raises ``errors[index]`` on each."""
    barrier, board, raised, local = threading.Barrier(2), [None, None], [None, None], threading.local()

    def gather_object(items):
        board[local.index] = items
        barrier.wait(10)
        return [item for items in board for item in items]

    def run(index):
        local.index = index
        try:
            with raised_together(SimpleNamespace(num_processes=2, process_index=index), "The rollout"):
                if errors[index] is not None:
                    raise errors[index]
        except Exception as error:
            raised[index] = error

    monkeypatch.setattr(processes, "gather_object", gather_object)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("own", [NonFiniteError("rows [3]"), RewardError("'f' raised"), ValueError("3 scores for 4")])
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_raise_the_same_kind_and_name_the_process(monkeypatch, own, index):
    raised = run_two(monkeypatch, [own, None] if index == 0 else [None, own])
    assert raised[index] is own
    other = raised[1 - index]
    assert type(other) is type(own)
    assert str(other) == f"The rollout failed on another process. process {index}: {own}"


def test_an_error_of_an_unknown_kind_is_a_runtime_error_on_the_others(monkeypatch):
    class Local(Exception):
        """One that the other processes need not know."""

    raised = run_two(monkeypatch, [Local("out of memory"), None])
    assert type(raised[1]) is RuntimeError and "process 0: out of memory" in str(raised[1])


def test_errors_on_both_are_each_ones_own(monkeypatch):
    own = [ValueError("a"), ValueError("b")]
    assert run_two(monkeypatch, own) == own
    assert run_two(monkeypatch, [None, None]) == [None, None]


@pytest.mark.parametrize("part", ["sampling", "reference", "reward"])
def test_whatever_fails_in_a_rollout_is_told_to_the_others(tmp_path, monkeypatch, part):
    told = []
    monkeypatch.setattr(processes, "gather_object", lambda items: told.extend(items) or items)

    def fail(prompts, completions, **kwargs):
        raise KeyError("no")

    trainer = make_trainer(tmp_path, **({"reward": fail} if part == "reward" else {}))
    if part == "sampling":
        torch.nn.init.constant_(trainer.actor_critic.policy.transformer.ln_f.bias, torch.nan)
    if part == "reference":
        monkeypatch.setattr(trainer.reference, "read", lambda tokens: 1 / 0)
    prompts = trainer.prompts.next_batch(8)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    error = {"sampling": NonFiniteError, "reference": ZeroDivisionError, "reward": RewardError}[part]
    with pytest.raises(error):
        trainer.collector.collect(prompts, 0)
    assert [kind for kind, _ in told] == [RuntimeError if part == "reference" else error]
