"""PPOTrainer: the short loop that joins prompts, rollout, estimator and update; every stage is public."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_callback import TrainerState

from lmppo import IMPORTED
from lmppo.checks import check_kl_zero, rounding_tolerance
from lmppo.collector import Collector, ScoredRollout
from lmppo.config import PPOConfig, RewardStream
from lmppo.control import Control
from lmppo.estimators import Estimate, estimate, shape_rewards
from lmppo.evaluation import Evaluation
from lmppo.explain import save_rollouts
from lmppo.functional import approx_kl
from lmppo.launch import make_accelerator
from lmppo.loss import Penalties
from lmppo.metrics import critic_metrics, rollout_metrics
from lmppo.models import ActorCritic, Reference, compute_precision, load_policy
from lmppo.models.critics import make_actor_critic
from lmppo.models.frozen_weights import place_policy
from lmppo.models.quantized import check_trainable
from lmppo.models.recomputation import prepare_recomputation
from lmppo.optimizer import make_optimizer, set_learning_rates
from lmppo.prompts import PromptStream, load_tokenizer, make_prompt_encoder, tokenizer_of
from lmppo.protocols import Tokenizer
from lmppo.records import Experience, Rollout
from lmppo.redaction import scrubbed
from lmppo.rewards import RewardSet, make_streams
from lmppo.run import Callbacks, Run
from lmppo.sampling import SamplingParams
from lmppo.sampling_checks import check_sampling, sampling_warnings
from lmppo.trpo import trpo_update
from lmppo.update import critic_epochs, critic_update, logprobs_now, ppo_update

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Step:
    """What one iteration was made of, as far as a checkpoint keeps it."""

    scored: ScoredRollout
    experience: Experience
    rewards: Tensor
    kl_coef: float


class PPOTrainer:
    """Token-level PPO with a critic for a causal language model.

    Args:
        model: Hub id or directory of the policy or of an adapter to go on with, or the model itself (also a PeftModel).
        reward_funcs: One or several reward functions in trl's protocol, or names of one-label classifiers.
        args: The configuration.
        train_dataset: Rows with a ``prompt`` (text, chat messages or token ids); the reward functions get the other
            columns.
        eval_dataset: The same, for :meth:`evaluate`; or several such sets by name, as a dict.
        processing_class: The policy's tokenizer, or a multimodal model's processor, of which the tokenizer is used and the
            whole is saved; loaded from the model's name if not given.
        reward_processing_classes: Tokenizers of the reward models.
        peft_config: Train a fresh adapter.
        ref_model: The reference, if it is not the policy as it is now.
        critic: None: the critic that another run has left beside ``model``, else a fresh value head on the policy's trunk.
            ``"lora"``: an adapter of its own on the base of a policy with a LoRA adapter, with a value head.
            Otherwise a model or its name: a critic, a reward model or a language model, whose values start as the
            critic's, as the rewards, or at 0; a model that is given is copied.
        callbacks: transformers callbacks, or their classes.
        run_settings: Other settings that affect results: kept in ``run_config.yaml``, and a run is not resumed with others.
        reward_streams: In place of ``reward_funcs``: several kinds of reward, each with its own discount and its own
            output of the critic (:class:`lmppo.RewardStream`, or its fields as a dict).
        watch_funcs: Functions of the same kinds as ``reward_funcs`` that are logged and never enter the reward.

    Raises:
        ValueError: The arguments do not fit together; the message names the culprit and the remedy.
        TypeError: An argument is of the wrong kind.
        OSError: A model or a tokenizer cannot be loaded.
        UntrustedModelError: Its weights are pickled, or it needs code that ``trust_remote_code`` does not allow.
    """

    @scrubbed
    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable | str | PreTrainedModel | Sequence[Callable | str | PreTrainedModel] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        peft_config: "PeftConfig | None" = None,
        ref_model: PreTrainedModel | str | None = None,
        critic: PreTrainedModel | str | None = None,
        callbacks: Callbacks | None = None,
        reward_streams: Sequence[RewardStream | dict] | None = None,
        run_settings: dict[str, Any] | None = None,
        watch_funcs: Any = None,
    ) -> None:
        self.args = args if args is not None else PPOConfig()
        if not isinstance(self.args, PPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a lmppo.PPOConfig.")
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give rows with a `prompt`.")
        if eval_dataset is None and self.args.eval_steps is not None:
            raise ValueError(f"eval_steps={self.args.eval_steps} needs an eval_dataset.")
        self.accelerator = make_accelerator(self.args, evaluates=eval_dataset is not None)
        device = self.accelerator.device

        # The models.
        torch.manual_seed(self.args.seed)  # adapters start from random numbers
        trust: dict[str, Any] = {"trust_remote_code": self.args.trust_remote_code}
        layers, dtype = self.args.num_layers_unfrozen, self.args.frozen_dtype
        frozen: dict[str, Any] = {"num_layers_unfrozen": layers, "frozen_dtype": dtype}
        policy = place_policy(load_policy(model, peft_config, **trust), device, **frozen)
        check_trainable(policy, self.args.objective)
        origin = str(model) if isinstance(model, str | Path) else policy.config._name_or_path
        named = origin if (Path(origin) / "tokenizer_config.json").exists() else policy.config._name_or_path
        self.processing_class = processing_class or load_tokenizer(named, **trust)  # an adapter may have none beside it
        given: Any = load_policy(ref_model, **trust) if isinstance(ref_model, str) else ref_model
        self.reference = Reference(policy, given, **frozen)
        self._kl_starts_at_zero = ref_model is None and not self.reference.rounded
        self._first_ratio_checked = False

        # The rewards.
        self.streams = make_streams(reward_funcs, reward_streams, self.args)
        self.rewards = RewardSet.from_streams(
            self.streams, self.args.reward_weights, reward_processing_classes, device, watch_funcs, **trust
        )

        # The critic, the prompts and the optimizer.
        tokenizer = tokenizer_of(self.processing_class)
        params = self._make_params(tokenizer, policy)
        streams: dict[str, Any] = {"n_streams": len(self.streams), "origin": origin}
        actor_critic = make_actor_critic(policy, critic, self.args, tokenizer, **streams, **trust, **frozen)
        prepare_recomputation(actor_critic, self.args)
        readers = {"model": policy, "ref_model": self.reference.model, "critic": actor_critic.critic}
        encoder = make_prompt_encoder(self.processing_class, readers, self.args)
        needed, shuffle = self.rewards.needed_columns, self.args.shuffle_dataset
        self.prompts = PromptStream(train_dataset, encoder, seed=self.args.seed, shuffle=shuffle, needed=needed)
        self.evaluation = Evaluation(eval_dataset, encoder, needed)
        optimizer: Any = make_optimizer(actor_critic, self.args)
        self.model, self.optimizer = self.accelerator.prepare(actor_critic, optimizer)

        # What runs: the controllers, the run on disk, the collector of rollouts.
        self.control = Control(self.args)
        self.run = self._make_run(dict(run_settings or {}), callbacks)
        parts = (self.rewards, tokenizer, params, self.args, self.accelerator, self.state)
        self.collector = Collector(self.model, self.reference, *parts)
        self.last_step: Step | None = None
        self.run.fire("on_init_end")

    def _make_params(self, tokenizer: Tokenizer, policy: Any) -> SamplingParams:
        params = SamplingParams.of(self.args, tokenizer, policy)
        check_sampling(params, self.args, policy)
        for message in sampling_warnings(params, self.args, policy) if self.accelerator.is_main_process else ():
            warnings.warn(message, stacklevel=4)  # the caller of the trainer, through scrubbed()
        return params

    def _make_run(self, run_settings: dict[str, Any], callbacks: Callbacks | None) -> Run:
        drawn = self.args.max_steps * self.args.rollout_batch_size // self.args.num_generations
        return Run(
            self.args,
            self.accelerator,
            self.actor_critic,
            self.optimizer,
            self.processing_class,
            stateful={"prompts": self.prompts, "control": self.control},
            settings={
                **self.rewards.describe(),
                "reward_streams": [[s.name, s.weight, s.gamma, s.lam, len(s.reward_funcs)] for s in self.streams],
                "train_dataset": self.prompts.fingerprint,
                "run_settings": run_settings,
            },
            callbacks=callbacks,
            num_train_epochs=self.prompts.epochs_of(drawn),
            shown_to_callbacks={"train_dataloader": self.prompts, "eval_dataloader": None},
        )

    @property
    def actor_critic(self) -> ActorCritic:
        """Policy and critic, without the wrapper for distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def state(self) -> TrainerState:
        """The run's state: ``global_step`` counts the iterations done, ``log_history`` holds their metrics."""
        return self.run.state

    @scrubbed
    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainerState:
        """Run PPO up to ``max_steps``, and write ``final/``.

        Args:
            resume_from_checkpoint: As in :class:`PPOConfig`, which it overrides.

        Raises:
            CheckpointError: The run directory cannot be used, or the checkpoint cannot be resumed.
        """
        args, run, state = self.args, self.run, self.state
        run.open(args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint)
        if run.is_finished:
            self.accelerator.print(
                f"Nothing to do: the run in {args.output_dir} is at step {state.global_step} already."
            )
            return state
        if args.metric_for_best_model is not None and state.best_metric is None:
            metrics = self.evaluation.metrics(self.sample_eval(), kl_coef=self.control.kl.coef)
            run.check_best_metric(metrics)  # a wrong name is found out before any step
        saved = state.global_step
        run.fire("on_train_begin")
        hidden = args.disable_tqdm or not self.accelerator.is_main_process
        bar = tqdm(initial=state.global_step, total=args.max_steps, desc="PPO", disable=hidden)
        while state.global_step < args.max_steps and not run.control.should_training_stop:
            row = self.step()
            bar.update()
            bar.set_postfix_str(
                f"reward {row['reward']:.3f}, kl {row['kl_to_ref']:.2f}, ev {row['explained_variance']:.2f}, "
                f"{row['tokens_per_second']:.0f} tok/s"
            )
            if run.control.should_save:
                self.save_checkpoint()
                saved = state.global_step
        bar.close()
        if saved != state.global_step:
            self.save_checkpoint()
        self.save_model(run.directory / "final")
        run.fire("on_train_end")
        run.close()
        return state

    def step(self) -> dict[str, float]:
        """One PPO iteration; returns the row of metrics that it logged."""
        self.run.fire("on_step_begin")
        args, iteration, started = self.args, self.state.global_step, time.perf_counter()
        startup = {"time/startup": started - IMPORTED} if self.last_step is None else {}
        lr, critic_lr = set_learning_rates(self.optimizer, iteration, args)

        # 1. Sample completions and score them.
        prompts = self.prompts.next_batch(args.rollout_batch_size // args.num_generations, args.num_generations)
        scored = self.collector.collect(prompts, iteration)
        rollout, sampled = scored.rollout, time.perf_counter()
        if iteration == 0:
            self._check_start(rollout)

        # 2. Put the KL to the reference into the reward.
        kl_coef = self.control.kl.coef
        rewards = shape_rewards(rollout, args, self.streams, kl_coef=kl_coef)

        # 3. Estimate advantages, and what the critic is to learn.
        estimated = estimate(rollout, rewards, args, self.streams)
        experience = Experience.from_rollout(rollout, estimated.advantages, estimated.returns, estimated.mask)
        self.last_step = Step(scored, experience, rewards, kl_coef)

        # 4. Learn.
        self.control.warmup.update(iteration, estimated.metrics.get("critic/explained_variance", 0.0))
        stats = self._learn(experience, estimated, self._tolerance(rollout))

        # 5. Record.
        row = rollout_metrics(scored, kl_coef=kl_coef) | stats | estimated.metrics
        row |= critic_metrics(rollout.values, estimated.returns, rollout.completion_mask, rollout.tokens.prompt_numbers)
        n_tokens, seconds = int(rollout.completion_mask.sum()), time.perf_counter() - started
        self.run.num_tokens += n_tokens
        self.state.num_input_tokens_seen += n_tokens + int(rollout.tokens.prompt_mask.sum())
        row |= {"learning_rate": lr, "critic_learning_rate": critic_lr, "num_tokens": self.run.num_tokens}
        row |= {"tokens_per_second": n_tokens / seconds, "time/rollout": sampled - started}
        row |= {"time/update": seconds - (sampled - started), **startup}

        # 6. Adapt the KL coefficients.
        self.control.update(row, args.rollout_batch_size)
        return self._finish_step(row, scored)

    def _learn(self, experience: Experience, estimated: Estimate, tolerance: float) -> dict[str, float]:
        """The update of one iteration: of the critic alone, by TRPO, or PPO's."""
        args, iteration = self.args, self.state.global_step
        parts = (experience, args, self.accelerator)
        critic = partial(critic_update, self.model, self.optimizer, *parts, iteration=iteration)
        if self.control.policy_frozen:
            return critic(epochs=critic_epochs(args, warmup=True))
        first = None if self._first_ratio_checked else tolerance
        self._first_ratio_checked = True
        if args.objective == "trpo":
            stats = trpo_update(self.model, *parts, iteration=iteration, first_ratio_tolerance=first)
            return critic(epochs=critic_epochs(args)) | stats
        beta = self.control.beta.coef
        penalties = Penalties(beta, self.control.kl.coef * estimated.scale if args.kl_in_loss else 0.0, self.reference)
        stats = ppo_update(
            self.model,
            self.optimizer,
            *parts,
            iteration=iteration,
            penalties=penalties,
            first_ratio_tolerance=first,
        )
        if args.objective == "kl_penalty":
            new = logprobs_now(self.model, *parts)
            stats |= {
                "policy_kl_coef": beta,
                "policy_kl": approx_kl(new, experience.old_logprobs, experience.completion_mask).item(),
            }
        return stats

    def _check_start(self, rollout: Rollout) -> None:
        """Before the first step the KL to the reference is what the support makes of it, and no target is below that."""
        if self._kl_starts_at_zero:
            worst = (rollout.kl_to_ref - rollout.kl_of_support).abs().max().item()
            check_kl_zero(worst, self._tolerance(rollout))
        if self.accelerator.is_main_process:
            self.control.check_target(rollout.kl_of_support.sum(dim=1).mean().item())

    def _tolerance(self, rollout: Rollout) -> float:
        """What rounding can make of a log-probability of this rollout."""
        largest = rollout.max_logit.max().item()
        precision = compute_precision(self.actor_critic.policy, self.accelerator.mixed_precision)
        return self.args.step_zero_tolerance or rounding_tolerance(largest, precision)

    def _finish_step(self, row: dict[str, float], scored: ScoredRollout) -> dict[str, float]:
        """Count the iteration, ask the callbacks, evaluate and log."""
        self.state.global_step += 1
        if self.prompts.is_map_style:
            self.state.epoch = row["epoch"] = self.prompts.drawn / len(self.prompts.dataset)
        row = {"step": self.state.global_step, **row}
        self.run.end_step()
        if self.run.control.should_evaluate:
            row |= self._evaluate_step()
        self.run.log(row, scored)
        if self.run.control.should_evaluate:  # asked for in on_log
            late = self._evaluate_step()
            row |= late
            self.accelerator.log(late, step=self.state.global_step)
        self.run.write_row(row)
        return row

    def _evaluate_step(self) -> dict[str, float]:
        """An evaluation in the course of training, which may be the best one."""
        metrics = self.evaluate()
        self.run.keep_best(metrics)
        return metrics

    def sample_eval(self) -> ScoredRollout | dict[str, ScoredRollout]:
        """``eval_completions`` scored completions of ``eval_dataset``; the same prompts and noise at every call.

        Of several evaluation sets, as many of each, by their names.

        Raises:
            ValueError: There is no eval_dataset.
        """
        return self.evaluation.sample(self.collector, self.args.eval_completions)

    def evaluate(self, scored: ScoredRollout | dict[str, ScoredRollout] | None = None) -> dict[str, float]:
        """Reward, KL to the reference, length, EOS rate and diversity on ``eval_dataset``, as ``eval_*``.

        Of several evaluation sets, as ``eval_{name}_*``, with one ``on_evaluate`` of the callbacks for each.

        Args:
            scored: What :meth:`sample_eval` gave, if it is at hand.

        Raises:
            ValueError: There is no eval_dataset.
        """
        scored = self.sample_eval() if scored is None else scored
        tell = partial(self.run.fire, "on_evaluate")
        return self.evaluation.metrics(scored, kl_coef=self.control.kl.coef, tell=tell)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the policy as a plain Hugging Face model with its tokenizer, and the critic beside it.

        An adapter is merged, and also kept as it is in ``adapter/``. An earlier export is replaced when the new one is
        whole; whatever else is in ``output_dir`` stays.

        Args:
            output_dir: Where to. Default: the run directory itself, beside what the run keeps there; ``final/`` is
                written by :meth:`train` alone.

        Raises:
            ExportError: What was written gives other logits than the policy, and was not kept.
        """
        self.run.save_model(self.args.output_dir if output_dir is None else output_dir)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present step, and delete the oldest ones beyond ``save_total_limit``."""
        self.run.save_checkpoint(self._keep_rollouts())

    def _keep_rollouts(self) -> Callable[[Path], None] | None:
        """What writes the last rollout into a checkpoint, with its log-probabilities under the policy as it is now."""
        if not self.args.save_rollouts or self.last_step is None:
            return None
        new = logprobs_now(self.model, self.last_step.experience, self.args, self.accelerator)
        keep = partial(save_rollouts, new_logprobs=new, config=self.args, tokenizer=self.collector.tokenizer)
        return partial(keep, rows=self.args.save_rollouts, streams=self.streams, **vars(self.last_step))
