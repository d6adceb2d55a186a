"""The models: policy and critic in one module, split into trunk and heads; the frozen reference; loading them."""

from lmppo.models.actor_critic import HEADS, ActorCritic, score_tokens
from lmppo.models.decoder import Decoder
from lmppo.models.inputs import Positions, inputs_of
from lmppo.models.language_model import LanguageModel, States, vocab_size_of
from lmppo.models.loading import load_policy, load_weights
from lmppo.models.probe import UnsupportedModelError
from lmppo.models.quantized import compute_precision
from lmppo.models.recomputation import recomputing
from lmppo.models.reference import Reference

__all__ = [
    "HEADS",
    "ActorCritic",
    "Decoder",
    "LanguageModel",
    "Positions",
    "Reference",
    "States",
    "UnsupportedModelError",
    "compute_precision",
    "inputs_of",
    "load_policy",
    "load_weights",
    "recomputing",
    "score_tokens",
    "vocab_size_of",
]
