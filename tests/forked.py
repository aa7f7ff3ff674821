"""Scripts in processes of their own that need not import JAX and ours again, which takes four seconds.

One process a worker of the tests has all imported and starts nothing of JAX; each script is a fork of it. Settings are
the caller's, as of a process that is started: XLA reads its flags when it first has a device, and JAX's are set again.
"""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["qlora_jax.train.loop", "qlora_jax.io.write"])


def run(script: str, *arguments: object, devices: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -c script arguments` with so many CPU devices, to its end; `environment` is added to this process's."""
    if devices > 1:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return Started(script, arguments, environment).ended()


class Started:
    """`python -c script arguments` that goes on beside its caller; `environment` is added to this process's."""

    def __init__(self, script: str, arguments: Iterable[object], environment: Mapping[str, str]):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        self._argv = ["-c", *map(str, arguments)]
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # a thread could hold a lock while it forks
            forkserver.ensure_running()
        settings = dict(os.environ) | environment
        self.process: Any = _context.Process(target=_run, args=(script, self._argv, settings, self._files))
        self.process.start()

    def ended(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """What it said, once it has ended; subprocess.TimeoutExpired, and it is killed, if it has not by then."""
        self.process.join(timeout)
        if late := self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self._folder:
            out, err = (file.read_text() if file.exists() else "" for file in self._files)
        if late:
            raise subprocess.TimeoutExpired(self._argv, timeout or 0, out, err)
        return subprocess.CompletedProcess(self._argv, self.process.exitcode, out, err)


def _run(script: str, argv: list[str], environment: Mapping[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    import jax

    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_COMPILATION_CACHE"):
        if name in environment:
            jax.config.update(name.lower(), environment[name].lower() in ("1", "true"))
    jax.config.update("jax_platforms", environment.get("JAX_PLATFORMS"))
    sys.argv = argv
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
