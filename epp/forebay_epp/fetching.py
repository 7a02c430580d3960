"""GET one page of a model server, which is not trusted.

An answer is bounded in time and size, redirects and compression are refused, and an answer that
breaks these rules counts as none. What pages mean and when to ask for them do not belong here.
"""

from __future__ import annotations

from aiohttp import (
    ClientConnectionError,
    ClientConnectorError,
    ClientPayloadError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    InvalidURL,
    TCPConnector,
)

MAX_PAGE_BYTES = 1 << 20
TIMEOUT_SECONDS = 1.0
CAUSES = ("timeout", "connect", "status", "redirect", "too_large", "unparsable")


class FetchError(Exception):
    """An answer that is refused; the text is for people.

    Attributes:
        cause: one of `CAUSES`.
        missing: the page is not at this path: no sign that the server is in trouble. It may be at
            another path, or have its gauges only after a first request.
        status: the HTTP status where that is what is wrong, otherwise 0.
    """

    def __init__(self, cause: str, what: str, *, missing: bool = False, status: int = 0) -> None:
        super().__init__(what)
        self.cause = cause
        self.missing = missing
        self.status = status


def open_session() -> ClientSession:
    """Return a session for `fetch`, with one connection a server; the caller closes it."""
    return ClientSession(
        connector=TCPConnector(limit=0, limit_per_host=1),
        timeout=ClientTimeout(total=TIMEOUT_SECONDS),
        headers={"Accept-Encoding": "identity"},
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
    )


async def fetch(session: ClientSession, url: str, accept: str) -> bytes:
    """Return the page.

    Raises:
        FetchError: the answer is not a plain page of bounded size.
        aiohttp.ClientError, OSError: there is no whole answer.
        TimeoutError: not in time.
    """
    async with session.get(url, allow_redirects=False, headers={"Accept": accept}) as response:
        if response.status != 200:
            cause = "redirect" if 300 <= response.status < 400 else "status"
            response.close()
            missing = response.status == 404
            what = f"HTTP status {response.status}"
            raise FetchError(cause, what, missing=missing, status=response.status)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() != "identity":
            response.close()
            raise FetchError("unparsable", "the page is compressed although that was not requested")
        page = bytearray()
        async for chunk in response.content.iter_any():
            page += chunk
            if len(page) > MAX_PAGE_BYTES:
                response.close()
                raise FetchError("too_large", f"the page is larger than {MAX_PAGE_BYTES} bytes")
        return bytes(page)


def cause(error: Exception) -> str:
    """Return the one of `CAUSES` that fits best; a broken answer is "connect"."""
    match error:
        case FetchError():
            return error.cause
        case TimeoutError():
            return "timeout"
        case ClientConnectionError() | ClientPayloadError() | InvalidURL() | OSError():
            return "connect"
    return "unparsable"


def refused(error: Exception) -> bool:
    """Return whether there was not even a connection."""
    return isinstance(error, ClientConnectorError)


def unserved(error: Exception) -> bool:
    """Return whether the server says that it cannot serve."""
    return isinstance(error, FetchError) and error.status in {502, 503, 504}


def text(error: Exception) -> str:
    """Return the error in words for a log, bounded."""
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
