"""Answers a prompt, a file of prompts, or, without either, chats.

    python -m experiments.generate --model=assets/tiny_llama --quant=nf4+dq --prompt="Once upon a time"

Three ways: one --prompt; a file of --prompts, answered as JSONL to --out or stdout; or, without either, a chat (/help
lists its commands, Ctrl-D ends it; a line of piped input is a message).
A file of prompts is .txt, one a line; or JSON, JSONL, CSV, Parquet with a field "prompt", with "instruction" and
"input", with a conversation in "messages", or a benchmark's questions ("turns", or "question_id" and "text"). Rows may
have a "seed" of their own. An answer is {"question_id", ..., "prompt", "text", "reason", "answer_id", "model_id"}.
Run again with the same --out, it goes on where it stopped. An answer depends on the seed and its prompt, not on its
batch or its place; a prompt that stands in the file twice gets two answers.
stdout gets text alone: with --prompt and --template=plain the prompt and its continuation, with other templates, in
JSONL and in a chat the new text. Everything else goes to stderr.
Templates: plain gives the text as it is, alpaca and guanaco wrap it as these models are trained, chat is the
tokenizer's own. Default: plain; alpaca for rows with "instruction"; in a chat the adapter's; for questions, and in a
chat without one, the tokenizer's own, else guanaco. Sampling is the paper's for Guanaco by default.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.support import cli
from experiments.support.model_flags import model_flags

if TYPE_CHECKING:
    from qlora_jax.generate.answer_file import AnswerFile
    from qlora_jax.generate.answers import Prepared
    from qlora_jax.generate.sampling import Sampling
    from qlora_jax.models.decoder import Decoder
    from qlora_jax.text.tokenizer import Tokenizer

MODEL = model_flags()
PROMPT = flags.DEFINE_string("prompt", None, 'text to continue, or to answer; "" is BOS alone')
PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts")
OUT = flags.DEFINE_string("out", None, "JSONL file for the answers to --prompts; stdout by default")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "throw away the answers that --out has, instead of going on")
TEMPLATE = flags.DEFINE_enum("template", None, ["plain", "alpaca", "guanaco", "chat"], "what is put around a prompt")
SYSTEM = flags.DEFINE_string("system", None, "system line of guanaco and chat; the template's own by default")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "tokens of an answer at most")
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of sampling; 0 is greedy")
TOP_K = flags.DEFINE_integer("top_k", 0, "tokens that are sampled from, the most probable ones; 0 is all")
TOP_P = flags.DEFINE_float("top_p", 0.9, "probability of the nucleus that is sampled from; 1 keeps every token")
MIN_P = flags.DEFINE_float("min_p", 0.0, "least probability of a token, as a share of the most probable one's")
STOP = flags.DEFINE_multi_string("stop", [], "text that ends an answer and is not shown; may be given several times")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "prompts decoded together")
MODEL_ID = flags.DEFINE_string("model_id", None, "name of the answering system in --out; that of --model by default")


@dataclasses.dataclass(frozen=True)
class Setup:
    model: "Decoder"
    tokenizer: "Tokenizer"
    sampling: "Sampling"
    eos_ids: list[int]


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.generate.prompting import Request, bos_note, check_stops, prompt_ids
    from qlora_jax.generate.requests import read_requests
    from qlora_jax.generate.sampling import Sampling

    if PROMPT.value is not None and PROMPTS.value is not None:
        raise InputError("--prompt and --prompts exclude each other; give one of them")
    if OUT.value is not None and PROMPTS.value is None:
        raise InputError("--out is for the answers to --prompts=FILE; without it text goes to stdout")
    if BATCH_SIZE.value < 1:
        raise InputError(f"--batch_size is {BATCH_SIZE.value}; expected at least 1")
    # what is cheap to read is checked before the model is loaded
    sampling = Sampling(
        MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value, top_k=TOP_K.value, min_p=MIN_P.value
    )
    check_stops(STOP.value)
    requests = read_requests(PROMPTS.value) if PROMPTS.value is not None else []
    tokenizer = MODEL.tokenizer()
    if TEMPLATE.value == "chat":
        prompt_ids(tokenizer, "chat", Request("?"))
    if PROMPTS.value is not None:
        return answer_file(tokenizer, sampling, requests)
    one = Request(PROMPT.value or "", form="prompt" if PROMPT.value is not None else "question")
    template = one_template(tokenizer, one)
    if said := bos_note(tokenizer, template):
        note(said)
    setup = load(tokenizer, sampling)
    return converse(setup, template) if PROMPT.value is None else answer_one(setup, template, one)


def one_template(tokenizer: "Tokenizer", request: Any) -> str:
    """The template of a single prompt or a chat. Raises InputError where it has no place for --system."""
    from qlora_jax.errors import InputError
    from qlora_jax.generate.answers import default_template
    from qlora_jax.generate.prompting import MANY_TURNS

    trained = _trained_template()
    template = TEMPLATE.value or (trained if request.form == "question" else None)
    template = template or default_template(tokenizer, request.form)
    if trained not in (None, template):
        note(f"the adapter was trained with the template {trained}: --template={trained} asks it so")
    if SYSTEM.value is not None and template not in MANY_TURNS:
        raise InputError(f"--system: the template {template} has no place for it; say --template=guanaco or chat")
    return template


def _trained_template() -> str | None:
    """What the adapter's folder says of its training."""
    from qlora_jax.generate.trained import read_template

    adapter = MODEL.adapter_folder()
    return None if adapter is None else read_template(adapter)


def load(tokenizer: "Tokenizer", sampling: "Sampling") -> Setup:
    loaded = MODEL.load()
    eos_ids = sorted({*tokenizer.eos_ids, *loaded.model.config.eos_ids})
    return Setup(loaded.model, tokenizer, sampling, eos_ids)


def answer_one(setup: Setup, template: str, request: Any) -> int:
    """Prints one text as it is decoded."""
    from qlora_jax.generate.chat import Chat

    chat = Chat(setup.model, setup.tokenizer, template, setup.sampling, setup.eos_ids, note, STOP.value, SYSTEM.value)
    pieces = chat.answer(request)
    first = next(pieces, "")  # a mistake shows before anything is printed
    show((request.text if template == "plain" else "") + first)
    for piece in pieces:
        show(piece)
    show("\n")
    return 0


def answer_file(tokenizer: "Tokenizer", sampling: "Sampling", requests: list) -> int:
    """Answers a file's prompts that --out does not answer yet; each batch is written as it ends."""
    from qlora_jax.errors import InputError
    from qlora_jax.generate.answer_file import AnswerFile
    from qlora_jax.generate.answers import check_answered, prepare
    from qlora_jax.generate.prompting import bos_note

    settings = {
        **MODEL.identity(),
        "template": TEMPLATE.value,
        "system": SYSTEM.value,
        "stop": STOP.value,
        **dataclasses.asdict(sampling),
        "model_id": model_id(),
    }
    prepared = prepare(requests, tokenizer, settings, sampling.seed, TEMPLATE.value, SYSTEM.value)
    for said in sorted({said for prompt in prepared if (said := bos_note(tokenizer, prompt.template))}):
        note(said)
    if OUT.value is None:
        return write_answers(load(tokenizer, sampling), prepared, None)
    if Path(OUT.value).expanduser().absolute() == Path(str(PROMPTS.value)).expanduser().absolute():
        raise InputError(f"--out={OUT.value} is the file of prompts itself; choose another --out")
    file = AnswerFile(Path(OUT.value).expanduser(), settings, OVERWRITE.value, note)
    try:
        check_answered(prepared, file.rows, OUT.value)
        if len(file.rows) == len(prepared):
            note(f"{OUT.value} has the answers to all {len(prepared)} prompts; nothing to do (--overwrite begins anew)")
            return 0
        if file.rows:
            note(f"{OUT.value} has {len(file.rows)} of {len(prepared)} answers; going on after them")
        return write_answers(load(tokenizer, sampling), prepared, file)
    finally:
        file.close()


def write_answers(setup: Setup, prepared: "list[Prepared]", file: "AnswerFile | None") -> int:
    from tqdm import tqdm

    from qlora_jax.generate.answers import answer

    done = 0 if file is None else len(file.rows)
    cut = 0
    with tqdm(total=len(prepared), initial=done, unit="prompt", desc="generating") as bar:
        for rows in answer(
            setup.model,
            setup.tokenizer,
            prepared,
            setup.sampling,
            setup.eos_ids,
            BATCH_SIZE.value,
            STOP.value,
            model_id(),
            done,
            lambda answered, _: bar.update(done + answered - bar.n),
        ):
            cut += sum(row["reason"] == "context" for row in rows)
            if file is None:
                show("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            else:
                file.append(rows)
    if cut:
        note(f"{cut} answers cut short: the context of {setup.model.config.context} tokens is full")
    if file is not None:
        note(f"written: {file.path} ({len(file.rows)} answers)")
    return 0


def model_id() -> str:
    """--model_id, or the model's name and the adapter as the flags name them."""
    if MODEL_ID.value is not None:
        return MODEL_ID.value
    model = MODEL.model.value.rstrip("/")
    name = Path(model).name if Path(model).expanduser().is_dir() else model
    return f"{name}+{MODEL.adapter.value.rstrip('/')}" if MODEL.adapter.value else name


def converse(setup: Setup, template: str) -> int:
    """Reads messages and commands from stdin until its end."""
    from qlora_jax.generate.chat import Chat
    from qlora_jax.generate.conversation import Conversation

    chat = Chat(setup.model, setup.tokenizer, template, setup.sampling, setup.eos_ids, note, STOP.value, SYSTEM.value)
    return Conversation(chat, template, sys.stdin.isatty(), show, note).run()


def show(text: str) -> None:
    from qlora_jax.progress import for_terminal

    print(for_terminal(text), end="", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
