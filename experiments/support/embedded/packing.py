"""Documents to token rows for pretraining: shuffled, each between begin and end tokens, joined, cut to length."""

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np

from experiments.support.embedded import corpus, tokenizer

HELD_OUT_SHARE = 0.02


def pack(
    documents: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    context: int,
    bos_id: int,
    eos_id: int,
    seed: int,
) -> np.ndarray:
    """Token rows, int32 [n, T] with T = `context`, without padding; the last incomplete row is dropped.

    Args:
        documents: texts.
        encode: from a list of texts to their token ids, without special tokens.
        context: tokens a row.
        bos_id: stands before each document.
        eos_id: stands after each document.
        seed: the order of the documents.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    stream = [np.asarray([bos_id, *ids, eos_id], np.int32) for ids in encode(order)]
    tokens = np.concatenate(stream) if stream else np.zeros(0, np.int32)
    rows = len(tokens) // context
    return tokens[: rows * context].reshape(rows, context)


@functools.lru_cache(maxsize=2)
def _all_rows(context: int, seed: int) -> np.ndarray:
    """All rows of the mix, [n, T]; the first `HELD_OUT_SHARE` of them are not trained on."""
    texts = corpus.documents(seed) + corpus.stdlib_documents(seed=seed)
    encode = tokenizer.encoder(tokenizer.load())
    return pack(texts, encode, context, tokenizer.BOS_ID, tokenizer.EOS_ID, seed)


def pretraining_rows(context: int = 256, seed: int = 0) -> np.ndarray:
    """The rows to train on, int32 [n, T]."""
    rows = _all_rows(context, seed)
    return rows[int(len(rows) * HELD_OUT_SHARE) :]


def heldout_rows(context: int = 256, seed: int = 0) -> np.ndarray:
    """The rows to measure the loss on, int32 [n, T]: none of them is trained on."""
    rows = _all_rows(context, seed)
    return rows[: int(len(rows) * HELD_OUT_SHARE)]
