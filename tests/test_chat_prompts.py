"""Chat prompts are rendered as trl renders them, whatever is in a row; processors of multimodal models."""

import dataclasses

import datasets
import pytest
from builders import count_a, make_config, make_trainer, trained
from fakes import END_OF_TEXT, tiny_gpt2, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor
from trl import TrlParser
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from lmppo import PPOConfig, PPOTrainer
from lmppo.prompts import PromptEncoder, PromptStream

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' and m.content == 'forbidden' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|endoftext|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ style }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Let me think: "}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def add(x: int) -> int:
    """Adds.

    Args:
        x: A number.
    """
    return x


def tokenizer(**kwargs):
    return tiny_tokenizer(**({"chat_template": TEMPLATE} | kwargs))


def encoder(processing_class=None, **kwargs):
    return PromptEncoder(processing_class or tokenizer(), 257, None, 8, **kwargs)


def rendered(row, **kwargs):
    """The tokens of a row as text."""
    using = encoder(**kwargs)
    return using.tokenizer.decode(using.encode([row], ["Row 0"])[0][1])


SHAPES = {
    "user": {"prompt": [USER]},
    "system and user": {"prompt": [SYSTEM, USER]},
    "developer and user": {"prompt": [{"role": "developer", "content": "Be brief."}, USER]},
    "an assistant has the last word": {"prompt": [USER, ANSWER]},
    "several turns": {"prompt": [USER, ANSWER, USER]},
    "a tool has the last word": {"prompt": [USER, CALL, {"role": "tool", "name": "add", "content": "4"}]},
    "null contents and keys": {"prompt": [{**USER, "tool_calls": None}, {**CALL, "content": None}, USER]},
    "blocks of text": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    "an assistant's blocks are continued": {
        "prompt": [USER, {"role": "assistant", "content": [{"type": "text", "text": "hm"}]}]
    },
    "no thinking": {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "thinking": {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": True, "style": "s"}},
    "no thinking, continued": {"prompt": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    "another template": {"prompt": [USER], "chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}},
    "no arguments": {"prompt": [USER], "chat_template_kwargs": {}},
    "tools": {"prompt": [USER], "tools": TOOLS},
    "a function as a tool": {"prompt": [USER], "tools": [add]},
    "no tools": {"prompt": [USER], "tools": []},
    "null tools": {"prompt": [USER], "tools": None},
    "tools and arguments": {"prompt": [USER], "tools": TOOLS, "chat_template_kwargs": {"style": "s"}},
    "other columns": {"prompt": [USER], "label": True, "completion": "x", "messages": 3, "chosen": "y"},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_a_row_is_rendered_as_trl_renders_it(row):
    example = {key: row[key] for key in ("prompt", "chat_template_kwargs") if key in row}
    assert rendered(row) == apply_chat_template(example, tokenizer(), tools=row.get("tools"))["prompt"]


def test_an_assistant_with_the_last_word_is_continued():
    assert rendered(SHAPES["an assistant has the last word"]) == "<user>2+2?<|endoftext|><assistant>Let me think: "
    assert rendered(SHAPES["no thinking"]).endswith("<assistant><think></think>")


def test_tokens_are_those_of_transformers_and_messages_stay_messages():
    """With a tokenizer that puts a beginning-of-text token before every text: not before a rendered one."""
    tokens = tokenizer()
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    (prompt, ids), (_, text_ids) = encoder(tokens).encode([{"prompt": (USER,)}, "ab"], ["Row 0", "Row 1"])
    expected = tokens.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert (prompt, ids) == ([USER], expected)
    assert ids[0] != 0 and text_ids == tokens("ab")["input_ids"] == [0, *tokenizer()("ab")["input_ids"]]


def test_tools_may_be_json():
    text = '[{"name": "add"}]'
    assert rendered({"prompt": [USER], "tools": text}) == rendered({"prompt": [USER], "tools": [{"name": "add"}]})
    with pytest.raises(ValueError, match="^Row 0: the chat template cannot render its messages: JSONDecodeError"):
        rendered({"prompt": [USER], "tools": "add"})


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_rows_of_a_data_set_whose_missing_keys_are_null(form):
    """A Dataset fills what a row lacks with null: there it is not given."""
    rows = [
        {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"name": "a", "n": 1}]},
        {"prompt": [USER], "chat_template_kwargs": {"style": "s"}, "tools": [{"name": "b", "n": 2}]},
        {"prompt": [USER, ANSWER]},
    ]
    prompts = PromptStream(datasets.Dataset.from_list(rows).with_format(form), encoder(), shuffle=False)
    texts = [tokenizer().decode(ids) for ids in prompts.next_batch(3).input_ids]
    assert texts == [rendered(row) for row in rows]


def test_a_rows_arguments_win_over_the_settings():
    setting = {"chat_template_kwargs": {"enable_thinking": False, "style": "set"}}
    assert rendered({"prompt": [USER]}, **setting).endswith("<assistant><think></think>set")
    own = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": True}}
    assert rendered(own, **setting).endswith("<assistant>set")
    assert rendered({"prompt": [USER], "chat_template_kwargs": None}, **setting) == rendered(
        {"prompt": [USER]}, **setting
    )


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"prompt": [{"role": "user", "content": "forbidden"}]}, "TemplateError: no such talk"),
        ({"prompt": [SYSTEM]}, "ValueError: Invalid role in the last message: system"),
        ({"prompt": [USER], "tools": ["add"]}, "ValueError: Tools should"),
        ({"prompt": [USER], "chat_template_kwargs": {"tokenize": True}}, "TypeError.*tokenize"),
        ({"prompt": [USER, {"role": "assistant", "tool_calls": []}]}, "ValueError: continue_final_message is set"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named(bad, complaint):
    rows = [{"prompt": [USER]}] * 3
    with pytest.raises(ValueError, match=f"^Row 3 of train_dataset: the chat template cannot .*messages: {complaint}"):
        PromptStream([*rows, bad], encoder())


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"prompt": [USER], "chat_template_kwargs": "x"}, "`chat_template_kwargs` is a str; expected a dict"),
        ({"prompt": [USER], "images": ["a.png"]}, "has images, in its column `images`: lmppo trains on text alone"),
        ({"prompt": "2+2", "image": object()}, "has images, in its column `image`"),
        ({"prompt": [USER, "hello"]}, "the prompt is a list holding dict, str; expected text, a list of messages"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": 1}]}]},
            "its messages hold a part of the type 'image'",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "its messages hold a part of the type 'image_url'",
        ),
    ],
)
def test_what_a_model_of_text_would_leave_out_is_refused(bad, complaint):
    with pytest.raises(ValueError, match=f"^Row 1 of train_dataset:? {complaint}"):
        PromptStream([{"prompt": [USER], "images": None, "image": None}, bad], encoder())


# --- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_in_yaml_and_on_the_command_line(tmp_path):
    path, meant = tmp_path / "config.yaml", {"enable_thinking": False, "n": [1, 2]}
    path.write_text("chat_template_kwargs:\n  enable_thinking: false\n  n: [1, 2]\n")
    flag = ["--chat_template_kwargs", '{"enable_thinking": false, "n": [1, 2]}']
    for arguments in (["--config", str(path)], flag):
        config = TrlParser(PPOConfig).parse_args_and_config(args=arguments)[0]
        assert config.chat_template_kwargs == meant == config.to_dict()["chat_template_kwargs"]
        assert dataclasses.replace(config, seed=3).chat_template_kwargs == meant


def test_the_setting_reaches_the_prompts_and_names_the_run(tmp_path):
    def prompt(directory, **settings):
        trainer = make_trainer(
            tmp_path / directory, model=tiny_gpt2(), dataset=[{"prompt": [USER]}], tokenizer=tokenizer(),
            max_completion_length=4, **settings,
        )  # fmt: skip
        return trainer, tokenizer().decode(trainer.prompts.next_batch(1).input_ids[0])

    plain, text = prompt("a")
    other, thinking = prompt("b", chat_template_kwargs={"enable_thinking": False})
    assert thinking == text + "<think></think>"
    assert other.run.settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert other.run.settings["train_dataset"] != plain.run.settings["train_dataset"]


# --- processors ------------------------------------------------------------------------------------------------------


def processor(**kwargs):
    return LlavaProcessor(CLIPImageProcessor(), tokenizer(), image_token="Z", patch_size=14, **kwargs)


def test_a_processors_tokenizer_is_used_and_the_whole_is_saved(tmp_path):
    whole = trained(tmp_path / "a", model=tiny_gpt2(), tokenizer=processor(), save_steps=1)
    alone = trained(tmp_path / "b", model=tiny_gpt2(), tokenizer=processor().tokenizer)
    assert whole.state.log_history[-1]["reward"] == alone.state.log_history[-1]["reward"]
    for place in ("final", "checkpoints/step-000001/policy"):
        assert type(AutoProcessor.from_pretrained(tmp_path / "a" / place)) is LlavaProcessor
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "a" / place)("ab")["input_ids"] == tokenizer()("ab")["input_ids"]
        )
    assert type(whole.processing_class) is LlavaProcessor


def test_messages_go_through_the_tokenizers_template_or_the_processors_own():
    """A processor's own template gets blocks, as trl's trainers give it."""
    assert rendered({"prompt": [USER]}, processing_class=processor()) == rendered({"prompt": [USER]})
    blocks = "{% for m in messages %}{{ m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}:"
    own = processor(chat_template=bos_first(blocks))
    messages = prepare_multimodal_messages([USER, ANSWER])
    expected = own.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=True)
    assert encoder(own).encode([{"prompt": [USER, ANSWER]}], ["Row 0"])[0] == ([USER, ANSWER], expected["input_ids"][0])


def bos_first(template):
    return "{{ bos_token }}" + template


@pytest.mark.parametrize("wrong", ["gpt2", 7, CLIPImageProcessor()], ids=["text", "number", "image processor"])
def test_what_is_no_tokenizer_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match=f"^processing_class is a {type(wrong).__name__}; expected a tokenizer"):
        PPOTrainer(tiny_gpt2(), count_a, make_config(tmp_path), ["a"], processing_class=wrong)


def test_the_test_template_ends_turns():
    assert rendered({"prompt": [USER]}) == f"<user>2+2?{END_OF_TEXT}<assistant>"
