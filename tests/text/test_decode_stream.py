"""Incremental decoding: only whole text comes out, and all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.text.tokenizer import Tokenizer

TEXT = st.text(
    st.sampled_from("ab \n.猫é🦙 ️▁0") | st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
)


@pytest.fixture(scope="session")
def spm(golden):
    return Tokenizer.from_folder(golden / "tokenizer")


@given(TEXT)
def test_bytes_one_by_one(byte_tokenizer, text):
    stream = byte_tokenizer.stream()
    pieces = [stream.push(id) for id in text.encode()]
    assert "".join(pieces) == text
    # each character comes out with its last byte
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""


@given(TEXT, st.integers(0, 5))
def test_pieces_together_are_the_whole_text(spm, text, group):
    ids = spm.encode(text)
    stream = spm.stream()
    size = group + 1
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.flush() == spm.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@given(TEXT, TEXT)
def test_text_goes_on_from_its_context(spm, before, after):
    head, tail = spm.encode(before), spm.encode(after)
    stream = spm.stream(context=head)
    assert spm.decode(head) + stream.push(tail) + stream.flush() == spm.decode(head + tail)


def test_the_space_before_a_word_depends_on_its_context(spm):
    word = spm.encode("cat")
    assert spm.stream().push(word) == "cat"
    assert spm.stream(context=spm.encode("The")).push(word) == " cat"


def test_control_tokens_leave_nothing(byte_tokenizer):
    stream = byte_tokenizer.stream()
    assert stream.push([256, 104, 257, 105]) == "hi"
    assert stream.push(257) == "" and stream.flush() == ""


def test_control_tokens_that_are_to_be_seen(byte_tokenizer):
    stream = byte_tokenizer.stream((), {258: "<|turn|>"})
    assert stream.push([104, 258, 257, 105]) == "h<|turn|>i"
    assert stream.push([0xC3, 258]) == "\ufffd<|turn|>" and stream.push([0xC3, 0xA9]) == "é"


def test_bytes_that_are_no_text_are_shown_in_the_end(byte_tokenizer):
    stream = byte_tokenizer.stream()
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.flush() == "\ufffd"
    assert byte_tokenizer.stream().push([0x80, 97]) == "\ufffda"
    assert "\ufffd" in byte_tokenizer.stream().push([0x80] * 40)
