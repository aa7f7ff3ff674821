"""What every command shares: flags, the config flag, one-line errors, exit statuses, quiet libraries.

    from absl import flags
    from experiments import cli

    CONFIG = cli.config_flag()
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)

    def main() -> None:
        print(CONFIG.value.train.steps, WORKDIR.value)

    if __name__ == "__main__":
        cli.run(main)

Exit statuses: 0 done; 1 a mistake of ours, with its traceback; 2 a mistake that the user can mend, in one line on
stderr; 130 interrupted. `--only_check_args` reads flags and config and exits before `main`.
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from experiments.support import help, process
from experiments.support.command import this_command
from qlora_jax.base import get_config
from qlora_jax.config_file import REPOSITORY, call, known_files, load_config, override
from qlora_jax.errors import InputError, full_disk_said
from qlora_jax.settings import SECTIONS

__all__ = ["call", "config_flag", "config_path", "load_config", "override", "run"]

FLAGS = flags.FLAGS
FLAG = "config"
HELP = {"--help", "-help", "-h", "-?", "--helpshort", "-helpshort"}
HELP_FULL = {"--helpfull", "-helpfull"}
# flags defined in here belong to the command that calls
flags.disclaim_key_flags()


class _ConfigParser(flags.ArgumentParser):
    """Turns the path of a config file into its locked ConfigDict."""

    def __init__(self, default: str | None, optional: bool) -> None:
        self.default_path, self.optional = default, optional
        self.path = ""
        self.overridden: list[str] = []

    def parse(self, argument: str) -> ConfigDict:
        self.path = argument
        return load_config(argument)

    def flag_type(self) -> str:
        return "config file"


def config_flag(default: str | None = None, optional: bool = False) -> flags.FlagHolder:
    """Defines `--config=FILE` and `--config.section.key=value`; `.value` is the ConfigDict with the overrides in it.

    Args:
      default: config file that is used when none is given, relative to the repository; None makes the flag required.
      optional: none need be given: then the value is the library's base with the overrides in it.
    """
    text = "config file; --config.SECTION.KEY=VALUE overrides a key (see configs/base.py for all keys and units)"
    # absl reads a default where the flag is defined, before errors are caught: it is read with the other flags instead
    return flags.DEFINE(_ConfigParser(default, optional), FLAG, None, text)


def config_path() -> str:
    """The file that --config names; "" where it is optional and names none."""
    parser = _parser()
    return parser.path or ("" if parser.optional else str(REPOSITORY / (parser.default_path or "")))


def overridden() -> list[str]:
    """The keys that were set by --config.SECTION.KEY=VALUE."""
    return _parser().overridden


def _parser() -> _ConfigParser:
    parser = FLAGS[FLAG].parser
    assert isinstance(parser, _ConfigParser)
    return parser


def run(main: Callable[[], int | None]) -> None:
    """Reads the flags, calls `main` and exits with its result (None is 0)."""
    process.prepare()
    try:
        app.run(full_disk_said()(lambda _: main()), flags_parser=_read_flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # a terminal shows ^C and perhaps half a progress bar on this line
        begin = "\n" if sys.stderr.isatty() else ""
        print(f"{begin}interrupted; run the same command again to go on:\n  {this_command()}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # who read our output has closed it (`| head`); the interpreter's last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _read_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with every error as an InputError."""
    if (HELP | HELP_FULL) & set(argv[1:]):
        print(_help(argv[0], whole=bool(HELP_FULL & set(argv[1:]))))
        sys.exit(0)
    try:
        arguments = FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
        overrides: list[tuple[str, str]] = []
        if FLAG in FLAGS:
            arguments, overrides = _take_overrides(arguments)
        rest = FLAGS([argv[0], *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"unknown flag --{error.flagname}{_like(error.flagname, argv[0])}") from error
    except flags.Error as error:
        mistake = error.__cause__ or error.__context__
        raise mistake if isinstance(mistake, InputError) else InputError(_one_line(error)) from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags are --name=value, values with spaces are quoted")
    if FLAG in FLAGS:
        _complete_config(overrides)
    if FLAGS["only_check_args"].value:  # absl's flag; absl itself heeds it only once a process
        sys.exit(0)
    _quieten()
    return [argv[0]]


def _take_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits off `--config.key=value`, `--config.key value`, `--config.key` (true) and `--noconfig.key` (false)."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    while arguments:
        argument, *arguments = arguments
        if argument == "--":
            return [*rest, argument, *arguments], overrides
        match = re.fullmatch(rf"--?(no)?{FLAG}\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        negated, key, value = match.groups()
        if negated:
            value = "false"
        elif value is None and arguments and not arguments[0].startswith("--"):
            value, *arguments = arguments
        overrides.append((key, "true" if value is None else value))
    return rest, overrides


def _complete_config(overrides: list[tuple[str, str]]) -> None:
    """Reads the default file where none was given, and applies the overrides."""
    parser = _parser()
    if FLAGS[FLAG].value is None:
        if parser.optional:
            FLAGS[FLAG].value = get_config()
        elif parser.default_path is None:
            raise InputError(f"missing flag --{FLAG}=FILE; there are {', '.join(map(str, known_files()))}")
        else:
            FLAGS[FLAG].value = load_config(str(REPOSITORY / parser.default_path))
    parser.overridden = [key for key, _ in overrides]
    override(FLAGS[FLAG].value, overrides, prefix=f"--{FLAG}.")


def _like(name: str, program: str) -> str:
    known = [flag.name for flag in FLAGS.get_key_flags_for_module(program)]
    if FLAG in FLAGS and name.partition(".")[0] in SECTIONS:
        return f"; did you mean --{FLAG}.{name}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean --{close[0]}?"
    return f"; the flags are {', '.join('--' + flag for flag in known)}" if known else ""


def _one_line(error: flags.Error) -> str:
    """absl's message without its repetitions: "flag --n=x: invalid literal ..." -> "--n=x: expected an int"."""
    text = " ".join(str(error).split()).removeprefix("ERROR:: ")
    missing = re.findall(r"Flag --(\S+) must have a value other than None", text)
    if missing:
        names = dict.fromkeys(missing)
        return f"missing flag{'s' * (len(names) > 1)} {', '.join(f'--{name}=...' for name in names)} (--help says more)"
    if isinstance(error, flags.IllegalFlagValueError):
        match = re.match(r"flag --([^=\s]+)=(.*?): ", text)
        kind = FLAGS[match[1]].flag_type() if match and match[1] in FLAGS else None
        if match and ("invalid literal" in text or "could not convert" in text):
            return f"--{match[1]}={match[2]}: expected {'an int' if kind == 'int' else f'a {kind}'}"
        return text.removeprefix("flag ")
    return text[:1].lower() + text[1:]


def _quieten() -> None:
    """Keeps libraries' log lines off the terminal, unless --verbosity asks for them; our warnings are plain lines."""
    if FLAGS["verbosity"].present:
        return
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("qlora_jax").setLevel(logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))


def _help(program: str, whole: bool) -> str:
    """The command's docstring and its own flags, in the order in which it defines them."""
    doc, own = sys.modules["__main__"].__doc__ or "", own_flags(program)
    if not whole:
        return help.screen(doc, own)
    names = {flag.name for flag in own}
    texts = [
        f"  --{flag.name}: {' '.join((flag.help or '').split())}"
        for found in FLAGS.flags_by_module_dict().values()
        for flag in found
        if flag.name not in names
    ]
    return help.whole(doc, own, "\n".join(texts))


def own_flags(program: str) -> list[flags.Flag]:
    """The command's flags, without other spellings of them."""
    return [flag for flag in FLAGS.get_key_flags_for_module(program) if not (flag.help or "").startswith("Alias for ")]
