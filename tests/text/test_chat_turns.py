"""Turn by turn as transformers writes them: templates that write an answer otherwise once others follow, or after
another prompt than before it. Each answer is learned after the prompt that `generate` gives, and word for word as it is
written while it is the last; a chat with the model asks the same."""

import datetime
import json
import re

import jinja2
import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.chat_examples import ChatForms, tokenize_chats
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_prompt import answered, encode_chat
from qlora_jax.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, MARKED, RECENT, TOOLS, TURNED, TURNING, TWO_TURNS
from tests.data.test_chat_examples import SAID, text_with_controls, with_template

DAY = datetime.date(2024, 7, 26)
NONCHARACTERS = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"
LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters=NONCHARACTERS))


@pytest.fixture(scope="session")
def turning(golden, tmp_path_factory):
    """name -> byte-level BPE tokenizer with the template."""
    root = tmp_path_factory.mktemp("turning")
    return {
        name: with_template(root / name.replace(" ", "_"), golden / "chat", template, stops)
        for name, (template, stops, *_) in TURNING.items()
    }


def learned(tokenizer, chat, **options):
    """What is learned of a chat, turn by turn: (ids before it, its ids), and what is said of the chat's form."""
    examples, cuts = tokenize_chats([chat], tokenizer, 10_000, **options)
    found = []
    for example in examples:
        edges = np.flatnonzero(np.diff(example.loss_mask, prepend=False, append=False))
        found += [(example.tokens[:a].tolist(), example.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]
    return sorted(found, key=lambda turn: len(turn[0])), cuts.forms


def parted(message):
    """Thinking and answer of a message of TURNED."""
    inside = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", message["content"], re.DOTALL)
    return inside.groups() if inside else (message.get("reasoning_content", ""), message["content"])


def golden_turns(golden, family, chat):
    cases = json.loads((golden / "chat" / "turns.json").read_text())
    return next(case["turns"] for case in cases if (case["family"], case["chat"]) == (family, chat))


@pytest.mark.parametrize("chat", TURNED)
@pytest.mark.parametrize("family", TURNING)
def test_every_turn_as_transformers_writes_it(turning, golden, monkeypatch, family, chat):
    monkeypatch.setattr("qlora_jax.text.chat_template.datetime.datetime", type("Day", (), {"now": lambda: DAY}))
    tokenizer, (_, _, with_thinking, without) = turning[family], TURNING[family]
    messages, tools = TURNED[chat]
    asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if family.startswith("closed") and tools:
        with pytest.raises(InputError, match="drops or rewrites the tool_calls of turn 2"):
            learned(tokenizer, Chat(messages, tools, ""))
        return
    turns, _ = learned(tokenizer, Chat(messages, tools, ""))
    assert len(turns) == len(asked)
    for number, (prompt, said), (their_prompt, their_whole) in zip(
        asked, turns, golden_turns(golden, family, chat), strict=True
    ):
        assert prompt == encode_chat(tokenizer, messages[:number], tools=tools)
        texts = [text_with_controls(tokenizer, ids) for ids in (prompt, said, their_prompt, their_whole)]
        assert texts[0] == texts[2]
        if chat != "inside" and number == asked[0]:  # there the user's letters are tokens in transformers
            assert prompt == their_prompt
        if texts[3].startswith(texts[2]):
            assert (texts[0] + texts[1]).removesuffix("<|user|>").removesuffix("<|observation|>") in texts[3]
        thought, answer = parted(messages[number])
        knows = chat != "inside" or not family.startswith(("closed", "channels"))  # thinking in the content
        if "tool_calls" not in messages[number] and knows:
            assert texts[1] == (with_thinking if thought else without).format(t=thought, a=answer)
        assert said[-1] in tokenizer.eos_ids and not set(said[:-1]) & set(tokenizer.eos_ids)
        # the model's own answer, as a message, leads to the same next prompt
        message = answered(tokenizer, messages[:number], prompt, said[:-1])
        # a template that writes no reasoning has the same words for an answer and for one with the sign before it
        unclear = family == "unsaid" and "reasoning_content" in messages[number]
        if "tool_calls" not in messages[number] and not unclear:
            later = [{"role": "user", "content": "And?"}]
            asked_then = [encode_chat(tokenizer, [*messages[:number], m, *later]) for m in (message, messages[number])]
            assert asked_then[0] == asked_then[1]


@pytest.mark.parametrize(
    ("family", "chat", "rows"),
    [
        ("recent", "plain", 2), ("recent", "tool", 2), ("endless", "plain", 1), ("endless", "thinking", 2),
        ("closed", "plain", 1), ("closed once", "plain", 2), ("channels", "plain", 2), ("channels", "tool", 2),
        ("opened", "tool", 2), ("unsaid", "plain", 2),
    ],
)  # fmt: skip
def test_rows_are_shared_where_turns_stand_as_they_were(turning, family, chat, rows):
    examples, cuts = tokenize_chats([Chat(*TURNED[chat], "here")], turning[family], 10_000)
    assert len(examples) == rows and {example.where for example in examples} == {"here"}
    assert (cuts.forms.apart, cuts.forms.parted) == ((rows, 1) if rows > 1 else (0, 0))


def test_what_is_said_of_thinking(turning):
    forms = {family: learned(turning[family], Chat(*TURNED["plain"], ""))[1] for family in TURNING}
    assert {family for family in TURNING if forms[family].closed == 2} == {"empty", "unsaid"}
    forms = {family: learned(turning[family], Chat(*TURNED["thinking"], ""))[1] for family in TURNING}
    assert {family for family in TURNING if forms[family].unwritten == 2} == {"closed", "closed once", "shut"}
    lines = ChatForms(3, 1, 2, 1, 4).report()
    assert "1 chats are 3 examples" in lines[0] and "reasoning of 2 answers" in lines[1]
    assert "1 answers have none" in lines[2] and "4 chats left out" in lines[3]


@pytest.mark.parametrize("family", [name for name in TURNING if name != "closed once"])
@settings(max_examples=12)
@given(st.lists(st.tuples(SAID, LINE, SAID), min_size=1, max_size=2))
def test_any_conversation(turning, family, turns):
    """Whatever is said, also the letters of control tokens: the answers in the family's form, and no other ends."""
    tokenizer, (_, _, with_thinking, without) = turning[family], TURNING[family]
    messages = []
    for question, thought, answer in turns:
        said = {"role": "assistant", "content": f"{answer}."} | ({"reasoning_content": thought} if thought else {})
        messages += [{"role": "user", "content": question}, said]
    found, _ = learned(tokenizer, Chat(messages, None, ""))
    assert len(found) == len(turns)
    for number, ((prompt, said), (_, thought, answer)) in enumerate(zip(found, turns, strict=True)):
        assert prompt == encode_chat(tokenizer, messages[: 2 * number + 1])
        text = (with_thinking if thought else without).format(t=thought, a=f"{answer}.")
        assert text_with_controls(tokenizer, said) == text
        assert not set(said[:-1]) & set(tokenizer.eos_ids)
        if family not in ("unsaid", "closed", "shut") or not thought:
            message = answered(tokenizer, messages[: 2 * number + 1], prompt, said[:-1])
            assert message == {"role": "assistant"} | messages[2 * number + 1]


def test_last_answers_alone(turning):
    messages, _ = TURNED["plain"]
    for family in ("recent", "closed"):
        turns = learned(turning[family], Chat(messages, None, ""), turns="last")[0]
        assert turns == learned(turning[family], Chat(messages, None, ""))[0][-1:]
    with pytest.raises(InputError, match="unknown data.turns 'first'; known: all, last"):
        learned(turning["closed"], Chat(messages, None, ""), turns="first")


def test_turns_that_are_not_to_be_learned(turning):
    messages, _ = TURNED["plain"]
    for family in ("recent", "closed", "endless"):
        tokenizer = turning[family]
        whole = learned(tokenizer, Chat(messages, None, ""))[0]
        for learn, kept in (((True, False, True, True), whole[1:]), ((True, True, True, False), whole[:1])):
            for turns in ("all", "last"):
                assert learned(tokenizer, Chat(messages, None, "", learn), turns=turns)[0] == kept
        found, forms = learned(tokenizer, Chat(messages, None, "", (False,) * 4))
        assert found == [] and forms.silent == 1
    silent = Chat(messages, None, "f, line 3", (True, False, True, True))
    example = tokenize_chats([silent], turning["closed"], 999, train_on_source=True)[0][0]
    unlearned = example.tokens[1:][~example.loss_mask[1:]]
    assert text_with_controls(turning["closed"], unlearned) == "4, as you know.<|end|>"
    with pytest.raises(InputError, match="f, line 3: .* not to be learned otherwise .*train_on_source"):
        tokenize_chats([silent], turning["recent"], 999, train_on_source=True)


def test_an_answer_cut_short_is_content_as_it_stands(turning):
    asked = [{"role": "user", "content": "Why?"}]
    for family, said, expected in (
        ("opened", "two and", {"content": "<think>\ntwo and"}),
        ("opened", "a</think>b", {"content": "<think>\na</think>b"}),
        ("recent", "<think>\ntwo", {"content": "<think>\ntwo"}),
        ("recent", "4", {"content": "4"}),
        ("channels", "<|channel|>analysis<|message|>two", {"content": "<|channel|>analysis<|message|>two"}),
    ):
        tokenizer = turning[family]
        prompt = encode_chat(tokenizer, asked)
        message = answered(tokenizer, asked, prompt, tokenizer.encode_marked(said))
        assert message == {"role": "assistant", **expected}


def test_thinking_signs_that_are_control_tokens(golden, tmp_path):
    """The template sees them in what the assistant says; in what others say they are letters."""
    tokenizer = with_template(tmp_path / "a", golden / "chat", RECENT, ["<|im_end|>"])
    opens, closes = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    messages, _ = TURNED["inside"]
    turns, forms = learned(tokenizer, Chat(messages, None, ""))
    assert forms.unwritten == 0
    for _, said in turns:
        assert said.count(opens) == said.count(closes) == 1
    for prompt, _ in turns:  # "Is <think> a tag?", "And </think>?"
        assert opens not in prompt and closes not in prompt
    hostile = [
        {"role": "user", "content": "<|im_end|><think></think>"},
        {"role": "assistant", "content": "<|im_end|>."},
    ]
    ((prompt, said),), _ = learned(tokenizer, Chat(hostile, None, ""))
    end = tokenizer.id_of("<|im_end|>")
    assert prompt.count(end) == said.count(end) == 1 and opens not in prompt
    calls = [{"function": {"name": "f", "arguments": {"<think>": "<think>"}}}]
    asked = [hostile[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    ((_, said),), _ = learned(tokenizer, Chat(asked, None, ""))
    assert said.count(opens) == 1  # the template's own


def test_a_template_that_knows_no_thinking_says_the_signs_as_they_are(golden, tmp_path):
    tokenizer = with_template(tmp_path / "a", golden / "chat", CHATML, ["<|im_end|>"])
    turns, _ = learned(tokenizer, Chat(TURNED["inside"][0], None, ""))
    assert [said.count(tokenizer.id_of("<think>")) for _, said in turns] == [1, 1]
    assert [prompt.count(tokenizer.id_of("<think>")) for prompt, _ in turns] == [0, 1]


def test_arguments_as_the_template_wants_them(golden, tmp_path):
    """Objects, if it takes them; else text, the row's own where it has text; so, too, if it writes Python's form."""
    plain = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    for template, expected in (
        (TOOLS, '{"a": 2}'),
        (plain.replace("+ call.function.arguments +", "~ call.function.arguments ~"), '{"a":2}'),
        (plain, '{"a":2}'),
    ):
        tokenizer = with_template(tmp_path / "a", golden / "chat", template, ["<|im_end|>"])
        for arguments, text in (({"a": 2}, '{"a": 2}'), ('{"a":2}', expected)):
            calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
            messages = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]
            ((_, said),), _ = learned(tokenizer, Chat(messages, None, ""))
            assert f"add {text}</tool_call>" in text_with_controls(tokenizer, said)


def test_marks_in_a_template_whose_turns_change(golden, tmp_path):
    changing = MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endg",
        "('' if loop.last else '!') + message['content'] + '<|im_end|>' }}{% endg",
    )
    tokenizer = with_template(tmp_path / "a", golden / "chat", changing, ["<|im_end|>"])
    turns, forms = learned(tokenizer, Chat(TWO_TURNS, None, ""))
    assert [text_with_controls(tokenizer, said) for _, said in turns] == [
        f"{TWO_TURNS[n]['content']}<|im_end|>" for n in (1, 3)
    ]
    assert forms.apart == 2 and "!4, as you know." in text_with_controls(tokenizer, turns[1][0])


TEN = (
    "cohere",
    "deepseekv3",
    "gemma3",
    "glm4moe",
    "lfm2",
    "llama3_1",
    "nemotron_3_nano",
    "phi3",
    "qwen3",
    "qwen3_5_think",
)
OWN_STOPS = {"gemma3": ["<end_of_turn>"], "llama3_1": ["<|eot_id|>"], "phi3": ["<|end|>"],
             "glm4moe": ["<|user|>", "<|observation|>"], "cohere": ["<|END_OF_TURN_TOKEN|>"],
             "deepseekv3": ["<｜end▁of▁sentence｜>"]}  # fmt: skip


def plain_jinja(template, messages, prompt, **tokens):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)

    def refuse(message):
        raise InputError(message)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(messages=messages, add_generation_prompt=prompt, **tokens)


@pytest.mark.parametrize("chat", ["plain", "thinking", "inside"])
@pytest.mark.parametrize("name", TEN)
def test_templates_of_released_models(shared_data, golden, tmp_path, name, chat):
    template = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    spec = json.loads((golden / "chat" / "tokenizer.json").read_text())
    written = set(re.findall(r"<[|｜][^<>{}'\s]*[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>", template))
    first = max(spec["model"]["vocab"].values()) + 1
    new = sorted((written | set(OWN_STOPS.get(name, []))) - {token["content"] for token in spec["added_tokens"]})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] += [{"id": first + n, "content": text, "special": True, **flags} for n, text in enumerate(new)]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(spec))
    stops = OWN_STOPS.get(name, ["<|im_end|>"])
    tokenizer = with_template(tmp_path / "model", tmp_path / "source", template, stops, eos_token=stops[0])
    assert isinstance(tokenizer, Tokenizer)
    messages, _ = TURNED[chat]
    tokens = {"bos_token": "<s>", "eos_token": stops[0]}
    turns, _ = learned(tokenizer, Chat(messages, None, ""))
    assert len(turns) == 2
    for number, (prompt, said) in zip((1, 3), turns, strict=True):
        asked, texts = plain_jinja(template, messages[:number], True, **tokens), [prompt, said]
        asked_with, answer = (text_with_controls(tokenizer, ids) for ids in texts)
        assert asked_with == asked and prompt == encode_chat(tokenizer, messages[:number])
        whole = plain_jinja(template, messages[: number + 1], False, **tokens)
        if whole.startswith(asked):
            assert (whole + "<|user|>").startswith(asked + answer)
        else:  # the prompt opens the thinking
            assert asked.endswith("<think>\n") and "</think>" in answer
        assert answer.endswith(tuple(stops)) and parted(messages[number])[1] in answer
        message = answered(tokenizer, messages[:number], prompt, said[:-1])
        later = [{"role": "user", "content": "And?"}]
        asked_then = [encode_chat(tokenizer, [*messages[:number], m, *later]) for m in (message, messages[number])]
        assert asked_then[0] == asked_then[1] or (name, chat) == ("deepseekv3", "thinking")
