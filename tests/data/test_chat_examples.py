"""What is learned of a chat: exactly the assistant's turns with their ends, in the templates of known families; against
transformers' own rendering, ids and masks; and what becomes of chats that are too long."""

import datetime
import json
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from qlora_jax.data.chat_examples import ChatCuts, ChatForms, tokenize_chats
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Request, prompt_ids
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, CONTROLS, FAMILIES, LLAMA2, MARKED_WHOLE, SYSTEM, TOOLS, TWO_TURNS

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"))
WORDS = st.lists(st.sampled_from(["a", " ", "\n", "é", "\U0001f600", "</s>", "<|im_end|>", "<|im_start|>", "7"]))
SAID = TEXT | WORDS.map("".join)


def with_template(folder, source, template, stops=(), **config):
    """The tokenizer of `source` with another chat template; `stops`: texts of tokens at which generation stops."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if stops:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        numbers = {token["content"]: token["id"] for token in added}
        stopping = {"eos_token_id": [numbers[text] for text in stops]}
        (folder / "generation_config.json").write_text(json.dumps(stopping))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def families(golden, tmp_path_factory):
    """name -> byte-level BPE tokenizer with the family's template."""
    root = tmp_path_factory.mktemp("families")
    templates = {name: family[0] for name, family in FAMILIES.items()} | {"marked_whole": MARKED_WHOLE}
    return {name: with_template(root / name, golden / "chat", template) for name, template in templates.items()}


@pytest.fixture(scope="session")
def llama_model(golden, tmp_path_factory):
    """SentencePiece without a tokenizer.json, with Llama 2's template."""
    return with_template(tmp_path_factory.mktemp("llama_model"), golden / "tokenizer", LLAMA2)


def one(tokenizer, messages, max_len=10_000, train_on_source=False, tools=None):
    return tokenize_chats([Chat(messages, tools, "f, line 1")], tokenizer, max_len, train_on_source)[0][0]


def text_with_controls(tokenizer, ids):
    """Text of ids in which control tokens show."""
    text, run = "", []
    for token in [*map(int, ids), None]:
        if token is not None and token not in tokenizer.controls:
            run.append(token)
            continue
        text += tokenizer.decode(run)
        run = []
        text += tokenizer.controls.get(token, "")
    return text


def learned_texts(tokenizer, example):
    """The text of every run of learned tokens."""
    edges = np.flatnonzero(np.diff(example.loss_mask)) + 1
    runs = np.split(np.arange(len(example)), edges)
    return [text_with_controls(tokenizer, example.tokens[run]) for run in runs if example.loss_mask[run[0]]]


def cases(golden):
    return json.loads((golden / "chat" / "cases.json").read_text())


def test_rendering_ids_and_masks_are_those_of_transformers(families, golden):
    masks = 0
    for case in cases(golden):
        tokenizer = families[case["family"]]
        assert tokenizer.apply_chat_template(case["messages"], False) == case["text"]
        example = one(tokenizer, case["messages"])
        if "  blanks" not in case["text"]:  # there a token of transformers lies across the prompt's end: tested below
            assert example.tokens.tolist() == case["ids"]
            if case["mask"] is not None:
                masks += 1
                assert example.loss_mask.tolist() == list(map(bool, case["mask"]))
        # a turn's prompt, as `generate` gives it, is what stands before the turn
        if case["family"] != "marked_whole":
            begins = np.flatnonzero(np.diff(example.loss_mask.astype(int)) == 1) + 1
            assert len(begins) == len(case["prompts"])
            for begin, prompt in zip(begins, case["prompts"], strict=True):
                # transformers encodes earlier turns as the whole does; so do we, but for tokens cut at a prompt's end
                assert text_with_controls(tokenizer, example.tokens[:begin]) == text_with_controls(tokenizer, prompt)
            assert example.tokens[: begins[0]].tolist() == case["prompts"][0]
    assert masks == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_families(families, family):
    tokenizer, (_, takes_system, _, end) = families[family], FAMILIES[family]
    messages = [SYSTEM, *TWO_TURNS] if takes_system else TWO_TURNS
    example = one(tokenizer, messages)
    between = " {} " if family == "llama2" else "{}"
    assert learned_texts(tokenizer, example) == [between.format(TWO_TURNS[n]["content"]) + end for n in (1, 3)]
    # the begin token once, where the template writes it, and every turn's prompt as `generate` has it
    begins = [n for n, token in enumerate(example.tokens) if token == tokenizer.bos_id]
    assert len(begins) == {"llama2": 2, "llama3": 1, "mistral": 1, "gemma": 1}.get(family, 0)
    for number in (1, 3):
        turns = messages[: number + takes_system]
        prompt = prompt_ids(tokenizer, "chat", Request(turns[-1]["content"]), turns[:-1])
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.loss_mask[len(prompt) - 1] and example.loss_mask[len(prompt)]
    source = one(tokenizer, messages, train_on_source=True)
    assert source.tokens.tolist() == example.tokens.tolist()
    assert not source.loss_mask[0] and source.loss_mask[1:].all()


@pytest.mark.parametrize("family", ["chatml", "mistral", "marked", "llama3"])
@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_any_conversation_is_masked_exactly(families, family, turns):
    tokenizer, (_, _, trims, end) = families[family], FAMILIES[family]
    messages = [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    example = one(tokenizer, messages)
    answers = [answer.strip() if trims else answer for _, answer in turns]
    assert learned_texts(tokenizer, example) == [answer + end for answer in answers]
    prompt = encode_chat(tokenizer, messages[:1])
    assert example.tokens[: len(prompt)].tolist() == prompt and not example.loss_mask[: len(prompt)].any()
    # letters of a control token inside a message are letters: the template's are all there are
    written = encode_chat(tokenizer, [{**message, "content": "x"} for message in messages], False)
    controls = [[int(n) for n in ids if int(n) in tokenizer.controls] for ids in (example.tokens, written)]
    assert controls[0] == controls[1]


def test_a_token_across_the_prompts_end_is_cut_there(families):
    tokenizer = families["chatml"]
    joined = tokenizer.encode("assistant\n\n")
    assert joined != tokenizer.encode("assistant\n") + tokenizer.encode("\n")  # "\n\n" is one token
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "\nyes"}]
    example = one(tokenizer, messages)
    prompt = encode_chat(tokenizer, messages[:1])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert tokenizer.encode("\n\n")[0] not in example.tokens
    assert learned_texts(tokenizer, example) == ["\nyes<|im_end|>"]


def test_sentencepiece_without_a_tokenizer_json(llama_model):
    messages = [SYSTEM, TWO_TURNS[0], {"role": "assistant", "content": "4 </s> \U0001f600 é"}, *TWO_TURNS[2:]]
    example = one(llama_model, messages)
    assert [text.strip() for text in learned_texts(llama_model, example)] == [
        "4 </s> \U0001f600 é </s>",
        f"{TWO_TURNS[3]['content']} </s>",
    ]
    for number in (2, 4):
        prompt = encode_chat(llama_model, messages[:number])
        assert example.tokens[: len(prompt)].tolist() == prompt and example.loss_mask[len(prompt)]
    assert (example.tokens == llama_model.bos_id).sum() == 2 and (example.tokens == llama_model.eos_id).sum() == 2


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_the_real_llama_2(shared_data, tmp_path, kind):
    folder = shared_data / "tokenizers" / "llama2_32k"
    shutil.copyfile(folder / kind, tmp_path / kind)
    tokenizer = with_template(tmp_path, tmp_path / "nothing", LLAMA2)
    example = one(tokenizer, [SYSTEM, *TWO_TURNS])
    assert [text.strip() for text in learned_texts(tokenizer, example)] == [
        f"{TWO_TURNS[n]['content']} </s>" for n in (1, 3)
    ]
    prompt = encode_chat(tokenizer, [SYSTEM, *TWO_TURNS[:3]])
    assert example.tokens[: len(prompt)].tolist() == prompt


BARE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
TORN = [{"role": "user", "content": "the sto"}, {"role": "assistant", "content": "ry."}]


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_an_answer_apart_from_its_prompt_gets_no_space(golden, tmp_path, kind):
    (tmp_path / "source").mkdir()
    shutil.copyfile(golden / "tokenizer" / kind, tmp_path / "source" / kind)
    tokenizer = with_template(tmp_path / "a", tmp_path / "source", BARE)
    example = one(tokenizer, TORN)
    assert len(tokenizer.encode("the story.")) == 3  # "story" is one token
    assert tokenizer.decode(example.tokens) == "the story." and learned_texts(tokenizer, example) == ["ry.</s>"]
    prompt = encode_chat(tokenizer, TORN[:1])
    assert example.tokens[: len(prompt)].tolist() == prompt


def test_where_the_tokenizer_cannot_keep_prompt_and_answer_apart(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"the": 0, "sto": 1, "ry": 2, "story": 3, ".": 4, "?": 5}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # what is apart has a space between when it is decoded
    words.add_special_tokens(["</s>"])
    (tmp_path / "source").mkdir()
    words.save(str(tmp_path / "source" / "tokenizer.json"))
    tokenizer = with_template(tmp_path / "a", tmp_path / "source", BARE, bos_token=None)
    with pytest.raises(InputError, match="f, line 1: the tokenizer joins .*'the sto' and 'ry.*masked exactly"):
        one(tokenizer, TORN)


def test_tools(golden, tmp_path):
    tokenizer = with_template(tmp_path / "a", golden / "chat", TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "description": "<|im_end|> adds"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        TWO_TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    example = one(tokenizer, messages, tools=tools)
    assert learned_texts(tokenizer, example) == [
        '<tool_call>add {"a": 2, "b": 2}</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert (example.tokens == encode_chat(tokenizer, [TWO_TURNS[0]])[0]).sum() == 5  # five headers


def test_too_long_chats(families):
    tokenizer = families["chatml"]
    end = next(number for number, text in tokenizer.controls.items() if text == "<|im_end|>")
    whole = one(tokenizer, TWO_TURNS)
    learned = np.flatnonzero(whole.loss_mask)
    first_end = next(n for n in learned if whole.tokens[n] == end) + 1
    chat = Chat(TWO_TURNS, None, "f, line 1")

    def cut(max_len, **options):
        examples, cuts = tokenize_chats([chat, Chat(TWO_TURNS[:2], None, "")], tokenizer, max_len, **options)
        return examples[0], (cuts.shortened, cuts.cut, cuts.dropped)

    last_end = len(whole) - 1  # a line break follows
    assert cut(len(whole))[1] == (0, 0, 0) and len(cut(len(whole))[0]) == len(whole)
    example, counts = cut(last_end)
    assert len(example) == last_end and counts == (0, 0, 0)  # nothing that is learned is lost
    for max_len in (last_end - 1, first_end):
        example, counts = cut(max_len)
        assert example.tokens.tolist() == whole.tokens[:first_end].tolist() and counts == (1, 0, 0)
        assert example.loss_mask.tolist() == whole.loss_mask[:first_end].tolist()
    for max_len in (first_end - 1, learned[0] + 1):  # a cut answer has no end: nothing ended there
        example, counts = cut(max_len)
        assert example.tokens.tolist() == whole.tokens[:max_len].tolist() and counts == (0, 2, 0)
        assert end not in example.tokens[learned[0] :] and example.loss_mask[learned[0] :].all()
    examples, cuts = tokenize_chats([chat], tokenizer, learned[0])
    assert examples == [] and cuts.dropped == 1
    forms = [ChatForms(unknown_ends=("<|im_end|>",)), ChatForms(1, 2, 3, 4, 5, ("a", "<|im_end|>"))]
    assert cuts == ChatCuts(dropped=1, forms=forms[0])
    assert cuts + ChatCuts(1, 2, 3, forms[1]) == ChatCuts(1, 2, 4, ChatForms(1, 2, 3, 4, 5, ("<|im_end|>", "a")))
    short = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
    room = len(one(tokenizer, short))
    kept, cuts = tokenize_chats([chat, Chat(short, None, "here")], tokenizer, room)
    assert [example.where for example in kept] == ["here"] and cuts.dropped == 1
    assert cut(first_end, train_on_source=True)[0].loss_mask[1:].all()


def test_an_end_that_generation_does_not_know_is_named(families):
    chats = [Chat(TWO_TURNS, None, "")]
    assert tokenize_chats(chats, families["chatml"], 999)[1].forms == ChatForms(unknown_ends=("<|im_end|>",))
    assert tokenize_chats(chats, families["mistral"], 999)[1].forms == ChatForms()


def test_a_template_that_writes_the_day(golden, tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = with_template(tmp_path / "a", golden / "chat", dated)
    chats = [Chat(TWO_TURNS, None, "")]
    example = tokenize_chats(chats, tokenizer, 999, now=datetime.date(2024, 7, 26))[0][0]
    assert tokenizer.decode(example.tokens).startswith("26 Jul 2024")


def test_every_control_token_is_a_token(families):
    assert set(CONTROLS) <= set(families["chatml"].controls.values())
