"""The models: policy and critic in one module, split into trunk and heads; the frozen reference; loading them."""

from lmppo.models.actor_critic import HEADS, ActorCritic
from lmppo.models.chunks import Sums, chunks_of, join_sums, sum_over_logits
from lmppo.models.decoder import Decoder
from lmppo.models.inputs import Positions, inputs_of
from lmppo.models.language_model import LanguageModel, vocab_size_of
from lmppo.models.loading import load_policy, load_weights
from lmppo.models.probe import UnsupportedModelError
from lmppo.models.quantized import compute_precision
from lmppo.models.recomputation import recomputing
from lmppo.models.reference import Reference
from lmppo.models.scoring import Reader, measure_logits, score_tokens, score_values
from lmppo.models.states import States

__all__ = [
    "HEADS",
    "ActorCritic",
    "Decoder",
    "LanguageModel",
    "Positions",
    "Reader",
    "Reference",
    "States",
    "Sums",
    "UnsupportedModelError",
    "chunks_of",
    "compute_precision",
    "inputs_of",
    "join_sums",
    "load_policy",
    "load_weights",
    "measure_logits",
    "recomputing",
    "score_tokens",
    "score_values",
    "sum_over_logits",
    "vocab_size_of",
]
