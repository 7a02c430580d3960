"""`forebay top` and `forebay debug` against the live page's real routes."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import tarfile
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from loop_thread import LoopThread
from ports import free_port

from forebay_cli import CommandError, top
from forebay_cli.epps import EPP
from forebay_control.plan import Plan
from forebay_epp.adapters import live
from forebay_epp.adapters.live.history import History
from forebay_epp.adapters.live.report import PolicyInForce, describe
from forebay_epp.core.terms import BandState, ControllerState, EndpointState, FlowState
from forebay_epp.traffic import Traffic

if TYPE_CHECKING:
    from pathlib import Path

FLOWS = tuple(FlowState("llama", n, 0, f"tenant-{n}\x1b[31m") for n in range(1, 9))
STATE = ControllerState(
    *("serving/chat", 36, 0, 8, 1.0, False),
    (
        BandState("Critical", 100, 0, 0, 0.0, 1.0, False, (), 0),
        BandState("Standard", 0, 36, 0, 12.3, 4.0, False, FLOWS, len(FLOWS)),
    ),
    (
        EndpointState("10.0.0.1:8000", "pod-1", 6, 0, 8, 2, 6, 0, 0.9, fresh=True),
        EndpointState("10.0.0.2:8000", "pod-2", 0, 0, 8, 0, 0, 0, None, True, True, "connect"),
    ),
)
# Prints what kubectl prints and no more: the port is that of the pages, which need no forwarding.
KUBECTL = """\
    #!/usr/bin/env python3
    import sys, time
    if "get" in sys.argv:
        labels = "app.kubernetes.io/component=endpoint-picker,forebay.dev/pool=chat"
        assert f"--selector={labels}" in sys.argv
        print("chat-epp-0", end="")
    else:
        assert "pod/chat-epp-0" in sys.argv and ":9090" in sys.argv
        print("Forwarding from 127.0.0.1:{port} -> 9090", flush=True)
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def port():
    """The port of a server of the live page."""
    number = free_port()
    policy, history = PolicyInForce(), History(Traffic())
    policy.reconfigured(Plan("serving/chat"))

    async def report() -> dict[str, object]:
        return describe(STATE, policy, history, None)

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes(live.routes(report))
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", number).start()
        return runner

    thread = LoopThread()
    runner = thread.do(start())
    yield number
    thread.do(runner.cleanup())
    thread.stop()


def command(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-P", "-m", "forebay_cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env=environment,
    )


def test_it_shows_bands_flows_slots_and_what_is_out(port):
    """Once, where there is no terminal; names are printed without their control characters."""
    done = command("top", f"--port={port}")

    assert done.returncode == 0, done.stderr
    for words in ("36 waiting", "Standard", "12.3s", "tenant-8", "3 others", "6/8", "out: connect"):
        assert words in done.stdout
    assert "\x1b[31m" not in done.stdout


def test_json_is_for_programs(port):
    """The whole state of every EPP."""
    (item,) = json.loads(command("top", "-o", "json", f"--port={port}").stdout)["items"]

    assert item["epp"] == "forebay-up"
    assert item["bands"][1]["requests"] == 36


def test_q_quits(port):
    """In a terminal it stays until then, and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "forebay_cli", "top", f"--port={port}"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while b"Standard" not in shown:
        assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(ours, 65536)
    os.write(ours, b"q")

    while process.poll() is None and select.select([ours], [], [], 10)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
    assert process.wait(30) == 0, shown
    os.close(ours)


def test_pods_are_reached_by_kubectl(port, tmp_path):
    """Those of the pool, by a port that kubectl chooses and whose process ends with the command."""
    program = tmp_path / "kubectl"
    program.write_text(textwrap.dedent(KUBECTL).replace("{port}", str(port)))
    program.chmod(0o755)

    done = command("top", "--pool=chat", path=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "serving/chat (chat-epp-0)" in done.stdout


def test_an_epp_that_does_not_answer_is_an_error():
    """It says which, where, and what to try."""
    with pytest.raises(CommandError, match=r"forebay-up: http://127\.0\.0\.1:1/live/state.*--port"):
        top.screen([EPP("forebay-up", "http://127.0.0.1:1")])


def test_the_bundle_holds_pages_and_says_what_it_could_not_get(port, tmp_path):
    """A page that is missing is a file that says so; an archive is never overwritten."""
    file = tmp_path / "bundle.tar.gz"
    flags = (str(file), f"--port={port}", "--operator-port=1")

    assert command("debug", *flags).returncode == 0
    with tarfile.open(file) as archive:
        state = archive.extractfile("forebay-debug/epps/forebay-up/live/state")
        operator = archive.extractfile("forebay-debug/operator/resources.json")
        assert json.load(state)["pool"] == "serving/chat"
        assert b"refused" in operator.read()
    assert "exists" in command("debug", *flags).stderr


def test_completion_knows_every_command_and_its_flags():
    """And bash takes the script."""
    script = command("completion", "bash").stdout

    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "top" in script
    assert "--once" in script
