"""Measures a model: perplexity of a text, loss on held-out examples, MMLU, ROUGE-L, or a task of EleutherAI's harness.

    python -m experiments.evaluate --task=perplexity --model=assets/tiny_llama --quant=nf4+dq --text=README.md

    --task=perplexity --text=FILE                             (or --tokens=FILE.npy)
    --task=heldout --workdir=RUN                              (a finished run; --model is its base)
    --task=mmlu --mmlu_data=DIR_OR_FILE_OR_HUB_NAME           --shots=5 --split=test
    --task=glue --glue_data=FILE[,FILE]                       (an encoder; or --glue_results=A.json,B.json: the mean)
    --task=rouge --rouge_data=FILE                            --source_len=1024 --new_tokens=128
    --task=lm-eval --tasks=NAME,NAME                          --include_path=DIR --limit=N --num_fewshot=N

perplexity: mean negative log-likelihood a token, in nats, over windows of the model's context that do not overlap and
are each begun with BOS. Every token but BOS is scored. --tokens=FILE.npy takes ids instead of a text: integers
[tokens], or [texts, tokens]. --out gets {"task", "quant", "tokens", "nll_per_token", "perplexity", ...}.

heldout: the loss on the examples that a run held out, before its first step and with its adapter.

mmlu: accuracy by subject, by category, over subjects and over questions. --out gets {"task", "quant", ...,
"accuracy_subjects", "accuracy_questions", ...}. glue: a task's metrics and their mean, its score; what was said of
every row stands beside --out=NAME.json in NAME.predictions.jsonl. lm-eval: the tasks of EleutherAI's harness and those
of --include_path; --out gets its results.

rouge: greedy answers to Super-NaturalInstructions' test tasks (its owners' list of them), or to rows {input, output}.
--out gets {"task", "quant", "questions", "rouge_l", "exact_match", "tasks", ...}, in percent.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.support import cli, glue_task, harness_task, heldout_task, mmlu_task, rouge_task
from experiments.support.model_flags import Loaded, model_flags

if TYPE_CHECKING:
    from qlora_jax.text.tokenizer import Tokenizer

TASKS = ("perplexity", "heldout", "mmlu", "glue", "rouge", "lm-eval")
DECODERS_ALONE = ("perplexity", "mmlu", "lm-eval")

MODEL = model_flags()
TASK = flags.DEFINE_string("task", None, f"what to measure: {', '.join(TASKS)}", required=True)
TEXT = flags.DEFINE_string("text", None, "text file (UTF-8)")
TOKENS = flags.DEFINE_string("tokens", None, ".npy file of token ids, in place of --text")
HELDOUT = heldout_task.heldout_flag()
MMLU = mmlu_task.mmlu_flags()
GLUE = glue_task.glue_flags()
ROUGE = rouge_task.rouge_flags()
HARNESS = harness_task.harness_flags()
CONTEXT = flags.DEFINE_integer("context", None, "tokens seen at once, BOS included; the model's own context by default")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "sequences scored together; what makes 8,192 tokens by default")
OUT = flags.DEFINE_string("out", None, "JSON file for the result")


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.files import write_json

    if TASK.value not in TASKS:
        raise InputError(f"unknown task {TASK.value!r}; known: {', '.join(TASKS)}")
    if OUT.value is not None and Path(OUT.value).is_dir():
        raise InputError(f"--out={OUT.value} is a folder; expected a file to write JSON to")
    out = None if OUT.value is None else Path(OUT.value).expanduser()
    if CONTEXT.value is not None and CONTEXT.value < 2:
        raise InputError(f"context is {CONTEXT.value}; expected at least 2 tokens")
    if TASK.value in DECODERS_ALONE:
        refuse_pairs()
    if TASK.value == "perplexity":
        result = measure_perplexity()
        table = perplexity_table(result)
    elif TASK.value == "heldout":
        result = heldout_task.measure(HELDOUT, MODEL)
        table = heldout_task.table(result)
    elif TASK.value == "mmlu":
        result = mmlu_task.measure(MMLU, MODEL, CONTEXT.value, BATCH_SIZE.value, out)
        table = mmlu_task.table(result)
    elif TASK.value == "glue":
        result = glue_task.measure(GLUE, MODEL, CONTEXT.value, BATCH_SIZE.value, out)
        table = glue_task.table(result)
    elif TASK.value == "rouge":
        result = rouge_task.measure(ROUGE, MODEL, BATCH_SIZE.value)
        table = rouge_task.table(result)
    else:
        result, table = harness_task.measure(HARNESS, MODEL, CONTEXT.value, BATCH_SIZE.value)
    print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
        print(f"written: {out}")
    return 0


def refuse_pairs() -> None:
    """Raises InputError for an encoder-decoder, before minutes of loading."""
    from qlora_jax.errors import InputError
    from qlora_jax.io.load import load_config

    if load_config(MODEL.folder()).kind.pair is not None:
        raise InputError(
            f"--task={TASK.value} scores texts by a decoder, and {MODEL.model.value} is an encoder-decoder (T5): "
            "--task=rouge measures its answers, --task=heldout its loss"
        )


def perplexity_table(result: dict[str, Any]) -> str:
    header = f"{'quant':8} {'bits/weight':>11} {'tokens':>12} {'nats/token':>11} {'perplexity':>11}"
    figures = f"{result['tokens']:12,} {result['nll_per_token']:11.4f} {result['perplexity']:11.4f}"
    return f"{header}\n{result['quant']:8} {result['bits_per_param']:11.3f} {figures}"


def measure_perplexity() -> dict[str, Any]:
    """The result, as it is written."""
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.perplexity import perplexity
    from qlora_jax.io.folder import has_tokenizer
    from qlora_jax.io.load import load_config
    from qlora_jax.progress import Progress

    if (TEXT.value is None) == (TOKENS.value is None):
        raise InputError("--task=perplexity takes one of --text=FILE and --tokens=FILE.npy")
    folder = MODEL.folder()
    config = load_config(folder)
    # token ids can be scored without a tokenizer; config.json knows BOS
    tokenizer = MODEL.tokenizer() if has_tokenizer(folder) or TEXT.value is not None else None
    bos_id = config.bos_id if tokenizer is None else first_token(tokenizer)
    texts = read_texts(tokenizer, MODEL.vocabulary())
    loaded = MODEL.load()
    if bos_id is None:
        print("BOS is not put before a text here: the first token of a window is not scored", file=sys.stderr)
    started = time.perf_counter()
    with Progress("scoring", unit="window") as scoring:
        found = perplexity(loaded.model, texts, bos_id, CONTEXT.value, BATCH_SIZE.value, scoring.to)
    return {
        "task": "perplexity",
        "quant": loaded.quant,
        "tokens": found.tokens,
        "nll_per_token": found.nll_per_token,
        "perplexity": found.perplexity,
        "windows": found.windows,
        "context": CONTEXT.value or config.context,
        "bits_per_param": bits_per_param(loaded),
        "seconds": round(time.perf_counter() - started, 3),
        "model": MODEL.model.value,
        "adapter": MODEL.adapter.value,
        "data": TEXT.value or TOKENS.value,
    }


def first_token(tokenizer: "Tokenizer") -> int | None:
    """What the tokenizer puts before every text, None for nothing."""
    from qlora_jax.errors import InputError

    if len(tokenizer.prefix) > 1:
        raise InputError(f"the tokenizer puts {len(tokenizer.prefix)} tokens before a text; windows begin with one")
    return tokenizer.prefix[0] if tokenizer.prefix else None


def read_texts(tokenizer: "Tokenizer | None", V: int) -> list:
    """Token ids of --text or --tokens, a text each."""
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.perplexity import read_tokens
    from qlora_jax.generate.prompting import read_text

    if TOKENS.value is not None:
        return read_tokens(Path(TOKENS.value).expanduser(), V)
    assert tokenizer is not None and TEXT.value is not None
    ids = tokenizer.encode(read_text(Path(TEXT.value).expanduser()))
    if not ids:
        raise InputError(f"{TEXT.value} is empty; expected a text to score")
    if max(ids) >= V:
        raise InputError(
            f"{TEXT.value} has token id {max(ids)}; the model's vocabulary is 0 to {V - 1} (is it its tokenizer?)"
        )
    return [ids]


def bits_per_param(loaded: Loaded) -> float:
    """Bits a weight of the linear layers, scales included."""
    from qlora_jax import lora

    config = loaded.model.config
    stored = [lora.linear(loaded.model, name).weight.get_value() for name in config.linears]
    weights = [config.weights(name) for name in config.linears]
    return 8 * sum(w.nbytes for w in stored) / sum(weights)


if __name__ == "__main__":
    cli.run(main)
