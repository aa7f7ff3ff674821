"""Tokens added to a tokenizer: ids, kinds, a pad token, and files that are read again alike."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.text.added_tokens import extended_tokenizer, find_added, write_tokenizer
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer


@pytest.fixture
def folder(golden, tmp_path):
    """folder(files, changes of tokenizer_config.json): a copy of the golden tokenizer (400 ids, no pad token)."""

    def make(names=("tokenizer.json",), **changes) -> Path:
        out = tmp_path / "tokenizer"
        out.mkdir()
        for name in names:
            shutil.copyfile(golden / "tokenizer" / name, out / name)
        config = json.loads((golden / "tokenizer" / "tokenizer_config.json").read_text())
        (out / "tokenizer_config.json").write_text(json.dumps(config | changes))
        return out

    return make


def settings(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_ordinary_tokens_stand_in_texts_and_control_tokens_do_not(folder, tmp_path):
    added = find_added(folder(), ("<think>", "foo bar"), ("<|im_start|>",))
    assert added.new == {"<think>": 400, "foo bar": 401, "<|im_start|>": 402, "<pad>": 403} and added.before == 400
    tokenizer, plain = extended_tokenizer(added), Tokenizer.from_folder(added.folder)
    ids = tokenizer.encode("x<think>y foo bar <|im_start|></s>")
    assert [i for i in ids if i >= 400] == [400, 401] and tokenizer.eos_id not in ids
    assert tokenizer.decode([400, 402, 401, 403]) == "<think>foo bar"
    for text in ("no such token in here", "  two spaces\n", "ünïcödé 日本"):
        assert tokenizer.encode(text, bos=True, eos=True) == plain.encode(text, bos=True, eos=True)
    chat = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = chat
    ids = encode_chat(tokenizer, [{"role": "user", "content": "<|im_start|><think>"}], False)
    assert ids[0] == 402 and ids.count(402) == 1 and ids[-1] == 400


def test_rows(folder):
    added = find_added(folder(), ("<a>", "<b>"), ())
    assert len(added.new) == 3
    assert (added.rows(400), added.rows(402), added.rows(512)) == (403, 403, 512)
    assert added.rows_to_fill(400) == added.rows_to_fill(512) == [400, 401, 402]
    assert "grow from 402 to 403 rows" in added.report(402)[0]
    assert "take rows that the 512 of the embedding had beyond the tokenizer's 400" in added.report(512)[0]
    # an embedding that is too small for its own tokenizer lacks these rows as well
    assert added.rows_to_fill(398) == [398, 399, 400, 401, 402] and added.real_rows(398) == 398


def test_what_is_there_already_is_not_added_twice(folder):
    path = folder()
    once = find_added(path, ("<think>",), ())
    second = path.with_name("second")
    second.mkdir()
    write_tokenizer(once, second)
    again = find_added(second, ("<think>", "</s>"), ("<pad>",))
    assert again.new == {} and again.pad is None and (again.rows(402), again.rows(390)) == (402, 390)
    assert again.rows_to_fill(390) == []
    lines = again.report(402)
    assert lines[0] == "tokens: in the vocabulary already, left as they are: '<think>', '</s>', '<pad>'"
    assert "warning: '</s>': control tokens, which no text becomes" in lines[1]
    more = find_added(second, ("<more>",), ())
    assert more.new == {"<more>": 402} and more.pad == "<pad>"


@pytest.mark.parametrize(
    ("named", "expected", "grows"),
    [
        ({}, "<pad>", True),
        ({"pad_token": None}, "<pad>", True),
        ({"pad_token": "</s>"}, "<pad>", True),  # the end token
        ({"pad_token": "<unk>"}, "<unk>", False),
        ({"pad_token": {"content": "<unk>", "special": True}}, "<unk>", False),
        ({"pad_token": "<my pad>"}, "<my pad>", True),  # named, but not in the vocabulary
    ],
)
def test_pad_is_never_the_end_token(folder, tmp_path, named, expected, grows):
    added = find_added(folder(**named), ("<think>",), ())
    assert added.pad == expected and (expected in added.new) == grows
    (tmp_path / "out").mkdir()
    write_tokenizer(added, tmp_path / "out")
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert settings(tmp_path / "out")["pad_token"] == expected
    assert tokenizer.id_of(expected) not in (None, *tokenizer.eos_ids)
    assert tokenizer.is_control(expected)


def test_a_pad_token_that_is_asked_for(folder):
    assert find_added(folder(), (), ("[PAD]",)).new == {"[PAD]": 400}


def test_every_file_that_speaks_of_tokens_has_them(folder, golden, tmp_path):
    decoder = {"0": {"content": "<unk>", "special": True}}
    path = folder(added_tokens_decoder=decoder, additional_special_tokens=["</s>"], extra_special_tokens={})
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (path / "added_tokens.json").write_text(json.dumps({"</s>": 2}))
    (path / "generation_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    names = write_tokenizer(find_added(path, ("<a>",), ("<b>",)), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert names == ["added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    found = settings(tmp_path / "out")
    assert {key: token["special"] for key, token in found["added_tokens_decoder"].items()} == {
        "0": True, "400": False, "401": True, "402": True
    }  # fmt: skip
    assert found["additional_special_tokens"] == ["</s>", "<b>"]
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == {
        "</s>": 2, "<a>": 400, "<b>": 401, "<pad>": 402
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["pad_token"] == "<pad>"


def test_a_sentencepiece_model_takes_control_tokens_alone(folder, tmp_path):
    path = folder(("tokenizer.model",))
    with pytest.raises(InputError, match="a SentencePiece model takes control tokens alone .*save_pretrained"):
        find_added(path, ("<think>",), ())
    added = find_added(path, (), ("<|im_start|>",))
    (tmp_path / "out").mkdir()
    names = write_tokenizer(added, tmp_path / "out")
    assert names == ["added_tokens.json", "tokenizer.model", "tokenizer_config.json"]
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert tokenizer.id_of("<|im_start|>") == 400 and tokenizer.id_of("<pad>") == 401 and tokenizer.vocab_size == 402
    assert 400 not in tokenizer.encode("<|im_start|>") and tokenizer.decode([400]) == ""
    assert tokenizer.encode("text") == Tokenizer.from_folder(path).encode("text")


@pytest.mark.parametrize(
    ("ordinary", "control", "message"),
    [
        (("",), (), "data.added_tokens: ''; expected a text without white space"),
        ((), (" <a>",), "data.added_special_tokens: ' <a>'; expected a text without white space"),
        (("<a>", "<a>"), (), "data.added_tokens: '<a>' stands there twice"),
        (("<a>",), ("<a>",), "data.added_special_tokens: '<a>' stands there twice, or in both keys"),
        ((3,), (), "data.added_tokens: 3; expected a text"),
    ],
)
def test_texts_that_are_none(folder, ordinary, control, message):
    with pytest.raises(InputError, match=message):
        find_added(folder(), ordinary, control)


def test_ids_with_gaps(folder):
    """The library numbers a new token by how many there are, not by the highest id."""
    path = folder()
    spec = json.loads((path / "tokenizer.json").read_text())
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"][last] = 450
    (path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="ids have gaps"):
        extended_tokenizer(find_added(path, ("<think>",), ()))
