"""A critic that is a model of its own: loading it, and whether it reads the policy's tokens.

Such a critic is fed the policy's token ids. Whether it understands them is decided by what the ids stand for, never by how
many there are: a tokenizer of another family may be of any size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from lmppo.models.actor_critic import ActorCritic
from lmppo.models.frozen_weights import EXPORTED, store_frozen
from lmppo.models.language_model import vocab_size_of
from lmppo.models.loading import as_float32, print_once
from lmppo.models.lora_critic import HEAD, LORA, with_lora_critic
from lmppo.models.quantized import is_quantized
from lmppo.models.token_values import as_token_values, load_token_values
from lmppo.pretrained import UntrustedModelError, load_config, load_tokenizer
from lmppo.protocols import CausalLM, Tokenizer
from lmppo.settings import AdvantageSettings

AUTO = "auto:"


@dataclass(frozen=True)
class _Match:
    """Whether a critic reads the policy's tokens: it does, unless one of the two texts says why not."""

    name: str
    unknown: str = ""  # why the tokens could not be compared
    difference: str = ""  # what the critic would misread

    def check(self) -> None:
        """Refuse a critic that is known to read other tokens."""
        if self.difference:
            raise ValueError(
                f"critic {self.name!r} does not read the policy's tokens: {self.difference}. Leave critic out to share "
                f"the policy's trunk, write '{AUTO}{self.name}' to use it only where it fits, or train one with the "
                f"policy's tokenizer."
            )


def load_critic(
    critic: str | Path | PreTrainedModel,
    policy: CausalLM,
    n_streams: int = 1,
    *,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A critic of its own: a model with one output per stream at every token, such as a token classifier.

    It may also be a sequence-classification (reward) model, by name or loaded: its value of a prefix is then, at first,
    the reward it would give that prefix (one label: the logit; two: the log-odds of the second). A language model's
    trunk gets a new head, which starts at zero. A loaded model stays as it is: a copy is trained.

    The two tokenizers must map the same tokens to the same ids; the critic's may have more added tokens, such as one for
    padding. It is the one beside the critic's weights. Where one of the two cannot be found, the sizes of the embeddings
    decide.

    Args:
        critic: A model (a copy of it is trained), a directory or a Hub id. ``"auto:<directory or id>"`` asks for it only
            if its tokens are known to be the policy's, and says on the main process what was decided.
        policy: The policy.
        n_streams: Number of reward streams.
        tokenizer: The policy's (default: the one beside its weights).
        trust_remote_code: Whether code that comes with the critic may run.

    Returns:
        The critic in float32, or None: ``auto:``, and its tokens are not known to be the policy's.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        OSError: The critic cannot be loaded, also with ``auto:``.
        ValueError: Its labels or its vocabulary do not fit.
    """
    if not isinstance(critic, str | Path):
        name = _name_of(critic)
        match = _compare(policy, tokenizer, _tokenizer_at(name, may_download=False), name)
        match.check()
        if is_quantized(critic):
            raise ValueError("critic is quantized, and all weights of a critic are trained: give one in float32.")
        own = as_token_values(as_float32(critic, "critic"), n_streams)
        return _checked(own, policy, n_streams, match)
    name = str(critic).removeprefix(AUTO)
    config = load_weights_config(
        name, trust_remote_code=trust_remote_code
    )  # first of all: with `auto:` too, a name that leads nowhere is an error
    match = _compare(policy, tokenizer, _tokenizer_at(name, trust_remote_code, may_download=True), name)
    if not str(critic).startswith(AUTO):
        match.check()
        return _checked(
            load_token_values(name, config, n_streams, trust_remote_code=trust_remote_code), policy, n_streams, match
        )
    if match.unknown or match.difference:
        print_once(f"Critic: a value head on the policy's trunk, not {name!r}: {match.unknown or match.difference}.")
        return None
    loaded = _checked(
        load_token_values(name, config, n_streams, trust_remote_code=trust_remote_code), policy, n_streams, match
    )
    print_once(f"Critic: {name!r}, which reads the policy's tokens.")
    return loaded


def load_weights_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration behind a name, with the same message as :func:`load_weights` when there is none.

    Raises:
        OSError: There is none.
    """
    try:
        return load_config(name, trust_remote_code=trust_remote_code)
    except UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(f"Could not load a model configuration from {name!r}: {str(error).splitlines()[0]}") from error


def _tokenizer_at(name: str, trust_remote_code: bool = False, *, may_download: bool) -> Any:
    """The tokenizer behind a name; None if there is none."""
    if not name:
        return None
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, may_download=may_download)
    except UntrustedModelError:
        if may_download:  # else it is only asked what a model that is there already was made for
            raise
        return None
    except (OSError, ValueError, TypeError, ImportError):  # the last two: of families that need more than a file
        return None
    # Without a file of tokens, transformers makes a tokenizer of the special tokens alone.
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def _compare(policy: CausalLM, tokenizer: Tokenizer | None, its_tokenizer: Tokenizer | None, name: str) -> _Match:
    if tokenizer is None:
        tokenizer = _tokenizer_at(_name_of(policy), may_download=False)
    if tokenizer is None or its_tokenizer is None:
        missing = "the policy has no tokenizer" if tokenizer is None else f"no tokenizer can be loaded from {name!r}"
        return _Match(name, unknown=f"their tokens could not be compared, as {missing}")
    return _Match(name, difference=_difference(tokenizer.get_vocab(), its_tokenizer))


def _difference(tokens: dict[str, int], its_tokenizer: Tokenizer) -> str:
    """What the critic would misread, with an example or two; empty if nothing."""
    its_tokens = its_tokenizer.get_vocab()
    misread = sorted((i, token) for token, i in tokens.items() if its_tokens.get(token) != i)
    if misread:
        count = f"{len(misread)} of the policy's {len(tokens)} tokens have another id in its tokenizer, or none"
        shown = [f"{token!r} is {i}, and {its_tokens.get(token, 'unknown')} there" for i, token in misread[:2]]
        return f"{count} ({'; '.join(shown)})"
    more = sorted(set(its_tokens) - set(tokens) - set(its_tokenizer.get_added_vocab()), key=its_tokens.__getitem__)
    if more:
        shown = [repr(token) for token in more[:2]]
        return f"its tokenizer cuts text into {len(more)} tokens that the policy's lacks ({', '.join(shown)})"
    return ""


def _checked(critic: Any, policy: CausalLM, n_streams: int, match: _Match) -> PreTrainedModel:
    """The critic, if its labels and the size of its vocabulary fit."""
    if is_quantized(critic):
        raise ValueError("critic is quantized, and all weights of a critic are trained: give one in float32.")
    if getattr(critic.config, "num_labels", None) != n_streams:
        raise ValueError(f"critic has {critic.config.num_labels} labels; expected {n_streams}, one per reward stream.")
    n_vocab, n_policy = vocab_size_of(critic), vocab_size_of(policy)
    if n_vocab < n_policy:
        raise ValueError(
            f"critic knows {n_vocab} tokens and the policy {n_policy}: they must share the tokenizer. Train the "
            f"critic's model with the policy's tokenizer, or leave critic out to share the policy's trunk."
        )
    if match.unknown and n_vocab != n_policy:
        print_once(f"Critic: it knows {n_vocab} tokens and the policy {n_policy}; {match.unknown}.")
    return critic


def _name_of(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", ""))


def make_actor_critic(
    policy: CausalLM,
    critic: Any,
    args: AdvantageSettings,
    tokenizer: Tokenizer | None = None,
    *,
    n_streams: int,
    origin: str = "",
    num_layers_unfrozen: int | None = None,
    frozen_dtype: str = "float32",
    trust_remote_code: bool = False,
) -> ActorCritic:
    """Policy and critic; without a use for the critic its head stays as it is.

    Args:
        policy: A causal language model.
        critic: None for a value head on the policy's trunk; ``"lora"`` for an adapter of its own on the policy's base; or
            as in :func:`load_critic`.
        args: The configuration.
        tokenizer: The policy's.
        n_streams: Number of reward streams.
        origin: The directory that the policy is from. A critic that another run has left there is taken over if it
            fits and ``critic`` is None, or ``"lora"`` where that is what it is; a line says so.
        num_layers_unfrozen: How many of the policy's top layers are trained; None: all.
        frozen_dtype: What the weights of a critic of its own that are not trained are stored in.
        trust_remote_code: Whether code that comes with the critic may run.

    Raises:
        ValueError: A critic is given, and the baseline uses none; or it does not fit the policy.
        OSError: The critic cannot be loaded.
    """
    if not args.uses_critic:
        if critic is not None:
            raise ValueError(f"baseline={args.baseline!r} uses no critic: leave critic out, or set baseline='critic'.")
        model = ActorCritic(policy, None, n_streams, num_layers_unfrozen)
        model.value_head.requires_grad_(False)
        return model
    left = _left_by_a_run(origin)
    if isinstance(critic, str) and critic == LORA:
        adapter = left["critic"] if _is_adapter(left.get("critic")) else None
        return with_lora_critic(
            policy,
            n_streams,
            num_layers_unfrozen=num_layers_unfrozen,
            left=adapter,
            trust_remote_code=trust_remote_code,
        )
    if critic is not None:
        own = load_critic(critic, policy, n_streams, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    else:
        own = _take_over_critic(left, policy, n_streams, tokenizer, trust_remote_code)
    if own is not None:
        store_frozen(own, frozen_dtype, "critic", EXPORTED)
    model = ActorCritic(policy, own, n_streams, num_layers_unfrozen)
    if own is None:
        _take_over_head(left, model.value_head)
    return model


def _left_by_a_run(origin: str) -> dict[str, Path]:
    """What of a critic lies beside a policy that another run has exported, or beside its ``adapter/``."""
    directory = Path(origin)
    places = [directory] + ([directory.parent] if (directory / "adapter_config.json").exists() else [])
    names = ("critic", HEAD)
    return {name: place / name for place in places for name in names if origin and (place / name).exists()}


def _is_adapter(path: Path | None) -> bool:
    return path is not None and (path / "adapter_config.json").exists()


def _take_over_critic(
    left: dict[str, Path], policy: CausalLM, n_streams: int, tokenizer: Tokenizer | None, trust_remote_code: bool
) -> PreTrainedModel | None:
    path = left.get("critic")
    if path is None:
        return None
    if _is_adapter(path):
        print_once(
            f"Critic: a new value head, as the critic in {path} is an adapter, which critic={LORA!r} takes over."
        )
        return None
    try:
        critic = load_critic(str(path), policy, n_streams, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    except UntrustedModelError:
        raise
    except (ValueError, OSError) as error:
        print_once(f"Critic: a new value head, as the critic in {path} does not fit. {error}")
        return None
    print_once(f"Critic: taken over from {path}.")
    return critic


def _take_over_head(left: dict[str, Path], head: nn.Linear) -> None:
    path = left.get(HEAD)
    if path is None:
        return
    saved = load_file(path)
    shapes = {name: list(tensor.shape) for name, tensor in saved.items()}
    expected = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    if shapes != expected:
        print_once(f"Critic: a new value head, as the one in {path} does not fit: {shapes}, expected {expected}.")
        return
    head.load_state_dict(saved)
    print_once(f"Critic: the value head is taken over from {path}.")
