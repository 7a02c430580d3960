"""Who decides where a request goes, and when: forebay's flow controller, or what it replaces."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Protocol

from forebay_control.plan import ScorerName
from forebay_epp.core.controller import FlowController
from forebay_epp.core.terms import (
    PREFIX_BLOCK_BYTES,
    Dispatched,
    Endpoint,
    EndpointMetrics,
    Request,
    Usage,
    Verdict,
)
from forebay_replay.load import BLOCK_TOKENS

if TYPE_CHECKING:
    from forebay_control.plan import Plan
    from forebay_replay.load import Arrival

BYTES_PER_TOKEN = 4


class Routing(Protocol):
    """Decides. Each call returns what is sent now: numbers of requests and of servers.

    Attributes:
        waiting: how many requests it holds back.
    """

    waiting: int

    def arrive(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:
        """A request has come."""

    def first_token(self, number: int, now: float) -> list[tuple[int, int]]:
        """An answer has begun."""

    def end(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:
        """An answer has ended."""

    def fail(self, number: int, now: float) -> list[tuple[int, int]]:
        """A server could not be reached, or has broken off the answer."""

    def scrape(self, server: int, page: EndpointMetrics, now: float) -> list[tuple[int, int]]:
        """A server's metrics have been read."""

    def scrape_refused(self, server: int, now: float) -> list[tuple[int, int]]:
        """A server could not be reached to read its metrics."""

    def replace(self, servers: int, now: float) -> list[tuple[int, int]]:
        """Only the first so many servers are in the pool."""

    def wake(self, now: float) -> list[tuple[int, int]]:
        """The moment that `next_wakeup` named has come."""

    def next_wakeup(self) -> float | None:
        """When to wake it if nothing happens before."""


class Direct:
    """Sends each request at once, as a proxy without an endpoint picker does.

    Args:
        servers: how many there are.
        least_request: to the server with the fewest unanswered requests, at random among equals
            (Envoy's LEAST_REQUEST with all servers as choices); otherwise in turn.
    """

    waiting = 0

    def __init__(self, servers: int, *, least_request: bool) -> None:
        self._least_request = least_request
        self._unanswered = [0] * servers
        self._server: dict[int, int] = {}
        self._turn = 0
        self._servers = servers
        self._random = Random(1)  # noqa: S311  # ties, not secrets

    def arrive(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Send it."""
        if self._least_request:
            pool = self._unanswered[: self._servers]
            least = min(pool)
            equals = [number for number, unanswered in enumerate(pool) if unanswered == least]
            server = self._random.choice(equals)
        else:
            server = self._turn = (self._turn + 1) % self._servers
        self._unanswered[server] += 1
        self._server[number] = server
        return [(number, server)]

    def replace(self, servers: int, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Choose among these."""
        self._servers = servers
        return []

    def first_token(self, number: int, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Nothing waits."""
        return []

    def end(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Count it."""
        return self.fail(number, now)

    def fail(self, number: int, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Count it."""
        self._unanswered[self._server.pop(number)] -= 1
        return []

    def scrape(self, server: int, page: EndpointMetrics, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Nothing is scraped."""
        return []

    def scrape_refused(self, server: int, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Nothing is scraped."""
        return []

    def wake(self, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Never."""
        return []

    def next_wakeup(self) -> float | None:
        """Never."""
        return None


class AtRandom(Direct):
    """Sends each request at once to a server at random."""

    def __init__(self, servers: int) -> None:
        super().__init__(servers, least_request=False)

    def arrive(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Send it."""
        server = self._random.randrange(self._servers)
        self._unanswered[server] += 1
        self._server[number] = server
        return [(number, server)]


class Queued:
    """forebay's flow controller.

    Args:
        servers: how many there are.
        plan: its queues.
        seed: of the lots that it draws.
    """

    def __init__(self, servers: int, plan: Plan, seed: int = 1) -> None:
        self._reads_prefix = plan.choice.rates(ScorerName.PREFIX_CACHE)
        self.controller = FlowController(plan, Random(seed))  # noqa: S311  # lots, not secrets
        self.addresses = [f"10.0.0.{number}:8000" for number in range(servers)]
        self._numbers = {address: number for number, address in enumerate(self.addresses)}
        self.controller.set_endpoints([Endpoint(address) for address in self.addresses], 0.0)

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return self.controller.waiting

    def replace(self, servers: int, now: float) -> list[tuple[int, int]]:
        """Tell the controller."""
        endpoints = [Endpoint(address) for address in self.addresses[:servers]]
        self.controller.set_endpoints(endpoints, now)
        return self.wake(now)

    def arrive(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:
        """Queue it."""
        size_bytes = arrival.prompt_tokens * BYTES_PER_TOKEN
        blocks = arrival.blocks if self._reads_prefix else ()
        names = BLOCK_TOKENS * BYTES_PER_TOKEN // PREFIX_BLOCK_BYTES
        prefix = tuple(names * block + part for block in blocks for part in range(names))
        self.submit(Request(number, arrival.model, size_bytes, prefix=prefix), now)
        return self.wake(now)

    def submit(self, request: Request, now: float) -> None:
        """Give the controller a request."""
        self.controller.submit(request, now)

    def first_token(self, number: int, now: float) -> list[tuple[int, int]]:
        """Tell the controller."""
        self.controller.first_token(number, now)
        return self.wake(now)

    def end(self, number: int, arrival: Arrival, now: float) -> list[tuple[int, int]]:
        """Tell the controller."""
        usage = Usage(arrival.prompt_tokens, arrival.answer_tokens)
        self.controller.complete(number, usage, now, Verdict.GOOD)
        return self.wake(now)

    def fail(self, number: int, now: float) -> list[tuple[int, int]]:
        """Tell the controller."""
        self.controller.complete(number, None, now, Verdict.UNREACHABLE)
        return self.wake(now)

    def scrape(self, server: int, page: EndpointMetrics, now: float) -> list[tuple[int, int]]:  # noqa: ARG002
        """Tell the controller."""
        self.controller.observe(page, now)
        return self.wake(now)

    def scrape_refused(self, server: int, now: float) -> list[tuple[int, int]]:
        """Tell the controller."""
        self.controller.scrape_failed(self.addresses[server], now, refused=True)
        return self.wake(now)

    def wake(self, now: float) -> list[tuple[int, int]]:
        """Return what it dispatches now.

        Raises:
            RuntimeError: it refused a request, which the plans of a replay leave it no reason to.
        """
        sent = []
        for decision in self.controller.poll(now):
            if not isinstance(decision, Dispatched):
                raise RuntimeError(f"refused: {decision}")  # noqa: TRY004  # not a wrong argument
            sent.append((decision.request_id, self._numbers[decision.endpoint]))
        return sent

    def next_wakeup(self) -> float | None:
        """When the controller wants to be polled."""
        return self.controller.next_wakeup()
