"""Tokens and masks of examples, worked out by hand with one token a byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.examples import tokenize_example, tokenize_examples
from qlora_jax.data.formats import Text
from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer

BOS, EOS = 256, 257  # of the byte tokenizer
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def test_two_pieces(byte_tokenizer):
    example = tokenize_example("ab", "cd", byte_tokenizer, 8, 8, where="f, line 3")
    assert example.tokens.tolist() == [BOS, 97, 98, 99, 100, EOS]
    assert example.loss_mask.tolist() == [False, False, False, True, True, True]
    assert (example.tokens.dtype, example.loss_mask.dtype, example.where) == (np.int32, np.bool_, "f, line 3")
    learned = tokenize_example("ab", "cd", byte_tokenizer, 8, 8, train_on_source=True)
    assert learned.loss_mask.tolist() == [False] + [True] * 5


def test_each_piece_is_cut_to_its_length(byte_tokenizer):
    texts = [Text("abcdef", "uvwxyz", ""), Text("ab", "uv", ""), Text("ab", "uvw", ""), Text("abc", "uv", "")]
    examples, truncated = tokenize_examples(texts, byte_tokenizer, 3, 3)
    cut = [BOS, 97, 98, 117, 118, EOS]
    assert [example.tokens.tolist() for example in examples] == [cut] * 4
    assert (truncated.sources, truncated.targets) == (2, 2)


def test_empty_source_is_begin_alone(byte_tokenizer):
    example = tokenize_example("", "a", byte_tokenizer, 1, 2)
    assert example.tokens.tolist() == [BOS, 97, EOS]
    assert example.loss_mask.tolist() == [False, True, True]


@given(TEXT, TEXT.filter(str.strip), st.integers(1, 12), st.integers(2, 12), st.booleans())
def test_masks(byte_tokenizer, source, target, max_source, max_target, train_on_source):
    example = tokenize_example(source, target, byte_tokenizer, max_source, max_target, train_on_source)
    first = ([BOS] + list(source.encode()))[:max_source]
    second = list(target.encode())[: max_target - 1] + [EOS]
    assert example.tokens.tolist() == first + second
    assert example.tokens[-1] == EOS and example.loss_mask[-1] and not example.loss_mask[0]
    learned = example.tokens[example.loss_mask].tolist()
    assert learned == ((first[1:] if train_on_source else []) + second)


@pytest.fixture
def without_bos(tmp_path, byte_folder):
    (tmp_path / "tokenizer.json").write_bytes((byte_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    return Tokenizer.from_folder(tmp_path)


def test_a_model_without_begin_token(without_bos):
    example = tokenize_example("", "ab", without_bos, 4, 4)
    assert example.tokens.tolist() == [97, 98, EOS]
    assert example.loss_mask.tolist() == [False, True, True]  # nothing predicts the very first token
    assert tokenize_example("x", "ab", without_bos, 4, 4).loss_mask.tolist() == [False, True, True, True]


def test_errors(byte_tokenizer):
    with pytest.raises(InputError, match="f, line 2: the target is empty"):
        tokenize_examples([Text("a", "b", "f, line 1"), Text("a", " ", "f, line 2")], byte_tokenizer, 8, 8)
    with pytest.raises(InputError, match="data.max_source_len is 0"):
        tokenize_example("a", "b", byte_tokenizer, 0, 8)
    with pytest.raises(InputError, match="data.max_target_len is 1"):
        tokenize_example("a", "b", byte_tokenizer, 8, 1)
