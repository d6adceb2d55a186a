"""Policy and critic as one module.

Dropout is off everywhere, always: the modules stay in evaluation mode, in training as well, so that sampling and
learning see the same function and the first ratio is 1.

Axes: ``B`` sequences, ``P`` prompt positions, ``T`` completion positions, ``N`` counted tokens of all sequences,
``L`` lines and ``W`` positions of aligned rows, ``H`` hidden, ``V`` vocabulary, ``K`` reward streams.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmppo.models.activations import use_fused_gelu
from lmppo.models.chunks import OfLogits
from lmppo.models.decoder import Decoder, needs_step_masks
from lmppo.models.graphs import GraphedDecoder, check_graphs
from lmppo.models.inputs import Aligned, Positions, inputs_of, pick, takes
from lmppo.models.language_model import LanguageModel
from lmppo.models.last_layer import LastLayer
from lmppo.models.probe import (
    Outputs,
    UnsupportedModelError,
    check_causal,
    check_finite,
    find_positions,
    probe_tokens,
    read_alone,
)
from lmppo.protocols import CausalLM
from lmppo.records import Tokens, spread

HEADS = ("logits", "values")


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one forward pass (and one DDP wrapper) serves both.

    Without ``critic`` they share the trunk: a linear value head, zero at first, reads the policy's last hidden state.
    With it, the critic is a model of its own with one output per stream; or, if it has an adapter, a model of its own whose
    last hidden state the value head reads.

    Args:
        policy: A causal language model, plain or with a peft adapter.
        critic: ``None``; or a model with ``n_streams`` outputs for each token, see :func:`lmppo.models.critics.load_critic`;
            or a language model with an adapter, see :func:`lmppo.models.lora_critic.with_lora_critic`.
        n_streams: Number of reward streams ``K``.
        num_layers_unfrozen: How many top layers of the policy, and of a critic with an adapter, are trained; None: all.

    Raises:
        UnsupportedModelError: The policy or the critic computes something else of a row in a padded batch, over a cache,
            or before a later token than of the row alone; or the policy has no hidden states for a value head.
    """

    policy: Any
    critic: Any
    value_head: Any

    def __init__(
        self,
        policy: CausalLM,
        critic: PreTrainedModel | None = None,
        n_streams: int = 1,
        num_layers_unfrozen: int | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = None
        self.n_streams = n_streams
        self.eval()
        use_fused_gelu(self)
        self.language_model = LanguageModel(policy, num_layers_unfrozen=num_layers_unfrozen)
        self._masks_steps = needs_step_masks(self.language_model)
        self._value_reader: LanguageModel | None = self.language_model  # whose states the value head reads
        if critic is not None and not hasattr(critic, "peft_config"):
            self._value_reader, self._critic_positions = None, probe_critic(critic)
            self._critic_last_layer = LastLayer(critic, self._critic_states)
            return
        if critic is not None:
            self._value_reader = LanguageModel(critic, "critic", num_layers_unfrozen)
            _freeze_beyond(self._value_reader.trunk, critic)
        if not self._value_reader.width:
            raise UnsupportedModelError(
                f"model is a {type(policy).__name__}, which gives no hidden states (B, S, H) for a value head: pass a "
                f"critic of its own, critic=."
            )
        self.value_head = nn.Linear(self._value_reader.width, n_streams, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(next(iter(policy.parameters())).device)

    def train(self, mode: bool = True) -> "ActorCritic":
        """Stay in evaluation mode: dropout is off everywhere."""
        return super().train(False)

    @property
    def packs(self) -> bool:
        """Whether policy and critic can read several rows one behind the other."""
        critic = self._critic_positions if self._value_reader is None else self._value_reader.positions
        return self.language_model.packs and critic.packs

    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters the policy loss may move."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def head_learning_rate(self, step: float) -> float:
        """The rate at which a step of Adam's moves a value by ``step``, in units of the reward, or less.

        Each weight of the value head moves by the rate at most, and a value by the rate times the sum of a hidden state's
        absolute values.
        """
        assert self._value_reader is not None
        return step / max(self._value_reader.size_of_states, 1.0)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the value loss moves."""
        modules = [module for module in (self.critic, self.value_head) if module is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def forward(
        self, tokens: Tokens, heads: Sequence[str] = HEADS, of_logits: OfLogits | None = None
    ) -> dict[str, Any]:
        """What is asked for of the states before the N counted tokens, from one pass of the trunk.

        Args:
            tokens: Prompts and completions.
            heads: Any of ``"logits"`` and ``"values"``. Values alone leave the policy as it is: no gradient reaches a
                trunk that they share with it.
            of_logits: What is added up over the tokens' logits, see :func:`lmppo.models.chunks.sum_over_logits`.

        Returns:
            ``{"logits": the sums, "values": (1, N, K)}``, as far as asked; the tokens row by row.
        """
        outputs: dict[str, Any] = {}
        states: Any = None
        if "logits" in heads or self.critic is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and "logits" in heads):
                states = self.language_model.read(tokens)
        if "logits" in heads:
            assert of_logits is not None, "what is to be added up over the logits?"
            outputs["logits"] = self.language_model.sum_over_logits(states, of_logits)
        if "values" in heads:
            outputs["values"] = self.values_of(states.hidden) if self.critic is None else self._critic(tokens)
        return outputs

    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the distributions that the counted tokens were drawn from, 0 elsewhere."""
        return self.language_model.logits(tokens)

    def values(self, tokens: Tokens) -> Tensor:
        """``(B, T, K)`` values of the states before the counted tokens, 0 elsewhere."""
        return spread(self(tokens, ("values",))["values"], tokens.completion_mask)

    def last_values(self, tokens: Tokens) -> Tensor:
        """``(B, K)`` values of the state after each row's last counted token."""
        if self._value_reader is not None:
            return self.values_of(self._value_reader.read_last(tokens).hidden)[0]
        aligned = Aligned.of(tokens, whole=True)
        return self._critic_everywhere(aligned)[aligned.layout.line, aligned.last]

    def decoder(self, prompt_ids: Tensor, prompt_mask: Tensor, *, graphs_for: int | None = None) -> Decoder:
        """The policy's cache over left-padded prompts ``(B, P)``, to be fed token by token.

        Args:
            prompt_ids: ``(B, P)``.
            prompt_mask: ``(B, P)``.
            graphs_for: How many tokens are fed at most, by a graph that is recorded; None: any number, without one.
        """
        parts = (self.language_model, prompt_ids, prompt_mask)
        if graphs_for is None:
            return Decoder(*parts, masks_steps=self._masks_steps)
        return GraphedDecoder(*parts, masks_steps=self._masks_steps, n_new=graphs_for)

    def check_graphs(self) -> None:
        """See :func:`lmppo.models.graphs.check_graphs`."""
        check_graphs(self.language_model, self._masks_steps)

    def values_of(self, hidden: Tensor | None) -> Tensor:
        """The value head, in float32 whatever the autocast: ``(..., H) -> (..., K)``."""
        assert hidden is not None, "a model without hidden states has no value head"
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())

    def _critic(self, tokens: Tokens) -> Tensor:
        if self._value_reader is not None:
            return self.values_of(self._value_reader.read(tokens).hidden)
        aligned = Aligned.of(tokens)
        with self._critic_last_layer.reading(aligned):
            return pick(self._critic_everywhere(aligned), aligned.lines, aligned.columns)

    def _critic_everywhere(self, aligned: Aligned) -> Tensor:
        """``(L, W, K)`` values of the states after each token of aligned rows."""
        return self.critic(**inputs_of(aligned, self._critic_positions)).logits.float()

    def _critic_states(self, aligned: Aligned) -> Outputs:
        """The critic's hidden states of the counted tokens: a new head gives 0 for whatever they are."""
        out = self.critic(**inputs_of(aligned, self._critic_positions), output_hidden_states=True)
        return [pick(out.hidden_states[-1], aligned.lines, aligned.columns)]


def _freeze_beyond(trunk: nn.Module | None, model: nn.Module) -> None:
    """Train nothing that values do not depend on, such as an adapter on the head of a language model."""
    beyond = set(model.parameters()) - set((trunk or model).parameters())
    for parameter in beyond:
        parameter.requires_grad_(False)


@torch.no_grad()
def probe_critic(critic: PreTrainedModel) -> Positions:
    """How a critic of its own counts positions.

    Its hidden states are probed as well: a new head gives 0 for whatever they are.

    Raises:
        UnsupportedModelError: It reads later tokens, or computes something else of a row when the row is padded.
    """

    def read(**inputs: Any) -> Outputs:
        out = critic(**inputs, output_hidden_states=True)
        return [out.logits, out.hidden_states[-1]]

    tokens = probe_tokens(critic)
    with torch.autocast(tokens.prompt_ids.device.type, enabled=False):
        alone = read_alone(read, tokens)
        check_finite(alone, critic, "critic")
        check_causal(read, tokens, alone, critic, "critic")
        told = takes(critic.base_model, "position_ids")
        return find_positions(read, tokens, alone, critic, "critic", takes_positions=told)
