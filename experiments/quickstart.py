"""Quantizes a small Llama, finetunes it in 4 bits, and compares that with 16 bits. It needs one to four minutes.

    python -m experiments.quickstart

Everything it needs is in the repository: a Llama of 2.6 million parameters that this project pretrained itself
(configs/pretrain.py) and an instruction set of its own making. The same adapter is then trained on the unquantized
base: 4 bits must not cost anything. Run again, finished parts are not trained again.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from experiments.support import cli
from experiments.support.command import command, this_command

CONFIG = cli.config_flag("configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for everything that is written.")


def main() -> int:
    begun = time.perf_counter()
    import jax

    from qlora_jax.embedded import located
    from qlora_jax.files import write_json
    from qlora_jax.train.loop import Stopped
    from qlora_jax.train.memory import peak_host_bytes

    config, workdir = CONFIG.value, Path(WORKDIR.value)
    print(f"qlora_jax quickstart on {jax.devices()[0].device_kind}: finetune {config.model.path} in 4 bits\n")
    sizes = print_sizes(config.model.path)
    rows = json.loads(located(config.data.eval_path).read_text(encoding="utf-8"))
    config_16 = config.copy_and_resolve_references()
    config_16.quant.format = "none"
    models = {"4-bit": Answering(config), "16-bit": Answering(config_16)}
    runs = {}
    with ThreadPoolExecutor(1) as beside:  # compiling and decoding keep one core busy at most
        asked_before = beside.submit(models["4-bit"].answers, rows)
        for name, model in models.items():
            print(f"\n{name} base:")
            try:
                runs[name] = train(model.config, workdir / name)
            except Stopped as stopped:
                print(f"{stopped}:\n  {this_command()}")
                return 143  # 128 + SIGTERM
        asked_after = beside.submit(models["4-bit"].answers, rows, workdir / "4-bit" / "adapter")
        after_16 = models["16-bit"].answers(rows, workdir / "16-bit" / "adapter")
        before, after = asked_before.result(), asked_after.result()
    results = compare(runs, [row["output"] for row in rows], before, after, after_16)
    draw_losses({name: workdir / name for name in runs}, workdir / "loss.png")
    show_answers(rows, before, after)
    results |= {"sizes": sizes, "seconds": round(time.perf_counter() - begun, 1), "peak_host_bytes": peak_host_bytes()}
    write_json(workdir / "quickstart.json", results)
    print(f"\nwritten under {workdir}:")
    for file, what in (
        ("4-bit/adapter/", "the adapter, as PEFT reads it"),
        ("4-bit/metrics.jsonl, summary.json", "every step; the run's figures"),
        ("16-bit/", "the same of the comparison"),
        ("loss.png", "both loss curves"),
        ("quickstart.json", "the figures above"),
    ):
        print(f"  {file:35} {what}")
    flags = [f"--model={config.model.path}", "--quant=nf4+dq", f"--adapter={workdir}/4-bit/adapter"]
    chat = command("generate", *flags, "--template=alpaca")
    print(f"\ntook {results['seconds']:.0f} s. Ask it yourself:\n  {chat}")
    return 0


def print_sizes(model: str) -> dict[str, float]:
    """The linear layers in each format; MiB by name."""
    from qlora_jax.io.folder import resolve
    from qlora_jax.io.load import load_config
    from qlora_jax.models.sizes import linear_bytes

    config = load_config(resolve(model))
    formats = {
        "16-bit": ("none", False),
        "nf4": ("nf4", False),
        "nf4 + double quantization": ("nf4", True),
        "fp4": ("fp4", False),
        "int4": ("int4", False),
    }
    print(f"{'linear layers stored as':28}{'MiB':>8}{'bits a weight':>16}")
    sizes = {}
    for name, (format, double_quant) in formats.items():
        count, bits = linear_bytes(config, format, double_quant=double_quant)
        sizes[name] = round(count / 2**20, 3)
        print(f"{name:28}{count / 2**20:8.2f}{bits:16.3f}")
    return sizes


def train(config: Any, workdir: Path) -> dict[str, Any]:
    """One finetuning, resumed or already done; its summary with the held-out loss before the first step."""
    from qlora_jax.settings import resolved
    from qlora_jax.train.loop import finetune

    summary = finetune(config, resolved(config), workdir)
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(row for row in map(json.loads, lines) if "eval_loss" in row)
    return summary | {"eval_loss_before": first["eval_loss"]}


class Answering:
    """A model of a config's format that answers instructions greedily, without and with an adapter.

    Without one it carries a fresh adapter, which adds exact zeros: both ways go through one compiled program.
    """

    def __init__(self, config: Any):
        self.config = config
        self._model: Any = None

    def answers(self, rows: list[dict], adapter: Path | None = None) -> list[str]:
        from qlora_jax.data.prompts import alpaca_prompt
        from qlora_jax.generate.decode import generate
        from qlora_jax.io.folder import resolve
        from qlora_jax.io.peft import load_adapter
        from qlora_jax.text.tokenizer import Tokenizer

        config = self.config
        model = self._model = self._model or self._load()
        if adapter is not None:
            load_adapter(model, adapter)
        tokenizer = Tokenizer.from_folder(resolve(config.model.path))
        prompts = [tokenizer.encode(alpaca_prompt(row["instruction"], row["input"]), bos=True) for row in rows]
        length, eos_ids = config.data.max_target_len, tokenizer.eos_ids
        tokens = generate(model, prompts, length, temperature=0.0, eos_ids=eos_ids, batch_size=len(prompts))
        return [tokenizer.decode(ids) for ids in tokens]

    def _load(self) -> Any:
        import jax

        from qlora_jax import lora
        from qlora_jax.io.folder import resolve
        from qlora_jax.io.load import QuantSpec, load_model
        from qlora_jax.train.setup import read_lora_config

        config = self.config
        quant = QuantSpec(config.quant.format, config.quant.block_size, config.quant.double_quant)
        model = load_model(resolve(config.model.path), quant, config.model.compute_dtype)
        adapter = read_lora_config(config.lora, adds_tokens=False, tied=model.head is None)
        lora.attach(model, adapter, jax.random.key(0))
        return model


def compare(runs: dict, references: list[str], before: list[str], after: list[str], after_16: list[str]) -> dict:
    """Prints held-out loss and exact match before and after, in 4 and in 16 bits."""
    from qlora_jax.evaluate.exact_match import exact_match

    four, sixteen = runs["4-bit"], runs["16-bit"]
    table = {
        "before": (four["eval_loss_before"], exact_match(before, references)),
        "after, 4-bit base": (four["final_eval_loss"], exact_match(after, references)),
        "after, 16-bit base": (sixteen["final_eval_loss"], exact_match(after_16, references)),
    }
    print(f"\n{len(references)} held-out instructions  {'loss (nats/token)':>20}{'exact match':>14}")
    for name, (loss, match) in table.items():
        print(f"{name:26}{loss:20.4f}{match:14.1%}")
    loss_gap = four["final_eval_loss"] - sixteen["final_eval_loss"]
    match_gap = table["after, 4-bit base"][1] - table["after, 16-bit base"][1]
    print(f"4-bit minus 16-bit: loss {loss_gap:+.4f}, exact match {match_gap:+.1%}")
    return {
        "held_out": {name: {"loss": loss, "exact_match": match} for name, (loss, match) in table.items()},
        "difference": {"loss": loss_gap, "exact_match": match_gap},
        "tokens_per_second": four["tokens_per_second"],
        "base_bytes": {"4-bit": four["base_bytes"], "16-bit": sixteen["base_bytes"]},
    }


def show_answers(rows: list[dict], before: list[str], after: list[str], count: int = 3) -> None:
    """Answers to instructions spread over the held-out set."""
    for index in range(count):
        place = index * len(rows) // count
        row = rows[place]
        shown = f"{row['instruction']} {row['input']}".strip()
        print(f"\n  {shown}\n    before: {_short(before[place])}\n    after:  {_short(after[place])}")


def _short(text: str, limit: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def draw_losses(runs: dict[str, Path], out: Path) -> None:
    """Training loss of each run, and its held-out loss as points."""
    from qlora_jax.api.finetune import FinetuneRun
    from qlora_jax.api.plot import loss_figure

    figure = loss_figure({f"{name} base": FinetuneRun(workdir).curve for name, workdir in runs.items()})
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    cli.run(main)
