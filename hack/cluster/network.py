"""The addresses around a node, and its one link to this machine.

The node has a network namespace of its own. A pair of virtual interfaces joins it to the machine;
there is no route further, so nothing that pods send leaves the machine, and the machine reaches
pods and Services by routes over that link. All of it ends with the namespace.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.needs import UserError, require

NUMBERS = range(16)


@dataclass(frozen=True)
class Network:
    """The addresses of the n-th whole cluster on this machine; the first has the usual ones."""

    number: int

    @property
    def link(self) -> str:
        """The name of the link's end on this machine."""
        return f"forebay{self.number}"

    @property
    def _other_end(self) -> str:
        return f"{self.link}p"

    @property
    def host(self) -> str:
        """This machine's address on the link; the API server listens there."""
        return f"10.254.{self.number}.1"

    @property
    def node(self) -> str:
        """The node's address on the link; DNS listens there."""
        return f"10.254.{self.number}.2"

    @property
    def pods(self) -> str:
        """The range of pods' addresses."""
        return f"10.244.{self.number}.0/24"

    @property
    def services(self) -> str:
        """The range of Services' addresses."""
        return f"10.96.{16 * self.number}.0/20"

    @property
    def api_service(self) -> str:
        """The address of the Service `kubernetes`."""
        return f"10.96.{16 * self.number}.1"

    @classmethod
    def take(cls, owner: Path) -> Network:
        """Return a network that no other cluster on this machine has; it is the folder's.

        Raises:
            UserError: all are taken.
        """
        for number in NUMBERS:
            network = cls(number)
            # The link's name is the claim: only one can make it.
            if network._owner is None and network._make(owner):
                return network
        raise UserError(f"{len(NUMBERS)} clusters with a node run already: take one down first")

    def up(self, owner: Path) -> None:
        """Make the link unless it exists, so that the machine has its address.

        Raises:
            UserError: it went with the node, and another cluster has it now.
        """
        if self._owner is None:
            self._make(owner)
        if self._owner != str(owner):
            raise UserError(f"{self._owner} has the network of {owner} now: take {owner} down")

    def down(self, owner: Path) -> None:
        """Remove the link; the routes over it go with it."""
        if self._owner == str(owner):
            _ip("link", "delete", self.link, check=False)

    @property
    def _owner(self) -> str | None:
        try:
            return Path(f"/sys/class/net/{self.link}/ifalias").read_text().strip()
        except FileNotFoundError:
            return None

    def _make(self, owner: Path) -> bool:
        ends = ("name", self.link, "type", "veth", "peer", "name", self._other_end)
        if _ip("link", "add", *ends, check=False):
            if self._owner is None:
                _ip("link", "add", *ends)  # fails again, and says why
            return False
        _ip("link", "set", self.link, "alias", str(owner))
        _ip("address", "add", f"{self.host}/30", "dev", self.link)
        _ip("link", "set", self.link, "up")
        return True

    def join(self, pid: int) -> None:
        """Move the link's other end into the process' network namespace; route to it."""
        _ip("link", "set", self._other_end, "netns", str(pid))
        inside = (require("nsenter"), f"--net=/proc/{pid}/ns/net")
        _ip("link", "set", "lo", "up", prefix=inside)
        _ip("link", "set", self._other_end, "name", "eth0", prefix=inside)
        _ip("address", "add", f"{self.node}/30", "dev", "eth0", prefix=inside)
        _ip("link", "set", "eth0", "up", prefix=inside)
        for range_ in (self.pods, self.services):
            _ip("route", "add", range_, "via", self.node, "dev", self.link)


def _ip(*arguments: str, check: bool = True, prefix: tuple[str, ...] = ()) -> int:
    done = subprocess.run(
        [*prefix, require("ip"), *arguments], capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.returncode
