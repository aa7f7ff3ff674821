"""experiments.train, which adds the bytes of models that its process read to the file that COUNTED names."""

import atexit
import os
import runpy

import numpy as np

from qlora_jax.io.source import LocalSource

count = 0
read = LocalSource.read


def counted(self: LocalSource, file: str, start: int, out: np.ndarray) -> None:
    global count
    count += out.size
    read(self, file, start, out)


def write() -> None:
    with open(os.environ["COUNTED"], "a") as file:
        file.write(f"{count}\n")


LocalSource.read = counted  # type: ignore[method-assign]
atexit.register(write)
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
