"""The client's model name put back into an answer that was made under another one."""

from __future__ import annotations

import json


class ModelRestorer:
    """Puts the client's model name back into an answer that comes in chunks.

    A chunk may end inside the text to replace; such an end is held back until the next one.
    """

    __slots__ = ("_held", "_patterns", "_replacements")

    def __init__(self, target: str, name: str) -> None:
        # ensure_ascii and not: servers write non-ASCII names either way.
        spellings = {json.dumps(target), json.dumps(target, ensure_ascii=False)}
        self._patterns = [
            f'"model":{space}{spelling}'.encode() for spelling in spellings for space in ("", " ")
        ]
        self._replacements = [
            f'"model":{space}{json.dumps(name)}'.encode() for _ in spellings for space in ("", " ")
        ]
        self._held = b""

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        """Return what can be passed on after this chunk."""
        text = self._held + chunk
        for pattern, replacement in zip(self._patterns, self._replacements, strict=True):
            text = text.replace(pattern, replacement)
        keep = 0 if last else max(_overlap(text, pattern) for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: bytes, pattern: bytes) -> int:
    """Length of the longest end of `text` that is a proper beginning of `pattern`."""
    start = text.rfind(b'"', max(0, len(text) - len(pattern) + 1))
    best = 0
    while start >= 0:
        if pattern.startswith(text[start:]):
            best = len(text) - start
        start = text.rfind(b'"', max(0, len(text) - len(pattern) + 1), start)
    return best
