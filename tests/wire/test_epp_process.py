"""The EPP as a process: start, plan file, TLS files, health, drain."""

from __future__ import annotations

import json
import re
import signal
import ssl
import subprocess
import sys
from contextlib import ExitStack
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import grpc
import pytest
from control_plane import START_SECONDS
from ext_proc_peer import Stream, channel, until
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import free_port

from forebay_control.v1 import control_pb2
from forebay_epp.transport import health


def snapshot(*addresses, max_requests=100, slots=1) -> dict:
    """A plan file's content: one band, a fixed number of slots."""
    return {
        "plan": {
            "pool": "test/pool",
            "bands": [
                {
                    "name": "Standard",
                    "priority": 0,
                    "fairness": "FCFS",
                    "ordering": "FCFS",
                    "ttlSeconds": 60,
                    "maxRequests": max_requests,
                    "maxBytes": 1 << 20,
                    "flowMaxRequests": max_requests,
                    "flowMaxBytes": 1 << 20,
                }
            ],
            "limits": {"maxRequests": 1000, "maxBytes": 1 << 24, "maxBodyBytes": 1 << 16},
            "saturation": {
                "mode": "Concurrency",
                "maxConcurrency": slots,
                "kvCacheUsageThreshold": 1,
            },
            "unmatched": {"action": "Queue", "band": "Standard"},
            "noEndpointsTtlSeconds": 60,
        },
        "endpoints": {"endpoints": [{"address": address} for address in addresses]},
    }


class Process:
    """`python -m forebay_epp` with its own ports."""

    def __init__(self, folder, *flags, secure="false", drain="5s") -> None:
        self.plan_file = folder / "plan" / "plan.json"
        self.plan_file.parent.mkdir(exist_ok=True)
        if not self.plan_file.exists():
            self.write(snapshot("10.0.0.1:80"))
        self.grpc, self.health, self.metrics = free_port(), free_port(), free_port()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "forebay_epp", f"--plan-file={self.plan_file}"),
                *("--bind-address=127.0.0.1", f"--secure-serving={secure}"),
                *(f"--grpc-port={self.grpc}", f"--grpc-health-port={self.health}"),
                *(f"--metrics-port={self.metrics}", f"--drain-timeout={drain}", *flags),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )

    def write(self, content: dict) -> None:
        json_format.ParseDict(content, control_pb2.Snapshot())
        new = self.plan_file.with_suffix(".new")
        new.write_text(json.dumps(content))
        new.replace(self.plan_file)

    def serving(self) -> bool:
        assert self.process.poll() is None, self.process.stderr.read()
        try:
            return self.check("inference-extension", 1)
        except grpc.RpcError:
            return False

    def check(self, service: str, timeout_seconds: float = 10) -> bool:
        """Ask for its health under a service name."""
        with channel(f"127.0.0.1:{self.health}") as raw:
            answer = health_pb2_grpc.HealthStub(raw).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds
            )
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def page(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self.metrics}{path}", timeout=5) as page:
            return page.read().decode()

    def state(self) -> dict:
        return json.loads(self.page("/debug/queues"))

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and the log."""
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log


@pytest.fixture
def start(tmp_path):
    """Start processes that end with the test."""
    started = []

    def begin(*flags, wait=True, **options) -> Process:
        started.append(Process(tmp_path, *flags, **options))
        if wait:
            until(started[-1].serving, START_SECONDS)
        return started[-1]

    yield begin
    for process in started:
        process.process.kill()
        process.process.communicate()


def test_it_shows_queues_and_metrics(start):
    """The pages on the metrics port, before any request."""
    process = start()

    assert process.state()["endpoints"][0]["address"] == "10.0.0.1:80"
    metrics = process.page("/metrics")
    assert 'forebay_queue_requests{band="Standard",pool="test/pool"} 0.0' in metrics
    assert "process_resident_memory_bytes" in metrics


@pytest.mark.parametrize("transport", ["completion-queue", "aio"])
def test_sigterm_drains(start, transport):
    """NOT_SERVING at once; what runs may end; what waits gets 503; the exit status is 0."""
    process = start(f"--transport={transport}", drain="1s")
    with ExitStack() as stack:
        raw = stack.enter_context(channel(f"127.0.0.1:{process.grpc}"))
        running, waiting = Stream(raw), Stream(raw)
        running.send_request()
        running.routed()
        waiting.send_request()
        until(lambda: process.state()["requests"] == 1)

        process.process.send_signal(signal.SIGTERM)

        until(lambda: not process.serving())
        late = Stream(raw)
        late.send_request()
        assert late.answer().immediate_response.status.code == 503
        refused = waiting.answer().immediate_response
        assert json.loads(refused.body)["error"]["code"] == "EvictedShuttingDown"
        running.respond()
        status, log = process.end()
    assert status == 0
    assert "Traceback" not in log


def test_what_is_cut_at_the_end_of_a_drain_is_counted(start):
    """Two answers outlast it; the log says so, and what to do."""
    process = start(drain="0s")
    process.write(snapshot("10.0.0.1:80", slots=2))
    until(lambda: process.state()["endpoints"][0]["limit"] == 2, 20)
    with channel(f"127.0.0.1:{process.grpc}") as raw:
        running = [Stream(raw), Stream(raw)]
        for stream in running:
            stream.send_request()
            stream.routed()

        process.process.send_signal(signal.SIGTERM)

        status, log = process.end()
    (cut,) = [line for line in map(json.loads, log.splitlines()) if "answers" in line]
    assert (status, cut["level"], cut["answers"]) == (0, "warning", 2)
    assert "--drain-timeout" in cut["msg"]


@pytest.mark.parametrize("transport", ["completion-queue", "aio"])
def test_who_drains_is_alive(start, transport):
    """Not ready and not to be killed: a liveness probe must not cut off what it still serves."""
    process = start(f"--transport={transport}", drain="60s")
    assert process.check("liveness")
    with channel(f"127.0.0.1:{process.grpc}") as raw:
        running = Stream(raw)
        running.send_request()
        running.routed()

        process.process.send_signal(signal.SIGTERM)

        until(lambda: not process.check("readiness"), 20)
        assert process.check("liveness")


def test_who_does_not_turn_any_more_is_not_alive():
    """The health server asks for it under that one name only."""
    server, port = health.serve("127.0.0.1:0", lambda: True, lambda: False)
    try:
        with channel(f"127.0.0.1:{port}") as raw:
            stub = health_pb2_grpc.HealthStub(raw)
            answers = {
                name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
                for name in ("liveness", "readiness", "")
            }
    finally:
        server.stop(0)

    no, yes = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING
    assert answers == {"liveness": no, "readiness": yes, "": yes}


def test_sigterm_dispatches_what_waits_when_a_slot_comes_free(start):
    """Draining is not dropping."""
    process = start(drain="10s")
    with channel(f"127.0.0.1:{process.grpc}") as raw:
        running, waiting = Stream(raw), Stream(raw)
        running.send_request()
        running.routed()
        waiting.send_request()
        until(lambda: process.state()["requests"] == 1)

        process.process.send_signal(signal.SIGTERM)
        until(lambda: not process.serving())
        running.respond()

        assert waiting.routed() == "10.0.0.1:80"
        waiting.respond()
        assert process.end()[0] == 0


def test_a_new_plan_file_is_taken_while_requests_wait(start):
    """A new endpoint serves what was queued before."""
    process = start()
    with channel(f"127.0.0.1:{process.grpc}") as raw:
        first, second = Stream(raw), Stream(raw)
        first.send_request()
        first.routed()
        second.send_request()
        until(lambda: process.state()["requests"] == 1)

        process.write(snapshot("10.0.0.1:80", "10.0.0.2:80"))

        assert second.routed() == "10.0.0.2:80"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"plan": {"bands": 3}}', '{"plan": {"nonsense": 1}}', "{}", "\x00"],
)
def test_a_plan_that_is_not_valid_leaves_the_last_good_one(start, text):
    """It is logged and counted; nothing else changes."""
    process = start()

    process.plan_file.write_text(text)

    # Written in place, not renamed: the EPP may see the file more than once.
    refused = re.compile(r'forebay_plan_reloads_total\{result="refused"\} [1-9]')
    until(lambda: refused.search(process.page("/metrics")) is not None)
    assert process.state()["endpoints"][0]["address"] == "10.0.0.1:80"


def test_without_a_valid_plan_it_does_not_start(start, tmp_path):
    """The log says which field is wrong and why."""
    (tmp_path / "plan").mkdir()
    content = snapshot("nonsense")
    content["plan"]["bands"][0]["fairness"] = "Best"
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(content))
    process = start(wait=False)

    status, log = process.end()

    assert status == 2
    assert "plan.bands[0].fairness: 'Best' is not one of FCFS, RoundRobin" in log
    assert "endpoints.endpoints[0].address: 'nonsense' is not ip:port" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("flag", ["grpc_port", "grpc_health_port", "metrics_port"])
def test_a_port_in_use_is_named(start, flag):
    """One line, exit status 2 or 1, no traceback."""
    first = start()
    taken = {
        "grpc_port": first.grpc,
        "grpc_health_port": first.health,
        "metrics_port": first.metrics,
    }[flag]
    name = f"--{flag.replace('_', '-')}"

    status, log = start(f"{name}={taken}", wait=False).end()

    assert status != 0
    assert name in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--grpc-port=x", "not a port"),
        ("--secure-serving=maybe", "not true or false"),
        ("--drain-timeout=soon", "not a duration"),
        ("--max-streams=0", "not a whole number above 0"),
        ("--transport=udp", "invalid choice"),
        ("--cert-path=/nonexistent", "--cert-path"),
    ],
)
def test_a_wrong_flag_is_explained(start, flag, message):
    """Exit status 2 and what would be right."""
    secure = "true" if "cert" in flag else "false"

    status, log = start(flag, wait=False, secure=secure).end()

    assert (status, message in log, "Traceback" in log) == (2, True, False)


def test_certificate_files_are_reloaded(start, tmp_path):
    """New handshakes get the new certificate; files that are no pair change nothing."""
    folder = tmp_path / "tls"
    folder.mkdir()
    _write_pair(folder)
    process = start(f"--cert-path={folder}", secure="true")
    address = ("127.0.0.1", process.grpc)
    before = ssl.get_server_certificate(address)

    (folder / "tls.crt").write_text("nonsense")
    broken = ssl.get_server_certificate(address)
    _write_pair(folder)
    after = ssl.get_server_certificate(address)

    assert before == broken
    assert after == (folder / "tls.crt").read_text()
    assert after != before


def _write_pair(folder) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test", "-days", "2"),
            *("-keyout", folder / "tls.key", "-out", folder / "tls.crt"),
        ],
        check=True,
        capture_output=True,
    )


def test_plaintext_and_tls_do_not_mix(start):
    """A plaintext client of a secure port gets an error, not an answer."""
    process = start(secure="true")
    with channel(f"127.0.0.1:{process.grpc}") as raw:
        stream = Stream(raw)
        stream.send_request()
        with pytest.raises(grpc.RpcError):
            stream.answer()


def test_pages_that_do_not_exist_are_404(start):
    """No surprise on the metrics port."""
    process = start()

    with pytest.raises((HTTPError, URLError)):
        process.page("/nothing")
