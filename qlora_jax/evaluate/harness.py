"""EleutherAI's lm-eval on our models: every task of the harness runs on a 4-bit base with an adapter.

BOS as the harness's own model of transformers has it for a Llama: before every context, not twice where the text
begins with it, and alone as the context of what has none. In `loglikelihood_rolling` BOS is the first window's context
and is not scored itself, as the harness documents it. (Its model of transformers puts a second BOS there, and adds that
token's log-probability.) Control tokens written out in a context, as chat templates do, are control tokens.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qlora_jax.errors import InputError
from qlora_jax.evaluate.scoring import ScoredTokens, token_scores
from qlora_jax.generate.decode import complete
from qlora_jax.generate.sampling import Sampling
from qlora_jax.models.decoder import Decoder
from qlora_jax.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say
GENERATED_TOGETHER = 16  # prompts, where no batch size is given
# Where a task writes out that it asks for nothing special
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "top_k": 0, "min_p": 0.0}
_END = "\uf8f2"  # private use: marks where a message that goes on ends in a template's text


class HarnessModel(TemplateLM):
    """What lm_eval asks of a model.

    Args:
      model: any adapter on it counts, without dropout.
      tokenizer: the model's.
      name: of the tokenizer, where the harness keeps requests.
      context: tokens seen at once; the model's own context if None.
      batch_size: sequences together; by length if None.
      seed: of sampled answers.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        name: str = "",
        context: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.tokenizer, self._name = model, tokenizer, name
        self._tokenizer, self._batch_size, self._seed = tokenizer, batch_size, seed
        self.max_length = model.config.context if context is None else context
        if not 2 <= self.max_length <= model.config.context:
            raise InputError(f"context is {context}; expected 2 to the model's {model.config.context} tokens")

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        template = hashlib.sha256((self._tokenizer.chat_template or "").encode()).hexdigest()[:16]
        return f"{self._name}-{template}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as transformers gives them: after what the tokenizer puts before a text, unless add_special_tokens is
        False, or is None and the text begins with BOS."""
        ids, V = self._tokenizer.encode_marked(string), self.model.config.V
        if max(ids, default=0) >= V:
            raise InputError(f"token id {max(ids)}, but the model's vocabulary is 0 to {V - 1} (is it its tokenizer?)")
        begun = add_special_tokens is None and ids[:1] == [self._tokenizer.bos_id]
        return ids if begun or add_special_tokens is False else [*self._tokenizer.prefix, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each continuation; a context too long for the model loses its beginning."""
        sequences = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens; the model's context is {self.max_length}"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            sequences.append(ScoredTokens(tokens, len(tokens) - len(continuation)))
        with tqdm(total=len(sequences), desc="scoring", unit="request", disable=disable_tqdm, delay=2) as bar:
            scores = token_scores(self.model, sequences, self._batch_size, lambda done, total: bar.update(done - bar.n))
        found = [(float(s.logprobs.sum(dtype="float64")), bool(s.greedy.all())) for s in scores]
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context whose first token is context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            fresh = [(None, *make_disjoint_window(window)) for window in cut]
            windows, counts = windows + fresh, [*counts, len(fresh)]
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        found = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string, the end token or the task's number of tokens."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answering", unit="request", disable=disable_tqdm, delay=2) as bar:
            for numbers in groups.values():
                sampling, until = self._sampling(requests[numbers[0]].args[1])
                texts = self._generate([requests[number].args[0] for number in numbers], sampling, until)
                found |= dict(zip(numbers, texts, strict=True))
                bar.update(len(numbers))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], sampling: Sampling, until: list[str]) -> list[str]:
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"the task generates {sampling.max_new_tokens} tokens, the model's context is {self.max_length}: "
                "set max_gen_toks in the task's generation_kwargs, or --gen_kwargs=max_gen_toks=N"
            )
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]

        def stopped(number: int, tokens: Sequence[int]) -> bool:
            return any(stop in self._tokenizer.decode(tokens) for stop in until)

        batch_size = self._batch_size or GENERATED_TOGETHER
        done = complete(self.model, prompts, sampling, self._tokenizer.eos_ids, batch_size, stopped)
        return [postprocess_generated_text(self._tokenizer.decode(one.tokens), until, None) for one in done]

    def _sampling(self, wanted: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """A task's generation_kwargs as our sampling, and its stop strings.

        Raises:
          InputError: it asks for what we do not have.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(wanted, MAX_NEW_TOKENS))
        until = [stop for stop in settings.pop("until") if stop]
        sampled = settings.pop("do_sample")
        temperature = float(settings.pop("temperature", 1.0)) if sampled else 0.0
        settings.pop("temperature", None)
        chosen = {"top_p": float(settings.pop("top_p", 1.0)), "max_new_tokens": settings.pop("max_gen_toks")}
        known = {field.name for field in dataclasses.fields(Sampling)}
        for name, value in settings.items():
            if name in known:
                chosen[name] = value
            elif sampled and name not in _NEUTRAL or _NEUTRAL.get(name, value) != value:
                raise InputError(f"the task's generation_kwargs ask for {name} = {value!r}, which is not supported")
        return Sampling(temperature=temperature, seed=self._seed, **chosen), until

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it; else its last message, an answer's beginning, goes on."""
        if add_generation_prompt:
            return self._tokenizer.apply_chat_template(chat_history)
        *before, last = chat_history
        marked = [*before, {**last, "content": last["content"] + _END}]
        return self._tokenizer.apply_chat_template(marked, add_generation_prompt=False).partition(_END)[0]
