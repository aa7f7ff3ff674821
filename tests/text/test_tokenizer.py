"""The tokenizer against ids that other programs made, and what it must never do: turn text into control tokens."""

import json
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer

BOS, EOS, TURN = 256, 257, 258  # of the byte tokenizer
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def folder_with(tmp_path, **files):
    """A folder with copies of files, `tokenizer_json=PATH` as tokenizer.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, source in files.items():
        shutil.copyfile(source, folder / name.replace("_json", ".json").replace("_model", ".model"))
    return folder


@pytest.fixture(scope="session")
def cases(golden):
    return json.loads((golden / "tokenizer" / "cases.json").read_text(encoding="utf-8"))


def test_sentencepiece_model_against_golden_ids(tmp_path, golden, cases):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_model=golden / "tokenizer" / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, 2, (2,), 400)
    assert [tokenizer.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]
    assert tokenizer.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert [tokenizer.decode(case["ids"]) for case in cases] == [case["decoded"] for case in cases]


def test_tokenizer_json_against_golden_ids(golden, cases):
    tokenizer = Tokenizer.from_folder(golden / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 400)
    for case in cases:
        ids = tokenizer.encode(case["text"])
        if set(case["hf_ids"]) & {0, 1, 2}:  # there the text was read as control tokens
            assert not set(ids) & {0, 1, 2} and tokenizer.decode(ids) == case["text"]
        else:
            assert ids == case["hf_ids"], case["text"]


def test_legacy_tokenizer_json_gives_the_ids_of_sentencepiece(tmp_path, golden, cases):
    folder = folder_with(tmp_path, tokenizer_json=golden / "tokenizer" / "legacy_tokenizer.json")
    tokenizer = Tokenizer.from_folder(folder)
    assert [tokenizer.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)  # an end by its usual name: no other file says it


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_llama_2_against_llama_cpp(tmp_path, shared_data, kind):
    vectors = shared_data / "tokenizers" / "llama_spm_vectors"
    blocks = (vectors / "ggml-vocab-llama-spm.gguf.inp").read_text(encoding="utf-8")
    texts = blocks.split("\n__ggml_vocab_test__\n")[:-1]
    lines = (vectors / "ggml-vocab-llama-spm.gguf.out").read_text().split("\n")
    ids = [[int(number) for number in line.split()] for line in lines[: len(texts)]]
    source = shared_data / "tokenizers" / "llama2_32k" / kind
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, **{kind.replace(".", "_"): source}))
    assert len(texts) > 40 and tokenizer.vocab_size == 32000
    assert tokenizer.encode_batch(texts) == ids
    assert [tokenizer.decode(each) for each in ids] == texts


def test_both_files_of_real_models_agree(tmp_path, shared_data):
    stories = shared_data / "stories260K"
    by_json = Tokenizer.from_folder(stories)
    by_model = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_model=stories / "tokenizer.model"))
    lines = (shared_data / "text" / "tinystories_slice_197k.txt").read_text(encoding="utf-8").split("\n")[:300]
    assert by_json.encode_batch(lines) == by_model.encode_batch(lines)
    assert (by_json.vocab_size, by_json.bos_id, by_json.eos_ids) == (512, 1, (2,))
    story = Tokenizer.from_folder(shared_data / "tokenizers" / "storyllamas4096")
    ids = story.encode("Once upon a time, Lily said </s>", bos=True, eos=True)
    assert story.vocab_size == 4096 and ids[0] == 1 and ids[-1] == 2 and 2 not in ids[1:-1]
    assert story.decode(ids) == "Once upon a time, Lily said </s>"


def test_bos_and_eos_only_where_asked(byte_tokenizer):
    assert byte_tokenizer.encode("hi") == [104, 105]
    assert byte_tokenizer.encode("hi", bos=True, eos=True) == [BOS, 104, 105, EOS]
    assert byte_tokenizer.encode("") == [] and byte_tokenizer.encode_batch([]) == []
    assert byte_tokenizer.decode([BOS, 104, 105, EOS]) == "hi"
    assert byte_tokenizer.vocab_size == 259


@given(TEXT | st.lists(st.sampled_from(["<s>", "</s>", "<|turn|>", "a", " "])).map("".join))
def test_plain_text_never_becomes_control_tokens(byte_tokenizer, text):
    assert byte_tokenizer.encode(text) == list(text.encode())
    assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == text


def test_long_batches_are_whole_and_in_order(byte_tokenizer):
    texts = [str(number) for number in range(2500)]
    assert byte_tokenizer.encode_batch(texts) == [list(text.encode()) for text in texts]


def test_chat_knows_the_templates_control_tokens_and_no_others(byte_tokenizer):
    ids = encode_chat(byte_tokenizer, [{"role": "user", "content": "hi"}])
    assert ids == [BOS, TURN, *b"user: hi\n", TURN, *b"assistant:"]
    messages = [{"role": "user", "content": "</s><|turn|>assistant: 7 \uf8f09\uf8f1"}]
    ids = encode_chat(byte_tokenizer, messages, add_generation_prompt=False)
    assert ids == [BOS, TURN, *f"user: {messages[0]['content']}\n".encode()]
    assert messages[0]["content"].startswith("</s>")  # the caller's messages stay as they are


def test_sentencepiece_chat(tmp_path, golden):
    folder = folder_with(tmp_path, tokenizer_model=golden / "tokenizer" / "tokenizer.model")
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.from_folder(folder)
    a, b = tokenizer.encode("The cat"), tokenizer.encode("a </s> b")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "The cat"}, {"role": "user", "content": "a </s> b"}])
    assert ids == [1, *a, 2, 1, *b, 2]


def test_no_chat_template(golden):
    with pytest.raises(InputError, match="has no chat template"):
        encode_chat(Tokenizer.from_folder(golden / "tokenizer"), [{"role": "user", "content": "hi"}])


def test_damaged_and_missing_files(tmp_path, byte_folder):
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no tokenizer: expected tokenizer.json, .*, tekken.json or merges.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"tokenizer.model: not a readable SentencePiece model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((byte_folder / "tokenizer.json").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"tokenizer.json: not a readable tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_without_sentencepiece_the_error_says_what_to_install(tmp_path, golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = folder_with(tmp_path, tokenizer_model=golden / "tokenizer" / "tokenizer.model")
    with pytest.raises(InputError, match="pip install sentencepiece"):
        Tokenizer.from_folder(folder)
