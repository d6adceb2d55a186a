"""Lower layers that stay as they are: what they compute of a rollout is computed once.

Policy and reference share them, and every pass over the same tokens starts from the states at the boundary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmppo.models.exchange import exchanged
from lmppo.models.inputs import base_of, kind_of, stack_of
from lmppo.models.probe import UnsupportedModelError


class FrozenLayers:
    """The layers of a model below the ones that are trained.

    Args:
        model: A causal language model, plain or with an adapter.
        n_trained: How many of the top layers are trained.
        name: How messages name the model.

    Raises:
        ValueError: It has no lower layers then.
        UnsupportedModelError: Its layers cannot be found.
    """

    def __init__(self, model: Any, n_trained: int, name: str = "model") -> None:
        base = base_of(model)
        self.name, self.kind = name, kind_of(model)
        n_layers = base.config.get_text_config(decoder=True).num_hidden_layers
        if not 1 <= n_trained < n_layers:
            raise ValueError(
                f"num_layers_unfrozen={n_trained}: {name} is a {self.kind} of {n_layers} layers; give 1 to "
                f"{n_layers - 1}, or leave it out to train all of them."
            )
        stack = stack_of(base)
        if stack is None:
            raise self.unsupported(f"it has no list of {n_layers} layers")
        self.layers: list[Any] = list(stack)[: n_layers - n_trained]
        self._n_others: int | None = None  # what the layers give beside their states, if they give a tuple

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """The error that says why a model cannot be used so."""
        return UnsupportedModelError(
            f"num_layers_unfrozen does not work for {self.name}, a {self.kind}: {reason}. Leave it out, or train an "
            f"adapter on the top layers (LoraConfig(layers_to_transform=...))."
        )

    @torch.no_grad()
    def compute(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """``(B, W, H)`` what the lower layers compute of some inputs; the layers above are not run.

        Raises:
            UnsupportedModelError: They give something else.
        """
        with self.watching(stop=True) as reached, contextlib.suppress(_ReachedError):
            model(**inputs)
        (output,) = reached or [None]
        self._n_others = len(output) - 1 if isinstance(output, tuple) else None
        return self.hidden_in(output)

    @contextlib.contextmanager
    def watching(self, *, stop: bool = False) -> Iterator[list[Any]]:
        """Within it, what the lower layers give is appended to the list; ``stop``: an error ends the pass there."""
        reached: list[Any] = []

        def reach(*args: Any) -> None:
            reached.append(args[-1])
            if stop:
                raise _ReachedError

        handle = self.layers[-1].register_forward_hook(reach)
        try:
            yield reached
        finally:
            handle.remove()

    def hidden_in(self, output: Any) -> Tensor:
        """``(B, W, H)`` the states in what the lower layers gave."""
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise self.unsupported("its layers hand on something else than hidden states (B, S, H)")
        return hidden

    @contextlib.contextmanager
    def answering(self, hidden: Tensor | None) -> Iterator[None]:
        """Within it the lower layers answer these states ``(B, W, H)``, whatever they are given; None: they compute."""
        output = hidden if self._n_others is None else (hidden, *[None] * self._n_others)
        with exchanged({} if hidden is None else dict.fromkeys(self.layers, lambda *args, **kwargs: output)):
            yield


class _ReachedError(Exception):
    """The last of the lower layers has computed."""
