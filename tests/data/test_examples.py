"""Tokens and masks of examples, worked out by hand with one token a byte."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from qlora_jax.data.examples import Lengths, Truncated, tokenize_example, tokenize_examples
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


def test_each_piece_is_cut_to_its_length_and_only_a_whole_answer_ends(byte_tokenizer):
    texts = [Text("abcdef", "uvwxyz", ""), Text("ab", "uv", ""), Text("ab", "uvw", ""), Text("abc", "uv", "")]
    examples, truncated = tokenize_examples(texts, byte_tokenizer, Lengths(3, 3))
    cut, whole = [BOS, 97, 98, 117, 118, 119], [BOS, 97, 98, 117, 118, EOS]
    assert [example.tokens.tolist() for example in examples] == [cut, whole, cut, whole]
    assert truncated == Truncated(sources=2, targets=2, dropped=0)
    assert truncated.report(Lengths(3, 3)) == [
        "data: cut to length: 2 sources (max_source_len 3), 2 targets (max_target_len 3), which are learned without "
        "an end"
    ]


def test_pieces_without_a_length_of_their_own_have_the_context_together(byte_tokenizer):
    texts = [Text("abcdef", "uvwxyz", ""), Text("abcdef", "uv", ""), Text("abcdefghi", "u", ""), Text("", "uvwxyz", "")]

    def made(*lengths):
        examples, truncated = tokenize_examples(texts, byte_tokenizer, Lengths(*lengths))
        tokens = ["".join(chr(n) if n < 256 else "<>"[n - BOS] for n in example.tokens) for example in examples]
        return tokens, (truncated.sources, truncated.targets, truncated.dropped)

    whole = ["<abcdefuvwxyz>", "<abcdefuv>", "<abcdefghiu>", "<uvwxyz>"]
    assert made(0, 0) == (whole, (0, 0, 0))
    assert made(0, 0, 14) == (whole, (0, 0, 0))
    assert made(0, 0, 13) == (["<abcdefuvwxyz", *whole[1:]], (0, 1, 0))
    assert made(0, 0, 11) == (["<abcdefuvwx", "<abcdefuv>", "<abcdefghiu", "<uvwxyz>"], (0, 2, 0))
    assert made(0, 0, 10) == (["<abcdefuvw", "<abcdefuv>", "<uvwxyz>"], (0, 1, 1))
    assert made(4, 0, 9) == (["<abcuvwxy", "<abcuv>", "<abcu>", "<uvwxyz>"], (3, 1, 0))
    assert made(0, 3, 9) == (["<abcdefuv", "<abcdefuv", "<uvw"], (0, 3, 1))
    assert made(0, 0, 1) == ([], (0, 0, 4))
    # lengths that are given are what they are, whatever the context
    assert made(8, 4, 3) == (["<abcdefuvwx", "<abcdefuv>", "<abcdefgu>", "<uvwx"], (1, 2, 0))
    lines = Truncated(0, 2, 1).report(Lengths(0, 0, 11))
    assert lines == [
        "data: cut to length: 2 targets (the model's context of 11 tokens), which are learned without an end",
        "data: 1 examples left out: nothing to learn within the model's context of 11 tokens",
    ]
    assert Truncated(3, 1).report(Lengths(4, 0, 9))[0].startswith("data: cut to length: 3 sources (max_source_len 4)")


def test_empty_source_is_begin_alone(byte_tokenizer):
    example = tokenize_example("", "a", byte_tokenizer, 1, 2)
    assert example.tokens.tolist() == [BOS, 97, EOS]
    assert example.loss_mask.tolist() == [False, True, True]


@given(TEXT, TEXT.filter(str.strip), st.integers(1, 12), st.integers(2, 12), st.booleans())
def test_masks(byte_tokenizer, source, target, max_source, max_target, train_on_source):
    example = tokenize_example(source, target, byte_tokenizer, max_source, max_target, train_on_source)
    first = ([BOS] + list(source.encode()))[:max_source]
    second = [*target.encode(), EOS][:max_target]
    assert example.tokens.tolist() == first + second
    assert (example.tokens[-1] == EOS) == (len(target.encode()) < max_target)
    assert example.loss_mask[-1] and not example.loss_mask[0]
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


LLAMA = "tokenizer"  # a SentencePiece model and its tokenizer.json, in golden


@pytest.fixture(scope="module", params=["bytes", "tokenizer.json", "tokenizer.model", "bpe"])
def any_tokenizer(request, golden, byte_tokenizer, tmp_path_factory):
    if request.param == "bytes":
        return byte_tokenizer
    if request.param == "bpe":
        return Tokenizer.from_folder(golden / "chat")
    folder = tmp_path_factory.mktemp("one")
    shutil.copyfile(golden / LLAMA / request.param, folder / request.param)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer.from_folder(folder)


PIECES = st.lists(st.text(st.sampled_from("ab \n.<|>#é\U0001f600"), min_size=1, max_size=6), min_size=1, max_size=6)


@given(PIECES, st.integers(0, 63), st.integers(2, 40), st.booleans())
def test_given_turns_change_no_id_and_no_token_that_touches_one_is_learned(any_tokenizer, pieces, bits, most, source):
    """Against decoding: the characters that a token adds to those before it."""
    pieces.append("end")
    target = "".join(pieces)
    begins = [0, *itertools.accumulate(map(len, pieces))]
    spans = tuple(span for n, span in enumerate(itertools.pairwise(begins[:-1])) if bits >> n & 1)
    plain, masked = (
        tokenize_examples([Text("q", target, "", given)], any_tokenizer, Lengths(9, most), source)[0]
        for given in ((), spans)
    )
    if not masked:  # the cut came before anything that is learned
        assert sum(end - begin for begin, end in spans) > 0
        return
    assert masked[0].tokens.tolist() == plain[0].tokens.tolist()
    mask, whole = masked[0].loss_mask, plain[0].loss_mask
    assert not (mask & ~whole).any()
    if any_tokenizer.bos_id == BOS and any_tokenizer.vocab_size == 259:  # one token a byte: each has one place
        learned = np.ones(len(target.encode()) + 1, bool)
        for begin, end in spans:
            learned[len(target[:begin].encode()) : len(target[:end].encode())] = False
        assert mask[-len(learned[:most]) :].tolist() == learned[:most].tolist()
        return
    tokens = plain[0].tokens.tolist()
    first = int(np.flatnonzero(whole)[0]) if not source else len(any_tokenizer.encode("q", bos=True))
    alone = any_tokenizer.encode(target)
    for number in range(first, min(len(tokens), first + len(alone))):
        before, after = (any_tokenizer.decode(alone[: number - first + n]) for n in (0, 1))
        if before == after or not (target.startswith(before) and target.startswith(after)):
            continue  # a space that the tokenizer adds, or a byte of a character
        touches = any(len(before) < end and len(after) > begin for begin, end in spans)
        assert mask[number] == (whole[number] and not touches), (target, spans, number)
    if len(tokens) > first + len(alone):
        assert mask[-1]  # the end


def test_a_masked_turn_with_a_character_of_many_tokens(byte_tokenizer):
    text = Text("", "aé\U0001f600b", "f, line 1", ((1, 3),))
    example = tokenize_examples([text], byte_tokenizer, Lengths(9, 9))[0][0]
    assert example.loss_mask.tolist() == [False, True, *[False] * 6, True, True]
    cut, truncated = tokenize_examples([dataclasses.replace(text, given=((0, 3),))], byte_tokenizer, Lengths(9, 5))
    assert cut == [] and truncated == Truncated(0, 0, 1)
    assert truncated.report(Lengths(9, 5)) == [
        "data: 1 examples left out: nothing to learn within data.max_source_len + data.max_target_len = 14 tokens"
    ]


def test_a_text_whose_tokens_have_no_places(byte_tokenizer):
    with pytest.raises(InputError, match=r"f, line 1: the tokenizer does not tell where the tokens of this convers"):
        tokenize_examples([Text("", "a\ufdd20\ufdd3b", "f, line 1", ((0, 1),))], byte_tokenizer, Lengths(9, 9))


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (-1, 8, "data.max_source_len is -1, expected at least 1 .BOS., or 0: as long as sources are"),
        (8, 1, "data.max_target_len is 1, expected at least 2 .a token and EOS., or 0: as long as targets are"),
        (8, -2, "data.max_target_len is -2"),
    ],
)
def test_lengths_that_hold_nothing(source, target, reason):
    with pytest.raises(InputError, match=reason):
        Lengths.of(ConfigDict({"max_source_len": source, "max_target_len": target}))


def test_an_empty_target(byte_tokenizer):
    with pytest.raises(InputError, match="f, line 2: the target is empty"):
        tokenize_examples([Text("a", "b", "f, line 1"), Text("a", " ", "f, line 2")], byte_tokenizer, Lengths(8, 8))
