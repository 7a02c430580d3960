"""How a program gets to the data-plane thread: once, or not at all."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forebay_epp.handover import hand_over

WAIT_SECONDS = 30


async def test_it_is_done_when_it_returns():
    """The thread calls back with its own time."""
    calls = []

    def post(call) -> None:
        threading.Thread(target=call, args=(7.0,)).start()

    await hand_over(post, calls.append, WAIT_SECONDS)
    assert calls == [7.0]


async def test_what_was_given_up_is_never_done():
    """The operator has been told that it was not applied, not even in part."""
    calls, posted = [], []
    with pytest.raises(TimeoutError, match="busy"):
        await hand_over(posted.append, calls.append, 0.01)
    posted[0](7.0)

    assert calls == []


async def test_what_has_begun_is_waited_for():
    """It cannot be given up any more."""
    go_on, calls = threading.Event(), []

    def slow(now: float) -> None:
        go_on.wait(WAIT_SECONDS)
        calls.append(now)

    def post(call) -> None:
        threading.Thread(target=call, args=(7.0,)).start()

    handing = asyncio.create_task(hand_over(post, slow, 0.05))
    await asyncio.wait((handing,), timeout=0.3)
    assert not handing.done()
    go_on.set()
    await handing

    assert calls == [7.0]
