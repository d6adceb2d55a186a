"""What cannot be sampled as asked for: refused or warned of when a trainer is built."""

import re
import reprlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from lmppo.config import PPOConfig
from lmppo.models import vocab_size_of
from lmppo.protocols import CausalLM
from lmppo.sampling import SamplingParams
from lmppo.settings import SamplingSettings

# Fields of a GenerationConfig, by patterns of their names, that leave what is sampled as it is: ids of special tokens,
# caches, what generate() returns, ways to compute the same faster, its own records; and do_sample, which is what lmppo does.
# Every other field is looked at.
_NO_SAMPLING = re.compile(
    r"_.*|do_sample|(pad|bos|eos|decoder_start)_token_id|.*cache.*|output_.*|return_.*|.*assistant.*|.*lookbehind|.*lookup.*"
    r"|max_matching_ngram_size|speculation_.*|use_mtp|.*compile.*|continuous_batching_.*|prefill_.*|low_memory"
    r"|transformers_version"
)
# The setting that does what a field of another name does.
_COUNTERPARTS = {
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "min_length": "min_new_tokens",
    "num_return_sequences": "num_generations",
}


def check_sampling(params: SamplingParams, config: SamplingSettings, policy: CausalLM) -> None:
    """Refuse constraints on tokens that the policy cannot fulfil.

    Args:
        params: What ``config`` comes to with this policy.
        config: The settings.
        policy: The policy.

    Raises:
        ValueError: A token id is outside the vocabulary, a bad word is an end-of-text token, or no token is left.
    """
    vocab_size = vocab_size_of(policy)
    bad_words = [token for word in config.bad_words_ids or [] for token in word]
    given = {
        "stop_token_ids": config.stop_token_ids or [],
        "suppress_tokens": config.suppress_tokens or [],
        "bad_words_ids": bad_words,
    }
    for name, ids in given.items():
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"{name} has {', '.join(map(str, outside[:5]))}, outside the model's vocabulary: token ids are 0 to "
                f"{vocab_size - 1}. Look them up with the model's own tokenizer."
            )
    ends = sorted(set(bad_words) & set(params.eos_token_ids))
    if ends:
        raise ValueError(
            f"bad_words_ids has {', '.join(map(str, ends))}, which end completions, and generate() ignores such words: "
            f"leave them out, or forbid them by suppress_tokens."
        )
    rules = params.rules(vocab_size)
    if rules is not None and not rules.any(dim=-1).all():
        raise ValueError(
            f"No token can be sampled: suppress_tokens, bad_words_ids and min_new_tokens={params.min_new_tokens} forbid "
            f"all {vocab_size} of the vocabulary. Forbid fewer."
        )


def sampling_warnings(params: SamplingParams, config: PPOConfig, policy: CausalLM) -> Iterator[str]:
    """What is allowed, and probably not what is wanted: completions that cannot end, and fields that nothing reads.

    Args:
        params: What ``config`` comes to with this policy.
        config: The configuration.
        policy: The policy.
    """
    ends = [token for token in params.eos_token_ids if 0 <= token < vocab_size_of(policy)]
    rules = params.rules(vocab_size_of(policy))
    if ends and rules is not None and not params.stop_strings and not rules[params.rule_numbers()][:, ends].any():
        yield (
            f"No completion can end before max_completion_length={params.max_completion_length}: suppress_tokens and "
            f"min_new_tokens={params.min_new_tokens} forbid every token that ends one ({', '.join(map(str, ends))}). "
            f"Leave one of them possible, or set stop_strings."
        )
    unread = unread_fields(getattr(policy, "generation_config", None), config)
    if not unread:
        return
    named = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in unread.items())
    settings = dict.fromkeys(_setting_of(name) for name in unread if hasattr(config, _setting_of(name)))
    missing = [name for name in unread if not hasattr(config, _setting_of(name))]
    remedies = [f"set {', '.join(settings)} in the configuration of the run"] * bool(settings)
    remedies += [f"there is no setting for {', '.join(missing)}"] * bool(missing)
    yield (
        f"model.generation_config has {named}: without effect here, as the settings of the run alone say how completions "
        f"are sampled. To sample as the model's own configuration says, {'; '.join(remedies)}."
    )


def unread_fields(generation: Any, config: PPOConfig) -> dict[str, Any]:
    """What a model's generation_config asks for beyond the defaults of its class, and the configuration does not.

    Args:
        generation: A GenerationConfig, or None.
        config: The configuration.
    """
    fields = vars(GenerationConfig())
    defaults = fields | GenerationConfig._get_default_generation_params()
    found = {}
    for name in fields:
        value = getattr(generation, name, None)
        unset = value is None or value is False or value in ([], {}, defaults[name])
        if unset or _NO_SAMPLING.fullmatch(name):
            continue
        asked = getattr(config, _setting_of(name), None)
        if value != asked and [value] != asked:  # one stop string may stand by itself
            found[name] = value
    return found


def _setting_of(field: str) -> str:
    return _COUNTERPARTS.get(field, field)
