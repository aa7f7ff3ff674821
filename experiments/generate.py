"""Continues prompts, or chats: python -m experiments.generate --model=DIR --prompt="Once upon a time" --temperature=0

Three ways: one --prompt; a file of --prompts (.txt, one a line; or JSON, JSONL, CSV, Parquet with a field "prompt", or
with "instruction" and "input"), answered as JSONL {"prompt", "text"} to --out or stdout; or, without either, a chat
(/reset forgets the conversation, Ctrl-D ends it; a line of piped input is a message).
stdout gets text alone: with --prompt and --template=plain the prompt and its continuation, with other templates, in
JSONL and in a chat the new text. Everything else goes to stderr.
Templates: plain gives the text as it is, alpaca and guanaco wrap it as these models are trained, chat is the
tokenizer's own. Default: plain; alpaca for rows with "instruction"; in a chat the tokenizer's own, else guanaco.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from experiments.model_flags import model_flags

if TYPE_CHECKING:
    from qlora_jax.data.tokenizer import Tokenizer
    from qlora_jax.generate.sampling import Sampling
    from qlora_jax.models.llama import Llama

MODEL = model_flags()
PROMPT = flags.DEFINE_string("prompt", None, 'text to continue, or to answer; "" begins with BOS alone')
PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts")
OUT = flags.DEFINE_string("out", None, "JSONL file for the answers to --prompts; stdout by default")
TEMPLATE = flags.DEFINE_enum("template", None, ["plain", "alpaca", "guanaco", "chat"], "what is put around a prompt")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "tokens of an answer at most")
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of sampling; 0 is greedy")
TOP_P = flags.DEFINE_float("top_p", 0.9, "probability of the nucleus that is sampled from; 1 keeps every token")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "prompts decoded together")


@dataclasses.dataclass(frozen=True)
class Setup:
    model: "Llama"
    tokenizer: "Tokenizer"
    sampling: "Sampling"
    eos_ids: list[int]


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.generate.prompting import Request, prompt_ids, read_requests
    from qlora_jax.generate.sampling import Sampling

    if PROMPT.value is not None and PROMPTS.value is not None:
        raise InputError("--prompt and --prompts exclude each other; give one of them")
    if OUT.value is not None and PROMPTS.value is None:
        raise InputError("--out is for the answers to --prompts=FILE; without it text goes to stdout")
    if OUT.value is not None and Path(OUT.value).is_dir():
        raise InputError(f"--out={OUT.value} is a folder; expected a file to write JSONL to")
    if BATCH_SIZE.value < 1:
        raise InputError(f"--batch_size is {BATCH_SIZE.value}; expected at least 1")
    # what is cheap to read is checked before the model is loaded
    sampling = Sampling(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value)
    requests = read_requests(PROMPTS.value) if PROMPTS.value is not None else []
    tokenizer = MODEL.tokenizer()
    if TEMPLATE.value == "chat":
        prompt_ids(tokenizer, "chat", Request("?"))
    loaded = MODEL.load()
    eos_ids = sorted({*tokenizer.eos_ids, *loaded.model.config.eos_ids})
    setup = Setup(loaded.model, tokenizer, sampling, eos_ids)
    if PROMPT.value is not None:
        return answer_one(setup, TEMPLATE.value or "plain", PROMPT.value)
    if PROMPTS.value is not None:
        return answer_file(setup, requests)
    return converse(setup, TEMPLATE.value or ("chat" if tokenizer.chat_template else "guanaco"))


def answer_one(setup: Setup, template: str, prompt: str) -> int:
    """Prints one text as it is decoded."""
    from qlora_jax.generate.chat import Chat
    from qlora_jax.generate.prompting import Request

    chat = Chat(setup.model, setup.tokenizer, template, setup.sampling, setup.eos_ids, note)
    pieces = chat.answer(Request(prompt))
    first = next(pieces, "")  # a mistake shows before anything is printed
    show((prompt if template == "plain" else "") + first)
    for piece in pieces:
        show(piece)
    show("\n")
    return 0


def answer_file(setup: Setup, requests: list) -> int:
    """Answers all prompts of a file in batches and writes them in the file's order."""
    from tqdm import tqdm

    from qlora_jax.generate.decode import check_prompt, complete
    from qlora_jax.generate.prompting import Answer, answer_text, prompt_ids

    templates = [TEMPLATE.value or ("alpaca" if request.instruction else "plain") for request in requests]
    prompts = [
        prompt_ids(setup.tokenizer, template, request) for template, request in zip(templates, requests, strict=True)
    ]
    for request, prompt in zip(requests, prompts, strict=True):
        check_prompt(prompt, setup.model, f"the prompt {request.text[:40]!r}")

    def stop(number, tokens) -> bool:
        answer = Answer(setup.tokenizer, templates[number], prompts[number])
        answer.push(tokens)
        return answer.stopped

    with tqdm(total=len(prompts), unit="prompt", desc="generating") as bar:
        answers = complete(
            setup.model,
            prompts,
            setup.sampling,
            setup.eos_ids,
            BATCH_SIZE.value,
            stop,
            lambda done, _: bar.update(done - bar.n),
        )
    lines = []
    for request, template, prompt, answer in zip(requests, templates, prompts, answers, strict=True):
        text = answer_text(setup.tokenizer, template, prompt, answer.tokens)
        lines.append(json.dumps({"prompt": request.message, "text": text}, ensure_ascii=False) + "\n")
    cut = sum(answer.reason == "context" for answer in answers)
    if cut:
        note(f"{cut} of {len(answers)} answers cut short: the context of {setup.model.config.context} tokens is full")
    write_lines(lines)
    return 0


def write_lines(lines: list[str]) -> None:
    if OUT.value is None:
        show("".join(lines))
        return
    out = Path(OUT.value).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, out)
    note(f"written: {out} ({len(lines)} answers)")


def converse(setup: Setup, template: str) -> int:
    """Reads messages from stdin until its end; at a terminal Ctrl-C ends an answer, not the chat."""
    from qlora_jax.errors import InputError
    from qlora_jax.generate.chat import Chat
    from qlora_jax.generate.prompting import Request

    interactive = sys.stdin.isatty()
    if interactive:
        note(f"chat (template {template}): /reset forgets the conversation, Ctrl-C ends an answer, Ctrl-D the chat")
    chat = Chat(setup.model, setup.tokenizer, template, setup.sampling, setup.eos_ids, note)
    while (message := read_message(interactive)) is not None:
        if message == "/reset":
            chat.reset()
            note("(conversation forgotten)")
        elif message:
            pieces = chat.answer(Request(message))
            try:
                for piece in pieces:
                    show(piece)
            except KeyboardInterrupt:
                if not interactive:
                    raise
            except InputError as error:
                if not interactive:
                    raise
                note(f"error: {error}")
            finally:
                pieces.close()
            show("\n")
    return 0


def read_message(interactive: bool) -> str | None:
    """The next line of stdin, None at its end."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def show(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
