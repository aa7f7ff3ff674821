"""One request to an OpenAI-compatible endpoint, repeated while that may help.

Repeated, after a wait that doubles (with jitter) or as long as Retry-After asks: 408, 409, 425, 429 and 5xx, timeouts,
lost connections, and bodies that are cut off or of the wrong shape. A Retry-After holds back all requests.
Not repeated: what is wrong with this request alone (400, 413, 422 ...: Refused), and what would be wrong with every
request (401, 403, 404, a redirection, an empty account: an InputError that ends the run).
The key goes into one header and nowhere else; should a server send it back, it is struck out.
"""

import asyncio
import dataclasses
import email.utils
import ipaddress
import json
import math
import random
import time
from typing import Any

import httpx2

from qlora_jax.errors import InputError

AGAIN = (408, 409, 425, 429)


class Refused(Exception):
    """This request has failed for good; others may succeed."""


class Stopped(Exception):
    """The run ends, and this request was waiting to be sent again."""


class _Again(Exception):
    """This try has failed; `wait` seconds as the server asks, or 0."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str  # "length" where the judge ran out of tokens
    prompt_tokens: int | None  # as the server counts them, None where it does not
    completion_tokens: int | None


@dataclasses.dataclass(frozen=True)
class Patience:
    timeout: float = 120.0  # seconds for one whole answer
    retries: int = 6  # tries after the first
    backoff: float = 1.0  # seconds before the first repetition; doubles
    longest: float = 120.0  # seconds of one wait at most


def completions_url(base_url: str) -> str:
    """The address that requests go to. Raises InputError for what is no http(s) address, or has a password in it."""
    if "@" in base_url or "?" in base_url:
        raise InputError("--base_url holds a user, a password or a query; expected http(s)://HOST[:PORT]/v1 alone")
    url = base_url.strip().rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"--base_url={base_url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise InputError(f"--base_url={base_url}: expected an address such as https://api.openai.com/v1")
    return url


def is_local(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint:
    """`async with Endpoint(...) as endpoint: reply = await endpoint.ask(body)`."""

    def __init__(self, url: str, key: str | None, patience: Patience = Patience(), connections: int = 8) -> None:
        self._url, self._key, self._patience = url, key, patience
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        try:
            self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=patience.timeout)
        except (ValueError, ImportError) as error:  # a proxy in the environment that cannot be used
            raise InputError(f"no connection to {url}: {error}; see HTTP_PROXY, HTTPS_PROXY and ALL_PROXY") from error
        self._not_before = 0.0  # time.monotonic()
        self._stopping = asyncio.Event()
        self.repeated = 0  # requests sent again

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    def stop(self) -> None:
        """Requests that wait to be sent give up; those on their way come home."""
        self._stopping.set()

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Raises Refused, Stopped, or InputError where no request can succeed."""
        content = json.dumps(body).encode()  # ASCII: a lone surrogate in an answer must not end the run
        for attempt in range(self._patience.retries + 1):
            await self._sleep(self._not_before - time.monotonic())
            try:
                return await self._send(content)
            except _Again as error:
                if attempt == self._patience.retries:
                    raise Refused(f"{error}, {attempt + 1} times") from error
                if error.wait > self._patience.longest:
                    raise Refused(f"{error}; asked to wait {error.wait:.0f} s, over --max_wait") from error
                self.repeated += 1
                self._not_before = max(self._not_before, time.monotonic() + error.wait if error.wait else 0.0)
                doubled = min(self._patience.backoff * 2**attempt, self._patience.longest)
                await self._sleep(max(error.wait, doubled * random.uniform(0.5, 1)))
        raise AssertionError("unreachable")

    async def _sleep(self, seconds: float) -> None:
        if self._stopping.is_set():
            raise Stopped
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stopping.wait(), seconds)
            except TimeoutError:
                return
            raise Stopped

    async def _send(self, content: bytes) -> Reply:
        try:
            async with asyncio.timeout(self._patience.timeout):
                response = await self._client.post(self._url, content=content)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _Again(f"no whole answer in {self._patience.timeout:g} s") from error
        except httpx2.HTTPError as error:
            raise _Again(f"{type(error).__name__}: {self._clean(str(error)) or 'the connection was lost'}") from error
        text = response.text.replace(self._key, "[key]") if self._key else response.text
        status = response.status_code
        if 200 <= status < 300:
            return _reply(text, self._clean)
        said = f"HTTP {status} from {self._url}"
        reason, code = _reason(text)
        detail = f"{said}: {self._clean(reason)}" if reason else said
        if status in (401, 403):
            raise InputError(f"{said}: the key was not accepted for this model; --key_env names its variable")
        if status == 404 or 300 <= status < 400 or status == 405:
            raise InputError(f"{detail}; check --base_url and --judge_model")
        if code == "insufficient_quota":
            raise InputError(detail)
        if status in AGAIN or status >= 500:
            raise _Again(detail, _retry_after(response.headers.get("retry-after")))
        raise Refused(detail)

    def _clean(self, text: str) -> str:
        """One short line that a terminal may show, without the key."""
        text = text.replace(self._key, "[key]") if self._key else text
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= 300 else line[:300] + " ..."


def _reply(text: str, clean: Any) -> Reply:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Again(f"an answer that is not whole JSON ({len(text)} characters)") from error
    try:
        choice = data["choices"][0]
        content = choice["message"]["content"]
    except (TypeError, KeyError, IndexError) as error:
        raise _Again(f"an answer without choices[0].message.content: {clean(text)}") from error
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if content is None:  # a refusal, or all tokens went into thinking
        content = choice["message"].get("refusal") or ""
    if not isinstance(content, str):
        raise _Again(f"an answer whose content is no text: {clean(text)}")
    usage = data.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    numbers = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in numbers)
    return Reply(content, str(choice.get("finish_reason") or ""), prompt, completion)


def _reason(text: str) -> tuple[str, str]:
    """(message, code) of an error's body."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, ""
    if isinstance(error, dict):
        return str(error.get("message") or error), str(error.get("code") or error.get("type") or "")
    return str(error), ""


def _retry_after(value: str | None) -> float:
    """Seconds, of either form that HTTP allows; 0 where there is none that can be read."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
