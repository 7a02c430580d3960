"""The operator's control server as a process: `python leader.py PORT HTTP_PORT PLAN_FILE SECONDS`.

It can be killed and frozen while EPPs run on, which a thread of the test cannot. Once it has led
for so many seconds it takes it that all EPPs are there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from aiohttp import web
from google.protobuf import json_format
from prometheus_client import generate_latest

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.shares import ledger
from forebay_operator.channel.trust import unauthenticated


async def main(port: int, http: int, snapshot: pb.Snapshot) -> None:
    """Program one pool until the process ends."""
    server = ControlServer(unauthenticated, lambda _: None, lambda _, __, ___: None)
    server.lead(int(time.time()))
    server.program(snapshot.plan.pool, snapshot)
    await server.serve(f"127.0.0.1:{port}", None)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest())

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", http).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    ledger.SETTLING_SECONDS = float(sys.argv[4])
    plan = json_format.Parse(Path(sys.argv[3]).read_text(), pb.Snapshot())
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), plan))
