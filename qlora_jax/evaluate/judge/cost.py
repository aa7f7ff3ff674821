"""What judging will cost, before it starts, and what it did cost.

The rule: a token is four bytes of UTF-8 (English text is near that; other scripts take fewer bytes a token on some
tokenizers), four tokens more for each message, and every answer of the judge is as long as max_tokens allows. The sum
is an upper bound for what the judge writes and an estimate of what it reads.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_jax.evaluate.judge.pairs import Comparison
from qlora_jax.evaluate.judge.prompts import Prompts

RULE = "4 bytes a token read, max_tokens written"
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4


@dataclasses.dataclass(frozen=True)
class Tokens:
    requests: int
    read: int
    written: int

    def dollars(self, input_price: float, output_price: float) -> float:
        """USD, of prices in USD per million tokens."""
        return (self.read * input_price + self.written * output_price) / 1e6


def estimate(comparisons: Sequence[Comparison], prompts: Prompts) -> Tokens:
    """Tokens of all requests by the rule above."""
    read = written = 0
    for comparison in comparisons:
        prompt = prompts.of(comparison.question.category)
        for message in prompt.messages(comparison.question.text, comparison.answer_1, comparison.answer_2):
            size = len(message["content"].encode("utf-8", "surrogatepass"))
            read += TOKENS_PER_MESSAGE + -(-size // BYTES_PER_TOKEN)
        written += prompt.max_tokens
    return Tokens(len(comparisons), read, written)


def used(rows: Iterable[dict[str, Any]]) -> Tokens:
    """Tokens that the server counted, of the rows that have its counts."""
    counted = [(row["prompt_tokens"], row["completion_tokens"]) for row in rows if row.get("prompt_tokens") is not None]
    return Tokens(len(counted), sum(read for read, _ in counted), sum(written or 0 for _, written in counted))
