"""Texts with a label as an encoder's examples: `<s> A </s>` or `<s> A </s></s> B </s>`, and the label as one more
token, the only one that is learned (models/roberta/row).

What is too long is cut as transformers does with truncation=True (longest_first): of a pair the longer text first, down
to equal lengths.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.data.glue.rows import Labelled
from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer

AROUND = {1: 2, 2: 4}  # tokens around one text, and around two


def as_token(label: float, classes: int) -> int:
    """A label as a row's last token, int32: a class's number; the bits of float32 where there is 1 class (a number)."""
    return int(np.float32(label).view(np.int32)) if classes == 1 else int(label)


def as_label(token: int, classes: int) -> float:
    """What `as_token` was made of."""
    return float(np.int32(token).view(np.float32)) if classes == 1 else int(token)


def rooms(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens stay of two texts of a and b tokens in `room`, as the tokenizers library cuts them."""
    if a + b <= room:
        return a, b
    short, long = min(a, b), max(a, b)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if a > b else (short, long)


def tokenize_labelled(
    rows: Sequence[Labelled], tokenizer: Tokenizer, classes: int, longest: int
) -> tuple[list[Example], int]:
    """Examples of rows, in their order, and how many of them were cut.

    longest: tokens of a row, those around its texts counted, its label not.

    Raises InputError where that leaves no room, or the tokenizer has no tokens to put around a text.
    """
    if tokenizer.bos_id is None:
        raise InputError("the model's tokenizer has no token that begins a text (<s>), which a row needs before </s>")
    if longest <= AROUND[2]:
        raise InputError(f"rows of {longest} tokens have no room for two texts and the {AROUND[2]} tokens around them")
    ids = iter(tokenizer.encode_batch([text for row in rows for text in row.texts]))
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    examples, cut = [], 0
    for row in rows:
        texts = [next(ids) for _ in row.texts]
        sizes = [len(text) for text in texts]
        room = longest - AROUND[len(texts)]
        kept = [min(sizes[0], room)] if len(texts) == 1 else list(rooms(sizes[0], sizes[1], room))
        cut += kept != sizes
        tokens = [begin, *texts[0][: kept[0]], end]
        if len(texts) == 2:
            tokens += [end, *texts[1][: kept[1]], end]
        tokens.append(as_token(row.label, classes))
        loss_mask = np.zeros(len(tokens), np.bool_)
        loss_mask[-1] = True
        examples.append(Example(np.asarray(tokens, np.int32), loss_mask, row.where))
    return examples, cut
