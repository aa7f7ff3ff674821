"""The flags of commands that take a run: --config, or --model and --data in its place."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from experiments.support import cli
from qlora_jax.config_file import known_files
from qlora_jax.errors import InputError

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()


class RunFlags(NamedTuple):
    config: flags.FlagHolder
    model: flags.FlagHolder
    data: flags.FlagHolder

    def has_file(self) -> bool:
        """Whether --config names a file. What that leaves open is as the file has it."""
        return bool(cli.config_path())

    def read(self, needs_data: bool) -> tuple[Any, set[str]]:
        """The config with --model and --data in it, and the keys that the user set.

        Raises InputError where neither a file nor a model (and data) is named.
        """
        config, given = self.config.value, set(cli.overridden())
        for flag, section in ((self.model, config.model), (self.data, config.data)):
            if flag.value is not None:
                section.path = flag.value
                given.add("model.path" if flag is self.model else "data.path")
        if self.has_file():
            return config, given
        missing = [] if config.model.path else ["--model=DIR_OR_NAME"]
        if needs_data and not config.data.path and not config.data.batches:
            missing.append("--data=FILE")
        if missing:
            files = ", ".join(map(str, known_files()))
            raise InputError(f"missing flag {' and '.join(missing)}, or --config=FILE; there are {files}")
        return config, given

    def fill(self, config: Any, given: set[str], say: Callable[[str], None]) -> None:
        """Chooses what was not said, where no file says it."""
        from qlora_jax.api.recipe import fill

        if not self.has_file():
            fill(config, given, say)


def run_flags() -> RunFlags:
    """Defines the flags for the calling command."""
    return RunFlags(
        cli.config_flag(optional=True),
        flags.DEFINE_string("model", None, "checkpoint folder, hub name, or quickstart (comes with the package)"),
        flags.DEFINE_string("data", None, "data file or set, its format found from its rows; as data.path of a config"),
    )
