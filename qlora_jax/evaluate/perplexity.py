"""Perplexity of a text: windows of the model's context, not overlapping, each begun with BOS.

    nll_per_token = mean over scored tokens t of -log p(token_t | BOS and the tokens before it in its window), nats
    perplexity    = exp(nll_per_token)

Every token but BOS is scored. The last window of a text may be short; it counts with the tokens it has. A model without
BOS has windows without it, whose first token nothing predicts and nobody scores. Sums are float64 on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.scoring import ScoredTokens, token_scores
from qlora_jax.models.decoder import Decoder

_MOST = 700.0  # nats a token, whose perplexity a float still holds; a guess among 10^300 tokens


@dataclasses.dataclass(frozen=True)
class Perplexity:
    tokens: int  # scored
    nll_per_token: float  # nats
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_per_token)


def read_tokens(path: Path, V: int) -> list[np.ndarray]:
    """The texts of an .npy file: integers [t], one text, or [n, t], a text a row; int32 arrays.

    Raises:
      InputError: the file is missing, no such array, or holds an id outside the vocabulary 0..V-1.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an .npy array: {error}") from error
    if (
        not isinstance(ids, np.ndarray)
        or not np.issubdtype(ids.dtype, np.integer)
        or ids.ndim not in (1, 2)
        or not ids.size
    ):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise InputError(f"{path} holds {found}; expected integer token ids, [tokens] or [texts, tokens]")
    outside = np.argwhere((ids < 0) | (ids >= V))
    if len(outside):
        where = tuple(outside[0].tolist())
        raise InputError(f"{path}: token id {ids[where]} at {list(where)}; the model's vocabulary is 0 to {V - 1}")
    return list(np.atleast_2d(ids).astype(np.int32))


def windows(texts: Sequence[Sequence[int] | np.ndarray], context: int, bos_id: int | None) -> list[np.ndarray]:
    """Each text cut into int32 windows of at most `context` tokens, BOS included.

    A BOS that a text begins with is not doubled; windows in which nothing is scored are left out.

    Raises:
      InputError: the context has no room for a scored token.
    """
    if context < 2:
        raise InputError(f"context is {context}; expected at least 2 tokens")
    first = np.asarray([] if bos_id is None else [bos_id], np.int32)
    room, pieces = context - len(first), []
    for text in texts:
        ids = np.asarray(text, np.int32)
        if bos_id is not None and len(ids) and ids[0] == bos_id:
            ids = ids[1:]
        pieces += [np.concatenate([first, ids[start : start + room]]) for start in range(0, len(ids), room)]
    return [piece for piece in pieces if len(piece) > 1]


def perplexity(
    model: Decoder,
    texts: Sequence[Sequence[int] | np.ndarray],
    bos_id: int | None,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Scores token ids.

    Args:
      model: any adapter on it counts, without dropout.
      texts: token ids [t] of each text, in the vocabulary.
      bos_id: begins each window; None for a model without.
      context: tokens of a window, BOS included; the model's own context if None.
      batch_size: windows scored together; as many as make 8,192 tokens if None.
      progress: called with (windows done, windows in all).
    Raises:
      InputError: nothing to score, a bad context or batch size, or a likelihood that is not finite.
    """
    context = model.config.context if context is None else context
    cut = windows(texts, context, bos_id)
    if not cut:
        raise InputError("the text has no token to score")
    scores = token_scores(model, [ScoredTokens(piece, 1) for piece in cut], batch_size, progress)
    nats, scored = 0.0, 0
    for piece, score in zip(cut, scores, strict=True):
        counted = piece[1:] != (-1 if bos_id is None else bos_id)
        nats, scored = nats - float(score.logprobs[counted].sum(dtype=np.float64)), scored + int(counted.sum())
    if not scored:
        raise InputError("the text has no token to score but BOS")
    if not nats / scored < _MOST:
        raise InputError(f"{nats / scored:,.1f} nats a token: the model's weights or adapter are broken")
    return Perplexity(scored, nats / scored, len(cut))
