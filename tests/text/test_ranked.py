"""Vocabularies by rank, against the way that tiktoken joins them, written out here."""

import base64
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.text.added_tokens import find_added
from qlora_jax.text.tokenizer import Tokenizer

PATTERN = r"[a-zA-Zé]+| ?[^\sa-zA-Zé]+|\s+"
CONTROLS = 24


def joined(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """A piece's ranks: the two neighbours whose string has the lowest rank become one, the first of equals first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks.get(a + b), place) for place, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        known = [pair for pair in pairs if pair[0] is not None]
        if not known:
            return [ranks[part] for part in parts]
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def a_vocabulary(draws: list[tuple[int, int]]) -> dict[bytes, int]:
    """All bytes, and strings joined from two that are there."""
    tokens = [bytes([byte]) for byte in range(256)]
    for a, b in draws:
        # mostly of the letters that the texts have
        pool = [*(token for token in tokens if set(token) <= set(b"abc\xc3\xa9 !"))]
        token = pool[a % len(pool)] + pool[b % len(pool)]
        if token not in tokens and len(token) < 9:
            tokens.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


def write_tekken(folder, ranks, specials=None, **config):
    config = {
        "pattern": PATTERN, "default_vocab_size": len(ranks) + CONTROLS, "default_num_special_tokens": CONTROLS,
        "version": "v3",
    } | config  # fmt: skip
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    said = {"config": config, "vocab": vocab} | ({} if specials is None else {"special_tokens": specials})
    (folder / "tekken.json").write_text(json.dumps(said))
    return folder


NUMBERS = st.integers(0, 10_000)


@settings(max_examples=60)
@given(draws=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=60), text=st.text("aaabbcé !\n<s>", max_size=60))
def test_pieces_are_joined_by_rank(tmp_path_factory, draws, text):
    ranks = a_vocabulary(draws)
    tokenizer = Tokenizer.from_folder(write_tekken(tmp_path_factory.mktemp("t"), ranks))
    expected = [CONTROLS + rank for piece in re.findall(PATTERN, text) for rank in joined(piece.encode(), ranks)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


def test_control_tokens_of_tekken(tmp_path):
    tokenizer = Tokenizer.from_folder(write_tekken(tmp_path, a_vocabulary([(1, 2)])))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prefix, tokenizer.id_of("[INST]")) == (1, (2,), (1,), 3)
    assert tokenizer.controls[23] == "<SPECIAL_23>" and tokenizer.vocab_size == CONTROLS + 257
    assert tokenizer.encode_marked("<s>[INST]a")[:3] == [1, 3, CONTROLS + ord("a")]
    assert min(tokenizer.encode("<s>[INST]</s>")) >= CONTROLS  # plain text never is one
    with pytest.raises(InputError, match="no tokenizer.json, and tekken.json, .* take no new tokens"):
        find_added(tmp_path, ["<new>"], [])


def test_listed_control_tokens(tmp_path):
    names = ["<unk>", "<s>", "</s>", "[THINK]"]
    listed = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    tokenizer = Tokenizer.from_folder(write_tekken(tmp_path, a_vocabulary([]), listed))
    assert tokenizer.id_of("[THINK]") == 3 and tokenizer.controls[4] == "<SPECIAL_4>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": []}, "expected 24 control tokens at most and 256 strings at least"),
        ({"config": {}}, "not a readable tokenizer: KeyError"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "each in the order of its rank; found 1"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}]}, "control token 'a' has the text or the id of a plain"),
        ({"special_tokens": [{"rank": 0, "token_str": "abba"}]}, "'abba' could not be told from the same letters"),
        ({"vocab": [{"rank": 0, "token_bytes": "?"}]}, "not a readable tokenizer"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    said = json.loads((write_tekken(tmp_path, a_vocabulary([])) / "tekken.json").read_text())
    (tmp_path / "tekken.json").write_text(json.dumps(said | change))
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_tiktoken_file(tmp_path):
    """Its control tokens stand beside it; without them it is refused."""
    ranks = a_vocabulary([(5, 7), (9, 9), (260, 3), (11, 260)])
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match="which has no control tokens: expected them in tokenizer_config.json"):
        Tokenizer.from_folder(tmp_path)
    added = {str(len(ranks)): {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "added_tokens_decoder": added})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_id == len(ranks) and tokenizer.bos_id is None
    assert tokenizer.encode_marked("c!<|end|>")[-1] == len(ranks)
    assert tokenizer.decode(tokenizer.encode("Ünder 1234!")) == "Ünder 1234!"
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines[:4], b"broken"]))
    with pytest.raises(InputError, match="line 5 is no string in base64 and its rank"):
        Tokenizer.from_folder(tmp_path)
