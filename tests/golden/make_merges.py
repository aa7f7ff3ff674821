"""Makes merges.json: what transformers makes of vocab.json and merges.txt, and ByT5's ids.

transformers 5.23.0, tokenizers 0.23.3, Python 3.11; no torch.

    python tests/golden/make_merges.py

    merges.json    {"cases": [{config, settings, map, ids, plain, named}], "bytes": [{settings, ids}]}. config, settings
                   and map: config.json, tokenizer_config.json and special_tokens_map.json, null for no such file; the
                   vocabulary is that of chat/tokenizer.json with TOKENS after it (tests/merges_folder.py writes the
                   folder). ids: of TEXTS as AutoTokenizer has them; plain: without what it puts around them; named:
                   special_tokens_map. bytes: of google/byt5's class, which has no file
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from merges_folder import TEXTS, write_folder

GOLDEN = Path(__file__).parent
ENDS = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
OPT = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
BY_FILE = {name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False} for name, text in ENDS.items()}
CASES = [
    ({"model_type": "roberta"}, None, None),
    ({"model_type": "roberta"}, {"add_prefix_space": True}, None),
    ({"model_type": "roberta"}, {"tokenizer_class": "RobertaTokenizerFast"}, {"cls_token": "<|im_start|>"}),
    ({"model_type": "gpt2"}, {"model_max_length": 1024}, None),
    ({"model_type": "gpt2"}, {"add_bos_token": True}, None),
    ({"model_type": "opt"}, OPT | ENDS, None),
    ({"model_type": "opt"}, OPT, BY_FILE),
    ({"model_type": "phi"}, {"tokenizer_class": "CodeGenTokenizer"}, None),
    ({"model_type": "gptj"}, None, None),
]
BYTES = [{}, {"extra_ids": 3}]


def main() -> None:
    cases = []
    for config, settings, named in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), GOLDEN, config, settings, named)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids, plain = (tokenizer(TEXTS, add_special_tokens=added)["input_ids"] for added in (True, False))
        found = {"ids": ids, "plain": plain, "named": tokenizer.special_tokens_map}
        cases.append({"config": config, "settings": settings, "map": named} | found)
    by_bytes = [{"settings": settings, "ids": ByT5Tokenizer(**settings)(TEXTS)["input_ids"]} for settings in BYTES]
    (GOLDEN / "merges.json").write_text(json.dumps({"cases": cases, "bytes": by_bytes}) + "\n")


if __name__ == "__main__":
    main()
