"""A small real tokenizer made on the spot: one token a byte, so that ids and cuts can be worked out by hand."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

BOS, EOS, TURN = 256, 257, 258
SPECIALS = ("<s>", "</s>", "<|turn|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def write_byte_tokenizer(folder: Path) -> Path:
    """tokenizer.json and tokenizer_config.json: id b is the byte b."""
    folder.mkdir(parents=True, exist_ok=True)
    # The byte-level alphabet in byte order: printable bytes stand for themselves, the others for U+0100 on.
    letters, extra = {}, 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        letters[chr(byte) if printable else chr(256 + extra)] = byte
        extra += not printable
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
