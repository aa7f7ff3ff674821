"""Stems and ROUGE-L are those of rouge_score."""

import gzip
import json

import pytest

from qlora_jax.evaluate.rouge.score import exact_match, longest_common, rouge_l
from qlora_jax.evaluate.rouge.stems import stem


@pytest.fixture(scope="module")
def found(golden):
    return json.loads(gzip.decompress((golden / "rouge.json.gz").read_bytes()))


def test_stems(found):
    assert len(found["stems"]) > 4000
    assert {word: stem(word) for word in found["stems"]} == found["stems"]


def test_scores(found):
    for answer, references, score in found["scores"]:
        assert rouge_l(answer, references) == pytest.approx(score, abs=1e-12), (answer, references)
    assert {0.0, 1.0} <= {rouge_l(answer, references) for answer, references, _ in found["scores"]}


def test_longest_common():
    assert longest_common("abcbdab", "bdcaba") == 4
    assert longest_common("", "abc") == longest_common("abc", "") == 0
    assert longest_common("abc", "abc") == 3


def test_exact_match():
    assert exact_match(" The cat.\n", ["a dog", "the cat"]) == 1
    assert exact_match("cat", ["the cat"]) == 0
