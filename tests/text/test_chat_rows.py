"""Chats that cannot be learned exactly are refused with the reason, and those that can in unusual ways are read."""

import json

import pytest

from qlora_jax.data.chat_examples import tokenize_chats
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, LLAMA3, MARKED, SYSTEM, TOOLS, TWO_TURNS
from tests.data.test_chat_examples import learned_texts, with_template

HEAD = "{{ '<|im_start|>' + message['role'] + '\n' }}"
LOOP = "{% for message in messages %}" + HEAD + "BODY{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TRIMMED = (  # earlier answers lose their reasoning
    LOOP.replace(
        "BODY", "{{ message.content if loop.last else message.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}"
    )
    + PROMPT
)
ALWAYS_TRIMMED = LOOP.replace("BODY", "{{ message.content.split('</think>')[-1] + '<|im_end|>\n' }}") + PROMPT
THOUGHT = [TWO_TURNS[0], {"role": "assistant", "content": "<think>2 and 2</think>4"}, *TWO_TURNS[2:]]


@pytest.fixture
def tokenizer_with(golden, tmp_path):
    def make(template, **config):
        return with_template(tmp_path / "model", golden / "chat", template, **config)

    return make


def first(tokenizer, messages=TWO_TURNS, tools=None):
    return tokenize_chats([Chat(messages, tools, "f, line 7")], tokenizer, 10_000)[0][0]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML.replace("%}{{ '<|im_start|>assistant\n' }}", "%}{{ 'now: ' }}"), TWO_TURNS,
         r"writes the prompt for turn 2 \(assistant\) differently when the answer follows \('now: ' becomes '<|im_"),
        (ALWAYS_TRIMMED, [TWO_TURNS[0], {"role": "assistant", "content": "4</think>, and <think>more</think>5"}],
         r"drops or rewrites the content of turn 2 \(assistant\), '4</think>, and <think>more</think>5'"),
        (LOOP.replace("messages", "messages[-2:]").replace("BODY", "{{ message.content + '<|im_end|>' }}"), TWO_TURNS,
         "writes the prompt for turn 4"),
        (LOOP.replace("BODY", "{{ message.content[:-4] + '<|im_end|>' }}") + PROMPT,
         [TWO_TURNS[0], {"role": "assistant", "content": "no <|im_end|> here"}],
         r"drops or rewrites the content of turn 2 \(assistant\), 'no <\|im_end\|> here'"),
        ("{{ raise_exception('a bad ' ~ messages[-1].content) }}", [{"role": "user", "content": "</s>"}, TWO_TURNS[1]],
         "refuses this conversation: a bad </s>"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", TWO_TURNS, "nothing for turn 2"),
        (CHATML.replace("messages %}", "messages if message.role != 'system' %}", 1), [SYSTEM, *TWO_TURNS],
         r"drops or rewrites the content of turn 1 \(system\), 'Be brief.'"),
        (LOOP.replace("BODY", "{{ message.content + '\n' }}") + PROMPT, TWO_TURNS,
         "no control token at the end of the assistant's turn .*would not learn to stop"),
        (LOOP.replace("BODY", "{{ '<|im_end|>' + message.content }}") + PROMPT, TWO_TURNS,
         "no control token at the end"),
        (MARKED.replace("message['content'] + '<|im_end|>' }}{% endg", "message['content'] }}{% endg"), TWO_TURNS,
         "marks no control token at the end .* inside its generation block"),
        (MARKED.replace("== 'assistant' %}", "== 'model' %}"), TWO_TURNS, "marks nothing of turn 2 as the assistant's"),
        (MARKED.replace("{% generation %}{{ message['content']", "{{ message['content'] }}{% generation %}{{ ''"),
         TWO_TURNS, "drops or rewrites the content of turn 2"),
        ("{{ raise_exception('no') }}", TWO_TURNS, "refuses this conversation: no"),
        (CHATML, [{"role": "user", "content": "\ufdd0"}, TWO_TURNS[1]], r"U\+FDD0, which is no character"),
        (CHATML.replace("['content']", "['content'][:9]"),
         [TWO_TURNS[0], {"role": "assistant", "content": "to </s></s></s>"}], "drops or rewrites"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_an_error(tokenizer_with, template, messages, reason):
    with pytest.raises(InputError, match=reason) as error:
        first(tokenizer_with(template), messages)
    assert str(error.value).startswith("f, line 7: ") and "\n" not in str(error.value)
    assert "ufdd" not in ascii(str(error.value)) or "U+FDD0" in reason


def test_the_other_bad_chats_are_counted(tokenizer_with):
    bad = [{"role": "user", "content": "\ufdd0"}, TWO_TURNS[1]]
    chats = [Chat(bad, None, f"f, line {n}") for n in range(3)] + [Chat(TWO_TURNS, None, "f, line 3")]
    with pytest.raises(InputError, match=r"^f, line 0: .*\(and 2 more bad rows in this data set\)"):
        tokenize_chats(chats, tokenizer_with(TRIMMED), 10_000)


def test_thinking_that_is_trimmed(tokenizer_with):
    """From earlier answers: each is an example. From every answer: the rest is learned, and that is said."""
    tokenizer = tokenizer_with(TRIMMED)
    examples, cuts = tokenize_chats([Chat(THOUGHT, None, "f, line 7")], tokenizer, 10_000)
    assert [learned_texts(tokenizer, example) for example in examples] == [
        ["<think>2 and 2</think>4<|im_end|>"],
        [f"{TWO_TURNS[3]['content']}<|im_end|>"],
    ]
    assert (cuts.forms.apart, cuts.forms.unwritten) == (2, 0)
    tokenizer = tokenizer_with(ALWAYS_TRIMMED)
    (example,), cuts = tokenize_chats([Chat(THOUGHT, None, "f, line 7")], tokenizer, 10_000)
    assert learned_texts(tokenizer, example)[0] == "4<|im_end|>" and cuts.forms.unwritten == 1


def test_tools_that_a_template_does_not_write(tokenizer_with):
    tools = [{"type": "function", "function": {"name": "add"}}]
    mend = r"; use another template \(chat_template.jinja in the model's folder\), or take the chats with tools out$"
    with pytest.raises(InputError, match=f"does not write the tool 'add' that the row has{mend}"):
        first(tokenizer_with(CHATML), tools=tools)
    called = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": tools}]
    with pytest.raises(InputError, match=rf"drops or rewrites the tool_calls of turn 2 \(assistant\), 'add'.*{mend}"):
        first(tokenizer_with(TOOLS.replace("message.tool_calls or []", "[]")), called)


def test_an_end_that_no_file_names_is_said(golden, tmp_path):
    template = LOOP.replace("BODY", "{{ message.content }}{{ eos_token }}") + PROMPT
    tokenizer = with_template(tmp_path / "model", golden / "chat", template, ["</s>"], eos_token=None)
    with pytest.raises(InputError, match=r"\(it writes eos_token, which tokenizer_config.json does not name\), or use"):
        first(tokenizer)


def test_several_marks_in_a_turn_and_marks_in_a_macro(tokenizer_with):
    macro = "{% macro say(text) %}{% generation %}{{ text }}{% endgeneration %}{% endmacro %}"
    body = (
        "{% if message.role == 'assistant' %}{{ say(message.content) }}!{{ say('<|im_end|>') }}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
    )
    template = macro + LOOP.replace("BODY", body)
    tokenizer = tokenizer_with(template)
    assert learned_texts(tokenizer, first(tokenizer, TWO_TURNS[:2])) == [TWO_TURNS[1]["content"], "<|im_end|>"]


def test_nested_generation_blocks(tokenizer_with):
    nested = "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}"
    with pytest.raises(InputError, match="generation blocks are nested or torn apart"):
        first(tokenizer_with(nested))
    torn = "{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x[:2] }}"
    with pytest.raises(InputError, match="generation blocks are torn apart"):
        first(tokenizer_with(torn))


def test_control_tokens_that_take_blanks_along(tokenizer_with, golden, tmp_path):
    spec = json.loads((golden / "chat" / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|end_header_id|>", "<|im_end|>")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(spec))
    for template, end in ((LLAMA3, "<|eot_id|>"), (CHATML, "<|im_end|>")):
        tokenizer = with_template(tmp_path / "model", tmp_path / "source", template)
        messages = [*TWO_TURNS[:3], {"role": "assistant", "content": "letters </s>"}]
        example = first(tokenizer, messages)
        assert learned_texts(tokenizer, example) == [f"{messages[n]['content']}{end}" for n in (1, 3)]
        for number in (1, 3):
            prompt = encode_chat(tokenizer, messages[:number])
            assert example.tokens[: len(prompt)].tolist() == prompt


def test_prompts_whose_last_blanks_would_join_the_answer(golden, tmp_path):
    """GPT-2's pre-tokenizer leaves a last line break to the word after it: a prompt alone has other tokens there."""
    spec = json.loads((golden / "chat" / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = with_template(tmp_path / "model", tmp_path / "source", LLAMA3)
    assert tokenizer.encode("\n\nSize") != tokenizer.encode("\n\n") + tokenizer.encode("Size")
    example = first(tokenizer)
    assert learned_texts(tokenizer, example) == [TWO_TURNS[n]["content"] + "<|eot_id|>" for n in (1, 3)]
    for number in (1, 3):  # also the second prompt, with the first answer before it
        prompt = encode_chat(tokenizer, TWO_TURNS[:number])
        assert example.tokens[: len(prompt)].tolist() == prompt


def test_generation_goes_on_where_training_refuses(tokenizer_with):
    endless = LOOP.replace("BODY", "{{ message.content + '\n' }}") + PROMPT
    tokenizer = tokenizer_with(endless)
    with pytest.raises(InputError, match="no control token at the end"):
        first(tokenizer, TWO_TURNS)
    ids = encode_chat(tokenizer, TWO_TURNS[:3])
    assert tokenizer.decode(ids).startswith("user\nWhat is 2 + 2?\nassistant\n4, as you know.\nuser\n")


def test_a_sentencepiece_without_offsets(golden, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((golden / "tokenizer" / "tokenizer.model").read_bytes())
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = with_template(tmp_path / "model", source, template)
    assert isinstance(tokenizer, Tokenizer)

    def encode(*_, **__):
        raise ValueError("Invalid return_type")

    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.encode", encode)
    with pytest.raises(InputError, match="places in a text.*sentencepiece>=0.2.3"):
        first(tokenizer, TWO_TURNS[:2])
