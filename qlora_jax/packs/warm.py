"""What packs of one process share: frozen models, tokenized data sets, compiled programs."""

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qlora_jax.checksums import Input
from qlora_jax.feed.load import LoadedData, load_data
from qlora_jax.io.folder import resolve
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.packs.step import Optimizer, over_members, pack_evaluation_of, steps_of
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.backward import compiler_options
from qlora_jax.train.memory import Program, memory_limit
from qlora_jax.train.setup import base_size, load_base

BASES = 8  # frozen models kept at a time; one alone on devices that state a memory limit
DATA_SETS = 32
PROGRAMS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen model, and what summaries say of it."""

    key: str
    graph: Any
    state: Any
    sizes: ModelConfig
    tokenizer: Tokenizer | None
    bytes: int
    bits_per_param: float  # of the linear layers
    params: int
    input: Input  # what model.path stood for

    def model(self) -> Decoder:
        """A model of its own on the same arrays."""
        return nnx.merge(self.graph, self.state)


class Warm:
    """Loads, reads and compiles at the first use; the least recently used goes first.

    Args:
      over: see over_members.
    """

    def __init__(self, over: str = "auto"):
        self.over = over_members(over)
        self._bases = _Kept(BASES if memory_limit() is None else 1)
        self._data = _Kept(DATA_SETS)
        self._programs = _Kept(PROGRAMS)

    def base(self, config: Any, say: Callable[[str], None]) -> Base:
        """The frozen model of a config."""
        key = _key(config.model.to_dict(), config.quant.to_dict(), bool(config.data.batches))

        def load() -> Base:
            folder = resolve(config.model.path, config.model.revision)
            tokenizer = None if config.data.batches else Tokenizer.from_folder(folder)
            model, made_of = load_base(config, folder, lambda done, total: None)
            graph, state = nnx.split(model)
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            bits, params = base_size(model)
            say(f"model: {config.model.path}: {params:,} parameters, {size / 2**20:,.1f} MiB, {bits:.3f} bits a weight")
            return Base(key, graph, state, model.config, tokenizer, size, bits, params, made_of)

        return self._bases.get(key, load)

    def data(self, config: Any, base: Base, say: Callable[[str], None]) -> tuple[LoadedData, str]:
        """A config's data, one object for equal settings, and a hash of its held-out examples."""

        def read() -> tuple[LoadedData, str]:
            sizes = base.sizes
            loaded = load_data(config.data, base.tokenizer, config.train.batch_size, sizes.V, sizes.context)
            for line in loaded.report:
                say(line)
            return loaded, _heldout_hash(loaded)

        where = (config.model.path, config.model.revision)
        return self._data.get(_key(config.data.to_dict(), where, config.train.batch_size), read)

    def programs(
        self, structure: Any, graph: Any, remat: str, config: Any, has_dropout: bool
    ) -> tuple[Program, Program]:
        """The programs that train and evaluate packs.

        Args:
          structure: hashable; equal where base, layers with adapters and largest rank are.
          graph: of lora.split, of a model that keeps what `remat` says.
          config: of a member; what its members share is read.
        """
        optimizer, chunk = Optimizer.of(config.optimizer), config.train.loss_chunk

        def steps() -> Program:
            function = steps_of(graph, optimizer, chunk, has_dropout, self.over)
            return Program(function, compiler_options(remat), donate_argnums=(0,))

        def evaluation() -> Program:
            return Program(pack_evaluation_of(graph, chunk, self.over))

        training = self._programs.get(("steps", structure, remat, chunk, optimizer, has_dropout), steps)
        return training, self._programs.get(("evaluation", structure, chunk), evaluation)


class _Kept:
    """Values by key, the most recently used `most` of them."""

    def __init__(self, most: int):
        self.most = most
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._values:
            while len(self._values) >= self.most:
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=list)


def _heldout_hash(data: LoadedData) -> str:
    digest = hashlib.sha256()
    for example in data.heldout:
        digest.update(len(example).to_bytes(8, "little") + example.tokens.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()
