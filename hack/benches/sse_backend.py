"""A model server for hack/bench transport: every request gets an event stream of fixed pace.

Run as `sse_backend.py PORT CHUNKS INTERVAL_SECONDS`.
"""

from __future__ import annotations

import asyncio
import sys

EVENT = (
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"delta":{"content":"a"}}]}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def main() -> None:
    """Serve until killed."""
    port, chunks, interval = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                # Envoy sends the body chunked in full duplex; its end is an empty chunk.
                await reader.readuntil(b"0\r\n\r\n")
                writer.write(HEAD)
                for _ in range(chunks):
                    writer.write(_chunk(EVENT))
                    await asyncio.sleep(interval)
                writer.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
