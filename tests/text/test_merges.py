"""vocab.json and merges.txt, and ByT5's bytes: transformers' ids."""

import json

import pytest

from qlora_jax.errors import InputError
from qlora_jax.io.folder import has_tokenizer
from qlora_jax.text.added_tokens import find_added
from qlora_jax.text.tokenizer import Tokenizer
from tests.conftest import TESTS
from tests.merges_folder import TEXTS, write_folder

GOLDEN = TESTS / "golden"
MADE = json.loads((GOLDEN / "merges.json").read_text())
ROBERTA = {"model_type": "roberta"}


@pytest.mark.parametrize("case", MADE["cases"], ids=lambda case: case["config"]["model_type"])
def test_ids_are_those_of_transformers(case, tmp_path):
    write_folder(tmp_path, GOLDEN, case["config"], case["settings"], case["map"])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert has_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == case["plain"]
    around = [(len(tokenizer.prefix), ids, plain) for ids, plain in zip(case["ids"], case["plain"], strict=True)]
    for length, ids, plain in around:
        assert ids[: length + len(plain)] == [*tokenizer.prefix, *plain]
    assert tokenizer.eos_id == tokenizer.id_of(case["named"]["eos_token"])
    assert tokenizer.bos_id == tokenizer.id_of(case["named"]["bos_token"])
    for text in TEXTS[:2] + TEXTS[3:]:
        found = tokenizer.decode(tokenizer.encode(text, eos=True))
        has_blank = (case["settings"] or {}).get("add_prefix_space") and text and text[0] != " "
        assert found == (f" {text}" if has_blank else text)
    end = case["named"]["eos_token"]
    assert tokenizer.eos_id not in tokenizer.encode(f"x {end}") and tokenizer.encode_marked(end) == [tokenizer.eos_id]


@pytest.mark.parametrize("case", MADE["bytes"], ids=["all", "three"])
def test_bytes(case, tmp_path):
    settings = {"tokenizer_class": "ByT5Tokenizer"} | case["settings"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["T5ForConditionalGeneration"]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert has_tokenizer(tmp_path) and tokenizer.ends_source and tokenizer.bos_id is None
    assert [tokenizer.encode_source(text) for text in TEXTS] == case["ids"]
    assert [tokenizer.decode(ids) for ids in case["ids"]] == TEXTS
    assert tokenizer.vocab_size == 259 + case["settings"].get("extra_ids", 125)
    assert tokenizer.id_of("<extra_id_2>") == 261


def test_what_is_wrong_is_named(tmp_path):
    def refused(config, message, **files):
        write_folder(tmp_path, GOLDEN, config, None, None)
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        with pytest.raises(InputError, match=message):
            Tokenizer.from_folder(tmp_path)

    refused({"model_type": "stablelm"}, "no file says how they are read; known are GPT2Tokenizer")
    refused({"tokenizer_class": "WhisperTokenizer"}, "WhisperTokenizer says how they are read")
    refused(ROBERTA, "line 2 is 'a b c'; expected two strings", merges_txt="a b\na b c\n")
    refused(ROBERTA, "lacks the cls_token, which stands", vocab_json='{"a": 0}')
    refused(ROBERTA, "vocab.json: not a readable vocabulary", vocab_json="{")
    refused(ROBERTA, "vocab.json: expected an object of strings and their ids", vocab_json='{"a": "0"}')
    refused(ROBERTA, "merges.txt: not a readable tokenizer", merges_txt="nothing known\n")
    write_folder(tmp_path, GOLDEN, ROBERTA, None, None)
    with pytest.raises(InputError, match="merges.txt and bytes take no new tokens"):
        find_added(tmp_path, ["<new>"], [])
