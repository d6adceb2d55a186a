"""The usable length of a model: a forward pass of that many tokens works, and one more does not where there is a table."""

import pytest
import torch
import transformers
from builders import gpt2, make_trainer, trained
from fakes import tiny_llama, tiny_tokenizer
from peft import PromptTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from lmppo import ClassifierReward
from lmppo.context import usable_context

# Every configuration takes of these what it knows; 34 positions.
SIZES = {
    "vocab_size": 300, "hidden_size": 16, "d_model": 16, "n_embd": 16, "emb_dim": 16, "embedding_size": 16, "dff": 32,
    "num_hidden_layers": 1, "num_layers": 1, "n_layers": 1, "n_layer": 1, "decoder_layers": 1, "rotary_dim": 2,
    "num_attention_heads": 2, "num_heads": 2, "n_head": 2, "n_heads": 2, "decoder_attention_heads": 2,
    "intermediate_size": 32, "decoder_ffn_dim": 32, "ffn_dim": 32, "num_key_value_heads": 2, "word_embed_proj_dim": 16,
    "max_position_embeddings": 34, "n_positions": 34, "max_seq_len": 34, "max_target_positions": 34,
}  # fmt: skip
TABLES = {  # family: usable of 34 positions, and what else its configuration needs
    "gpt2": (34, {}), "gpt_bigcode": (34, {}), "opt": (34, {}), "biogpt": (34, {}), "openai-gpt": (34, {}), "ctrl": (34, {}),
    "gptj": (34, {}), "bart": (34, {}), "mpt": (34, {}), "xlm": (34, {}),
    "whisper": (34, {"pad_token_id": 0}),
    "gpt_neo": (34, {"attention_types": [[["global"], 1]]}), "bert": (34, {}), "distilbert": (34, {}), "electra": (34, {}),
    "roberta": (32, {"pad_token_id": 1}), "xlm-roberta": (29, {"pad_token_id": 4}), "camembert": (33, {"pad_token_id": 0}),
    "mpnet": (32, {}), "xmod": (32, {"default_language": "en_XX"}), "data2vec-text": (32, {}), "ibert": (32, {}),
    "longformer": (32, {"attention_window": 4}), "nystromformer": (34, {}), "esm": (32, {"pad_token_id": 1}),
    "deberta-v2": (34, {}), "albert": (34, {}), "roformer": (34, {}),
}  # fmt: skip
CAUSAL = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def build(family, **needs):
    config = CONFIG_MAPPING[family]
    known = set(vars(config())) | set(config.attribute_map)
    made = config(**{name: size for name, size in SIZES.items() if name in known} | needs)
    classifier = family in transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    classifier = classifier and family not in ("bart", "whisper")  # these classify by an encoder as well
    return (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(made).eval()


def read(model, length):
    ids = torch.full((1, length), 5)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_used_to_its_end_and_no_further(family):
    usable, needs = TABLES[family]
    model = build(family, **needs)
    context = usable_context(model)
    assert context.length == usable
    read(model, usable)
    with pytest.raises((IndexError, RuntimeError)):
        read(model, usable + 1)


def test_what_the_configuration_says_of_a_table_does_not_count():
    model = gpt2()
    model.config.n_positions = 1000
    assert usable_context(model).length == 64


def test_tokens_that_an_adapter_puts_before_the_prompt_take_positions():
    model = get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    assert usable_context(model).length == 64 - 7
    read(model, 57)
    with pytest.raises(IndexError):
        read(model, 58)


@pytest.mark.parametrize("family, needs", [("bloom", {}), ("falcon", {"alibi": True}), ("mamba", {}),
                                           ("xlnet", {})])  # fmt: skip
def test_models_that_need_no_positions_have_no_limit(family, needs):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32} if family == "xlnet" else sizes
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes, **needs)).eval()
    assert usable_context(model) is None
    read(model, 40)


def rope(kind, **rest):
    return tiny_llama(12, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rest})


LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "kind, rest, usable",
    [
        ("default", {}, 64), ("linear", {"factor": 4.0}, 256), ("dynamic", {"factor": 4.0}, 64), ("llama3", LLAMA3, 64),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": 32}, 64), ("longrope", LONG, 16),
    ],
)  # fmt: skip
def test_scaled_rope_reads_as_far_as_it_was_scaled(kind, rest, usable):
    assert usable_context(rope(kind, **rest)).length == usable


@pytest.mark.parametrize("kind, rest, original", [("dynamic", {"factor": 4.0}, 64), ("longrope", LONG, 16)])
def test_the_limit_of_dynamic_rope_is_where_a_cache_and_a_full_pass_part(kind, rest, original):
    """Two tokens fed one by one to a cache, up to the limit and over it."""
    model = rope(kind, **rest).eval()
    ids = torch.randint(1, 12, (1, original + 1), generator=torch.Generator().manual_seed(0))

    def difference(length):
        with torch.no_grad():
            cache = model(input_ids=ids[:, : length - 2], use_cache=True).past_key_values
            for t in (length - 2, length - 1):
                step = model(input_ids=ids[:, t : t + 1], past_key_values=cache)
            return (step.logits[0, -1] - model(input_ids=ids[:, :length]).logits[0, -1]).abs().max()

    assert difference(original) < 1e-4 < 1e-3 < difference(original + 1)


def test_a_run_beyond_the_original_length_is_refused_and_names_the_setting(tmp_path):
    long = [{"prompt": "abcdefgh"}]
    trained(tmp_path / "within", model=rope("longrope", **LONG), dataset=long, max_steps=1)
    message = r"8 tokens and max_completion_length=9 exceed the {}'s context of 16 \(rope_type='longrope' reads"
    with pytest.raises(ValueError, match=message.format("model")):
        make_trainer(tmp_path / "a", model=rope("longrope", **LONG), dataset=long, max_completion_length=9)
    with pytest.raises(ValueError, match=message.format("ref_model")):
        make_trainer(
            tmp_path / "b",
            ref_model=rope("longrope", **LONG),
            model=tiny_llama(12),
            dataset=long,
            max_completion_length=9,
        )


def test_scaled_rope_trains_beyond_max_position_embeddings(tmp_path):
    model = tiny_llama(
        12, max_position_embeddings=12, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    )
    trained(tmp_path, model=model, dataset=[{"prompt": "abcdefgh"}], max_steps=1)


def test_a_long_text_is_cut_to_what_a_roberta_reads():
    model = build("roberta", pad_token_id=1, num_labels=1)
    reward = ClassifierReward(model, tiny_tokenizer())
    assert reward.max_length == 32
    assert reward(prompts=["x" * 60], completions=["abc"]) == reward(prompts=["x" * 29], completions=["abc"])
    with pytest.raises(ValueError, match="max_length=33 must be from 1 to 32"):
        ClassifierReward(model, tiny_tokenizer(), max_length=33)
