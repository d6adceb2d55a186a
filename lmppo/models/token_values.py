"""Any model as a critic: its trunk with a linear head of one output per reward stream, at every token.

The classes are transformers' token classifiers. A family without one gets one of the same build, so that it is saved,
loaded and resumed as the others are.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import logging as hf_logging

from lmppo.models.loading import load_weights


def load_token_values(name: str, config: Any, n_streams: int, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model behind a name as a critic.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code, and ``trust_remote_code`` is not set.
        OSError: It cannot be loaded.
        ValueError: It is a critic of another number of streams, of a family that cannot be one, or its weights lack a part.
    """
    architecture, trust = (config.architectures or [""])[0], {"trust_remote_code": trust_remote_code}
    if "ForTokenClassification" in architecture:
        if config.num_labels != n_streams:
            raise ValueError(
                f"critic {name!r} has {config.num_labels} labels; expected {n_streams}, one per reward stream."
            )
        return _load(name, token_value_class(config), copy.deepcopy(config), trained_head=True, **trust)
    if "ForSequenceClassification" in architecture:
        scorer = load_weights(AutoModelForSequenceClassification, name, **trust)
        return _with_head(scorer, scorer.state_dict(), n_streams)
    return _load(name, token_value_class(config), _regression(config, n_streams), **trust)


def as_token_values(model: Any, n_streams: int) -> Any:
    """A copy of a model as a critic; the model stays as it is.

    A reward model's values start as its rewards, a language model's at zero. A model with an output for every token is
    a critic already.

    Raises:
        ValueError: It has an adapter, or is of a family that cannot be a critic.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("critic has an adapter: pass model.merge_and_unload(), whose weights are all trained.")
    config = model.config
    scorer, language_model = "ForSequenceClassification" in type(model).__name__, model.get_output_embeddings()
    if not scorer and language_model is None and type(model) is not MODEL_MAPPING.get(type(config), None):
        return copy.deepcopy(model)
    return _with_head(model, {key: tensor.clone() for key, tensor in model.state_dict().items()}, n_streams)


def token_value_class(config: Any) -> Any:
    """The family's token-classification class, or one with the trunk that :class:`transformers.AutoModel` gives.

    Raises:
        ValueError: The family has no trunk of its own.
    """
    config_class = type(config)
    if config_class in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[config_class]
    if config_class not in MODEL_MAPPING:
        raise ValueError(
            f"critic has a {config_class.__name__}, and no model class that AutoModel knows gives its hidden states: "
            f"leave critic out, or give a model of another family."
        )
    trunk_class: Any = MODEL_MAPPING[config_class]
    family = next(cls for cls in trunk_class.__mro__ if PreTrainedModel in cls.__bases__)
    name = f"{config_class.__name__.removesuffix('Config')}ForTokenClassification"

    def initialize(self: Any, config: Any) -> None:
        family.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config, trust_remote_code=False))
        self.score = nn.Linear(_width(config), config.num_labels)
        self.post_init()

    def forward(self: Any, **inputs: Any) -> TokenClassifierOutput:
        hidden = self.base_model(**{n: value for n, value in inputs.items() if n != "output_hidden_states"})[0]
        return TokenClassifierOutput(logits=self.score(hidden), hidden_states=(hidden,))

    return type(name, (family,), {"__init__": initialize, "forward": forward, "__module__": __name__})


def _width(config: Any) -> int:
    """The width of what a language model's head reads, which may differ from ``hidden_size`` (OPT-350m)."""
    try:
        with torch.device("meta"):
            head = AutoModelForCausalLM.from_config(config, trust_remote_code=False).get_output_embeddings()
        return head.weight.shape[1]
    except (ValueError, AttributeError):  # no language model in this family, or one without a head
        return config.get_text_config().hidden_size


def _with_head(model: Any, weights: dict[str, torch.Tensor], n_streams: int) -> PreTrainedModel:
    """The model's trunk with a head, from its configuration and weights."""
    config = _regression(model.config, n_streams)
    trunk = {key: tensor for key, tensor in weights.items() if not key.startswith("score.")}
    critic = _load(None, token_value_class(model.config), config, state_dict=trunk)
    critic.config._name_or_path = model.config._name_or_path
    scorer = getattr(model, "score", None)
    if n_streams == 1 and model.config.num_labels <= 2 and isinstance(scorer, nn.Linear):
        head = head_of(critic)
        for ours, theirs in ((head.weight, scorer.weight), (head.bias, scorer.bias)):
            if ours is not None and theirs is not None:
                ours.data.copy_(theirs.data[-1:] - theirs.data[:1] if len(theirs) == 2 else theirs.data)
    return critic


def _load(
    name: str | None, model_class: Any, config: Any, *, trained_head: bool = False, **how: Any
) -> PreTrainedModel:
    """A critic from a name or from weights, with a head of zeros unless it has been trained; all else must be there."""
    with _no_load_report():  # it would call the head new, which is what is wanted
        critic, info = load_weights(
            model_class, name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **how
        )
    head = next(n for n, m in critic.named_modules() if m is head_of(critic))
    new = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    missing = [key for key in sorted(new) if trained_head or not key.startswith(f"{head}.")]
    if missing:
        raise ValueError(
            f"critic {name or type(critic).__name__!r} lacks weights, or has them in other shapes "
            f"({', '.join(missing[:3])}): give a whole model, with weights that are not quantized."
        )
    if not trained_head:
        for parameter in head_of(critic).parameters():
            nn.init.zeros_(parameter)
    return critic


def head_of(critic: Any) -> nn.Linear:
    """The linear head of a token classifier."""
    return next(m for n, m in critic.named_modules() if n in ("score", "classifier"))


def _regression(config: Any, n_streams: int) -> Any:
    """A copy of a configuration for one output per stream; a classifier's own problem_type is refused with one label."""
    config = copy.deepcopy(config)
    config.problem_type, config.num_labels = "regression", n_streams
    return config


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
