"""`forebay up` as people run it: real EPP, real Envoy, a simulated model server."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from ext_proc_peer import Stream, channel, until
from ports import free_port

from forebay_cli import CommandError, up

QUICKSTART = Path(__file__).parents[2] / "crds/examples/quickstart"
PORT_FLAGS = ("http", "grpc", "grpc-health", "metrics", "operator", "envoy-admin")
START_SECONDS = 60


class Program:
    """A process of ours, and what it has written to stderr so far."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self._lines.extend(self.process.stderr)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def says(self, text: str) -> bool:
        """Whether it has been written; fails when the process ends without."""
        if text in self.output:
            return True
        assert self.process.poll() is None, self.output
        return False

    def end(self, signal_number: int = 0, seconds: float = 30) -> int:
        """Wait for the end, after a signal if one is given; return the exit status.

        Ended processes may be ended again, as their starter does, so that no pipe stays open.
        """
        if signal_number:
            self.process.send_signal(signal_number)
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        self.process.stdout.close()
        self.process.stderr.close()
        return status


class Up(Program):
    """A running `forebay up`."""

    def __init__(self, folder: Path, *flags: str, ports: dict[str, int] | None = None) -> None:
        self.ports = ports or {name: free_port() for name in PORT_FLAGS}
        given = [f"--{name}-port={port}" for name, port in self.ports.items()]
        super().__init__("forebay_cli", "up", str(folder), *given, *flags)

    def started(self) -> Up:
        until(lambda: self.says("Ctrl-C ends"), START_SECONDS)
        return self

    def request(self, model: str, **fields) -> tuple[int, dict]:
        """Send a chat request through Envoy; return status and answer."""
        body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        address = ("127.0.0.1", self.ports["http"])
        with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body | fields))
            # Closed here even when it breaks off: it keeps the socket open.
            with closing(connection.getresponse()) as response:
                return response.status, json.loads(response.read())

    def queues(self) -> dict:
        address = ("127.0.0.1", self.ports["metrics"])
        with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
            connection.request("GET", "/debug/queues")
            return json.loads(connection.getresponse().read())

    def in_flight(self) -> int:
        return sum(endpoint["in_flight"] for endpoint in self.queues()["endpoints"])

    def children(self) -> list[int]:
        """The process ids of its children."""
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def child(self, word: str) -> int:
        """The process id of the child whose command line has a word."""
        return next(
            child for child in self.children() if word in Path(f"/proc/{child}/cmdline").read_text()
        )

    def gone(self) -> bool:
        """Whether all of the ports are free again."""
        return all(_is_free(port) for port in self.ports.values())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def in_background(action):
    """Run an action on a thread; its result is in the list once the block has ended."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    yield results
    thread.join(60)


@contextmanager
def hangups(handler):
    """Have processes that are started in the block begin with SIGHUP ignored, or not.

    They inherit it, so where the tests themselves run under nohup it is ignored.
    """
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def server():
    """The address of a simulated model server that says five tokens a second."""
    program = Program("forebay_sim", "--port", "0", "--inter-token-latency-ms", "200")
    line = program.process.stdout.readline()
    assert line.startswith("listening on "), program.output
    yield line.split()[-1]
    program.end(signal.SIGTERM)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the quickstart that a test may edit."""
    return Path(shutil.copytree(QUICKSTART, tmp_path / "manifests"))


@pytest.fixture
def start(folder, server):
    """Start `forebay up` on the folder; it ends with the test."""
    started = []

    def begin(*flags, **ports) -> Up:
        started.append(Up(folder, f"--endpoint={server}", *flags, **ports))
        return started[-1].started()

    yield begin
    for program in started:
        program.end(signal.SIGTERM)
        until(program.gone)


@pytest.mark.parametrize(
    "flags",
    [(), ("--no-secure-serving", "--transport=aio", "--proxy-concurrency=2")],
    ids=["default", "flags"],
)
def test_a_request_is_answered(start, flags):
    """From the quickstart's manifests, through Envoy and the EPP."""
    program = start(*flags)

    status, answer = program.request("llama-chat")

    assert (status, answer["model"]) == (200, "llama-chat")
    assert (program.end(signal.SIGINT), "Traceback" in program.output) == (0, False)


def test_what_is_printed_can_be_pasted(start):
    """The command of the summary names the URL and a model, and is answered."""
    program = start()
    (command,) = (line for line in program.output.splitlines() if line.strip().startswith("curl "))
    _, url, _, header, _, body = shlex.split(command)

    assert url == f"http://127.0.0.1:{program.ports['http']}/v1/chat/completions"
    assert header == "content-type: application/json"
    assert program.request(**json.loads(body))[0] == 200


def test_the_summary_shows_the_plan(start, server):
    """Pool, bands with their models, endpoints, pages."""
    program = start()

    for text in (
        *("default/chat", "Critical", "RoundRobin", "2000 requests", "llama-batch", server),
        f"http://127.0.0.1:{program.ports['metrics']}/debug/queues",
    ):
        assert text in program.output
    assert "warning" not in program.output


def test_an_edit_reaches_the_running_epp(start, folder):
    """And what changed is printed."""
    program = start()
    assert program.request("unheard-of")[0] == 200

    policy = folder / "policy.yaml"
    policy.write_text(policy.read_text() + "  unmatched: {action: Reject}\n")

    until(lambda: program.request("unheard-of")[0] == 404)
    assert "plan.unmatched.action: Queue -> Reject" in program.output
    assert program.request("llama-chat")[0] == 200


def test_an_edit_that_is_wrong_leaves_the_last_good_plan(start, folder):
    """The error names file, object, field and what would be right; the next edit is taken."""
    program = start()
    policy = folder / "policy.yaml"
    good = policy.read_text()

    policy.write_text(good.replace("policy: RoundRobin", "policy: Best", 1))

    until(lambda: program.says("LastValidInForce: generation 1 is in force, not the latest"))
    assert (
        f"{policy} (document 1, FlowControlPolicy chat): spec.bands[0].fairness[0].policy: "
        '"Best" is not one of FCFS, RoundRobin'
    ) in program.output
    assert program.request("llama-chat")[0] == 200

    policy.write_text(good)

    until(lambda: program.says("manifests are valid again"))


def test_what_has_no_effect_is_told(start, folder):
    """A kind that is not read, a model for a missing pool: reported once, and the rest runs."""
    (folder / "more.yaml").write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: s}}\n---\n"
        "apiVersion: inference.networking.x-k8s.io/v1alpha2\nkind: InferenceModel\n"
        "metadata: {name: lost}\nspec: {modelName: lost, poolRef: {name: chatt}}\n"
    )
    program = start()

    for text in ("Service s): this kind has no effect", "there is no InferencePool chatt"):
        assert program.output.count(text) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_open_requests_are_answered_before_the_end(start, number):
    """What runs is not cut off."""
    with hangups(signal.SIG_DFL):
        program = start()
    with in_background(lambda: program.request("llama-chat", max_tokens=5)) as answers:
        until(lambda: program.in_flight() == 1)
        status = program.end(number)

    assert (status, answers[0][0], program.gone()) == (0, 200, True)


def test_a_second_ctrl_c_does_not_wait(start):
    """The user need not wait for an answer that takes minutes."""
    program = start()
    long = threading.Thread(target=_ignoring_disconnect(program), daemon=True)
    long.start()
    until(lambda: program.in_flight() == 1)

    program.process.send_signal(signal.SIGINT)
    until(lambda: program.says("a second Ctrl-C"))
    status = program.end(signal.SIGINT, seconds=5)
    long.join(10)

    assert (status, program.gone(), "Traceback" in program.output) == (0, True, False)


def test_nohup_is_respected(start, folder):
    """Started with SIGHUP ignored, it outlives its terminal and goes on following the folder."""
    with hangups(signal.SIG_IGN):
        program = start("--no-proxy")

    program.process.send_signal(signal.SIGHUP)
    policy = folder / "policy.yaml"
    policy.write_text(policy.read_text().replace("30s", "31s"))

    until(lambda: program.says("ttlSeconds: 30.0 -> 31.0"))


def _ignoring_disconnect(program: Up):
    def request() -> None:
        try:
            program.request("llama-chat", max_tokens=600)
        except (OSError, http.client.HTTPException, ValueError):
            return

    return request


@pytest.mark.parametrize(("word", "name"), [("forebay_epp", "epp"), ("--config-yaml", "envoy")])
def test_the_end_of_a_process_ends_all(start, word, name):
    """It is named, with its status; the exit status is 1 and nothing is left running."""
    program = start()
    os.kill(program.child(word), signal.SIGKILL)

    status = program.end()

    assert (status, program.gone()) == (1, True)
    assert f"forebay up: {name} ended with status -9" in program.output
    assert "Traceback" not in program.output


MOMENTS = {
    "epp starts": lambda program: len(program.children()) == 1,
    "envoy starts": lambda program: len(program.children()) == 2,
    "all serve": lambda program: program.says("Ctrl-C ends"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_leaves_no_child(start, folder, server, moment):
    """Within 2 s, whenever it comes; the ports are free and the next run serves on them."""
    program = Up(folder, f"--endpoint={server}")
    until(lambda: MOMENTS[moment](program), START_SECONDS)
    children = program.children()

    program.end(signal.SIGKILL)

    # The main thread may be a zombie while others still hold the ports.
    until(lambda: all(map(_has_ended, children)) and program.gone(), 2)
    if moment == "all serve":
        again = start(ports=program.ports)
        assert again.request("llama-chat")[0] == 200


def _has_ended(pid: int) -> bool:
    """Whether it has; it may be a zombie that its new parent has not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_no_request_fails_while_it_starts(folder, server):
    """Envoy listens only once requests can be answered: refused until then, 200 from then on."""
    program = Up(folder, f"--endpoint={server}")
    statuses = []

    def answered() -> bool:
        try:
            statuses.append(program.request("llama-chat", max_tokens=1)[0])
        except (ConnectionRefusedError, ValueError) as error:
            statuses.append(type(error).__name__)
        return statuses.count(200) == 3

    until(answered, START_SECONDS)
    program.end(signal.SIGTERM)

    assert set(statuses) <= {"ConnectionRefusedError", 200}, statuses[-20:]
    assert statuses == sorted(statuses, key=lambda status: status == 200)


def test_without_a_proxy_the_epp_waits_for_one(start, server):
    """For a gateway of one's own."""
    program = start("--no-proxy", "--no-secure-serving")
    with channel(f"127.0.0.1:{program.ports['grpc']}") as raw:
        stream = Stream(raw)
        stream.send_request()
        routed = stream.routed()
        stream.cancel()

    assert routed == server
    assert f"ext_proc   127.0.0.1:{program.ports['grpc']}" in program.output
    assert _is_free(program.ports["http"])


@pytest.mark.parametrize("name", PORT_FLAGS)
def test_a_port_in_use_is_named_with_its_flag(folder, name):
    """Before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        program = Up(folder, f"--{name}-port={taken}")
        status = program.end()

    assert status == 1
    assert program.output == (
        f"forebay up: --{name}-port {taken}: Address already in use; "
        f"choose another with --{name}-port\n"
    )


SECOND_POOL = (QUICKSTART / "pool.yaml").read_text().replace("name: chat\n", "name: code\n", 1)


@pytest.mark.parametrize(
    ("flags", "files", "says"),
    [
        ((), {"pool.yaml": None}, "contains no InferencePool"),
        ((), dict.fromkeys(("pool", "models", "policy")), "holds no .yaml file"),
        ((), {"b.yaml": SECOND_POOL}, "(default/chat, default/code); choose one with --pool NAME"),
        (("--pool=x",), {}, "--pool x: "),
        ((), {"b.yaml": "a: ["}, "b.yaml: while parsing a flow"),
        ((), {"b.yaml": "a: 1\na: 2\n"}, "key 'a' is duplicated"),
        (("--endpoint=here",), {}, "--endpoint here: must be HOST:PORT"),
        (("--endpoint=127.0.0.1:0",), {}, "must be HOST:PORT"),
        (("--grpc-port=0",), {}, "--grpc-port 0: choose a port"),
        (("--grpc-port=7", "--metrics-port=7"), {}, "7: is also that of --grpc-port"),
        (("--http-port=x",), {}, "argument --http-port: 'x' is not a port"),
        (("--listen=localhost",), {}, "argument --listen: 'localhost' is not an IP address"),
        (("--proxy-concurrency=0",), {}, "'0' is not a number from 1 to 256"),
        (("--transport=x",), {}, "argument --transport"),
        (("--nonsense",), {}, "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple | dict) else "",
)
def test_a_mistake_is_explained(folder, flags, files, says):
    """In words and before anything is started, never as a traceback."""
    for name, text in files.items():
        if text is None:
            (folder / name).with_suffix(".yaml").unlink()
        else:
            (folder / name).write_text(text)
    program = Up(folder, *flags)

    status = program.end()

    assert status in {1, 2}
    assert says in program.output
    assert "Traceback" not in program.output


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """The most likely mistake of all."""
    program = Up(tmp_path / "nowhere")

    assert program.end() == 1
    assert f"{tmp_path}/nowhere: is not a folder" in program.output


def test_one_of_several_pools_can_be_chosen(start, folder):
    """The others stay without effect, and without a complaint."""
    (folder / "b.yaml").write_text(SECOND_POOL)

    program = start("--pool=code")

    assert "forebay serves InferencePool default/code" in program.output
    assert "warning" not in program.output


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("[::1]:80", "[::1]:80"),
        ("[0:0::1]:080", "[::1]:80"),
        ("localhost:80", "127.0.0.1:80"),
    ],
)
def test_an_endpoint_is_an_ip_address_in_the_end(text, address):
    """Envoy needs an address; a name's IPv4 address is preferred."""
    assert up.address_of(text) == address


@pytest.mark.parametrize("text", ["", ":80", "a:", "a:b", "a:70000", "::", "x" * 100 + ":1"])
def test_what_is_no_endpoint_is_refused(text):
    """With the flag's name."""
    with pytest.raises(CommandError, match="--endpoint"):
        up.address_of(text)
