"""A model server for hack/bench transport and answers: every request gets a stream of fixed pace.

Run as `sse_backend.py PORT CHUNKS INTERVAL_SECONDS`. A request whose query says
`pace=0.02&chunks=50` gets others. Each event says when it was sent, by the clock that all processes
of a machine share.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time

EVENT = (
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"delta":{"content":"a"}}],'
    b'"sent":%.6f}\n\n'
)
CHUNKS = re.compile(rb"chunks=(\d+)")
PACE = re.compile(rb"pace=([\d.]+)")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def main() -> None:
    """Serve until killed."""
    port, chunks, interval = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                # Envoy sends the body chunked in full duplex; its end is an empty chunk.
                await reader.readuntil(b"0\r\n\r\n")
                writer.write(HEAD)
                asked, pace = CHUNKS.search(head), PACE.search(head)
                pause = float(pace[1]) if pace else interval
                for _ in range(int(asked[1]) if asked else chunks):
                    if writer.transport.is_closing():
                        return
                    writer.write(_chunk(EVENT % time.monotonic()))
                    await asyncio.sleep(pause)
                writer.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
