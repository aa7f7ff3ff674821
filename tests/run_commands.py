"""Runs commands in this process, as `python -m` would: flags, modules and settings of each go when it ends.

What a process has made once serves all its commands: imports, JAX's backend, traced and compiled programs. A test whose
point is the process itself (signals, exit statuses of the interpreter, terminals) starts one.
"""

import contextlib
import io
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

REPOSITORY = Path(__file__).resolve().parents[1]
app.define_help_flags()  # absl's own flags stay
_gone: list = []  # modules of earlier commands: absl remembers some by id, which no other module may get


def run(command: list[str]) -> dict:
    """{"status", "out", "err"} of a command: a module's name or a script's path, and its arguments."""
    name, *arguments = command
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with _own_state(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = [name, *arguments]
        try:
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            status = error.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


@contextlib.contextmanager
def _own_state() -> Iterator[None]:
    """What a command changes for its whole process, put back: flags with the modules that define them, the folder, the
    environment, arguments, and how much is logged."""
    known = {name: dict(vars(flags.FLAGS[name])) for name in flags.FLAGS}
    argv, folder, environment = sys.argv, os.getcwd(), dict(os.environ)
    verbosity, jax_level = absl_logging.get_verbosity(), logging.getLogger("jax").level
    commands = _commands()
    for module in commands:
        del sys.modules[module]
    os.chdir(REPOSITORY)
    try:
        yield
    finally:
        os.chdir(folder)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for module in _commands():
            _gone.append(sys.modules.pop(module))
        sys.modules.update(commands)
        _restore(known)
        absl_logging.set_verbosity(verbosity)
        logging.getLogger("jax").setLevel(jax_level)


def _restore(known: dict[str, dict]) -> None:
    """Flags as they were; those of libraries that were imported on the way stay, as the libraries do."""
    FLAGS = flags.FLAGS
    for name in list(FLAGS):
        if name in known:
            vars(FLAGS[name]).update(known[name])
        elif FLAGS.find_module_defining_flag(name) not in sys.modules:
            delattr(FLAGS, name)


def _commands() -> dict:
    """Modules of the commands that are imported now: each defines flags, and once."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "experiments"}
