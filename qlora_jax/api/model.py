"""A model in a Python process: loaded once, finetuned, asked, saved.

The base is read once and stays as it was read: an adapter is put on a copy that shares its arrays. So finetuning and
asking again load nothing again, and the device holds one base.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from qlora_jax.api import opening
from qlora_jax.api.hub import push_folder
from qlora_jax.base import get_config
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.generate import answers
from qlora_jax.generate.chat import Chat
from qlora_jax.generate.conversation import Conversation
from qlora_jax.generate.prompting import MANY_TURNS, TEMPLATES, Request, check_stops
from qlora_jax.generate.requests import request_of
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.trained import read_template
from qlora_jax.io.folder import resolve
from qlora_jax.io.load import load_config
from qlora_jax.io.merge import copy_adapter, merge_folder
from qlora_jax.io.peft import load_adapter
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.roberta.encoder import check_kind
from qlora_jax.progress import Progress
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.checks import check_values
from qlora_jax.train.setup import Base, load_base, quantization

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
# Keys of a config that say how a model is loaded; all others are a run's.
LOADED = (
    "model.path", "model.revision", "model.compute_dtype", "model.kernel", "quant.format", "quant.block_size",
    "quant.double_quant",
)  # fmt: skip


def load(
    model: str | Path,
    quant: str | None = None,
    adapter: str | Path | None = None,
    *,
    block_size: int | None = None,
    revision: str = "main",
    compute_dtype: str | None = None,
    kernel: str = "auto",
) -> "Model":
    """Loads a model, with its linear layers in 4 bits, tensor by tensor.

    Args:
      model: folder of a Hugging Face checkpoint, a gs:// or s3:// address, a hub name (owner/name), or "quickstart",
        a Llama of 2.6 million parameters that comes with the package.
      quant: how linear layers are kept: none, int8, nf4, fp4, int4, fp4-e3m0, also nf4+dq (8-bit scales), and so on.
        None takes a quantized folder as it is, and nf4+dq for another.
      adapter: PEFT folder, such as a run's WORKDIR/adapter, or a hub name.
      block_size: values that share a scale; 64, or the folder's own, by default.
      revision: branch, tag or commit of a hub name.
      compute_dtype: float32 or bfloat16, of activations; float32 on CPUs, else bfloat16, by default.
      kernel: of the 4-bit matmul, as model.kernel of a config.
    Raises:
      InputError: there is no such model or adapter, or they do not fit.
    """
    if quant is not None and quant not in opening.QUANTS:
        raise InputError(f"quant is {quant!r}; expected one of {', '.join(opening.QUANTS)}")
    folder = resolve(str(model), revision)
    check_kind(load_config(folder), encoder=False)
    spec = opening.choose_quant(folder, quant, block_size, otherwise="nf4+dq")
    config = get_config()
    config.model.update(path=str(model), revision=revision, kernel=kernel)
    config.model.compute_dtype = compute_dtype or opening.default_dtype()
    config.quant.update(format=spec.format, block_size=spec.block_size, double_quant=spec.double_quant)
    check_values(config)
    place = None if adapter is None else resolve(str(adapter))
    residual = opening.check_adapter(place, spec)
    tokenizer = opening.find_tokenizer(folder, place)
    with Progress("loading", unit="tensor") as loading:
        base = load_base(config, folder, loading.to)
    loaded = Model(config, folder, base, tokenizer)
    if place is not None:
        loaded._put(place, takes_base=bool(residual))
        loaded.loaded_adapter = place
    return loaded


class Model:
    """Made by `load`.

    Attributes:
      name: as the user called it. folder: where its files are.
      tokenizer: of the adapter where it has one of its own, else of the model.
      adapter: folder of the adapter that answers, or None; a finetuning puts its own there.
      template: how `generate` and `chat` ask (plain, alpaca, guanaco or chat): as the adapter was trained, else by the
        model's chat template where it has one, else plain. May be set.
    """

    def __init__(self, config: Any, folder: Path, base: Base, tokenizer: Tokenizer):
        self.config = config  # its sections model and quant say how the base was loaded
        self.name, self.folder = config.model.path, folder
        self.adapter: Path | None = None
        self.template = "chat" if tokenizer.chat_template else "plain"
        self._base: Base | None = base
        self.loaded_adapter: Path | None = None  # that `load` was given: a finetuning begins there
        self._llama = base.model
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        sizes = self._llama.config
        parts = [f"{self.name!r}", f"{sizes.L} layers of width {sizes.D}", str(quantization(self.config))]
        parts += [f"computing in {self.config.model.compute_dtype}"]
        parts += [f"adapter {str(self.adapter)!r}"] if self.adapter is not None else ["no adapter"]
        return f"Model({', '.join(parts)}, template {self.template!r})"

    @property
    def base(self) -> Base:
        """The model as it was loaded, without an adapter.

        Raises InputError where the adapter took a part of it out (PiSSA, OLoRA).
        """
        if self._base is None:
            raise InputError(
                f"the adapter {self.adapter} took its part out of the base (PiSSA, OLoRA): load the model again "
                "without it to finetune, or let the train command start from it (lora.init_from)"
            )
        return self._base

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        system: str | None = None,
        template: str | None = None,
        batch_size: int = 16,
    ) -> Any:
        """Answers: the new text of a prompt, or a list of them for a list of prompts.

        Args:
          prompts: a text; a dict {"instruction", "input"} or {"messages"}; or a list of these. A list of messages
            {"role", "content"} is one conversation.
          max_new_tokens, temperature, top_p, top_k, min_p: of sampling; temperature 0 is greedy.
          stop: texts that end an answer and are not shown.
          seed: of sampling; an answer depends on it and its own prompt, not on its batch.
          system: system line, for the templates guanaco and chat.
          template: plain, alpaca, guanaco or chat; by default `self.template`.
          batch_size: prompts decoded together.
        Raises:
          InputError: a prompt does not fit the model's context, or has no place in the template.
        """
        stops = [stop] if isinstance(stop, str) else list(stop)
        check_stops(stops)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, top_k=top_k, min_p=min_p)
        one = isinstance(prompts, str | Mapping) or _is_conversation(prompts)
        asked: list[Any] = [prompts] if one else list(prompts)
        requests = [_request(prompt, number) for number, prompt in enumerate(asked, 1)]
        prepared = answers.prepare(requests, self.tokenizer, {}, seed, self._template(template), system)
        ends = opening.eos_ids(self._llama, self.tokenizer)
        texts: list[str] = []
        with Progress("generating", len(prepared), unit="prompt") as bar:
            for rows in answers.answer(
                self._llama, self.tokenizer, prepared, sampling, ends, batch_size, stops, progress=bar.to
            ):
                texts += [row["text"] for row in rows]
        return texts[0] if one else texts

    def chat(
        self,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> None:
        """A conversation at the terminal or in a notebook; /help lists its commands, /quit ends it."""
        name = self._template(template)
        if system is not None and name not in MANY_TURNS:
            raise InputError(f"system: the template {name} has no place for it; say template='guanaco' or 'chat'")
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        ends = opening.eos_ids(self._llama, self.tokenizer)
        chat = Chat(self._llama, self.tokenizer, name, sampling, ends, _note, (), system)
        interactive = sys.stdin.isatty() or "ipykernel" in sys.modules
        Conversation(chat, name, interactive, lambda text: print(text, end="", flush=True), _note).run()

    def save_adapter(self, out: str | Path, overwrite: bool = False) -> Path:
        """The adapter as a PEFT folder, with how it is asked and the tokenizer it needs; returns the folder.

        Raises InputError where there is no adapter, or `out` is there and not empty.
        """
        folder = Path(out).expanduser()
        copy_adapter(self._adapter(), folder, overwrite)
        return folder

    def push_adapter(self, repo: str, private: bool = True, message: str = "Adapter trained with qlora_jax") -> str:
        """Uploads the adapter to the Hugging Face hub as `repo` (owner/name); returns its address.

        Who uploads is said by HF_TOKEN, or by `hf auth login`. Raises InputError where the hub refuses.
        """
        return push_folder(self._adapter(), repo, private, message)

    def merge(self, out: str | Path, dtype: str = "bfloat16", overwrite: bool = False) -> Path:
        """A whole 16-bit checkpoint, the adapter added to the values of the 4-bit weights it was trained beside.

        Raises InputError where there is no adapter, or `out` is there and not empty.
        """
        folder = Path(out).expanduser()
        with Progress("merging", unit="tensor") as bar:
            merge_folder(
                self.folder,
                self._adapter(),
                folder,
                quantization(self.config),
                dtype=dtype,
                overwrite=overwrite,
                progress=bar.to,
            )
        return folder

    def answer_with(self, adapter: Path) -> None:
        """Takes an adapter for this base, in place of the one before."""
        self._put(adapter, takes_base=False)

    def _put(self, adapter: Path, takes_base: bool) -> None:
        base = self.base
        model = nnx.merge(*nnx.split(base.model))
        with Progress("adapter", unit="weight") as bar:
            load_adapter(model, adapter, bar.to)
        self.tokenizer = opening.find_tokenizer(self.folder, adapter)
        self._llama, self.adapter = model, adapter.absolute()  # wherever the process goes from here
        self.template = read_template(adapter) or ("chat" if self.tokenizer.chat_template else "plain")
        if takes_base:
            self._base = None  # its arrays became the adapted model's

    def _adapter(self) -> Path:
        if self.adapter is None:
            raise InputError("the model has no adapter: finetune it (qj.finetune), or load it with adapter=DIR")
        return self.adapter

    def _template(self, asked: str | None) -> str:
        name = asked or self.template
        if name not in TEMPLATES:
            raise InputError(f"template is {name!r}; expected one of {', '.join(TEMPLATES)}")
        return name

    @property
    def llama(self) -> Decoder:
        """The model that answers, as a Flax module: hidden, cache = model.llama(tokens)."""
        return self._llama


def _is_conversation(prompts: Any) -> bool:
    return (
        isinstance(prompts, list | tuple)
        and bool(prompts)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in prompts)
    )


def _request(prompt: Any, number: int) -> Request:
    where = f"prompt {number}"
    if isinstance(prompt, str):
        return Request(prompt, where=where)
    if _is_conversation(prompt):
        prompt = {"messages": [dict(turn) for turn in prompt]}
    if not isinstance(prompt, Mapping):
        raise InputError(f"{where} is {type(prompt).__name__}; expected text, a dict, or a list of messages")
    return request_of(Row("prompts", number, dict(prompt), unit="prompt"))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
