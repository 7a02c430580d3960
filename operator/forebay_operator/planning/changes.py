"""Describes the differences between two snapshots, in lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message

_ORIGINS = ("pool_uid", "sources")  # of a snapshot: what it was made from, not what it does


def differences(before: Message, after: Message, path: str = "") -> list[str]:
    """List what is different in two messages; entries of lists are compared by name."""
    lines: list[str] = []
    for part in before.DESCRIPTOR.fields:
        where = f"{path}{part.json_name}"
        old, new = getattr(before, part.name), getattr(after, part.name)
        if old == new or part.name in _ORIGINS:
            continue
        if part.is_repeated:
            olds, news = ({_key(entry): entry for entry in entries} for entries in (old, new))
            lines.extend(f"{where}[{key}] removed" for key in olds.keys() - news.keys())
            lines.extend(f"{where}[{key}] added" for key in news.keys() - olds.keys())
            for key in olds.keys() & news.keys():
                lines.extend(differences(olds[key], news[key], f"{where}[{key}]."))
        elif part.message_type:
            lines.extend(differences(old, new, f"{where}."))
        else:
            lines.append(f"{where}: {old} -> {new}")
    return sorted(lines)


def _key(part: Any) -> str:
    """Return the name of an entry, or the address of an endpoint, whose name is for people."""
    key: str = getattr(part, "address", "") or part.name
    return key
