"""Config keys, their values and metrics in words."""

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

_KEYS = {
    "model.path": "base model",
    "quant.format": "data type",
    "quant.double_quant": "DQ",
    "quant.block_size": "block size",
    "lora.rank": "r",
    "lora.alpha": "alpha",
    "lora.dropout": "dropout",
    "lora.targets": "layers",
    "data.path": "data set",
    "data.max_examples": "examples",
    "data.train_on_source": "train on source",
    "optimizer.name": "optimizer",
    "optimizer.learning_rate": "learning rate",
    "optimizer.schedule": "schedule",
    "train.batch_size": "batch size",
    "train.steps": "steps",
    "train.seed": "seed",
}
NAMED = tuple(_KEYS)  # the better known first
_METRICS = {
    "final_eval_loss": "held-out loss (nats a target token)",
    "final_train_loss": "training loss at the last step (nats a target token)",
    "final_eval_accuracy": "held-out accuracy (share of target tokens that are the likeliest)",
    "tokens_per_second": "tokens a second",
}
_HIGHER = ("accuracy", "mmlu", "exact_match", "elo", "per_second", "score")
_FORMATS = {"nf4": "NF4", "fp4": "FP4", "int4": "Int4", "fp4-e3m0": "FP4 (E3M0)", "int8": "Int8", "none": "16-bit"}


def key_name(key: str) -> str:
    return _KEYS.get(key, key)


def metric_name(metric: str) -> str:
    return _METRICS.get(metric, metric)


def higher_is_better(metric: str) -> bool:
    return any(word in metric.lower() for word in _HIGHER)


def freeze(value: Any) -> Hashable:
    """The value as a key of a dict."""
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value


def is_number(value: Any) -> bool:
    """Of a config: a switch is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_name(key: str, value: Any) -> str:
    if key == "quant.format":
        return _FORMATS.get(value, str(value))
    if key == "data.max_examples" and value == 0:
        return "all"
    if key == "lora.targets" and isinstance(value, list | tuple):
        return " ".join(str(item).removesuffix("_proj") for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:,}"
    if isinstance(value, str):
        if key.endswith(".path"):  # "huggyllama/llama-7b", "SirNeural/flan_v2:cot.jsonl"
            value = value.partition(":")[0].rstrip("/").rpartition("/")[2] if "://" not in value else value
        return value or "(none)"
    return json.dumps(value)


def level_name(keys: Sequence[str], values: Sequence[Any]) -> str:
    """Of several keys that change together: "NF4 + DQ", "7B, 0.1"."""
    if set(keys) == {"quant.format", "quant.double_quant"}:
        of = dict(zip(keys, values, strict=True))
        name = value_name("quant.format", of["quant.format"])
        return f"{name} + DQ" if of["quant.double_quant"] and of["quant.format"] not in ("none", "int8") else name
    return ", ".join(value_name(key, value) for key, value in zip(keys, values, strict=True))


def with_decimals(values: Sequence[float], precision: float | None) -> list[str]:
    """Numbers with as many decimals as show two digits of `precision` (four of the first number without one)."""
    size = precision or abs(values[0]) / 100
    decimals = min(max(1 - math.floor(math.log10(size)), 0), 12) if size else 4
    texts = [f"{value:,.{decimals}f}" for value in values]
    return ["0" if not float(text.replace(",", "")) else text.replace("-", "−") for text in texts]


def figure_number(value: float | None, digits: int = 4) -> str:
    """So many significant digits."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    text = text if "e" not in text or abs(value) < 1e-4 else f"{value:,.0f}"
    return text.replace("-", "−") if "e" not in text else text
