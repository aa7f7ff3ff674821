"""Scripts in processes of their own that need not import JAX and ours again, which takes four seconds.

One process a worker of the tests has all imported and starts nothing of JAX; each script is a fork of it. Settings are
the caller's, as of a process that is started: XLA reads its flags when it first has a device, and JAX's are set again.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["qlora_jax.train.loop", "qlora_jax.io.write"])


def run(script: str, *arguments: object, devices: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -c script arguments` with so many CPU devices, to its end; `environment` is added to this process's."""
    settings = dict(os.environ) | environment
    if devices > 1:
        settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        settings["JAX_PLATFORMS"] = "cpu"
    argv = ["-c", *map(str, arguments)]
    with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # a thread could hold a lock while it forks
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process: Any = _context.Process(target=_run, args=(script, argv, settings, files))
        process.start()
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)


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
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
