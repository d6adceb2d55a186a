"""How many tokens a model can read: by the table of positions that it looks up, or by its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")
_N_READ = 5  # tokens that are read to see which positions are looked up


@dataclass(frozen=True)
class Context:
    """The most tokens that a model can read.

    Attributes:
        length: Their number.
        reason: What limits it, for messages.
    """

    length: int
    reason: str


def usable_context(model: Any) -> Context | None:
    """What a model can read, whatever its configuration calls it; None for no limit.

    A table of positions decides where there is one, less the rows that no token gets (RoBERTa's positions start at
    ``padding_idx + 1``). Otherwise the configuration does: ``max_position_embeddings`` or its other names, times the
    factor where RoPE is scaled by ``linear`` or ``yarn``. ``dynamic`` and ``longrope`` RoPE change the frequencies of all
    positions when a text grows beyond the original length, so that cached keys and other rows of the batch would be
    read differently: that length is their limit.

    Args:
        model: A model of transformers that reads token ids.
    """
    config = model.config.get_text_config()
    free = _position_tables(model)
    if free:
        return Context(min(free), "its table of positions")
    if any("alibi" in name and value for name, value in config.to_dict().items()):
        return None
    lengths = {name: getattr(config, name, None) for name in _NAMES}
    name, length = next(((n, v) for n, v in lengths.items() if isinstance(v, int) and v > 0), ("", 0))
    return _with_rope(config, Context(length, name)) if length else None


def _with_rope(config: Any, context: Context) -> Context:
    """The context under the configuration's scaling of RoPE, which may be given for each type of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layers = [part for part in rope.values() if isinstance(part, dict)]
    for part in by_layers or [rope]:
        if part.get("rope_type") in ("dynamic", "longrope"):
            length = part.get("original_max_position_embeddings") if part["rope_type"] == "longrope" else None
            reason = f"rope_type={part['rope_type']!r} reads all positions differently beyond it"
            return Context(length or context.length, reason)
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    if kind == "linear":
        return Context(int(context.length * factor), f"{context.reason} times the factor of rope_type='linear'")
    if kind == "yarn":
        length = int(rope.get("original_max_position_embeddings", context.length) * factor)
        return Context(max(length, context.length), "the length that rope_type='yarn' scales to")
    return context


@torch.no_grad()
def _position_tables(model: Any) -> list[int]:
    """The number of tokens that each table of positions has rows for: what a short text looks up tells."""
    embedding = model.get_input_embeddings()
    unused = {getattr(embedding, "padding_idx", None), getattr(model.config.get_text_config(), "pad_token_id", None)}
    token = next(i for i in range(3) if i not in unused)
    ids = torch.full((1, _N_READ), token, device=next(model.parameters()).device)
    own = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _Lookups(own) as lookups:
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except Exception:  # what came before the error tells as much
            pass
    return lookups.free


def _place(tensor: Any) -> int:
    """Where the numbers of a tensor are, also if it is a view."""
    return getattr(tensor, "held", tensor).untyped_storage().data_ptr()  # as in lmppo.models.held


class _Lookups(TorchDispatchMode):
    """Notes the lookups of consecutive positions in a model's own tensors.

    Args:
        own: Where those tensors are in memory.

    Attributes:
        free: For each lookup, how many tokens the table has rows for.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own = own
        self.free: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._note(args[0], 0, args[1])
        elif func is aten.index_select.default:
            self._note(*args[:3])
        elif func is aten.index.Tensor:
            for dim, index in enumerate(args[1]):
                if index is not None:
                    self._note(args[0], dim, index)
        return func(*args, **(kwargs or {}))

    def _note(self, table: Tensor, dim: int, index: Tensor) -> None:
        index = index.squeeze()
        positions = index.dtype in (torch.int32, torch.int64) and index.ndim == 1 and len(index) >= _N_READ
        if not positions or _place(table) not in self.own:
            return
        first, follows = int(index[0]), index.diff() == 1
        n_read = 1 + int(follows.long().cumprod(dim=0).sum())  # with what an adapter puts before the text
        if n_read >= _N_READ and table.shape[dim] > first + n_read:  # virtual tokens are read to the last one
            self.free.append(table.shape[dim] - first - (n_read - _N_READ))
