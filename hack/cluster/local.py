"""A real Kubernetes without Docker, whole or only its control plane.

    eval "$(hack/local-cluster up)"
    hack/images --load-into DIR
    hack/local-cluster down

The parts are Debian's etcd, containerd and runc, and programs built from the modules in
programs/. A cluster is a folder: its processes (state.json), data, keys, kubeconfig and
logs; so several can run beside each other.

With --control-plane-only everything listens on 127.0.0.1, needs no rights, and pods are stored but
never run. Otherwise there is one node, which needs root: pods run, Services and their names
(NAME.NAMESPACE.svc.cluster.local) work from pods, and addresses of pods and Services also from this
machine. What pods send stays on this machine. Images are those loaded by `load`. NetworkPolicies
are stored, and nothing enforces them.

The API server asks for a token; etcd asks for nothing, so anyone with an account on the machine can
read and write the cluster's data. It is for tests.

Linux only: processes are ended through pidfds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import builds, lifecycle, node
from cluster.files import locked
from cluster.needs import UserError, require, say
from cluster.state import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def build(arguments: argparse.Namespace) -> None:
    """Build the cluster's programs unless they exist."""
    require("etcd")
    say(f"Kubernetes is in {builds.kubernetes()}")
    if not arguments.control_plane_only:
        say(f"CoreDNS is in {builds.node_programs()}")


def up(arguments: argparse.Namespace) -> None:
    """Start a cluster, or what has ended of one."""
    require("etcd")
    whole = not arguments.control_plane_only
    if whole:
        node.check(arguments.dir)
    options = {
        "audit": arguments.audit,
        "controller_manager": arguments.controller_manager or whole,
        "node": whole,
    }
    with locked(arguments.dir):
        cluster = Cluster(arguments.dir)
        if cluster.exists:
            lifecycle.expect(cluster, arguments.port, options)
        else:
            lifecycle.create(cluster, arguments.port, options)
        try:
            lifecycle.start(cluster)
        except BaseException:
            # Half a cluster is of no use; its logs are.
            lifecycle.stop(cluster)
            raise
        print(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")


def down(arguments: argparse.Namespace) -> None:
    """End a cluster and remove its folder."""
    if not arguments.dir.exists():
        return
    with locked(arguments.dir):
        cluster = Cluster(arguments.dir)
        if cluster.exists:
            lifecycle.remove(cluster)
        elif any(arguments.dir.iterdir()):
            raise UserError(f"{arguments.dir} holds no cluster: nothing is removed")
        else:
            arguments.dir.rmdir()


@contextlib.contextmanager
def existing(folder: Path) -> Iterator[Cluster]:
    """Give the cluster in the folder.

    Raises:
        UserError: there is none.
    """
    if not (folder / "state.json").exists():
        raise UserError(f"{folder} holds no cluster: hack/local-cluster up makes one")
    with locked(folder):
        yield Cluster(folder)


def stop_apiserver(arguments: argparse.Namespace) -> None:
    """End the API server and wait until it has ended."""
    with existing(arguments.dir) as cluster:
        number = signal.SIGKILL if arguments.kill else signal.SIGTERM
        lifecycle.stop_component(cluster, "kube-apiserver", number)


def start_apiserver(arguments: argparse.Namespace) -> None:
    """Start the API server again, on its port, with its data."""
    with existing(arguments.dir) as cluster:
        lifecycle.start_component(cluster, "kube-apiserver")


def restart_apiserver(arguments: argparse.Namespace) -> None:
    """Stop the API server and start it again, on its port, with its data."""
    stop_apiserver(arguments)
    start_apiserver(arguments)


def etcd_snapshot(arguments: argparse.Namespace) -> None:
    """Save all of the cluster's data to a file."""
    with existing(arguments.dir) as cluster:
        lifecycle.snapshot(cluster, arguments.file.resolve())


def etcd_restore(arguments: argparse.Namespace) -> None:
    """Go back to the data of a snapshot; all processes restart."""
    with existing(arguments.dir) as cluster:
        lifecycle.restore(cluster, arguments.file.resolve())


def load(arguments: argparse.Namespace) -> None:
    """Give the node images, as `docker save` writes them."""
    with existing(arguments.dir) as cluster:
        if cluster.network is None:
            raise UserError(f"the cluster in {arguments.dir} has no node")
        node.load(cluster.folder, arguments.archives)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    introduction, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=introduction,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., Any]) -> argparse.ArgumentParser:
        summary = (run.__doc__ or "").splitlines()[0]
        name = run.__name__.replace("_", "-")
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        if name != "build":
            runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108  # see locked()
            default = runtime / "forebay-cluster"
            help_text = "the cluster's folder (default: %(default)s)"
            added.add_argument("--dir", type=Path, default=default, help=help_text)
        return added

    starting = command(up)
    for added in (command(build), starting):
        added.add_argument("--control-plane-only", action="store_true", help="no node")
    starting.add_argument(
        "--controller-manager",
        action="store_true",
        help="also with --control-plane-only run the controllers: default service accounts, "
        "removal of deleted namespaces, garbage collection, EndpointSlices",
    )
    starting.add_argument(
        "--audit", action="store_true", help="log every request to DIR/audit.log, one JSON a line"
    )
    starting.add_argument("--port", type=int, default=0, help="of the API server (default: any)")
    command(down)
    for run in (restart_apiserver, stop_apiserver):
        command(run).add_argument("--kill", action="store_true", help="SIGKILL instead of SIGTERM")
    command(start_apiserver)
    command(load).add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE")
    for run in (etcd_snapshot, etcd_restore):
        command(run).add_argument("file", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if "dir" in parsed:
        parsed.dir = parsed.dir.absolute()
    return parsed


def main() -> int:
    """Run the command; report what the user can fix in one line."""
    arguments = parse(sys.argv[1:])
    # A terminated `up` cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        arguments.run(arguments)
    except UserError as error:
        say(f"hack/local-cluster: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
