"""The environment in which chat templates run: Jinja's sandbox, with bounds.

A template is somebody else's program. The sandbox keeps it from Python's insides. The bounds keep it from using up the
machine: each text and list that it makes, all of its texts together and its time have a limit, far above what a
conversation needs. A text whose length is known beforehand is refused before it is made.

Otherwise the environment is the one that templates are written for (transformers 5.23, utils/chat_template_utils.py):
block lines leave no trace, `tojson` keeps the text's own characters, `raise_exception` refuses a conversation, and
`{% generation %} ... {% endgeneration %}` marks what the assistant says.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import filters, nodes, parser, runtime, utils

LONGEST = 2**24  # characters of a text, entries of a list
ALTOGETHER = 2**30  # characters of the texts that a rendering makes on its way
_SORTED = 2**17  # entries of a list that are sorted, which nothing interrupts
_ENTRY = 64  # characters that an entry of a list counts as, by the memory that it takes
SECONDS = 10.0  # of a rendering, on the processor: a machine that stands still refuses nothing
_BITS = 2**14  # of a whole number
_INDENT = 100  # characters before a line, lines of a portion
# Around a marked text while it is on its way through the template. No text has these noncharacters: see
# chat_guard.guard.
BEGIN, END = "\ufdd4", "\ufdd5"
_WIDTH = re.compile(r"\*|[0-9]{6,}|:[^}]*\{")  # in a format: a width that no page has, or one from elsewhere
_ESCAPED = re.compile(r"\\u(fdd[0-5])")  # a noncharacter of chat_guard, in JSON that is all ASCII


class TooMuch(Exception):
    """A rendering goes over a bound."""


class _Used(threading.local):
    """What the rendering of this thread has used."""

    until = 0.0  # on the clock on the wall, which runs no slower and costs a tenth
    processor_until = 0.0
    characters = 0


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. `marks`: a template of it has generation blocks."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.marks = False
        self._used = _Used()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=self._weighed,
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}
        self.filters["tojson"] = self._tojson
        self.filters["join"] = self._join
        self.filters["counted"] = self._counted  # of what `_parse` finds in a ~ b
        checks: dict[str, Callable[..., Any]] = {
            "center": lambda value, width=80: self.spend(width),
            "format": self._check_format,
            "indent": self._check_indent,
            "pprint": self._weighed,
            "replace": lambda text, old, new, *_: self._check_replace(str(text), str(old), str(new)),
            "string": self._weighed,
            "sum": lambda values, attribute=None, start=0: self._check_small(start),
            "batch": lambda values, size, *_: self._check_small(size),
            "slice": lambda values, size, *_: self._check_small(size),
            **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), self._check_few),
            "wordwrap": lambda text, *options, **_: self._check_small(*(len(str(each)) for each in options)),
        }
        for name, check in checks.items():
            self.filters[name] = _after(check, self.filters[name])
        for name in ("list", "sort", "dictsort", "groupby"):
            self.filters[name] = self._weighing(self.filters[name])

    def start(self) -> None:
        """Before a rendering."""
        self._used.until, self._used.characters = time.perf_counter() + SECONDS, 0
        self._used.processor_until = time.thread_time() + SECONDS

    def spend(self, characters: int) -> None:
        """Raises TooMuch when a text of so many characters, or a list of so many entries, is one too many."""
        used = self._used
        used.characters += characters
        if characters > LONGEST:
            raise TooMuch(f"it makes a text or a list of {characters:,} (the bound is {LONGEST:,})")
        if used.characters > ALTOGETHER:
            raise TooMuch(f"it makes more than {ALTOGETHER:,} characters on its way")

    def _keep(self, made: Any) -> Any:
        """What a call or a filter has made: lists take more memory than texts."""
        if isinstance(made, list | tuple):
            self.spend(len(made))
            self._used.characters += (_ENTRY - 1) * len(made)
        return made

    def _weighing(self, filter: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(filter)(lambda *args, **kwargs: self._keep(filter(*args, **kwargs)))

    @property
    def tick(self) -> None:
        """Read in every round of a loop and at the beginning of every macro, where `_parse` puts it."""
        if time.perf_counter() > self._used.until and time.thread_time() > self._used.processor_until:
            raise TooMuch(f"it takes more than {SECONDS:.0f} s")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [*tree.find_all(nodes.For)]
        for block in [*blocks, *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]:
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick"), lineno=block.lineno))
        for joined in tree.find_all(nodes.Concat):
            line = joined.lineno
            joined.nodes = [nodes.Filter(each, "counted", [], [], None, None, lineno=line) for each in joined.nodes]
        return tree

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, once its size is known to be within the bounds."""
        if operator == "+" and type(left) is str and type(right) is str:  # most of them
            self.spend(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            self._check_format(left, *(right if isinstance(right, tuple) else (right,)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 0)
            if operator in ("*", "**") and bits > _BITS:
                raise TooMuch(f"it makes a number of more than {_BITS:,} bits")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            self.spend(len(repeated) * max(times, 0) if hasattr(repeated, "__len__") else 0)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.spend(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call from a template; those of texts' methods within the bounds."""
        text = getattr(obj, "__self__", None)
        if isinstance(text, str | bytes):
            name = obj.__name__
            if name in ("center", "ljust", "rjust", "zfill"):
                self.spend(args[0])
            elif name == "expandtabs":
                self._check_small(*args, *kwargs.values())
            elif name == "replace":
                self._check_replace(text, *args[:2])
            elif name == "join":
                args = ([*args[0]],)
                self.spend(sum(len(each) + len(text) for each in args[0]))
            elif name == "translate":
                raise TooMuch("it calls translate, which is not for templates")
        return self._keep(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own str.format, within the bounds."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        checked = functools.partial(self._check_format, value.__self__)
        return _after(lambda *args, **kwargs: checked(*args, *kwargs.values()), wrapped)

    def _weighed(self, value: Any) -> Any:
        """The value, where it is not too long as text: lists may hold one list many times."""
        if type(value) is not str and not isinstance(value, int | float):
            self.spend(_size(value))
        return value

    def _counted(self, value: Any) -> str:
        text = str(self._weighed(value))
        self.spend(len(text))
        return text

    def _check_few(self, values: Any, *_: Any, **__: Any) -> None:
        if hasattr(values, "__len__") and len(values) > _SORTED:
            raise TooMuch(f"it sorts or compares {len(values):,} entries (the bound is {_SORTED:,})")

    def _check_small(self, *numbers: Any) -> None:
        if any(not isinstance(number, int | float) or number > _INDENT for number in numbers):
            raise TooMuch(f"it asks a filter for {max(map(str, numbers))[:40]} (the bound is {_INDENT})")

    def _check_format(self, text: str, *args: Any, **kwargs: Any) -> None:
        if found := _WIDTH.search(text):
            raise TooMuch(f"it formats a text to the width {found[0][:40]}")
        biggest = max((_size(each) for each in (*args, *kwargs.values())), default=0)
        self.spend(len(text) + (text.count("%") + text.count("{")) * biggest)

    def _check_indent(self, text: str, width: int | str = 4, *_: Any, **__: Any) -> None:
        width = len(width) if isinstance(width, str) else width
        self._check_small(width)
        self.spend(len(text) + width * (text.count("\n") + 1))

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        self.spend(len(text) + text.count(old) * len(new))

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(filters.make_attrgetter(self, attribute), values)
        texts = [str(self._weighed(value)) for value in values]
        self.spend(sum(len(text) + len(d) for text in texts))
        return d.join(texts)

    def _tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it (Jinja's own filter escapes <, > and & for HTML)."""
        self.spend(_size(x))
        self._check_small(len(indent) if isinstance(indent, str) else indent or 0)
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # chat_guard finds its signs again where a template wants ASCII
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if ensure_ascii else text


class _GenerationTag(jinja2.ext.Extension):
    """Puts BEGIN and END around the body of a generation block."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        assert isinstance(self.environment, Environment)
        self.environment.marks = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


class _Dict:
    """What templates know as `dict`: not the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        self, *rest = args
        utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _after(check: Callable[..., Any], filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, its arguments checked before."""
    skipped = int(hasattr(filter, "jinja_pass_arg"))  # an environment or the like stands before the value

    @functools.wraps(filter)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args[skipped:], **kwargs)
        return filter(*args, **kwargs)

    return checked


def _size(value: Any) -> int:
    """About the characters that a value has as text. Raises TooMuch beyond LONGEST, before it counts further."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        size += 1
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
        if size > LONGEST:
            raise TooMuch(f"it makes a text of more than {LONGEST:,} characters")
    return size
