"""Stems of English words, by Porter's algorithm as NLTK has it, whose stems rouge_score compares.

A word is [C](VC){m}[V], of runs of consonants and vowels; m is its measure. Rules replace endings where what stands
before them fulfils a condition; of each step the first ending that fits decides. Source: Porter, 1980, with NLTK's
changes (its PorterStemmer's default mode): words of four letters in -ies and -ied, y after a consonant, -alli, -bli,
-fulli, -logi, two letters vowel and consonant, and a few irregular words.
"""

from collections.abc import Callable
from functools import cache

_IRREGULAR = {
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_PLURALS = (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", ""))
_DOUBLE = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_LONG = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_LAST = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


@cache
def stem(word: str) -> str:
    """Of a word in small letters."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double, _long, _last, _final_e, _final_l):
        word = step(word)
    return word


def is_consonant(word: str, at: int) -> bool:
    if word[at] != "y":
        return word[at] not in "aeiou"
    return at == 0 or not is_consonant(word, at - 1)


def measure(word: str) -> int:
    kinds = "".join("c" if is_consonant(word, at) else "v" for at in range(len(word)))
    return kinds.count("vc")


def _has_vowel(word: str) -> bool:
    return not all(is_consonant(word, at) for at in range(len(word)))


def _is_short(word: str) -> bool:
    """Ends consonant, vowel, consonant, the last not w, x or y; or is a vowel and a consonant."""
    if len(word) == 2:
        return not is_consonant(word, 0) and is_consonant(word, 1)
    last = len(word) - 1
    shape = last >= 2 and is_consonant(word, last - 2) and not is_consonant(word, last - 1) and is_consonant(word, last)
    return shape and word[-1] not in "wxy"


def _replaced(word: str, rules: tuple[tuple[str, str], ...], allowed: Callable[[str], bool]) -> str:
    for ending, other in rules:
        if word.endswith(ending):
            before = word[: len(word) - len(ending)]
            return before + other if allowed(before) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _replaced(word, _PLURALS, lambda before: True)


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    ending = next((end for end in ("ed", "ing") if word.endswith(end) and _has_vowel(word[: -len(end)])), None)
    if ending is None:
        return word
    word = word[: -len(ending)]
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) >= 2 and word[-1] == word[-2] and is_consonant(word, len(word) - 1):
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if measure(word) == 1 and _is_short(word) else word


def _final_y(word: str) -> str:
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and is_consonant(word, len(word) - 2) else word


def _double(word: str) -> str:
    if word.endswith("alli") and measure(word[:-4]) > 0:
        return _double(word[:-2])
    changed = _replaced(word, _DOUBLE, lambda before: measure(before) > 0)
    if changed == word and word.endswith("logi") and measure(word[:-3]) > 0:
        return word[:-1]
    return changed


def _long(word: str) -> str:
    return _replaced(word, _LONG, lambda before: measure(before) > 0)


def _last(word: str) -> str:
    for ending in _LAST:
        if word.endswith(ending):
            before = word[: -len(ending)]
            fits = measure(before) > 1 and (ending != "ion" or before[-1] in "st")
            return before if fits else word
    return word


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    before = word[:-1]
    return before if measure(before) > 1 or (measure(before) == 1 and not _is_short(before)) else word


def _final_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word
