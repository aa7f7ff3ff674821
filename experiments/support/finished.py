"""What a finished run says: what it made, and three commands to go on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.support.command import block, command

_QUESTION = "Name three primes."


def finished(config: Any, workdir: Path, summary: dict[str, Any], seconds: float) -> str:
    """What the run in `workdir` made, as lines for its user.

    Args:
      config: of the run (ConfigDict).
      summary: as in summary.json.
      seconds: that this process took.
    """
    made = [
        (workdir / "adapter", "the adapter, as PEFT reads it"),
        (workdir / "checkpoints", "the newest states, to go on from"),
        (workdir / "metrics.jsonl", "every step"),
        (workdir / "summary.json", "the run's figures"),
        (workdir / "config.json", "the config it used"),
    ]
    width = max(len(str(path)) for path, _ in made) + 2
    lines = [
        _result(summary, seconds),
        _sizes(summary),
        "",
        "made:",
        *(f"  {path!s:{width}}{_size(path):>12}  {what}" for path, what in made if path.exists()),
        "",
        "next:",
        *block(next_commands(config, workdir, summary)),
    ]
    return "\n".join(lines)


def _result(summary: dict[str, Any], seconds: float) -> str:
    losses = [
        f"{name} {summary[key]:.4f}"
        for name, key in (("training", "final_train_loss"), ("held out", "final_eval_loss"))
        if summary.get(key) is not None
    ]
    speed = summary.get("tokens_per_second")
    parts = [f"done: {summary['steps']:,} steps in {_duration(seconds)}"]
    unit = "" if summary.get("labels") else " (nats a token)"
    parts += [f"loss {', '.join(losses)}{unit}"] if losses else []
    parts += [f"{speed:,.0f} tokens/s"] if speed else []
    return "; ".join(parts)


def _sizes(summary: dict[str, Any]) -> str:
    from qlora_jax.io.shards import size_text

    return (
        f"base {size_text(summary['base_bytes'])} ({summary['base_bits_per_param']:.3f} bits a weight), adapter "
        f"{summary['trainable_params']:,} parameters; most memory: device {size_text(summary['peak_device_bytes'])} "
        f"(by the {summary['peak_device_bytes_source']}), host {size_text(summary['peak_host_bytes'])}"
    )


def next_commands(config: Any, workdir: Path, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(what it does, command): ask the adapter, evaluate it, merge it."""
    from qlora_jax.api.opening import quant_name
    from qlora_jax.data.glue.tasks import FORMAT as GLUE
    from qlora_jax.data.read import data_sets
    from qlora_jax.io.load import QuantSpec

    spec = QuantSpec(config.quant.format, config.quant.block_size, config.quant.double_quant)
    base = [f"--model={config.model.path}"]
    base += [f"--revision={config.model.revision}"] if config.model.revision != "main" else []
    adapted = [*base, f"--quant={quant_name(spec)}"]
    adapted += [f"--block_size={spec.block_size}"] if spec.format != "none" and spec.block_size not in (0, 64) else []
    adapted += [f"--adapter={workdir}/adapter"]
    if config.data.format == GLUE:
        rows = [f"--glue_data={','.join(data_sets(config.data.eval_path or config.data.path))}"]
        rows += [f"--glue_task={config.data.task}"] if config.data.task else []
        evaluate = command("evaluate", "--task=glue", *rows, *adapted)
    elif summary.get("final_eval_loss") is not None:
        evaluate = command("evaluate", "--task=heldout", f"--workdir={workdir}", *base)
    else:
        data = config.eval.mmlu_data or "cais/mmlu"
        evaluate = command("evaluate", "--task=mmlu", f"--mmlu_data={data}", *adapted)
    merged = str(workdir).rstrip("/") + "-merged"
    ask = [("ask it", command("generate", *adapted, *prompt_flags(config, workdir)))]
    return [
        *(ask if config.data.format != GLUE else []),
        ("measure it", evaluate),
        (
            "a whole checkpoint for other programs",
            command("export", f"--workdir={workdir}", f"--out={merged}", "--merge"),
        ),
    ]


def prompt_flags(config: Any, workdir: Path) -> list[str]:
    """The flags of `generate` that put around a question what the run was trained on."""
    from qlora_jax.generate.trained import read_template

    template = read_template(workdir / "adapter") or "plain"
    if template != "plain":
        return [f"--template={template}"]
    return ["--template=plain", f"--prompt={_plain_prompt(config.data)}"]


def _plain_prompt(data: Any) -> str:
    """A question as the paper's form of a data set that no template of `generate` is for puts it."""
    from qlora_jax.data import prompts

    if data.batches:
        return "Once upon a time"
    if data.format == "hh-rlhf":
        return f"{prompts.HH_LABELS['user']} {_QUESTION}{prompts.HH_LABELS['assistant']}"
    forms: dict[str, Callable[[str], str]] = {
        "self-instruct": prompts.self_instruct_prompt,
        "unnatural-instructions": prompts.unnatural_prompt,
        "flan-v2": prompts.chain_of_thought_prompt,
    }
    return forms[data.format](_QUESTION) if data.format in forms else _QUESTION


def _size(path: Path) -> str:
    from qlora_jax.io.shards import size_text

    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return size_text(sum(file.stat().st_size for file in files))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
