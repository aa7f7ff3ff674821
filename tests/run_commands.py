"""Runs commands one after the other in one process, as a user would: imports are paid for once.

stdin: JSON list of argument lists, each begun with a module's name or a script's path. stdout: JSON list of
{"status", "out", "err"}. Flags of a command are forgotten before the next.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(command: list[str]) -> dict:
    name, *arguments = command
    known = set(flags.FLAGS)
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
    forget(known, {name, sys.argv[0], "__main__"})
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def forget(known: set[str], modules: set[str]) -> None:
    """Undefines flags that the command defined; those of libraries stay, as their modules do."""
    for flag in set(flags.FLAGS) - known:
        module = flags.FLAGS.find_module_defining_flag(flag) or ""
        if module in modules or module.startswith("experiments."):
            delattr(flags.FLAGS, flag)
    for module in [name for name in sys.modules if name.startswith("experiments.")]:
        if module not in ("experiments.cli", "experiments.config_file", "experiments.model_flags"):
            del sys.modules[module]
    flags.FLAGS.unparse_flags()


if __name__ == "__main__":
    json.dump([run(command) for command in json.load(sys.stdin)], sys.stdout)
