"""A runner that trains nothing: rows and results that follow from a config alone, and mistakes on demand."""

from collections.abc import Callable

from configs import quickstart
from qlora_jax.sweep.engine import RunPack
from qlora_jax.sweep.grid import Grid, Points, expand


def points(grid: Grid, steps: int = 3) -> Points:
    config = quickstart.get_config()
    config.train.steps = steps
    return expand(config, grid)


def key(plain: dict) -> str:
    return plain["quant"]["format"]


def runner(seconds: float = 0.0, trouble: dict[str, str] | None = None, until: str = "") -> Callable[[], RunPack]:
    """Makes runners whose steps take `seconds`, and no time once the file `until` is there.

    `trouble`: what happens to a pack with a member of this train.seed (as text): "memory", "error", "input", "nan"
    (to that member alone), "once FILE" and "exit FILE" (an error, the process's end; unless FILE is there, which it
    makes).
    Nested, so that Ray sends it by value: workers cannot import tests.
    """

    def make_runner() -> RunPack:
        import os
        import time

        from qlora_jax.errors import InputError
        from qlora_jax.sweep.engine import Trained

        def run(configs, folder, on_row):
            seeds = [config["train"]["seed"] for config in configs]
            happens = {(trouble or {}).get(str(seed), "") for seed in seeds}
            for step in range(configs[0]["train"]["steps"]):
                time.sleep(0 if until and os.path.exists(until) else seconds)
                for member, config in enumerate(configs):
                    loss = config["optimizer"]["learning_rate"] / (1 + step + seeds[member])
                    on_row(member, {"step": step + 1, "loss": loss, "tokens": 100, "seconds": time.monotonic()})
            for what in happens:
                kind, _, file = what.partition(" ")
                if file and not os.path.exists(file):
                    open(file, "w").close()
                    if kind == "exit":
                        os._exit(1)
                    raise RuntimeError("a passing trouble")
            if "memory" in happens and len(configs) > 1:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate")
            if "error" in happens:
                raise ValueError("a lasting trouble")
            if "input" in happens:
                raise InputError("a value that no run can have")
            return [
                Trained({"final_eval_loss": float("nan")}, "loss is not finite at step 2")
                if (trouble or {}).get(str(seed)) == "nan"
                else Trained({"final_eval_loss": 1.0 / (1 + seed), "final_train_loss": loss, "tokens_per_second": 1.0})
                for seed in seeds
            ]

        return run

    return make_runner
