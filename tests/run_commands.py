"""Runs commands one after the other as a user would, each in a fork of this process: imports are paid for once.

stdin: JSON list of argument lists, each begun with a module's name or a script's path. stdout: JSON list of
{"status", "out", "err"}. A command's flags and modules go with its fork.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import flax.nnx  # noqa: F401 (what every command imports; nothing here starts a backend, which a fork could not share)
import jax  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)


def run(command: list[str]) -> dict:
    """The command in a fork; a fork that dies without a word has its signal as status."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            json.dump(run_here(command), file)
            file.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        text = file.read()
    return json.loads(text) if text else {"status": -(status & 0x7F), "out": "", "err": "died without a word"}


def run_here(command: list[str]) -> dict:
    name, *arguments = command
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [name, *arguments]
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
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


if __name__ == "__main__":
    json.dump([run(command) for command in json.load(sys.stdin)], sys.stdout)
