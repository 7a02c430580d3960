"""Calls from the asyncio thread to the data-plane thread and back.

What to call is up to the caller; `post` is `DataPlane.post`, which has a call run there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Post = Callable[[Callable[[float], None]], None]

_T = TypeVar("_T")


async def ask(post: Post, question: Callable[[float], _T], patience_seconds: float) -> _T:
    """Ask the other thread and return its answer.

    Raises:
        TimeoutError: it has not in time; it may still run the question.
    """
    running = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = running.create_future()

    def call(now: float) -> None:
        result = question(now)
        running.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(result))

    post(call)
    async with asyncio.timeout(patience_seconds):  # wait_for may swallow a cancellation
        return await answer


async def hand_over(post: Post, call: Callable[[float], _T], patience_seconds: float) -> _T:
    """Have the other thread do something, or, if it is late, not do it at all; return its result.

    Raises:
        TimeoutError: it has not begun in time, and will not.
    """
    running = asyncio.get_running_loop()
    done: asyncio.Future[_T] = running.create_future()
    undecided = [None]  # popped by the other thread to begin, or by this one to give up

    def begin(now: float) -> None:
        try:
            undecided.pop()
        except IndexError:
            return
        result = call(now)
        running.call_soon_threadsafe(lambda: None if done.done() else done.set_result(result))

    post(begin)
    await asyncio.wait((done,), timeout=patience_seconds)
    try:
        undecided.pop()
    except IndexError:
        return await done
    raise TimeoutError("the data plane is busy")
