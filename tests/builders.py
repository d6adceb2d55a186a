"""Runs small enough to train within a test: twelve tokens, tiny models, prompts and completions of many lengths."""

import dataclasses
import json
from pathlib import Path

import torch
from fakes import letter_tokenizer, tiny_gpt2, tiny_llama
from peft import LoraConfig
from transformers import GPT2Config, GPT2ForTokenClassification, LlamaConfig, LlamaForTokenClassification

from lmppo import PPOConfig, PPOTrainer
from lmppo.models import ActorCritic, load_policy
from lmppo.models.held import plain
from lmppo.prompts import pad_left
from lmppo.records import Experience, Samples, Tokens
from lmppo.run.checkpoint import optimizer_tensors
from lmppo.sampling import SamplingParams, sample, uniform_noise

VOCAB = 12
EOS = 0
PROMPTS = ["a", "bcd", "kjihgfe", "ab", "deadbeef", "c"]

torch.set_num_threads(1)  # bit-identical sums, and other work on the machine is left alone


def gpt2(seed=0, **kwargs):
    """A GPT-2 with dropout 0.1 in its config, whose completions end early about half of the time."""
    return tiny_gpt2(VOCAB, seed=seed, **kwargs)


def llama(seed=0, **kwargs):
    return tiny_llama(VOCAB, seed=seed, **kwargs)


MODELS = {"gpt2": gpt2, "llama": llama}


def critic_of(family="gpt2", seed=1, vocab_size=VOCAB, num_labels=1, n_positions=64):
    """A critic that is a model of its own, of random weights, so that its values are not all alike."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": EOS, "eos_token_id": EOS}
    if family == "gpt2":
        sizes = {"n_positions": n_positions, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
        return GPT2ForTokenClassification(GPT2Config(vocab_size=vocab_size, num_labels=num_labels, **ends, **sizes))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, num_labels=num_labels, initializer_range=0.2, **ends, **sizes)
    return LlamaForTokenClassification(config)


def lora(family="gpt2", **kwargs):
    if family == "gpt2":
        return LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **kwargs)
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


def count_a(prompts, completions, **kwargs):
    """A reward that any policy can raise: the number of a's."""
    return [float(completion.count("a")) for completion in completions]


def share_of_a(prompts, completions, **kwargs):
    """The share of a's, which does not grow with length."""
    return [completion.count("a") / max(1, len(completion)) for completion in completions]


def make_config(output_dir, **settings):
    small = {
        "max_steps": 2,
        "rollout_batch_size": 8,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "max_completion_length": 8,
        "eval_completions": 8,
        "ppo_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "critic_learning_rate": settings.get("learning_rate", 1e-2),  # one rate: tests compute the steps by hand
        "value_clip_range": 0.2,
        "lam": 0.95,
        "kl_form": "k1_reward",
        "target_kl": 0.0,  # no limit: tests count the steps
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PPOConfig(output_dir=str(output_dir), **(small | settings))


def make_trainer(output_dir, *, model=None, reward=count_a, dataset=None, tokenizer=None, **rest):
    """A PPOTrainer; ``rest`` holds further arguments of the trainer and settings of the configuration."""
    names = ("critic", "peft_config", "ref_model", "callbacks", "eval_dataset", "reward_processing_classes",
             "reward_streams", "run_settings", "watch_funcs")  # fmt: skip
    arguments = {name: rest.pop(name) for name in names if name in rest}
    return PPOTrainer(
        model=gpt2() if model is None else model,
        reward_funcs=None if "reward_streams" in arguments else reward,
        args=make_config(output_dir, **rest),
        train_dataset=[{"prompt": p} for p in PROMPTS] if dataset is None else dataset,
        processing_class=letter_tokenizer() if tokenizer is None else tokenizer,
        **arguments,
    )


def build_model(family, kind):
    """An actor-critic of a model family: shared trunk, critic of its own, or LoRA with an adapter that does something."""
    policy = MODELS[family]()
    if kind == "lora":
        policy = load_policy(policy, lora(family))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return with_values(ActorCritic(policy, critic_of(family) if kind == "separate" else None))


def trained(output_dir, **settings):
    """A trainer that has run to its end."""
    trainer = make_trainer(output_dir, **settings)
    trainer.train()
    return trainer


def build_policy_arguments(kind):
    """The trainer's arguments for a shared trunk, a critic of its own, or an adapter."""
    return {
        "shared": {},
        "separate": {"critic": critic_of()},
        "lora": {"peft_config": lora()},
        "lora critic": {"peft_config": lora(), "critic": "lora"},
    }[kind]


def encode(*prompts):
    """Left-padded ids and mask of texts, or of lists of token ids."""
    tokenizer = letter_tokenizer()
    rows = [tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]
    return pad_left(rows, max(map(len, rows)))


def make_samples(model: ActorCritic, prompts=PROMPTS, *, seed=0, n_time=8, eos=(EOS,), **settings) -> Samples:
    ids, mask = encode(*prompts)
    params = SamplingParams(n_time, eos, **settings)
    return sample(model, ids, mask, uniform_noise(seed, 0, range(len(ids)), n_time), params)


def with_values(model: ActorCritic, seed=5) -> ActorCritic:
    """A value head that has learned something, in place of zeros."""
    torch.manual_seed(seed)
    if model.value_head is not None:
        torch.nn.init.normal_(model.value_head.weight, std=0.5)
        torch.nn.init.constant_(model.value_head.bias, 0.3)
    return model


def make_experience(samples: Samples, seed=3) -> Experience:
    """What the update may see, with random advantages and returns."""
    generator = torch.Generator().manual_seed(seed)
    shape = samples.completion_mask.shape
    return Experience(
        tokens=samples.tokens,
        support=samples.support,
        old_logprobs=samples.logprobs,
        ref_logprobs=samples.logprobs + 0.3 * torch.randn(shape, generator=generator),
        ref_support_logprobs=torch.zeros(shape),
        old_values=samples.values,
        advantages=torch.randn(shape, generator=generator),
        returns=torch.randn(samples.values.shape, generator=generator),
    )


def supports(record):
    """``(B, T, V)``, or ``(B, T, 1)`` where all tokens could be sampled: the support as bools."""
    allowed = record.support.allowed()
    return torch.ones(*record.completion_mask.shape, 1, dtype=torch.bool) if allowed is None else allowed


def read(model, *batch):
    """Logits and values of prompt ids and mask, completion ids and mask."""
    tokens = Tokens(*batch)
    return model.logits(tokens), model.values(tokens)


def with_mask(record, mask):
    """The record with another completion mask."""
    return dataclasses.replace(record, tokens=dataclasses.replace(record.tokens, completion_mask=mask))


def alone(tensor, mask, row):
    """The counted part of one row."""
    return tensor[row][mask[row]]


def row_alone(model, prompt, completion):
    """Logits and values of one row through the plain model: no padding, no masks, no positions given."""
    ids = torch.cat([prompt, completion])[None]
    states = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    with torch.no_grad():
        out = model.policy(input_ids=ids, output_hidden_states=True)
        if model.critic is not None and model.value_head is None:
            values = model.critic(input_ids=ids).logits[0, states]
        else:
            read = out if model.critic is None else model.critic(input_ids=ids, output_hidden_states=True)
            values = read.hidden_states[-1][0, states] @ model.value_head.weight.T + model.value_head.bias
    return out.logits[0, states], values


def metrics_rows(output_dir):
    """The rows of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


def optimizer_state(trainer):
    """AdamW's state, copied."""
    return {name: tensor.clone() for name, tensor in optimizer_tensors(trainer.actor_critic, trainer.optimizer).items()}


def weights(trainer):
    """All weights of policy and critic, copied."""
    return {name: plain(tensor.detach()).clone() for name, tensor in trainer.actor_critic.state_dict().items()}


def assert_same(left: dict, right: dict):
    """Two sets of tensors are equal to the last bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
