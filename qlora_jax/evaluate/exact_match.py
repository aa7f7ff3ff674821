"""Share of answers that are the reference to the letter, surrounding space aside."""

from collections.abc import Sequence


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Raises ValueError when the two differ in number or are empty."""
    pairs = list(zip(answers, references, strict=True))
    if not pairs:
        raise ValueError("no answers to compare")
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs)
