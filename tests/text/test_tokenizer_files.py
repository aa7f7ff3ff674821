"""Which ids begin and end a text, from files that say it in different places and sometimes differ."""

import json
import shutil

import pytest

from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer

BOS, EOS, TURN = 256, 257, 258  # of the byte tokenizer


@pytest.fixture
def load(tmp_path, byte_folder):
    """Loads the byte tokenizer with other files beside it: load(config={...}) writes config.json."""

    def load(**files):
        shutil.copyfile(byte_folder / "tokenizer.json", tmp_path / "tokenizer.json")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return Tokenizer.from_folder(tmp_path)

    return load


def ids(tokenizer):
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids


def test_an_end_by_its_usual_name_when_nothing_else_is_known(load):
    assert ids(load()) == (None, EOS, (EOS,))


def test_every_end_of_generation_config_stops(load):
    tokenizer = load(
        tokenizer_config={"bos_token": "<s>", "eos_token": "<|turn|>"},
        generation_config={"bos_token_id": 9, "eos_token_id": [EOS, TURN]},
        config={"eos_token_id": 7},
    )
    assert ids(tokenizer) == (BOS, TURN, (TURN, EOS))


def test_model_config_when_the_tokenizer_is_silent(load):
    assert ids(load(config={"bos_token_id": 5, "eos_token_id": [TURN, EOS]})) == (None, TURN, (TURN, EOS))


def test_special_tokens_map(load):
    tokenizer = load(special_tokens_map={"bos_token": {"content": "<|turn|>"}, "eos_token": "</s>"})
    assert ids(tokenizer) == (TURN, EOS, (EOS,))


def test_a_tokenizer_that_says_it_has_no_begin_token_has_none(load):
    tokenizer = load(tokenizer_config={"bos_token": None, "eos_token": "</s>"}, config={"bos_token_id": BOS})
    assert ids(tokenizer) == (None, EOS, (EOS,))
    assert tokenizer.encode("a", bos=True, eos=True) == [97, EOS]


def test_named_tokens_are_control_tokens_even_if_not_marked(tmp_path, load, byte_folder):
    load(tokenizer_config={"eos_token": "</s>"})
    spec = json.loads((byte_folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("</s>") == list(b"</s>")
    assert tokenizer.decode([97, EOS]) == "a"


def test_tokens_beside_a_sentencepiece_model(tmp_path, golden):
    shutil.copyfile(golden / "tokenizer" / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {"eos_token": "<end>", "added_tokens_decoder": {"400": {"content": "<end>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 401}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.bos_id) == (400, 402, 1)
    text = tokenizer.encode("a <end> b", eos=True)
    assert text.count(400) == 1 and tokenizer.decode(text) == "a <end> b"


@pytest.mark.parametrize(
    "source",
    [
        {"tokenizer_config": {"eos_token": "</s>", "chat_template": "T"}},
        {
            "tokenizer_config": {
                "chat_template": [{"name": "tool", "template": "U"}, {"name": "default", "template": "T"}]
            }
        },
    ],
)
def test_chat_template_in_the_config(load, source):
    assert load(**source).chat_template == "T"


def test_chat_template_in_a_file_of_its_own(tmp_path, load):
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load(tokenizer_config={"chat_template": "T"}).chat_template == "F"


def test_begin_and_end_are_known_to_the_template_by_name(load):
    template = {"chat_template": "{{ bos_token }}|{{ eos_token }}"}
    assert load(tokenizer_config=template).apply_chat_template([]) == "|"  # no file names them
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    assert load(tokenizer_config=template | named).apply_chat_template([]) == "<s>|</s>"


def test_a_template_of_its_own_for_chats_with_tools(tmp_path, load):
    named = [{"name": "tool_use", "template": "with {{ tools[0] }}"}, {"name": "default", "template": "without"}]
    messages = [{"role": "user", "content": "a"}]
    tokenizer = load(tokenizer_config={"chat_template": named})
    assert tokenizer.render_chat(messages, False).text == "without"
    assert tokenizer.render_chat(messages, False, ["f"]).text == "with f"
    (tmp_path / "chat_template.jinja").write_text("alone")
    assert load().render_chat(messages, False, ["f"]).text == "alone"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("beside")
    assert load().render_chat(messages, False, ["f"]).text == "beside"


def test_where_generation_stops_is_a_control_token(tmp_path, load, byte_folder):
    spec = json.loads((byte_folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    tokenizer = load(tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, TURN]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.stops == {"</s>", "<|turn|>"} and tokenizer.encode("<|turn|>") == list(b"<|turn|>")


def test_errors(tmp_path, load):
    with pytest.raises(InputError, match=r"eos_token '<gone>' is not in the tokenizer's vocabulary"):
        load(tokenizer_config={"eos_token": "<gone>"})
    with pytest.raises(InputError, match="no file says which token ends a text"):
        load(tokenizer_config={"eos_token": None})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object, found a list"):
        Tokenizer.from_folder(tmp_path)
