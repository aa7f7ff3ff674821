"""The golden RoBERTa checkpoints (tests/golden/make_roberta.py), and an encoder's logits."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from qlora_jax.io.load import expected_shapes, load_config
from tests.conftest import TESTS
from tests.tiny_checkpoint import TOKENIZER

FOLDERS = TESTS / "golden" / "roberta"


def golden(name: str) -> dict[str, np.ndarray]:
    """rows.npz of a folder."""
    with np.load(FOLDERS / name / "rows.npz") as file:
        return dict(file)


@partial(jax.jit, static_argnames="graph")
def _classes(graph, state, tokens, lengths):
    return nnx.merge(graph, state).classes(tokens, lengths)


def classes_of(model, rows: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, labels] of `golden` rows."""
    return np.asarray(_classes(*nnx.split(model), rows["tokens"], rows["lengths"]))


def write_tiny_roberta(folder: Path, context: int = 48, labels: int = 0) -> Path:
    """A random checkpoint as RobertaForMaskedLM's, or with a head, and the golden tokenizer, for `context` tokens."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["RobertaForMaskedLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 400, "max_position_embeddings": context + 1, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if labels:
        names = {str(number): f"LABEL_{number}" for number in range(labels)}
        config |= {"architectures": ["RobertaForSequenceClassification"], "id2label": names}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in expected_shapes(load_config(folder)).items():
        width = shape[-1] if len(shape) == 2 and "embeddings" not in key else 4
        values = np.ones(shape) if "LayerNorm.weight" in key else rng.normal(size=shape) / np.sqrt(width)
        tensors[key] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def write_glue(folder: Path, count: int = 40) -> Path:
    """RTE/train.tsv and dev.tsv, CoLA/train.tsv without a header, and STS-B/train.tsv, in their owners' formats.

    Labels follow from the texts.
    """
    rng = np.random.default_rng(1)
    words = ["the", "sun", "tree", "runs", "a", "red", "dog", "sings", "blue", "over"]
    pairs = [[" ".join(rng.choice(words, size)) for size in rng.integers(2, 6, 2)] for _ in range(count)]
    alike = [sum(word in b.split() for word in a.split()) / len(a.split()) for a, b in pairs]
    for name in ("RTE", "CoLA", "STS-B"):
        (folder / name).mkdir(parents=True)

    def rte(first: int, last: int) -> str:
        rows = enumerate(zip(pairs[first:last], alike[first:last], strict=True))
        named = [f"{n}\t{a}\t{b}\t{'entailment' if x > 0.4 else 'not_entailment'}" for n, ((a, b), x) in rows]
        return "\n".join(["index\tsentence1\tsentence2\tlabel", *named, ""])

    (folder / "RTE" / "train.tsv").write_text(rte(0, count - 8))
    (folder / "RTE" / "dev.tsv").write_text(rte(count - 8, count))
    cola = [f'gj04\t{int("dog" in a.split())}\t\t"{a}' for a, _ in pairs]
    (folder / "CoLA" / "train.tsv").write_text("\n".join([*cola, ""]))
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    numbered = enumerate(zip(pairs, alike, strict=True))
    scores = [f"{n}\tg\tf\t2012\t{n}\ts\ts\t{a}\t{b}\t{5 * x:.3f}" for n, ((a, b), x) in numbered]
    (folder / "STS-B" / "train.tsv").write_text("\n".join([header, *scores, ""]))
    return folder
