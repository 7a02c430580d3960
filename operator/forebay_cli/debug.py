"""`forebay debug`: one archive with what a report of a problem needs.

It holds states, plans, statuses and logs. It names models, tenants and addresses, and holds no
prompt, Secret, token or header value: pages never show these, and Secrets and ConfigMaps are not
asked for.
"""

from __future__ import annotations

import io
import platform
import subprocess
import tarfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from forebay_cli import OPERATOR_PORT, CommandError, epps
from forebay_cli.epps import EPP

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

PAGES = ("/live/state", "/debug/queues", "/metrics")
LOG_LINES = 5000
KUBECTL_SECONDS = 60
KINDS = (
    "flowcontrolpolicies.forebay.dev",
    "inferencepools.inference.networking.k8s.io",
    "inferencemodels.inference.networking.x-k8s.io",
    "inferenceobjectives.inference.networking.x-k8s.io",
)


class Settings(epps.Settings):
    """The command's arguments."""

    file: Path
    operator_port: int
    operator_namespace: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    name = time.strftime("forebay-debug-%Y%m%d-%H%M%S.tar.gz")
    add("file", type=Path, nargs="?", default=Path(name), help="the archive to write")
    add("--operator-port", type=int, default=OPERATOR_PORT, help="forebay up's --operator-port")
    epps.add_arguments(parser)


def run(settings: Settings) -> int:
    """Write the archive.

    Raises:
        CommandError: no EPP is found, or the file cannot be written.
    """
    if settings.file.exists():
        raise CommandError(f"{settings.file}: exists; name another file")
    try:
        with tarfile.open(settings.file, "w:gz") as archive:
            for name, content in _parts(settings):
                entry = tarfile.TarInfo(f"forebay-debug/{name}")
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise CommandError(f"{settings.file}: {error.strerror}") from error
    print(f"{settings.file}: names models, tenants and addresses; look before you share it")  # noqa: T201
    return 0


def _parts(settings: Settings) -> Iterator[tuple[str, bytes]]:
    versions = f"forebay {metadata.version('forebay')}, Python {platform.python_version()}\n"
    yield "versions.txt", versions.encode()
    with epps.reach(settings) as found:
        for each in found:
            for path in PAGES:
                yield f"epps/{each.name}{path}", _page(each, path)
    if not epps.in_cluster(settings):
        operator = EPP("operator", f"http://127.0.0.1:{settings.operator_port}")
        yield "operator/resources.json", _page(operator, "/resources")
        return
    yield "pods.txt", _output(epps.kubectl(settings, "get", "pods", "--output=wide"))
    for kind in KINDS:
        yield (
            f"resources/{kind}.yaml",
            _output(epps.kubectl(settings, "get", kind, "--output=yaml")),
        )
    for component in ("endpoint-picker", "operator"):
        try:
            names = epps.pods(settings, component)
        except CommandError as error:
            yield f"logs/{component}.txt", f"{error}\n".encode()
            continue
        for name in names:
            command = epps.kubectl(settings, "logs", name, f"--tail={LOG_LINES}")
            yield f"logs/{name}.txt", _output(command)


def _page(epp: EPP, path: str) -> bytes:
    """Return a page, or why there is none: the rest is worth having all the same."""
    try:
        return epp.page(path)
    except (CommandError, LookupError) as error:
        return f"{error}\n".encode()


def _output(command: list[str]) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603  # kubectl
            command, capture_output=True, check=False, timeout=KUBECTL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {KUBECTL_SECONDS} s\n".encode()
    return done.stdout + done.stderr
