"""A run that can kill itself: ``python killable_run.py OUTPUT_DIR KIND KILL_AT``; KILL_AT = 0 lives."""

import os
import signal
import sys

from builders import build_policy_arguments, count_a, make_trainer

SETTINGS = {"max_steps": 4, "save_steps": 2, "kl_target": 0.05, "kl_horizon": 40, "resume_from_checkpoint": "auto"}


def reward_that_kills(kill_at):
    """Counts a's; kills the process without any warning the ``kill_at``-th time it is called."""
    calls = 0

    def count_a_or_die(prompts, completions, **kwargs):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return count_a(prompts, completions)

    return count_a_or_die


def run(output_dir, kind, kill_at=0, **settings):
    """Train to the end, or be killed."""
    arguments = build_policy_arguments(kind) | SETTINGS | settings
    trainer = make_trainer(output_dir, reward=reward_that_kills(kill_at), **arguments)
    trainer.train()
    return trainer


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
