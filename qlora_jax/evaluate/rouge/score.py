"""ROUGE-L and exact match of an answer, each the best over its references.

ROUGE-L is the F-measure of the longest common subsequence of stemmed words: P = LCS / words of the answer, R = LCS /
words of the reference, F = 2 P R / (P + R). Source: Lin, 2004; rouge_score's rougeL with its stemmer, by which
Tk-Instruct measures.
"""

import re
import string
from collections.abc import Sequence

from qlora_jax.evaluate.rouge.stems import stem

_NO_WORD = re.compile(r"[^a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Runs of letters a to z and digits, those of more than three stemmed."""
    return [stem(word) if len(word) > 3 else word for word in _NO_WORD.split(text.lower()) if word]


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for place, other in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """0 to 1; at least one reference."""
    given = words(answer)
    return max(_f_measure(given, words(reference)) for reference in references)


def _f_measure(answer: list[str], reference: list[str]) -> float:
    common = longest_common(answer, reference)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference but for capitals, punctuation and blanks, else 0."""
    return float(_plain(answer) in map(_plain, references))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())
