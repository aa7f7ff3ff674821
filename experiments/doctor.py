"""Says what this machine has for training, what it lacks, and the commands that mend it.

    python -m experiments.doctor

System, Python, JAX and its devices, GPU and driver, CUDA packages, the kernels that kernel=auto takes, free memory and
disk, extras, and the largest Guanaco config that fits. JAX is started in a process of its own: a broken install is
reported and never raised. --json prints everything as JSON, --out writes that to a file. Exit status 0 when training
can run here, 1 when not.
"""

import json
import sys
from pathlib import Path

try:
    from absl import flags

    from experiments.support import cli
except ImportError as error:  # what flags need is missing: the report without them names it
    if __name__ != "__main__":
        raise
    from qlora_jax.doctor.examine import examine, text

    print(text(examine(Path.cwd())), f"no flags are read: {error}", sep="\n")
    sys.exit(1)

JSON = flags.DEFINE_bool("json", False, "Print everything as JSON.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> int:
    from qlora_jax.doctor.examine import examine, text
    from qlora_jax.errors import InputError

    found = examine(Path.cwd())
    as_json = json.dumps(found, indent=2)
    print(as_json if JSON.value else text(found))
    if OUT.value:
        out = Path(OUT.value).expanduser()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(as_json + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out={out} cannot be written: {error.strerror or error}") from error
    return 0 if found["can_train"] else 1


if __name__ == "__main__":
    cli.run(main)
