"""Makes bos.json: what transformers puts before a text, and which tokens it knows by name, by a folder's files.

transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, Python 3.11; no torch.

    python tests/golden/make_bos.py

    bos.json    [{kind, processor, settings, map, config, prefix, bos, named}]. kind and processor: of the folder, as
                tests/bos_folder.py writes it; settings, map and config: its tokenizer_config.json,
                special_tokens_map.json and config.json, null for no such file. What AutoTokenizer makes of it: prefix,
                the ids before those of a text; bos, bos_token_id; named, special_tokens_map
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from bos_folder import write_folder

GOLDEN = Path(__file__).parent
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
SETTINGS = [
    None,
    {},
    BOTH,
    BOTH | {"add_bos_token": False},
    BOTH | {"add_bos_token": True},
    {"add_bos_token": True},
    {"eos_token": "</s>"},
    {"bos_token": None, "eos_token": "</s>", "add_bos_token": True},
    {"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"},
    {"bos_token": None, "tokenizer_class": "LlamaTokenizerFast"},
    {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"},
    BOTH | {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": "</s>"},
]
MAPS = [({"bos_token": "</s>"}, BOTH), ({"bos_token": {"content": "</s>"}}, BOTH | {"added_tokens_decoder": {}})]


def main() -> None:
    cases = []
    kinds = [(kind, processor) for kind in ("bytes", "pieces") for processor in ("none", "bos")]
    kinds += [("bytes", "own"), ("model", "own")]
    every = itertools.product(kinds, SETTINGS, (None, LLAMA))
    chosen = [(kind, settings, None, config) for kind, settings, config in every]
    chosen += [(kind, settings, named, None) for kind in kinds[:1] for named, settings in MAPS]
    for (kind, processor), settings, named, config in chosen:
        files = {"tokenizer_config": settings, "special_tokens_map": named, "config": config}
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), GOLDEN, kind, processor, **files)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids, plain = (tokenizer("cat", add_special_tokens=added)["input_ids"] for added in (True, False))
        assert ids[len(ids) - len(plain) :] == plain
        cases.append(
            {
                "kind": kind,
                "processor": processor,
                "settings": settings,
                "map": named,
                "config": config,
                "prefix": ids[: len(ids) - len(plain)],
                "bos": tokenizer.bos_token_id,
                "named": tokenizer.special_tokens_map,
            }  # fmt: skip
        )
    (GOLDEN / "bos.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
