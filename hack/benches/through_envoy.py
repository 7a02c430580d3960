"""What the benches of requests through a real Envoy share: fixtures, plans, clients, CPU time.

What is measured belongs in transport.py and answers.py. Needs nginx (Debian: nginx-light).
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from forebay_cli import envoy
from forebay_cli.child import dying_with_us

HERE = Path(__file__).parent
BODY = '{"model":"chat","messages":[{"role":"user","content":"%s"}],"max_tokens":50}'
PROMPT_BYTES = 200
ANSWER = '{"id":"x","choices":[],"usage":{"prompt_tokens":50,"completion_tokens":50}}'
START_SECONDS = 120  # on a busy machine


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require(*programs: str) -> None:
    """End with advice where a program is missing."""
    packages = {"nginx": "nginx-light"}
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        install = " ".join(packages.get(name, name) for name in missing)
        raise SystemExit(f"needs {' and '.join(missing)}; on Debian: apt-get install {install}")


def start_streaming(port: int, tokens: int, token_seconds: float) -> subprocess.Popen[bytes]:
    """Start a model server with streamed answers (sse_backend.py), which dies with the bench."""
    arguments = (str(port), str(tokens), str(token_seconds))
    return subprocess.Popen(dying_with_us(sys.executable, str(HERE / "sse_backend.py"), *arguments))


class Lane:
    """One Envoy, one EPP behind it, and one JSON server behind both.

    Args:
        folder: for configuration files; exists.
        options: of Envoy's bootstrap.

    Attributes:
        epp: the running EPP.
        http: Envoy's port.
        server: the port of the model server that `start_epp` sends to; nginx by default.
    """

    epp: subprocess.Popen[bytes]

    def __init__(self, folder: Path, **options: Any) -> None:
        self._folder = folder
        self.http, self._grpc, self.server = free_port(), free_port(), free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._used_ns: dict[str, int] = {}
        config = envoy.bootstrap(envoy.Ports(self.http, self._grpc), secure=False, **options)
        (folder / "envoy.json").write_text(json.dumps(config))
        binary = Path(sys.executable).with_name("envoy")
        self.start(
            *(binary, "-c", folder / "envoy.json", "--concurrency", 1, "-l", "error"),
            "--use-dynamic-base-id",
        )

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start a process that ends with the lane."""
        log = (self._folder / "log").open("ab")
        parts = dying_with_us(*(str(part) for part in command))
        process = subprocess.Popen(parts, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def start_nginx(self) -> None:
        """Start a model server with short JSON answers."""
        (self._folder / "nginx.conf").write_text(
            f"daemon off; pid {self._folder}/nginx.pid; error_log stderr; master_process off;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; keepalive_requests 1000000000; client_max_body_size 2m;\n"
            f"client_body_buffer_size 1m; server {{ listen 127.0.0.1:{self.server};\n"
            "default_type application/json;\n"
            f"location / {{ return 200 '{ANSWER}'; }} }} }}\n"
        )
        self.start("nginx", "-c", self._folder / "nginx.conf", "-p", self._folder)

    def start_bare(self) -> None:
        """Start bare_aio.py in the EPP's place and wait until requests pass."""
        address = f"127.0.0.1:{self.server}"
        self.epp = self.start(sys.executable, HERE / "bare_aio.py", self._grpc, address)
        self._wait()

    def start_epp(
        self,
        plan: dict[str, Any],
        transport: str = "completion-queue",
        python: Path = Path(sys.executable),
        *,
        wait: bool = True,
    ) -> None:
        """Start an EPP of the checkout that `python` belongs to, and wait until requests pass."""
        file = self._folder / "plan.json"
        file.write_text(json.dumps(plan))
        self.epp = self.start(
            *(python, "-m", "forebay_epp", "--plan-file", file),
            *("--transport", transport, "--secure-serving=false"),
            *("--bind-address", "127.0.0.1", "--grpc-port", self._grpc),
            *("--grpc-health-port", 0, "--metrics-port", 0, "--verbosity", 0),
        )
        if wait:
            self._wait()

    def stop(self) -> None:
        """End every process, the youngest first."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._processes.clear()

    @property
    def url(self) -> str:
        """Where completions are asked for."""
        return f"http://127.0.0.1:{self.http}/v1/chat/completions"

    def cpu(self) -> float:
        """Return the CPU seconds that the EPP's threads have used; differences are what counts.

        By the scheduler's nanoseconds: the ticks of /proc/PID/stat are 10 ms each.
        """
        for thread in Path(f"/proc/{self.epp.pid}/task").iterdir():
            with suppress(FileNotFoundError):
                self._used_ns[f"{self.epp.pid}.{thread.name}"] = int(
                    (thread / "schedstat").read_text().split()[0]
                )
        return sum(self._used_ns.values()) / 1e9

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self.epp.poll() is not None:
                log = (self._folder / "log").read_text()[-2000:]
                raise SystemExit(f"requests do not pass:\n{log}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        body = (BODY % "x").encode()
        request = urllib.request.Request(self.url, body)  # noqa: S310  # loopback
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def snapshot(*addresses: str, slots: int | None = 100_000) -> dict[str, Any]:
    """Return the plan of endpoints with so many slots each, as the plan file has it.

    Without `slots` they are learned, from scrapes.
    """
    many = {"maxRequests": 100_000, "maxBytes": 1 << 30}
    mode = "Adaptive" if slots is None else "Concurrency"
    return {
        "plan": {
            "pool": "bench/bench",
            "bands": [
                {
                    "name": "Standard",
                    "priority": 0,
                    "fairness": "RoundRobin",
                    "ordering": "FCFS",
                    "ttlSeconds": 60,
                    **many,
                    "flowMaxRequests": 100_000,
                    "flowMaxBytes": 1 << 30,
                }
            ],
            "models": [{"name": "chat", "band": "Standard"}],
            "limits": {**many, "maxBodyBytes": 1 << 20},
            "saturation": {
                "mode": mode,
                "maxConcurrency": slots or 100_000,
                "kvCacheUsageThreshold": 1,
            },
            "unmatched": {"action": "Queue", "band": "Standard"},
            "noEndpointsTtlSeconds": 60,
        },
        "endpoints": {"endpoints": [{"address": address} for address in addresses]},
    }
