"""A random Llama checkpoint for tests that need one with a tokenizer, or with a longer context than the golden ones."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qlora_jax.io.load import expected_shapes, load_config
from tests.bos_folder import bos_processor

TOKENIZER = Path(__file__).resolve().parent / "golden" / "tokenizer"


def write_tiny_checkpoint(folder: Path, context: int = 128, V: int = 400, **sizes: int) -> Path:
    """Weights large enough that its greedy text is not one token repeated; the golden tokenizer, which here puts <s>
    before a text, as Llama's does."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": context,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | sizes))
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in expected_shapes(load_config(folder)).items():
        width = shape[-1] if len(shape) == 2 and "embed" not in key else 1
        values = rng.normal(size=shape) * (3 if "lm_head" in key else 1) / np.sqrt(width)
        tensors[key] = (np.ones(shape) if len(shape) == 1 else values).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(TOKENIZER / "tokenizer_config.json", folder / "tokenizer_config.json")
    spec = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": bos_processor(spec)}))
    return folder
