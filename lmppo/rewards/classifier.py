"""A sequence classifier as a reward function."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmppo.context import usable_context
from lmppo.pretrained import UntrustedModelError, find_file, load_pretrained, load_tokenizer
from lmppo.protocols import Tokenizer
from lmppo.redaction import scrub, scrubbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUTS = ("logit", "log_odds", "probability")
OTHER_NAMES = "(Pass a function itself; a name such as 'lexicon' becomes one by reward_models.load.)"


class ClassifierReward:
    """The score of prompt + completion under a sequence classifier, as a reward function.

    With logits l and the label k: ``"logit"`` is l_k; ``"log_odds"`` is l_k - logsumexp of the other labels' logits,
    that is log p_k / (1 - p_k) (one label, or labels that do not exclude each other: l_k itself); ``"probability"`` is
    the sigmoid of the log-odds.

    Text is tokenized by the classifier's own tokenizer with its usual special tokens; chat messages go through its
    chat template. A text that is too long loses its beginning, never its completion. Padding is on the right and
    changes no score: a decoder pools the last token that differs from ``config.pad_token_id``, so where the model
    names no pad token, a batch is padded with a token that none of its texts holds.

    trl's RewardTrainer appends the EOS token to each text that it trains on. A model trained so is read in the same way:
    a completion that ended is scored with the EOS token after it, one that was cut without. Chat messages end as their
    template says.

    Args:
        model: A directory, a Hub id or a loaded ``AutoModelForSequenceClassification``. Loading takes safetensors
            only, in float32; a loaded model stays as it is, type, mode and device.
        processing_class: The classifier's tokenizer (default: the one saved with the model).
        output: ``"logit"``, ``"log_odds"`` or ``"probability"``.
        label: Name or index of the label to reward. Default: the only one; with several, the last one, except for
            ``"logit"``, which then must be told.
        batch_size: Texts per forward pass.
        max_length: Most tokens of a text (default: what model and tokenizer allow).
        device: Where to score (default: where the model is).
        append_eos: Whether texts that ended are scored with the EOS token (default: if the model's tags, or the settings
            saved beside it, say that trl's RewardTrainer trained it).
        trust_remote_code: Whether code that comes with the model or its tokenizer may run.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        ValueError: The model cannot be loaded or has no trained classification head, tokenizer and model do not fit,
            or ``output``, ``label``, ``batch_size``, ``max_length`` or ``append_eos`` is impossible.
    """

    @scrubbed
    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        processing_class: Tokenizer | None = None,
        *,
        output: str = "logit",
        label: str | int | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        append_eos: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from lmppo.models.loading import frozen_view
        from lmppo.models.quantized import check_quantized

        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is not one of {', '.join(OUTPUTS)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if isinstance(model, str | Path):
            self.model, source = _load_classifier(str(model), trust_remote_code), str(model)
        else:
            self.model, source = frozen_view(model), str(getattr(model.config, "_name_or_path", ""))
        self.__name__ = Path(scrub(source)).name or type(self.model).__name__
        check_quantized(self.model, self.__name__)
        self.tokenizer = copy.deepcopy(processing_class or _load_tokenizer(source, trust_remote_code))
        self.tokenizer.truncation_side = "left"
        self.append_eos = _trained_with_eos(model, source) if append_eos is None else append_eos
        if self.append_eos and self.tokenizer.eos_token is None:
            raise ValueError(f"append_eos: the tokenizer of {self.__name__} has no EOS token: set tokenizer.eos_token.")
        self.output = output
        self.label = _label_index(self.model.config, output, label, self.__name__)
        self.batch_size = batch_size
        self.max_length = self._allowed_length(max_length)
        self._n_embeddings = int(self.model.get_input_embeddings().weight.size(0))
        self._check_vocabulary()
        self.model = self.model.to(device) if device is not None else self.model

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]] | None = None,
        completion_ended: list[bool] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """One score per completion.

        Args:
            prompts: Text or chat messages.
            completions: Of the same kind.
            completion_ids: Tokens of another tokenizer, which are not used.
            completion_ended: Whether each completion ended by itself (default: all did).
            kwargs: Whatever else reward functions get; not used.
        """
        ended = [True] * len(prompts) if completion_ended is None else completion_ended
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores += self._output(self._logits(self._tokenize(prompts[rows], completions[rows], ended[rows]))).tolist()
        return scores

    def _tokenize(self, prompts: list, completions: list, ended: list[bool]) -> list[list[int]]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        chat = not isinstance(texts[0], str)
        if chat:
            texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in texts]
        elif self.append_eos:
            eos = self.tokenizer.eos_token
            texts = [text.removesuffix(eos) + eos if whole else text for text, whole in zip(texts, ended, strict=True)]
        ids = self.tokenizer(
            texts, add_special_tokens=not chat, truncation=self.max_length is not None, max_length=self.max_length
        )["input_ids"]
        return [row or [self.tokenizer.eos_token_id or 0] for row in ids]  # an empty text is scored as EOS

    @torch.inference_mode()
    def _logits(self, ids: list[list[int]]) -> Tensor:
        """``(n, labels)`` logits of token-id rows, each as if it were scored alone."""
        config = self.model.config.get_text_config()
        configured = config.pad_token_id
        pad_id = self._pad_id(ids, configured)
        width = max(map(len, ids))
        batch = torch.tensor([row + [pad_id] * (width - len(row)) for row in ids], device=self.model.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.model.device)
        mask = torch.arange(width, device=self.model.device) < lengths[:, None]
        try:
            config.pad_token_id = pad_id
            return self.model(input_ids=batch, attention_mask=mask.long()).logits.float()
        finally:
            config.pad_token_id = configured

    def _pad_id(self, ids: list[list[int]], configured: int | None) -> int:
        if configured is not None and 0 <= configured < self._n_embeddings:
            return configured
        unused = set(range(self._n_embeddings)).difference(*ids)
        if not unused:
            raise ValueError(
                f"{self.__name__} names no pad token, and {len(ids)} texts use all {self._n_embeddings} tokens: set "
                "config.pad_token_id, or lower batch_size."
            )
        return min(unused)

    def _output(self, logits: Tensor) -> Tensor:
        chosen = logits[:, self.label]
        if self.output == "logit":
            return chosen
        exclusive = getattr(self.model.config, "problem_type", None) != "multi_label_classification"
        if exclusive and logits.shape[1] > 1:
            others = torch.cat([logits[:, : self.label], logits[:, self.label + 1 :]], dim=1)
            chosen = chosen - others.logsumexp(dim=1)
        return chosen if self.output == "log_odds" else chosen.sigmoid()

    def _allowed_length(self, max_length: int | None) -> int | None:
        context = usable_context(self.model)
        told = self.tokenizer.model_max_length  # 1e30 where nobody has said
        limit = min(
            (n for n in (context.length if context else None, told) if n is not None and 0 < n < 10**9), default=None
        )
        if max_length is None:
            return limit
        if max_length < 1 or (limit is not None and max_length > limit):
            raise ValueError(f"max_length={max_length} must be from 1 to {limit}, the most {self.__name__} allows.")
        return max_length

    def _check_vocabulary(self) -> None:
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= self._n_embeddings:
            raise ValueError(
                f"the tokenizer of {self.__name__} has token ids up to {largest}, its model an embedding of "
                f"{self._n_embeddings} tokens: pass the tokenizer the classifier was trained with."
            )


def _load_classifier(name: str, trust_remote_code: bool) -> "PreTrainedModel":
    _check_place(name)
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = load_pretrained(
            AutoModelForSequenceClassification,
            name,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the classifier {name!r} cannot be loaded, neither as a directory nor from the Hub, with safetensors "
            f"weights: {str(error).splitlines()[0]} {OTHER_NAMES}"
        ) from error
    if info["missing_keys"] and not getattr(model, "_hf_peft_config_loaded", False):  # an adapter may hold the head
        raise ValueError(
            f"{name!r} has no trained classification head (missing: {', '.join(sorted(info['missing_keys']))}), so it "
            "would score at random. Train one on it: python -m reward_models.train_classifier, or trl's RewardTrainer."
        )
    return model.eval()


def _check_place(name: str) -> None:
    """Name what is wrong with a local path before the Hub is asked."""
    folder = Path(name)
    if folder.is_dir():
        return
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"the reward {name!r} is not a model directory, nor the id of a model on the Hub. {OTHER_NAMES}"
        )


def _load_tokenizer(source: str, trust_remote_code: bool) -> Tokenizer:
    try:
        return load_tokenizer(source, trust_remote_code=trust_remote_code)
    except UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {source!r}: pass processing_class, the tokenizer of the classifier."
        ) from error


def _trained_with_eos(model: Any, source: str) -> bool:
    """Whether trl's RewardTrainer trained a model, by the tags of a loaded one or the settings saved beside it.

    The settings are a pickle, which is not unpickled: its bytes are searched for two names. (A RewardConfig without
    eos_token is of an earlier trl, which appended none.)
    """
    if "reward-trainer" in (getattr(model, "model_tags", None) or ()):
        return True
    saved = find_file(source, "training_args.bin", may_download=isinstance(model, str | Path)) if source else None
    return saved is not None and all(name in saved.read_bytes() for name in (b"RewardConfig", b"eos_token"))


def _label_index(config: Any, output: str, label: str | int | None, name: str) -> int:
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None:
        if output == "logit" and len(names) > 1:
            raise ValueError(
                f"{name} has {len(names)} labels ({', '.join(names)}): choose one with label=..., or reward with "
                "output='log_odds' (or 'probability') of the last one."
            )
        return len(names) - 1
    wanted = str(label).casefold()
    matches = [i for i, known in enumerate(names) if known.casefold() == wanted]
    matches = matches or [i for i in range(len(names)) if str(i) == wanted]
    if not matches:
        raise ValueError(f"label={label!r} is not a label of {name}: choose one of {', '.join(names)}.")
    return matches[0]
