"""A conversation with a model: answers stream as they are decoded, and the cache is kept from turn to turn."""

from collections.abc import Callable, Generator, Sequence

from qlora_jax.generate.decode import Decoding, check_prompt, room_for
from qlora_jax.generate.prompting import MANY_TURNS, Answer, Request, prompt_ids, system_turn
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.seeds import draws_of
from qlora_jax.models.decoder import Decoder
from qlora_jax.text.chat_prompt import answered
from qlora_jax.text.tokenizer import Tokenizer

STEPS = 8  # tokens between two pieces of text


class Chat:
    """Asks, answers and remembers.

    Args:
      template: one of prompting.TEMPLATES; plain and alpaca take each message by itself.
      say: takes notes for the user (what was forgotten, where an answer was cut).
      stops: texts that end an answer, beside the template's own.
    Attributes:
      turns: the conversation so far, {"role", "content", "reasoning_content"?}.
      system: the system line of the next answers, for templates of many turns; None is the template's own.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        template: str,
        sampling: Sampling,
        eos_ids: Sequence[int],
        say: Callable[[str], None] = lambda note: None,
        stops: Sequence[str] = (),
        system: str | None = None,
    ):
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._eos_ids, self._say = sampling, eos_ids, say
        self._stops = tuple(stops)
        self._decoding: Decoding | None = None
        self._answers = 0  # a new answer has new random keys, also to the same question
        self.turns: list[dict[str, str]] = []
        self.system = system

    def reset(self) -> None:
        """Forgets the conversation, not the system line; the next answer is drawn like the first."""
        self.turns, self._answers = [], 0

    def answer(self, request: Request) -> Generator[str]:
        """Pieces of the answer's text as they are decoded.

        The turn is remembered when the answer is complete, or with what came until the caller closes the iterator.

        Raises:
          InputError: the message alone does not fit the model's context, or the template refuses it.
        """
        prompt = self._fitting(request)
        decoding = self._read(prompt)
        self._answers += 1
        text, shown = Answer(self._tokenizer, self._template, prompt, self._stops), ""
        try:
            while not decoding.done:
                piece = text.push(decoding.step(STEPS)[0])
                if text.stopped and not decoding.done:
                    decoding.finish(0, "stop")
                shown += piece
                if piece:
                    yield piece
            rest = text.flush()
            shown += rest
            if rest:
                yield rest
            if decoding.ends()[0][1] == "context" and not text.stopped:
                self._say(f"(cut short: the model's context of {self._model.config.context} tokens is full)")
        except KeyboardInterrupt:
            self._decoding = None  # interrupted in a device call, its cache may be gone
            raise
        finally:
            if self._template in MANY_TURNS:
                asked = [*self.turns, {"role": "user", "content": request.message}]
                said = {"role": "assistant", "content": shown.strip()}
                if self._template == "chat" and not text.stopped:  # word for word, and its reasoning apart
                    said = answered(self._tokenizer, [*system_turn(self.system), *asked], prompt, decoding.tokens[0])
                self.turns = [*asked, said]

    def _fitting(self, request: Request) -> list[int]:
        """The prompt's ids, with the oldest turns forgotten where the answer would find no room."""
        context = self._model.config.context
        needed = min(self._sampling.max_new_tokens, context // 4)
        forgotten = 0
        while True:
            prompt = prompt_ids(self._tokenizer, self._template, request, [*system_turn(self.system), *self.turns])
            if len(prompt) + needed <= context or not self.turns:
                break
            self.turns = self.turns[2:]
            forgotten += 1
        if forgotten:
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            self._say(f"(the oldest {turns} forgotten: the model's context is {context} tokens)")
        check_prompt(prompt, self._model, "the message")
        return prompt

    def _read(self, prompt: list[int]) -> Decoding:
        """The prompt in the cache. Room grows by doubling, so that few programs are compiled in a long conversation."""
        room = room_for(self._model, len(prompt), self._sampling.max_new_tokens)
        room = min(1 << (room - 1).bit_length(), room_for(self._model, self._model.config.context, 0))
        earlier, self._decoding = self._decoding, None  # its cache is used up, even if reading is interrupted
        draws = draws_of(prompt, self._sampling.seed, self._answers)
        self._decoding = Decoding(self._model, [prompt], self._sampling, self._eos_ids, [draws], room, earlier=earlier)
        return self._decoding
