"""Reaching the EPPs whose state a command shows: of `forebay up`, or of a pool in a cluster.

Pods are reached by `kubectl port-forward`. kubectl brings kubeconfig, exec credentials, proxies and
certificates as the user has set them up, and the pages answer loopback only, which a forwarded port
is. The kubernetes package would be a second reader of all that, and half a second of every start.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from forebay_cli import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

METRICS_PORT = 9090
TIMEOUT_SECONDS = 10.0
FORWARD_SECONDS = 20.0

_FORWARDED = re.compile(r"127\.0\.0\.1:(\d+) ->")


class Settings(argparse.Namespace):
    """Which EPPs are meant."""

    port: int
    pool: str | None
    namespace: str | None
    context: str | None


@dataclass(frozen=True)
class EPP:
    """An EPP and the URL of its pages."""

    name: str
    url: str

    def page(self, path: str) -> bytes:
        """Return a page.

        Raises:
            CommandError: it does not answer.
            LookupError: there is no such page.
        """
        try:
            with urlopen(f"{self.url}{path}", timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310  # http
                return bytes(answer.read())
        except HTTPError as error:
            with error:
                text = error.read(500).decode(errors="replace").strip()
            if error.code == 404:
                raise LookupError(text) from None
            raise CommandError(f"{self.name}: {error.code} {text}") from None
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise CommandError(
                f"{self.name}: {self.url}{path}: {reason}; is it running, with another --port?"
            ) from None

    def read(self, path: str) -> Any:
        """Return a page that is JSON.

        Raises:
            CommandError: it does not answer, or is of another release.
            LookupError: there is no such page.
        """
        try:
            return json.loads(self.page(path))
        except ValueError:
            raise CommandError(f"{self.url}{path}: is not JSON; is this an EPP?") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that choose EPPs."""
    add = parser.add_argument_group(
        "which EPPs", "forebay up's on this machine, or a cluster's with any of the last three"
    ).add_argument
    add(
        "--port",
        type=int,
        default=METRICS_PORT,
        metavar="PORT",
        help=f"forebay up's --metrics-port (default: {METRICS_PORT})",
    )
    add("--pool", metavar="NAME", help="the EPPs of this InferencePool, by kubectl")
    add("-n", "--namespace", metavar="NAME", help="its namespace (default: kubectl's)")
    add("--context", metavar="NAME", help="kubectl's context")


def in_cluster(settings: Settings) -> bool:
    """Return whether the EPPs meant are in a cluster, not of `forebay up`."""
    return any((settings.pool, settings.namespace, settings.context))


@contextmanager
def reach(settings: Settings) -> Iterator[list[EPP]]:
    """Yield the EPPs; forwarded ports end with the block.

    Raises:
        CommandError: there are none, or they cannot be reached.
    """
    if not in_cluster(settings):
        yield [EPP("forebay-up", f"http://127.0.0.1:{settings.port}")]
        return
    with ExitStack() as stack:
        yield [
            EPP(pod, stack.enter_context(_forwarded(settings, pod)))
            for pod in pods(settings, "endpoint-picker")
        ]


def kubectl(settings: Settings, *arguments: str) -> list[str]:
    """Return the command line of a call of kubectl.

    Raises:
        CommandError: there is no kubectl.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise CommandError("no kubectl on PATH: it is how a cluster is reached")
    chosen = [f"--context={settings.context}"] if settings.context else []
    if settings.namespace:
        chosen.append(f"--namespace={settings.namespace}")
    return [program, *chosen, *arguments]


def pods(settings: Settings, component: str) -> list[str]:
    """Return the names of the chart's running pods of one component, of the pool if one is given.

    Raises:
        CommandError: there are none, or kubectl fails.
    """
    labels = f"app.kubernetes.io/component={component}"
    if settings.pool:
        labels += f",forebay.dev/pool={settings.pool}"
    listed = subprocess.run(  # noqa: S603  # kubectl
        kubectl(
            settings,
            *("get", "pods", f"--selector={labels}", "--field-selector=status.phase=Running"),
            "--output=jsonpath={.items[*].metadata.name}",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise CommandError(listed.stderr.strip() or "kubectl get pods failed")
    if not (names := listed.stdout.split()):
        where = f"namespace {settings.namespace}" if settings.namespace else "kubectl's namespace"
        raise CommandError(f"no running pod with the labels {labels} in {where}: try -n, --pool")
    return names


@contextmanager
def _forwarded(settings: Settings, pod: str) -> Iterator[str]:
    """Yield the URL of a pod's port 9090, forwarded to any free port of loopback."""
    forward = subprocess.Popen(  # noqa: S603  # kubectl
        kubectl(settings, "port-forward", f"pod/{pod}", f":{METRICS_PORT}", "--address=127.0.0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{_port(forward, pod)}"
    finally:
        forward.terminate()
        forward.communicate()


def _port(forward: subprocess.Popen[bytes], pod: str) -> str:
    """Wait until kubectl says which port it has taken."""
    said = b""
    deadline = time.monotonic() + FORWARD_SECONDS
    with selectors.DefaultSelector() as selector:
        if forward.stdout is None:
            raise AssertionError("started with a pipe")
        selector.register(forward.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = forward.stdout.read1()  # type: ignore[attr-defined]  # a BufferedReader
            said += piece
            if match := _FORWARDED.search(said.decode(errors="replace")):
                return match[1]
            if not piece:
                break
    text = said.decode(errors="replace").strip() or f"nothing within {FORWARD_SECONDS:g} s"
    raise CommandError(f"kubectl port-forward {pod}: {text}")
