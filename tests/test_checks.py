"""The checks before the first step: rounding passes at any size of the logits, faults do not."""

import pytest
import torch
from builders import EOS, VOCAB, make_trainer, trained
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from lmppo.checks import (
    NonFiniteError,
    StepZeroError,
    check_first_ratio,
    check_kl_zero,
    check_reference,
    rounding_tolerance,
)

COMMON = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}


def sized(family, largest):
    """A model of 256 hidden units whose logits lie at about -largest, as those of GPT-2 at -30 to -130."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=64, **COMMON))

    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **sizes, **COMMON))

    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=64, **sizes, **COMMON))

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        # One direction common to all tokens lowers every logit; the rest still tells the tokens apart.
        hidden = model(input_ids=torch.arange(1, 11)[None], output_hidden_states=True).hidden_states[-1][0]
        mean = hidden.mean(dim=0)
        head.weight.mul_(2.0 / head.weight.std() / 256**0.5)
        head.weight.sub_(largest * mean / mean.square().sum())
    return model


@pytest.mark.parametrize("largest", [20, 80, 400])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_logits_of_real_size_are_no_fault(tmp_path, family, largest):
    trainer = make_trainer(tmp_path, model=sized(family, largest), max_steps=1, learning_rate=1e-4)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["first_ratio_error"] < rounding_tolerance(largest) / 2, "the bound leaves room"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_small_fault_is_caught_at_logits_of_real_size(tmp_path, family):
    class Disturb(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.register_forward_hook(self.jitter)

        def jitter(self, module, arguments, output):
            if output.logits.requires_grad:  # in the update alone
                output.logits = output.logits + 0.01 * torch.randn(output.logits.shape)

    with pytest.raises(StepZeroError, match="so the ratio does not start at 1"):
        trained(tmp_path, model=sized(family, 80), callbacks=[Disturb()])


def test_the_tolerance_grows_with_the_logits_and_the_precision():
    assert rounding_tolerance(5.0) == rounding_tolerance(20.0) == 1e-4
    assert rounding_tolerance(130.0) == pytest.approx(6.5e-4)
    assert rounding_tolerance(0.5, "bf16") == 1e-2
    assert rounding_tolerance(77.0, "bf16") == pytest.approx(0.77)


def test_what_is_above_the_tolerance_is_refused_with_both_numbers():
    check_first_ratio({"log_ratio_max": 1e-4}, 1e-4)
    check_first_ratio({}, 1e-4)
    check_kl_zero(1e-4, 1e-4)
    with pytest.raises(StepZeroError, match=r"up to 2\.00e-04 nats \(allowed: 1e-04\)"):
        check_first_ratio({"log_ratio_max": 2e-4}, 1e-4)
    with pytest.raises(StepZeroError, match=r"up to 2\.00e-04 nats on a token \(allowed: 1e-04\)"):
        check_kl_zero(2e-4, 1e-4)


def test_an_infinite_kl_names_the_row_and_the_token():
    ids, finite = torch.tensor([[4, 5], [6, 7]]), torch.zeros(2, 2)
    check_reference(finite, finite, ids)
    broken = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    with pytest.raises(NonFiniteError, match=r"Row 1 .* token 1 .*id 7, has the log-probability -inf under the refer"):
        check_reference(broken, -broken, ids)
    with pytest.raises(NonFiniteError, match=r"Row 1 .* token 1 .*id 7, was sampled where the reference gives probab"):
        check_reference(finite, -broken, ids)
