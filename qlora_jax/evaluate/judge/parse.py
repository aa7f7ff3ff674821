"""From what a judge wrote to a score. A text that does not hold a score where its prompt wants one is unparsed: -1.

    three-class  the last line holds nothing but 1, 2 or 3 (in bold, quoted, or behind a label such as "Answer:")
    relative     the first line holds nothing but two numbers from 1 to 10, as "8 9", "8, 9" or "(8, 9)". Where the
                 prompt wants a Python tuple, it may stand alone on any line, and so may two lines "Assistant 1: 8" and
                 "Assistant 2: 9" (as GPT-4 answers the paper's prompt for math); all of them must then say the same

Numbers that stand inside sentences are never read: they may be steps of a solution, or list items.
"""

import re
from collections.abc import Iterator

from qlora_jax.evaluate.tournament.verdicts import UNPARSED

LOWEST, HIGHEST = 1.0, 10.0

_FLAGS = re.IGNORECASE | re.ASCII
_NUMBER = r"(\d{1,3}(?:\.\d{1,4})?)"
_LABEL = r"(?:(?:my |the )?(?:final )?(?:answer|choice|verdict|decision|output|scores?)\s*(?:is|[:=])\s*)?"
_CLASS = re.compile(rf"{_LABEL}([123])\.?", _FLAGS)
_PAIR = re.compile(rf"{_LABEL}{_NUMBER}\s*[,; ]\s*{_NUMBER}\.?", _FLAGS)
_TUPLE = re.compile(rf"(?:{_LABEL}|\w+\s*=\s*)[(\[]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,?\s*[)\]]\.?", _FLAGS)
_OF_ONE = re.compile(rf"Assistant ([12])[:*=\s]{{1,5}}{_NUMBER}(?:\s*/\s*10)?\.?\s*(?:\(.*\))?", _FLAGS)
_MARKS = "*_`\"' \t\r"  # Markdown and quotation marks around a line


def threeclass_score(text: str, cut_off: bool) -> int:
    """1, 2, 3 or -1.

    Args:
      cut_off: the judge ran out of tokens, so the last line is not the one it wanted to write.
    """
    lines = _lines(text)
    match = _CLASS.fullmatch(lines[-1]) if lines and not cut_off else None
    return int(match[1]) if match else UNPARSED


def relative_score(text: str, cut_off: bool, tuple_wanted: bool) -> list[float]:
    """[points of the first answer, of the second], or [-1, -1].

    Args:
      cut_off: as above: a line that nothing follows may be half a line.
      tuple_wanted: the prompt asks for a Python tuple rather than for a first line.
    """
    lines = _lines(text)[:-1] if cut_off else _lines(text)
    first = (_PAIR.fullmatch(lines[0]) or _TUPLE.fullmatch(lines[0])) if lines else None
    found = {(first[1], first[2])} if first else set(_pairs(lines)) if tuple_wanted else set()
    points = {(float(a), float(b)) for a, b in found}
    if len(points) == 1 and all(LOWEST <= x <= HIGHEST for x in min(points)):
        return list(min(points))
    return [float(UNPARSED)] * 2


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Every tuple that has a line to itself, and every two lines that name the assistants in turn."""
    for line in lines:
        if match := _TUPLE.fullmatch(line):
            yield match[1], match[2]
    for line, following in zip(lines, lines[1:], strict=False):
        one, other = _OF_ONE.fullmatch(line), _OF_ONE.fullmatch(following)
        if one and other and one[1] == "1" and other[1] == "2":
            yield one[2], other[2]


def _lines(text: str) -> list[str]:
    """Lines without the marks around them; blank ones and the fences of code are left out."""
    lines = (line.strip(_MARKS) for line in text.split("\n") if not line.strip().startswith("```"))
    return [line for line in lines if line]
