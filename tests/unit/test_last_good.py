"""The last good program on a real disk: what is wrong with the file costs the warm start only."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import threading

import pytest

from forebay_epp.adapters.lastgood import CRASHES, FILE, LastGood, StoredPlan

POOL = "default/chat"
PATIENCE = 30.0


def stored(number: int = 1) -> StoredPlan:
    return StoredPlan(b"plan %d" % number)


def opened(folder, pool: str = POOL) -> LastGood:
    """What a process has after its start."""
    last_good = LastGood(folder, pool, {})
    last_good.load()
    return last_good


def kept(folder, *numbers: int) -> LastGood:
    """What a process has after putting these plans into force one after the other."""
    last_good = opened(folder)

    async def keep() -> None:
        for number in numbers:
            plan = stored(number)
            await last_good.attempt(plan.sha256, PATIENCE)
            last_good.attempted()
            last_good.keep_plan(plan.data)
            last_good.state.epoch = last_good.state.highest_epoch = 5
            last_good.state.endpoints = b"endpoints %d" % number
            await last_good.save(PATIENCE)

    asyncio.run(keep())
    return last_good


def save(last_good: LastGood) -> None:
    asyncio.run(last_good.save(PATIENCE))


def plans(last_good: LastGood) -> list[int]:
    return [int(plan.data.split()[1]) for plan in last_good.state.plans]


def test_what_was_kept_is_there_after_a_restart(tmp_path):
    """The newest plan first, and one before it; the newest endpoints."""
    kept(tmp_path, 1, 2, 3)
    again = opened(tmp_path)

    assert again.state.plans == [stored(3), stored(2)]
    assert (again.state.epoch, again.state.highest_epoch) == (5, 5)
    assert again.state.endpoints == b"endpoints 3"
    assert again._failures == {}


def test_a_plan_kept_again_takes_no_second_entry(tmp_path):
    """The one before it stays: it is what is left should this one turn out to be bad."""
    last_good = kept(tmp_path, 1, 2)
    last_good.keep_plan(stored(2).data)
    save(last_good)

    assert plans(opened(tmp_path)) == [2, 1]


def test_a_plan_that_returns_is_not_there_twice(tmp_path):
    """An edit was taken back."""
    assert plans(kept(tmp_path, 1, 2, 1)) == [1, 2]


def test_nobody_else_can_read_the_file(tmp_path):
    """It names models and addresses."""
    kept(tmp_path, 1)

    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_no_file_is_no_failure(tmp_path):
    """It is the first start."""
    assert opened(tmp_path)._failures == {}


def test_without_a_folder_nothing_is_kept():
    """And nothing is said about it."""
    last_good = kept(None, 1)

    assert (plans(last_good), last_good._failures) == ([1], {})


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 66, 200, -1])
def test_a_truncated_file_is_ignored(tmp_path, length):
    """As after a crash of the machine."""
    kept(tmp_path, 1, 2)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:length])
    last_good = opened(tmp_path)

    assert (plans(last_good), last_good._failures) == ([], {"corrupt": 1})


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    """In the checksum, the line break, and at every byte of the body."""
    kept(tmp_path, 1)
    file = tmp_path / FILE
    good = file.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        file.write_bytes(bad)
        last_good = opened(tmp_path)
        assert last_good._failures == {"corrupt": 1}, position
        assert plans(last_good) == [], position


def rewritten(folder, **changes) -> None:
    """Change what the file says, with a checksum that fits."""
    file = folder / FILE
    data = {**json.loads(file.read_bytes().partition(b"\n")[2]), **changes}
    body = json.dumps(data).encode()
    file.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"pool": "default/other"},
        {"plans": None},
        {"plans": [1]},
        {"plans": [{"plan": ""}]},
        {"plans": [{"plan": "", "proven": 1}]},
        {"deleted": "no"},
        {"starts": "many"},
        {"starts": -1},
        {"highestEpoch": float("inf")},
        {"highestEpoch": 2**64},
        {"quarantined": ["xyz"]},
    ],
    ids=str,
)
def test_a_file_that_says_something_strange_is_ignored(tmp_path, changes):
    """Another pool's, another release's, or no pool's."""
    kept(tmp_path, 1)
    rewritten(tmp_path, **changes)
    last_good = opened(tmp_path)

    assert (plans(last_good), last_good._failures) == ([], {"corrupt": 1})


@pytest.mark.parametrize("content", [b"[]", b"1", b"[" * 100_000, b"\xff", b"{}"])
def test_a_file_that_is_something_else_is_ignored(tmp_path, content):
    """Although its checksum fits."""
    (tmp_path / FILE).write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    assert opened(tmp_path)._failures == {"corrupt": 1}


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    """It is none of ours."""
    with (tmp_path / FILE).open("wb") as stream:
        stream.truncate(1 << 33)

    assert opened(tmp_path)._failures == {"corrupt": 1}


def test_a_folder_in_the_place_of_the_file(tmp_path):
    """Nor can it be replaced: both are reported."""
    (tmp_path / FILE).mkdir()
    last_good = kept(tmp_path, 1)

    assert last_good._failures == {"unreadable": 1, "unwritable": 2}
    assert plans(last_good) == [1]


def test_a_folder_that_is_not_there(tmp_path):
    """The EPP serves; it has no warm start."""
    last_good = kept(tmp_path / "missing", 1)

    assert last_good._failures == {"unwritable": 2}


RUN_WITH_LIMIT = """
import asyncio, resource, sys
from pathlib import Path
from forebay_epp.adapters.lastgood import LastGood
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
last_good = LastGood(Path(sys.argv[1]), "default/chat", {})
last_good.load()
last_good.keep_plan(b"s" * 100_000)
asyncio.run(last_good.save(30))
print(last_good._failures)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """And no half a file, which would take the space that the next one needs.

    A limit on the size of files stands for the full disk: a write fails half way in both.
    """
    kept(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITH_LIMIT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert "{'unwritable': 1}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert plans(opened(tmp_path)) == [1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


RUN_AS_UNUSED_PORT = """
import asyncio, os, sys
from pathlib import Path
from forebay_epp.adapters.lastgood import LastGood
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
last_good = LastGood(Path(sys.argv[1]), "default/chat", {})
last_good.load()
print([plan.data.decode() for plan in last_good.state.plans])
last_good.keep_plan(b"s")
asyncio.run(last_good.save(30))
print(last_good._failures)
"""


def test_a_read_only_folder_is_read(tmp_path):
    """What can be used is used."""
    state = tmp_path / "state"
    state.mkdir()
    kept(state, 1)
    (state / FILE).chmod(0o644)
    state.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN_AS_UNUSED_PORT, str(state)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        state.chmod(0o755)

    assert done.stdout.splitlines() == ["['plan 1']", "{'unwritable': 2}"]


def test_a_disk_that_hangs_holds_up_nobody(tmp_path):
    """Neither the one who waits nor the next one, and what is newest gets there in the end.

    Opening a pipe without a reader hangs as such a disk does.
    """
    os.mkfifo(tmp_path / f"{FILE}.new")
    last_good = opened(tmp_path)

    async def scenario() -> None:
        for number in range(1, 9):
            last_good.keep_plan(stored(number).data)
            await last_good.save(0.01)
        assert last_good._failures == {"slow": 8}
        assert sum(t.name == "last-good" for t in threading.enumerate()) == 1
        descriptor = os.open(tmp_path / f"{FILE}.new", os.O_RDONLY | os.O_NONBLOCK)
        try:
            await last_good.save(PATIENCE)
        finally:
            os.close(descriptor)

    asyncio.run(scenario())
    assert plans(opened(tmp_path)) == [8, 7]


# --- crashes


def crash_and_start(folder, times: int) -> LastGood:
    """Start that often; each process but the last ends without a word."""
    for _ in range(times):
        last_good = opened(folder)
    return last_good


def test_a_program_under_which_the_process_crashes_is_set_aside(tmp_path):
    """After three times; the one before it is used."""
    kept(tmp_path, 1, 2)  # the process that took it crashes: the first time

    assert plans(crash_and_start(tmp_path, CRASHES - 1)) == [2, 1]
    last_good = opened(tmp_path)
    assert plans(last_good) == [1]
    assert last_good.state.quarantined == [stored(2).sha256]


def test_two_bad_programs_end_on_none(tmp_path):
    """Built-in defaults are left, and both stay set aside."""
    kept(tmp_path, 1, 2)
    last_good = crash_and_start(tmp_path, 3 * CRASHES)

    assert plans(last_good) == []
    assert last_good.state.quarantined == [stored(1).sha256, stored(2).sha256]
    assert last_good.state.starts == 0


def test_a_process_that_ends_in_order_has_not_crashed(tmp_path):
    """Restarts for other reasons do not add up over days."""
    kept(tmp_path, 1)
    for _ in range(3 * CRASHES):
        last_good = opened(tmp_path)
        last_good.ended()
        save(last_good)

    assert plans(last_good) == [1]


def test_a_plan_that_was_lived_with_is_not_to_blame_for_later_ends(tmp_path):
    """Memory that runs out under traffic ends the process in any row; the plan stays in force."""
    last_good = kept(tmp_path, 1, 2)
    last_good.survived()
    save(last_good)
    last_good = crash_and_start(tmp_path, 5 * CRASHES)

    assert (plans(last_good), last_good.state.quarantined) == ([2, 1], [])


def test_a_plan_that_returns_is_still_beyond_suspicion(tmp_path):
    """Its successor was not, and was taken back."""
    last_good = kept(tmp_path, 1)
    last_good.survived()
    save(last_good)
    kept(tmp_path, 2, 1)

    assert plans(crash_and_start(tmp_path, 2 * CRASHES)) == [1, 2]


def test_a_plan_that_is_set_aside_leaves_the_program_in_part_only(tmp_path):
    """Its endpoints stay in force."""
    kept(tmp_path, 1, 2)
    last_good = crash_and_start(tmp_path, CRASHES)

    assert (last_good.state.whole, last_good.state.endpoints) == (False, b"endpoints 2")


def test_a_new_program_begins_with_a_clean_slate(tmp_path):
    """The crashes were another one's."""
    kept(tmp_path, 1)
    crash_and_start(tmp_path, CRASHES - 2)
    kept(tmp_path, 2)

    assert plans(crash_and_start(tmp_path, CRASHES - 1)) == [2, 1]


def attempt(folder, plan: StoredPlan) -> LastGood:
    """Start, try to put a plan into force, and crash over it."""
    last_good = opened(folder)
    asyncio.run(last_good.attempt(plan.sha256, PATIENCE))
    return last_good


def test_a_program_that_cannot_even_be_put_into_force_is_set_aside(tmp_path):
    """The process ends before it is kept, and the operator sends it each time."""
    kept(tmp_path, 1)
    bad = stored(2)
    for _ in range(CRASHES):
        assert bad.sha256 not in attempt(tmp_path, bad).state.quarantined
    last_good = opened(tmp_path)

    assert last_good.state.quarantined == [bad.sha256]
    assert plans(last_good) == [1]


def test_the_program_in_force_is_not_to_blame_for_the_next_one(tmp_path):
    """It is the one to go back to."""
    kept(tmp_path, 1)
    for number in range(2, 2 + 2 * CRASHES):
        attempt(tmp_path, stored(number))

    assert plans(opened(tmp_path)) == [1]


def test_a_first_program_that_ends_the_process_is_set_aside_too(tmp_path):
    """There is no file before it."""
    bad = stored(1)
    for _ in range(CRASHES):
        attempt(tmp_path, bad)

    assert opened(tmp_path).state.quarantined == [bad.sha256]


def test_a_refusal_is_not_a_crash(tmp_path):
    """A program may fail to apply as often as it likes."""
    last_good = kept(tmp_path, 1)
    for _ in range(3 * CRASHES):
        asyncio.run(last_good.attempt(stored(2).sha256, PATIENCE))
        last_good.attempted()
    save(last_good)

    assert opened(tmp_path).state.quarantined == []
