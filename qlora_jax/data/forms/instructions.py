"""Rows of instruction sets: an instruction is given, its answer is learned.

Each function takes a row as the set's owners publish it and gives its examples. A row whose answer is there and blank
gives none (Alpaca's own file has some).
"""

from qlora_jax.data.fields import Pair, answered, bad, objects, text
from qlora_jax.data.prompts import (
    alpaca_prompt,
    chain_of_thought_answer,
    chain_of_thought_prompt,
    self_instruct_prompt,
    unnatural_prompt,
    user_message,
)
from qlora_jax.data.rows import Row

_GPT3_END = "<|endoftext|>"  # ends the completions of Self-Instruct; our examples end with the tokenizer's own EOS
_CHIP2_HUMAN, _CHIP2_BOT = "<human>: ", "\n<bot>: "

FLAN_COLUMNS = ("question", "answer", "rationale")  # of FLAN v2's chain-of-thought files, which have no header


def alpaca(row: Row) -> list[Pair]:
    """{instruction, input?, output}: Alpaca's prompt, and the output. Alpaca and alpaca-clean."""
    instruction = text(row, "instruction")
    given = text(row, "input", optional=True)
    return answered(alpaca_prompt(instruction, given), _answer(row, "output"), user_message(instruction, given))


def input_output(row: Row) -> list[Pair]:
    """{input, output}: as they are. The input may be empty. LongForm, and any set that brings its own prompts."""
    return answered(text(row, "input", blank=True), _answer(row, "output"))


def self_instruct(row: Row) -> list[Pair]:
    """{prompt, completion}, the finetuning rows; {instruction, instances: [{input, output}]}, the tasks; or
    {prompt, target}, an evaluation's prompts with the answers of its authors (a model's `response` is passed over).

    Prompts are taken as they are. A task gives an example for each of its instances.
    """
    if "instances" in row.fields:
        instruction = text(row, "instruction")
        pairs = []
        for instance in objects(row, "instances"):
            given = text(instance, "input", optional=True)
            prompt, message = self_instruct_prompt(instruction, given), user_message(instruction, given)
            pairs += answered(prompt, _answer(instance, "output"), message)
        return pairs
    if "prompt" not in row.fields:
        bad(row, "prompt", 'no field "prompt" (with completion) or "instances" (with instruction)')
    answer = "target" if "target" in row.fields and "completion" not in row.fields else "completion"
    return answered(text(row, "prompt"), _answer(row, answer).removesuffix(_GPT3_END))


def unnatural_instructions(row: Row) -> list[Pair]:
    """{instruction, instances: [{input, instruction_with_input, constraints?, output}], reformulations?: [the same]}.

    Every instance is an example, and so is every paraphrase where the file has them (the full data, not the core).
    """
    text(row, "instruction")
    instances = objects(row, "instances")
    if row.fields.get("reformulations"):
        instances += objects(row, "reformulations")
    pairs = []
    for instance in instances:
        prompt = unnatural_prompt(
            text(instance, "instruction_with_input"), text(instance, "constraints", optional=True)
        )
        pairs += answered(prompt, _answer(instance, "output"), prompt.strip())
    return pairs


def flan_v2(row: Row) -> list[Pair]:
    """{question, answer, rationale}, chain of thought, with line breaks written as `\\n`; or {inputs, targets} as they
    are, the rows of the whole collection with its templates filled in."""
    if "inputs" in row.fields:
        return answered(text(row, "inputs"), _answer(row, "targets"))
    if "question" not in row.fields:
        bad(row, "question", 'no field "question" (chain of thought) or "inputs" (the collection)')
    question, answer, rationale = (text(row, column).replace("\\n", "\n").strip() for column in FLAN_COLUMNS)
    prompt = chain_of_thought_prompt(question)
    return [Pair(prompt, chain_of_thought_answer(rationale, answer), prompt.strip())]


def dolly(row: Row) -> list[Pair]:
    """{instruction, context?, response}: Alpaca's prompt, the context as its input; or {prompt, answer} as they are."""
    if "prompt" in row.fields:
        return answered(text(row, "prompt"), _answer(row, "answer"))
    if "instruction" not in row.fields:
        bad(row, "instruction", 'no field "instruction" (with response) or "prompt" (with answer)')
    instruction, context = text(row, "instruction"), text(row, "context", optional=True)
    return answered(alpaca_prompt(instruction, context), _answer(row, "response"), user_message(instruction, context))


def chip2(row: Row) -> list[Pair]:
    """{text: "<human>: question\\n<bot>: answer"}: both without their labels, as the paper has it.

    Raises:
      InputError: the text is not one question and one answer.
    """
    whole = text(row, "text")
    question, *answers = whole.split(_CHIP2_BOT)
    if not question.startswith(_CHIP2_HUMAN) or not answers:
        bad(row, "text", f'expected text as "<human>: question\\n<bot>: answer", found {whole[:40]!r}')
    question = question.removeprefix(_CHIP2_HUMAN)
    if len(answers) > 1 or "\n<human>: " in whole:
        bad(row, "text", "expected one question and one answer, found a longer conversation; cut it into rows")
    return answered(question, answers[0])


def _answer(row: Row, field: str) -> str:
    return text(row, field, blank=True)
