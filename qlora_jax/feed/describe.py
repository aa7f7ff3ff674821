"""What a run will see of its data: examples as the loss sees them, and their lengths."""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.feed.batches import round_up
from qlora_jax.progress import CONTROL
from qlora_jax.text.tokenizer import Tokenizer

_GIVEN, _LEARNED, _PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[0m"  # dim, green
_BAR = 40  # characters of the longest


def show_example(example: Example, tokenizer: Tokenizer, color: bool, label: str | None = None) -> str:
    """The example as text, decoded from its tokens: what is given dim, what is learned green; without color what is
    learned stands between ⟦ and ⟧. BOS and EOS are shown by these names where the tokens have them, other control
    tokens by their texts, control characters as U+FFFD. `label`: of a row whose last token stands for it
    (feed/labelled)."""
    marks = (f"{_GIVEN}%s{_PLAIN}", f"{_LEARNED}%s{_PLAIN}") if color else ("%s", "⟦%s⟧")
    stream = tokenizer.stream()
    shown = ""
    edges = np.flatnonzero(np.diff(example.loss_mask)) + 1
    runs = np.split(np.arange(len(example)), edges)
    for number, run in enumerate(runs):
        text = ""
        if label is not None and number == len(runs) - 1:
            shown += marks[1] % label
            break
        for token in example.tokens[run].tolist():
            name = _name(tokenizer, token)
            text += stream.flush() + name if name else stream.push(token)
        if number == len(runs) - 1:
            text += stream.flush()
        shown += marks[int(example.loss_mask[run[0]])] % CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return shown


def histogram(lengths: Sequence[int], multiple: int) -> list[str]:
    """Lines with a bar each: how many of the lengths fall in a range. At most 16 ranges, multiples of `multiple`."""
    longest = max(lengths)
    width = round_up(-(-longest // 16), multiple)
    counts = np.bincount((np.asarray(lengths) - 1) // width)
    lines = []
    for number, count in enumerate(counts):
        bar = "#" * -(-int(count) * _BAR // int(counts.max()))
        lines.append(f"{number * width + 1:7,} to {(number + 1) * width:7,} tokens {count:9,} {bar}".rstrip())
    return lines


def _name(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.bos_id:
        return "<BOS>"
    return "<EOS>" if token == tokenizer.eos_id else tokenizer.controls.get(token, "")
