"""Logits exist in chunks of tokens only, whatever is computed of them: every tensor that is made is looked at."""

import pytest
import torch
from builders import critic_of, lora, make_trainer
from fakes import tiny_gpt2, tiny_llama
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedTokenizerFast

import lmppo.models.chunks
from lmppo.trpo import PolicyBatch

V = 211  # no other axis has this size
CHUNK = 8  # tokens; also the rows that are sampled at a time, and no less than the hidden units: a head is (V, 8)
N_TIME = 24


class Watch(TorchDispatchMode):
    """Looks at every tensor that an operation gives, in forward and backward passes.

    Attributes:
        too_large: Tensors with logits, or the like of them, of more than ``CHUNK`` tokens.
        most: The most tokens whose logits, or the like, existed at the same time, in all tensors together.
    """

    def __init__(self, module):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.too_large, self.most, self.alive, self.paused = [], 0, {}, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == V and not self.paused:
                self.see(function, tensor)
        return result

    def see(self, function, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.known:
            return  # a view of weights
        tokens = storage.nbytes() / (4 * V)  # bools count for a quarter, float64 for two
        limit = CHUNK * max(1, tensor.element_size() // 4)
        if tokens > limit:
            self.too_large.append(f"{function}: {tuple(tensor.shape)} {tensor.dtype}")
        self.alive = {ref: n for ref, n in self.alive.items() if not ref.expired()}
        self.alive[StorageWeakRef(storage)] = tokens
        self.most = max(self.most, sum(self.alive.values()))


def tokenizer():
    words = {f"t{i}": i for i in range(V)}
    inner = Tokenizer(tokenizer_models.WordLevel(words, unk_token="t3"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", eos_token="t0")


def gpt2(**settings):
    return tiny_gpt2(V, n_embd=8, **settings)


def llama():
    return tiny_llama(V, hidden_size=8)


CASES = {
    "PPO": {},
    "LoRA": {"peft_config": lora()},
    "LoRA on the head": {
        "model": llama, "peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    },
    "an untied head, with entropy": {"model": llama, "ent_coef": 0.1},
    "exact KL in reward and loss": {"kl_form": "exact_both", "ent_coef": 0.1},
    "k3 in reward and loss": {"kl_form": "k3_both"},
    "a few tokens": {"top_k": 50, "kl_form": "exact_both"},
    "tokens that are forbidden": {"suppress_tokens": [5, 6], "kl_form": "k3_both", "min_new_tokens": 2},
    "a critic of its own": {"critic": lambda: critic_of(vocab_size=V), "truncation": "bootstrap"},
    "frozen lower layers": {"num_layers_unfrozen": 1, "kl_form": "exact_both"},
    "recomputed layers": {"gradient_checkpointing": True},
    "a reference of its own": {"ref_model": lambda: gpt2(seed=1)},
    "TRPO": {"objective": "trpo", "trpo_cg_steps": 2},
}  # fmt: skip


def make(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(lmppo.models.chunks, "LOGITS_BYTES", 4 * V * CHUNK)
    made = {n: value() if callable(value) else value for n, value in settings.items()}
    prompts = [{"prompt": [1 + i] * n} for i, n in enumerate([1, 3, 9, 2, 5, 7, 4, 6])]
    return make_trainer(
        tmp_path,
        **{"model": gpt2(), "dataset": prompts, "tokenizer": tokenizer()} | made,
        reward=lambda completions, **kwargs: [float(len(text)) for text in completions],
        max_completion_length=N_TIME,
        minibatch_size=8,
        micro_batch_size=8,
    )


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("name", CASES)
def test_no_more_logits_exist_than_those_of_a_chunk(name, tmp_path, monkeypatch):
    """In a whole step and an evaluation; TRPO's product with the Fisher matrix, which differentiates twice, apart."""
    trainer = make(tmp_path, monkeypatch, CASES[name])
    watch = Watch(trainer.actor_critic)
    product = PolicyBatch.fisher_vector_product

    def unwatched(self, v):
        watch.paused = True
        result = product(self, v)
        watch.paused = False
        return result

    monkeypatch.setattr(PolicyBatch, "fisher_vector_product", unwatched)
    with watch:
        row = trainer.step()
    assert row["completion_length"] > 12, "there are many chunks"
    assert watch.most > CHUNK, "something was seen"
    assert not watch.too_large, watch.too_large[:5]
    assert watch.most <= 13 * CHUNK, "intermediate results of one chunk, not logits of many"


def test_with_all_tokens_in_one_chunk_they_would(tmp_path, monkeypatch):
    """The test above can fail."""
    trainer = make(tmp_path, monkeypatch, {})
    monkeypatch.setattr(lmppo.models.chunks, "LOGITS_BYTES", 2**27)
    with Watch(trainer.actor_critic) as watch:
        trainer.step()
    assert watch.too_large and watch.most > 20 * CHUNK
