"""PPOTrainer: the short loop that joins prompts, rollout, estimator and update; every stage is public."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from lmppo import checkpoint as ckpt
from lmppo.build import (
    describe_environment,
    describe_model,
    load_tokenizer,
    make_accelerator,
    make_actor_critic,
    make_callbacks,
    make_kl_control,
    make_optimizer,
    make_prompt_encoder,
    make_sampling_params,
)
from lmppo.config import PPOConfig, RewardStream
from lmppo.estimators import estimate, shape_rewards
from lmppo.experience import Experience
from lmppo.functional import approx_kl
from lmppo.kl_control import AdaptiveBeta
from lmppo.metrics import MetricsFile, completion_columns, critic_metrics, rollout_metrics
from lmppo.models import ActorCritic, Reference, load_policy
from lmppo.objectives import Penalties
from lmppo.prompts import PromptStream
from lmppo.rewards import RewardSet, make_streams
from lmppo.rollout import ScoredRollout, collect_rollout
from lmppo.run_dir import changed_settings, discard_unsaved, find_resume_point, write_run_config
from lmppo.sampling import EVALUATION, ROLLOUT
from lmppo.saved_rollouts import save_rollouts
from lmppo.schedule import CriticWarmup, set_learning_rates
from lmppo.step_zero import check_kl_zero, rounding_tolerance
from lmppo.tables import print_completions
from lmppo.update import logprobs_now, ppo_update

if TYPE_CHECKING:
    from peft import PeftConfig


class PPOTrainer:
    """Token-level PPO with a critic for a causal language model.

    Args:
        model: Hub id or directory of the policy, or the model itself (also with a peft adapter).
        reward_funcs: One or several reward functions in trl's protocol, or names of one-label classifiers.
        args: The configuration.
        train_dataset: Rows with a ``prompt`` (text, chat messages or token ids); the reward functions get the other
            columns.
        eval_dataset: The same, for :meth:`evaluate`.
        processing_class: The policy's tokenizer; loaded from the model's name if not given.
        reward_processing_classes: Tokenizers of the reward models.
        peft_config: Train an adapter; the reference is then the same model with the adapter off.
        ref_model: The reference, if it is not the policy as it is now.
        critic: None: a value head on the policy's trunk. Otherwise a token-classification model, or a model's name.
        callbacks: transformers callbacks, or their classes.
        run_settings: What else decides the outcome; kept in ``run_config.yaml``, and a run is not continued with another.
        reward_streams: In place of ``reward_funcs``: several kinds of reward, each with its own discount and its own
            output of the critic (:class:`lmppo.RewardStream`, or its fields as a dict).
        watch_funcs: Functions of the same kinds as ``reward_funcs`` that are logged and never enter the reward.

    Raises:
        ValueError: The arguments do not fit together; the message names the culprit and the remedy.
        TypeError: An argument is of the wrong kind.
        OSError: A model or a tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable | str | PreTrainedModel | Sequence[Callable | str | PreTrainedModel] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        peft_config: "PeftConfig | None" = None,
        ref_model: PreTrainedModel | str | None = None,
        critic: PreTrainedModel | str | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        reward_streams: Sequence[RewardStream | dict] | None = None,
        run_settings: dict[str, Any] | None = None,
        watch_funcs: Any = None,
    ) -> None:
        self.args = args if args is not None else PPOConfig()
        if not isinstance(self.args, PPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a lmppo.PPOConfig.")
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give rows with a `prompt`.")
        self.accelerator = make_accelerator(self.args)
        torch.manual_seed(self.args.seed)  # adapters start from random numbers
        policy: Any = load_policy(model, peft_config)
        self.processing_class = processing_class or load_tokenizer(policy.config._name_or_path)
        policy.to(self.accelerator.device)
        if isinstance(ref_model, str):
            ref_model = load_policy(ref_model)
        self.reference = Reference(policy, None if ref_model is None else ref_model.to(self.accelerator.device))
        # A trained adapter that the user brings differs from the reference before any step; anything else may not.
        self._kl_starts_at_zero = ref_model is None and (peft_config is not None or not hasattr(policy, "peft_config"))
        self.streams = make_streams(reward_funcs, reward_streams, self.args)
        self.run_settings = dict(run_settings or {})
        self.rewards = RewardSet.from_streams(
            self.streams, self.args.reward_weights, reward_processing_classes, self.accelerator.device, watch_funcs
        )
        self.params = make_sampling_params(self.args, self.processing_class, policy)
        actor_critic = make_actor_critic(policy, critic, self.args, n_streams=len(self.streams))
        readers = {"model": policy, "ref_model": self.reference.model, "critic": actor_critic.critic}
        encoder = make_prompt_encoder(self.processing_class, readers, self.args)
        self.prompts = PromptStream(train_dataset, encoder, seed=self.args.seed, shuffle=self.args.shuffle_dataset)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = PromptStream(eval_dataset, encoder, shuffle=False, name="eval_dataset")
        elif self.args.eval_steps is not None:
            raise ValueError(f"eval_steps={self.args.eval_steps} needs an eval_dataset.")

        optimizer: Any = make_optimizer(actor_critic, self.args)
        self.model, self.optimizer = self.accelerator.prepare(actor_critic, optimizer)
        self.kl_control = make_kl_control(self.args)
        self.beta = AdaptiveBeta(self.args.policy_kl_coef, self.args.policy_kl_target)
        self.warmup = CriticWarmup(self.args.critic_warmup_steps, self.args.critic_warmup_explained_variance)
        self.metrics_file = MetricsFile(Path(self.args.output_dir) / "metrics.jsonl")
        self.completions_file = MetricsFile(Path(self.args.output_dir) / "completions.jsonl")
        self.num_tokens = 0
        self.newest: dict[str, Any] | None = None
        self.state = TrainerState(
            max_steps=self.args.max_steps,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.callbacks = make_callbacks(callbacks)

    @property
    def actor_critic(self) -> ActorCritic:
        """Policy and critic, without the wrapper for distributed training."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainerState:
        """Run PPO up to ``max_steps``, and write ``final/``.

        Args:
            resume_from_checkpoint: As in :class:`PPOConfig`, which it overrides.

        Raises:
            CheckpointError: The run directory cannot be used, or the checkpoint cannot be resumed.
        """
        asked = resume_from_checkpoint
        first = self._open_run(self.args.resume_from_checkpoint if asked is None else asked)
        final = Path(self.args.output_dir) / "final"
        if first >= self.args.max_steps and final.exists():
            self.accelerator.print(f"Nothing to do: the run in {self.args.output_dir} is at step {first} already.")
            return self.state
        self.control, saved = TrainerControl(), first
        self._fire("on_train_begin")
        bar = tqdm(
            initial=first,
            total=self.args.max_steps,
            desc="PPO",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )
        for iteration in range(first, self.args.max_steps):
            self._fire("on_step_begin")
            row = self.step(iteration, check_step_zero=iteration == first)
            bar.update()
            bar.set_postfix_str(
                f"reward {row['reward']:.3f}, kl {row['kl_to_ref']:.2f}, ev {row['explained_variance']:.2f}, "
                f"{row['tokens_per_second']:.0f} tok/s"
            )
            self._fire("on_step_end")
            stop = self.control.should_training_stop
            if _is_due(self.args.save_steps, iteration + 1) or self.control.should_save or stop:
                self.control.should_save, saved = False, iteration + 1
                self.save_checkpoint()
            if stop:
                break
        bar.close()
        if saved != self.state.global_step:
            self.save_checkpoint()
        self.save_model(final)
        self._fire("on_train_end")
        for tracker in self.accelerator.trackers:  # end_training() would end the process group too
            tracker.finish()
        return self.state

    def step(self, iteration: int, *, check_step_zero: bool = False) -> dict[str, float]:
        """One PPO iteration: rollout, rewards, advantages, update; returns the row of metrics it logged."""
        args, started = self.args, time.perf_counter()
        lr, critic_lr = set_learning_rates(self.optimizer, iteration, args)
        prompts = self.prompts.next_batch(args.rollout_batch_size // args.num_generations, args.num_generations)
        scored = self.rollout(prompts, iteration)
        sampled = time.perf_counter()

        rollout, kl_coef, beta = scored.rollout, self.kl_control.coef, self.beta.coef
        tolerance = args.step_zero_tolerance or rounding_tolerance(
            rollout.max_logit.max().item(), self.accelerator.mixed_precision
        )
        if check_step_zero and iteration == 0 and self._kl_starts_at_zero:
            check_kl_zero(rollout.kl_to_ref.abs().max().item(), tolerance)
        rewards = shape_rewards(rollout, args, self.streams, kl_coef=kl_coef)
        estimated = estimate(rollout, rewards, args, self.streams)
        experience = Experience.from_rollout(rollout, estimated.advantages, estimated.returns, estimated.mask)
        was_frozen = not self.warmup.over
        self.newest = {"scored": scored, "experience": experience, "rewards": rewards, "kl_coef": kl_coef}
        frozen = self.warmup.freezes(iteration, estimated.metrics.get("critic/explained_variance", 0.0))
        stats = ppo_update(
            self.model,
            self.optimizer,
            experience,
            args,
            self.accelerator,
            iteration=iteration,
            policy_frozen=frozen,
            penalties=Penalties(beta, kl_coef * estimated.scale if args.kl_in_loss else 0.0, self.reference),
            first_ratio_tolerance=tolerance if check_step_zero or was_frozen else None,
        )
        if args.objective == "kl_penalty" and not frozen:
            new = logprobs_now(self.model, experience, args, self.accelerator)
            stats["policy_kl_coef"], stats["policy_kl"] = beta, approx_kl(new, rollout.logprobs, estimated.mask).item()
            self.beta.update(stats["policy_kl"])
        row = rollout_metrics(scored, self.rewards.names, kl_coef=kl_coef) | stats | estimated.metrics
        row |= critic_metrics(rollout.values, estimated.returns, rollout.completion_mask)
        self.kl_control.update(row["kl_to_ref"], args.rollout_batch_size)

        n_tokens, seconds = int(rollout.completion_mask.sum()), time.perf_counter() - started
        self.num_tokens += n_tokens
        row |= {"learning_rate": lr, "critic_learning_rate": critic_lr, "num_tokens": self.num_tokens}
        row |= {"tokens_per_second": n_tokens / seconds, "time/rollout": sampled - started}
        row |= {"time/update": seconds - (sampled - started)}
        self._finish_step(iteration + 1, row, scored)
        return row

    def rollout(self, prompts: Any, iteration: int, *, purpose: int = ROLLOUT) -> ScoredRollout:
        """Sample and score one completion for each prompt of a batch."""
        return collect_rollout(
            self.model,
            self.reference,
            self.rewards,
            prompts,
            self.args,
            tokenizer=self.processing_class,
            params=self.params,
            accelerator=self.accelerator,
            iteration=iteration,
            trainer_state=self.state,
            purpose=purpose,
        )

    def sample_eval(self) -> ScoredRollout:
        """``eval_completions`` scored completions of ``eval_dataset``; the same prompts and noise at every call.

        Raises:
            ValueError: There is no eval_dataset.
        """
        if self.eval_prompts is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        self.eval_prompts.load_state_dict({"drawn": 0})
        return self.rollout(self.eval_prompts.next_batch(self.args.eval_completions), 0, purpose=EVALUATION)

    def evaluate(self, scored: ScoredRollout | None = None) -> dict[str, float]:
        """Reward, KL to the reference, length, EOS rate and diversity on ``eval_dataset``, as ``eval_*``.

        Args:
            scored: What :meth:`sample_eval` gave, if it is at hand.

        Raises:
            ValueError: There is no eval_dataset.
        """
        scored = self.sample_eval() if scored is None else scored
        metrics = rollout_metrics(scored, self.rewards.names, kl_coef=self.kl_control.coef)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self._fire("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | Path) -> None:
        """Write the policy as a plain Hugging Face model with its tokenizer, and the critic beside it.

        An adapter is merged, and also kept as it is in ``adapter/``. Files of the same names are replaced when the new
        ones are whole; whatever else is in ``output_dir`` stays.
        """
        if self.accelerator.is_main_process:
            ckpt.replace_model(self.actor_critic, Path(output_dir), self.processing_class)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present step, and delete the oldest ones beyond ``save_total_limit``."""
        keep = self._keep_rollouts()
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.global_step,
                "num_tokens": self.num_tokens,
                **{name: part.state_dict() for name, part in self._stateful().items()},
                "settings": self._settings(),
                "environment": describe_environment(self.accelerator),
            }
            path = ckpt.checkpoint_dir(self.args.output_dir, self.state.global_step)
            ckpt.save_checkpoint(path, self.actor_critic, self.optimizer.optimizer, state, self.processing_class, keep)
            if self.args.save_total_limit is not None:
                ckpt.prune_checkpoints(self.args.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._fire("on_save")

    def _keep_rollouts(self) -> Callable[[Path], None] | None:
        """What writes the newest rollout into a checkpoint, with its log-probabilities under the policy as it is now."""
        if not self.args.save_rollouts or self.newest is None:
            return None
        new = logprobs_now(self.model, self.newest["experience"], self.args, self.accelerator)
        keep = partial(save_rollouts, new_logprobs=new, config=self.args, tokenizer=self.processing_class)
        return partial(keep, rows=self.args.save_rollouts, streams=self.streams, **self.newest)

    def _fire(self, event: str, **kwargs: Any) -> None:
        """Tell the callbacks, with the arguments transformers' Trainer gives them."""
        for callback in self.callbacks:
            kwargs |= {"model": self.actor_critic.policy, "processing_class": self.processing_class}
            result = getattr(callback, event)(self.args, self.state, self.control, optimizer=self.optimizer, **kwargs)
            self.control = result or self.control

    def _open_run(self, resume: str | bool | None) -> int:
        """Decide where to start, put the state in place, and return the first iteration."""
        settings = self._settings()
        point = find_resume_point(self.args.output_dir, resume, settings)
        self.accelerator.wait_for_everyone()
        if point is not None:
            self._restore(point, settings)
        if self.accelerator.is_main_process:
            write_run_config(self.args.output_dir, settings)
            discard_unsaved(self.args.output_dir)
            self.metrics_file.cut_after(self.state.global_step)
            self.completions_file.cut_after(self.state.global_step)
        if self.args.report_to:
            scalars = {k: v for k, v in settings.items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers(self.args.run_name, config=scalars)
        self.accelerator.wait_for_everyone()
        return self.state.global_step

    def _restore(self, point: Path, settings: dict[str, Any]) -> None:
        saved = ckpt.load_checkpoint(point, self.actor_critic, self.optimizer.optimizer)
        for name, (old, new) in changed_settings(saved["settings"], settings).items():
            self.accelerator.print(f"Resuming with another {name}: {old!r} before, {new!r} now.")
        for name, new in describe_environment(self.accelerator).items():
            if saved["environment"].get(name) != new:
                old = saved["environment"].get(name)
                self.accelerator.print(f"Resuming is valid but not bit-identical: {name} was {old!r} and is {new!r}.")
        self.state.global_step = saved["step"]
        self.num_tokens = saved["num_tokens"]
        for name, part in self._stateful().items():
            if name in saved:  # checkpoints of older versions lack what came later
                part.load_state_dict(saved[name])
        self.accelerator.print(f"Resumed {point} at step {saved['step']}.")

    def _stateful(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "kl_control": self.kl_control, "beta": self.beta, "warmup": self.warmup}

    def _finish_step(self, step: int, row: dict[str, float], scored: ScoredRollout) -> None:
        """Log what the iteration did."""
        self.state.global_step = step
        if self.prompts.is_map_style:
            self.state.epoch = row["epoch"] = self.prompts.drawn / len(self.prompts.dataset)
        if _is_due(self.args.eval_steps, step):
            row |= self.evaluate()
        row = {"step": step, **row}
        self.state.log_history.append(row)
        if self.accelerator.is_main_process:
            self.metrics_file.append(row)
        if step % self.args.logging_steps == 0 or step == self.args.max_steps:
            self.accelerator.log(row, step=step)
            self._fire("on_log", logs=row)
            if self.args.log_completions and self.accelerator.is_main_process:
                self._show_completions(step, scored)

    def _show_completions(self, step: int, scored: ScoredRollout) -> None:
        columns, rows = completion_columns(scored, self.rewards.names), self.args.log_completions
        print_completions(f"Step {step}", scored.prompts, scored.completions, columns, rows=rows)
        for i, text in enumerate(scored.completions[:rows]):
            row = {"step": step, "prompt": scored.prompts[i], "completion": text}
            self.completions_file.append(row | {name: column[i] for name, column in columns.items()})

    def _settings(self) -> dict[str, Any]:
        return (
            self.args.to_dict()
            | describe_model(self.actor_critic)
            | {
                **self.rewards.describe(),
                "reward_streams": [[s.name, s.weight, s.gamma, s.lam, len(s.reward_funcs)] for s in self.streams],
                "train_dataset": self.prompts.fingerprint,
                "run_settings": self.run_settings,
            }
        )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
