"""Hostile inputs from good ones: bytes turned, cut and joined, JSON with other values, templates of every filter.

An input is a pure function of reader, seed and number, so that a failure is found again by its number.
"""

import json
import random
from collections.abc import Callable, Sequence

_NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31),
    -(2**63), 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
_TEXTS = (
    "", " ", "\n", "a\nb", "\x00", "\x1b[31mred\x1b[0m", "\u2028", "\ud800", "\ufdd0", "\ufdd2", "é" * 20, "../x",
    "../../secret", "/etc/passwd", "/dev/zero", "secret.safetensors", "model.safetensors", "a" * 5000, "null", "{}",
    "[", "(" * 300, "(a+)+$", "(?!x)", ".*", "\\", "%s%n", "{0.__class__}", "__class__", "__init__", "default",
    "main", "auto_map", "modeling_evil.Evil", "os.system", "<script>alert(1)</script>", "</s>", "<s>", "<|end|>",
    "F32", "BF16", "U8", "F8_E4M3", "nf4", "gaussian", "model.layers.0.self_attn.q_proj.weight", "-1", "1e999",
    "true", "\U0001f600", "\r\n", "\x85", "\x7f",
)  # fmt: skip
_KEYS = (
    "__metadata__", "weight_map", "auto_map", "trust_remote_code", "dtype", "shape", "data_offsets", "content", "id",
    "special", "rope_scaling", "quantization_config", "text", "messages", "data",
)  # fmt: skip

Change = Callable[[random.Random, bytes], bytes]


def rng_of(reader: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{reader} {seed} {number}")


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value, and some that JSON has not."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(_NUMBERS)
    if kind < 0.7:
        return rng.choice(_TEXTS)
    if kind < 0.8:
        return rng.choice((None, True, False))
    if depth > 3:
        return []
    if kind < 0.9:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {key_of(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def key_of(rng: random.Random) -> str:
    return rng.choice(_KEYS) if rng.random() < 0.5 else rng.choice(_TEXTS)


def in_json(rng: random.Random, data: bytes) -> bytes:
    """One to three values of a JSON text changed, dropped, doubled or exchanged; other bytes as they are."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return in_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, root)
    if rng.random() < 0.02:
        deep = rng.choice((50, 990, 3000, 60_000))
        return json.dumps(root[0])[:-1].encode("utf-8", "surrogatepass") + b',"x":' + b"[" * deep + b"]" * deep + b"}"
    text = json.dumps(root[0], ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.03:  # a key twice
        text = text.replace("{", '{"id": 0, "id": 1, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: random.Random, root: list) -> None:
    """Changes one place of a tree that is the only entry of `root`."""
    holder, key = root, 0
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    what = rng.random()
    if what < 0.6:
        holder[key] = value(rng)
    elif what < 0.7 and holder is not root:
        del holder[key]
    elif what < 0.8 and isinstance(holder, dict):
        holder[key_of(rng)] = holder[key]
    elif what < 0.85 and isinstance(holder, list) and holder is not root:
        holder.append(holder[key])
    elif what < 0.93 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((-1, 1, 8, -8, 2**16, -(2**16)))
    elif isinstance(holder[key], str):
        holder[key] += rng.choice(_TEXTS)
    else:
        holder[key] = [holder[key]]


def in_lines(rng: random.Random, data: bytes) -> bytes:
    """One line of a file of JSON lines changed as JSON, or lines exchanged and doubled."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.8:
        lines[at] = in_json(rng, lines[at]) if lines[at] else b"{}"
    else:
        lines.insert(at, rng.choice(lines))
    return b"\n".join(lines)


def in_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits, bytes and stretches changed; sometimes cut short."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        what = rng.random()
        if what < 0.3 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what < 0.45 and at < len(out):
            out[at] = rng.randrange(256)
        elif what < 0.6:
            out[at:at] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")[:40]
        elif what < 0.7:
            del out[at : at + rng.choice((1, 2, 8, 64))]
        elif what < 0.8:
            begin = rng.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + rng.choice((1, 8, 64))]
        elif what < 0.9:
            out[at : at + 8] = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(out))).to_bytes(8, "little")
        elif what < 0.95:
            out[at:at] = str(rng.choice(_NUMBERS[:20]))[:60].encode()
        else:
            del out[at:]
    return bytes(out)


def either(*changes: Change) -> Change:
    """One of several, drawn anew each time; now and then bytes are turned on top."""

    def change(rng: random.Random, data: bytes) -> bytes:
        out = rng.choice(changes)(rng, data)
        return in_bytes(rng, out) if rng.random() < 0.1 else out

    return change


def with_length(change: Change) -> Change:
    """Changes the JSON header of a safetensors file; the length before it mostly tells the truth."""

    def changed(rng: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, rest = change(rng, data[8 : 8 + length]), data[8 + length :]
        said = len(header) if rng.random() < 0.95 else rng.choice((0, 1, len(header) + 1, 2**26, 2**40, 2**64 - 1))
        return said.to_bytes(8, "little") + header + rest

    return changed


_NAMES = (
    "messages", "messages[0]", "messages[0].content", "messages|length", "m", "x", "bos_token", "tools", "range(9)",
    "loop", "range(99999)", "none", "true", "1", "'a'", "'<'", "['a', 'b']", "{'a': 1}", "namespace(a=1)", "self",
    "cycler('a')", "joiner()", "dict", "strftime_now", "raise_exception", "caller", "undefined_name", "''.join",
    "9**9", "10**300", "'a' * 99999", "3.5", "'<!-- -->' * 9999", "['a'] * 9999", "'a b ' * 99999",
)  # fmt: skip
_FILTERS = (
    "abs", "attr('__class__')", "attr('format')", "batch(3)", "batch(10**9)", "capitalize", "center(10**9)",
    "default('')", "dictsort", "escape", "filesizeformat", "first", "float", "forceescape", "format(1)",
    "groupby('role')", "indent(9)", "indent(10**9)", "int", "items", "join(',')", "last", "length", "list", "lower",
    "map('upper')", "map(attribute='content')", "max", "min", "pprint", "random", "reject('none')",
    "replace('a', 'aa' * 99)", "reverse", "round(400)", "safe", "selectattr('role', 'equalto', 'user')", "slice(3)",
    "sort", "string", "striptags", "sum", "sum(start='')", "title", "tojson", "tojson(indent=10**9)", "trim",
    "truncate(3)", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap(1)", "xmlattr", "list|tojson",
    "string * 3", "list * 3", "string|list", "map('list')|list",
)  # fmt: skip
_METHODS = (
    "upper()", "split()", "split('a')", "strip()", "format(1)", "format(*[1]*9)", "zfill(10**9)",
    "replace('a','b'*999)", "items()", "keys()", "join(['a']*999)", "encode()", "__class__", "__init__.__globals__",
    "mro()", "get('role')", "count('a')", "expandtabs(10**9)", "center(10**9)", "splitlines()", "partition('a')",
    "title()", "isdigit()", "translate({97:'b'*999})", "format_map({})", "append(1)", "pop()", "update({})",
    "find('a')", "index('q')", "casefold()",
)  # fmt: skip
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "not in")


def expression(rng: random.Random, depth: int = 0) -> str:
    """An expression of Jinja's."""
    what = rng.random()
    if depth > 3 or what < 0.25:
        return rng.choice(_NAMES)
    inner = expression(rng, depth + 1)
    if what < 0.55:
        return f"({inner})|{rng.choice(_FILTERS)}"
    if what < 0.75:
        return f"({inner}).{rng.choice(_METHODS)}"
    if what < 0.95:
        return f"({inner} {rng.choice(_OPERATORS)} {expression(rng, depth + 1)})"
    return f"({inner} if {expression(rng, depth + 1)} else {expression(rng, depth + 1)})"


_STATEMENTS = (  # E is an expression
    "{{ E }}", "{{ E }}", "{% set x = E %}", "{% for m in E %}{{ m }}{% endfor %}",
    "{% for m in messages %}{{ E }}{% endfor %}", "{% if E %}a{% else %}b{% endif %}", "{% include E %}",
    "{% macro f(x) %}{{ E }}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% generation %}{{ E }}{% endgeneration %}",
    "{% set ns = namespace() %}{% set ns.a = E %}", "{% import E as x %}", "{% extends E %}", "{{ DEEP E",
    "{% for a in range(99) %}{% for b in range(99) %}{% set x = E %}{% endfor %}{% endfor %}",
    "{% filter upper %}{{ E }}{% endfilter %}", "{% set x %}{{ E }}{% endset %}", "{% call f() %}E{% endcall %}",
    "{% block a %}{{ E }}{% endblock %}", "{% break %}E",
)  # fmt: skip


def template(rng: random.Random, data: bytes) -> bytes:
    """Statements and expressions of Jinja's, after a good template or alone."""
    parts = [data.decode("utf-8", "replace")] if rng.random() < 0.1 else []
    for _ in range(rng.choice((1, 1, 2, 4))):
        e = expression(rng)
        deep = "(" * rng.choice((3, 90, 400))
        parts.append(rng.choice(_STATEMENTS).replace("DEEP", deep).replace("E", e))
    return "".join(parts).encode("utf-8", "surrogatepass")


def text(words: Sequence[str]) -> Change:
    """Some of `words` one after the other, or the text with one of them in it."""

    def change(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.5:
            return "".join(rng.choice((*words, *_TEXTS)) for _ in range(rng.randrange(1, 6))).encode(
                "utf-8", "surrogatepass"
            )
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice((*words, *_TEXTS)).encode("utf-8", "surrogatepass") + data[at:]

    return change
