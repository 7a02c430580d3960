"""LoRA adapters in a simulated engine's memory: a fixed number of them, and loading takes time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Loaded:
    ready_at: float
    users: int = 0


class AdapterSlots:
    """Memory for `capacity` adapters; one that no running request uses can be replaced.

    The empty name is the base model, which is always loaded.
    """

    def __init__(self, capacity: int, load_seconds: float) -> None:
        self._capacity = capacity
        self._load_seconds = load_seconds
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # least recently used first

    def has_place_for(self, name: str) -> bool:
        """Whether a request for this adapter could run now."""
        return (
            not name
            or name in self._loaded
            or len(self._loaded) < self._capacity
            or self._idle() is not None
        )

    def acquire(self, name: str, now: float) -> float:
        """Use an adapter, loading it if necessary; returns when it is ready."""
        if not name:
            return now
        adapter = self._loaded.get(name)
        if adapter is None:
            idle = self._idle()
            if len(self._loaded) >= self._capacity and idle is not None:
                del self._loaded[idle]
            adapter = self._loaded[name] = _Loaded(ready_at=now + self._load_seconds)
        self._loaded.move_to_end(name)
        adapter.users += 1
        return max(now, adapter.ready_at)

    def release(self, name: str) -> None:
        """End one use; the adapter stays loaded until its memory is needed."""
        if name:
            self._loaded[name].users -= 1

    def _idle(self) -> str | None:
        return next((name for name, adapter in self._loaded.items() if not adapter.users), None)
