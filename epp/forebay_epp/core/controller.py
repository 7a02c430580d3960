"""The flow controller: admits, queues, dispatches, evicts.

Ownership: from `submit` until its decision a request belongs to the controller; each submitted id
gets exactly one decision, in the list of some later `poll`. A dispatched request occupies a slot of
its endpoint until the caller says `complete` or `cancel`, which it owes exactly once.

The caller does the waiting: after any call it polls, and polls again at `next_wakeup()`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forebay_control.plan import Mode, WhenFull
from forebay_epp.core.bands import Bands
from forebay_epp.core.charging import Charging
from forebay_epp.core.classification import Classifier
from forebay_epp.core.dispatching import Dispatching
from forebay_epp.core.endpoints import EndpointSet
from forebay_epp.core.expiry import DELETED, Expiry
from forebay_epp.core.footprints import Footprints
from forebay_epp.core.holdings import Holdings, holdings
from forebay_epp.core.selection import Selection
from forebay_epp.core.terms import (
    NEVER,
    ControllerState,
    Decision,
    Dispatched,
    Outcome,
    Refused,
    Usage,
    Verdict,
)
from forebay_epp.core.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan
    from forebay_control.shares import Shares
    from forebay_epp.core.bands import Band
    from forebay_epp.core.residency import Produced
    from forebay_epp.core.terms import (
        Endpoint,
        EndpointMetrics,
        HealthChange,
        RandomSource,
        Request,
    )
    from forebay_epp.core.tracked import TrackedEndpoint

MAX_RETRY_AFTER_SECONDS = 60
DELETED_POOL_SECONDS = 30.0  # for what waits when the pool is deleted
_DELETED_RETRY_SECONDS = 60
_ENDS = "the endpoint picker shuts down"


class FlowController:
    """Flow control of one pool.

    Args:
        plan: a plan; validated.
        random: source of the lots drawn among equal endpoints and target models.

    Raises:
        PlanError: the plan is not valid.
    """

    def __init__(self, plan: Plan, random: RandomSource) -> None:
        plan.validate()
        self._plan = plan
        self._random = random
        self._classifier = Classifier(plan)
        self._bands = Bands(plan)
        self._endpoints = EndpointSet(plan.saturation)
        self._selection = Selection(self._endpoints, plan.choice, random)
        self._footprints = Footprints()
        self._charging = Charging(self._bands, self._footprints)
        self._dispatching = Dispatching(
            self._bands, self._endpoints, self._selection, self._footprints, self._send_waiting
        )
        self._waits = Waits()
        self._waiting: dict[int, Request] = {}
        self._size_bytes = 0
        self._dispatched: dict[int, tuple[Request, TrackedEndpoint]] = {}
        self._decisions: list[Decision] = []
        self._draining = False
        self._waited = 0  # bands in which requests waited, as bits
        self._late: list[Request] = []  # came while draining: sent by the next poll, or refused
        self._changed = False
        self._expiry = Expiry(
            plan.no_endpoints_ttl_seconds, self._bands, self._endpoints, self._evict
        )

    # --- configuration and observation

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    def reconfigure(self, plan: Plan, now: float) -> None:
        """Put a new plan in force, whole or not at all; nothing queued is lost.

        Requests that wait keep their band, their position and their claim: a lowered cap
        refuses new arrivals only.

        Raises:
            PlanError: the plan is not valid; the one in force stays.
        """
        plan.validate()
        self._plan = plan
        self._classifier = Classifier(plan)
        self._bands.reconfigure(plan, now)
        self._endpoints.reconfigure(plan.saturation, now)
        self._selection.reconfigure(plan.choice)
        self._expiry.no_endpoints_ttl_seconds = plan.no_endpoints_ttl_seconds
        self._reschedule(now)
        if plan.mode is Mode.OBSERVE:
            for request in list(self._waiting.values()):
                self._leave(request)
                self._pass(request, now)

    def set_endpoints(self, endpoints: Iterable[Endpoint], now: float) -> None:
        """Replace the pool's endpoints; what is in flight on one that left may still complete.

        A different pod at a known address is a new endpoint; the old one's requests stay its own.
        """
        had_endpoints = bool(self._endpoints.present)
        self._endpoints.replace(endpoints, now)
        if bool(self._endpoints.present) != had_endpoints:
            self._expiry.endpoints_changed(now)
        self._reschedule(now)

    def set_shares(self, shares: Shares, now: float) -> None:
        """Take what of the endpoints' slots is this EPP's, because several serve the pool.

        Without shares, all are.
        """
        self._endpoints.set_shares(shares)
        self._reschedule(now)

    def relax_shares(self) -> None:
        """Go by what scrapes show instead, for no new shares come."""
        self._endpoints.relax_shares()

    def freeze_shares(self) -> None:
        """Keep what is held, for new shares are about to come."""
        self._endpoints.freeze_shares()

    def give_back_shares(self, now: float) -> None:
        """Give back the slots that no request takes: others may use them by now."""
        self._endpoints.give_back_shares()
        self._reschedule(now)

    def take_urgent(self) -> bool:
        """Return whether whoever divides the slots should hear of a change at once.

        That is when slots were given back since the last call, or a band began or ceased to wait.
        """
        if self._endpoints.shares is None:
            return False
        waiting = sum(1 << n for n, band in enumerate(self._bands.all) if band.arrival)
        changed, self._waited = waiting != self._waited, waiting
        returned, self._endpoints.returned = self._endpoints.returned, 0
        return changed or returned > 0

    @property
    def shared(self) -> bool:
        """Whether several EPPs share the pool's slots, as far as is known."""
        return self._endpoints.shares is not None

    def holdings(self) -> Holdings:
        """Return what the EPP has and wants, as far as whoever divides the slots needs to know."""
        return holdings(
            self._bands.all,
            self._endpoints,
            (request for request, _ in self._dispatched.values()),
        )

    def observe(self, metrics: EndpointMetrics, now: float) -> None:
        """Take what a scrape said; an endpoint that is not in the pool is ignored."""
        for produced in self._endpoints.observe(metrics, now):
            self.charge_produced(produced, now)

    def charge_produced(self, produced: Produced, now: float) -> None:
        """Charge a flow for what an answer that cannot be seen is taken to have come to."""
        self._charging.produced(produced, now)

    def charge(self, request: Request, usage: Usage, now: float) -> None:
        """Charge the flow of a request that has ended without usage for what it has used."""
        self._charging.used(request, usage, now)

    def take_estimates(self) -> list[tuple[Request, Usage]]:
        """Return the answers that have ended without usage, and what they are taken to have used.

        Each comes once, with the first scrape after its end; none where servers do not count.
        """
        return self._charging.take_estimates()

    def scrape_failed(self, address: str, now: float, *, refused: bool) -> None:
        """Note that a scrape of an endpoint has failed through the server's fault.

        Args:
            address: of the endpoint; one that is not in the pool is ignored.
            now: monotonic seconds.
            refused: there was not even a connection.
        """
        self._endpoints.scrape_failed(address, now, refused=refused)

    def in_flight_at(self, address: str) -> int:
        """Return how many requests are in flight on an endpoint of the pool; 0 for others."""
        return self._endpoints.in_flight_at(address)

    def seen_at(self, address: str) -> int:
        """Return how many requests of ours the next page of an endpoint may show at most."""
        return self._endpoints.seen_at(address)

    def take_health_changes(self) -> list[HealthChange]:
        """Return which endpoints were left out or came back since the last call."""
        return self._endpoints.take_changes()

    def drain(self) -> None:
        """Stop queueing: what waits may still be dispatched, a new request only at once."""
        self._draining = True

    def flush(self, now: float) -> None:
        """Evict everything that waits, because the process ends."""
        for request in list(self._waiting.values()):
            self._evict(request, Outcome.EVICTED_SHUTTING_DOWN, _ENDS, now)

    @property
    def pool_deleted(self) -> bool:
        """Whether the pool is deleted."""
        return self._expiry.served_until < NEVER

    def delete_pool(self, now: float) -> None:
        """Refuse new requests; what waits may still be dispatched for `DELETED_POOL_SECONDS`."""
        if not self.pool_deleted:
            self._expiry.served_until = now + DELETED_POOL_SECONDS
            self._reschedule(now)

    def restore_pool(self, now: float) -> None:
        """Take requests again: the pool exists."""
        if self.pool_deleted:
            self._expiry.served_until = NEVER
            self._reschedule(now)

    # --- requests

    def submit(self, request: Request, now: float) -> None:
        """Take a request; its decision comes with a poll.

        Raises:
            ValueError: the id is already in use.
        """
        if request.id in self._waiting or request.id in self._dispatched:
            raise ValueError(f"request id {request.id} is in use")
        request.enqueued_at = now
        known = self._classifier.classify(request)
        if self.pool_deleted:
            self._reject(request, Outcome.REJECTED_POOL_DELETED, _DELETED_RETRY_SECONDS, DELETED)
            return
        if self._plan.mode is Mode.OBSERVE:
            self._pass(request, now)
            return
        if not known:
            self._reject(
                request, Outcome.REJECTED_UNKNOWN_MODEL, 1, "the pool does not serve this model"
            )
            return
        self._enqueue(request, now)

    def cancel(self, request_id: int, now: float) -> None:
        """The caller has given up: evict the request, or free its slot. Unknown ids are ignored.

        Ignored because a cancellation may cross the decision on its way to the caller.
        """
        request = self._waiting.get(request_id)
        if request is not None:
            self._remove(request, Outcome.EVICTED_CANCELLED, 1, "the client has gone", now)
        elif request_id in self._dispatched:
            self.complete(request_id, None, now)

    def first_token(self, request_id: int, now: float) -> None:
        """The answer to a dispatched request has begun. Only the first call of a request counts.

        Raises:
            KeyError: the request is not in flight.
        """
        request, endpoint = self._dispatched[request_id]
        if now < request.first_token_at:
            request.first_token_at = now
            self._endpoints.first_token(endpoint, request, now)

    def progress(self, request_id: int, answer_tokens: int, now: float) -> None:
        """The answer to a dispatched request has come to so many tokens so far.

        Its flow is charged for those beyond what it was charged for already. The last word is
        the usage that `complete` brings, so an estimate will do, in steps of any size.

        Raises:
            KeyError: the request is not in flight.
        """
        self._charging.progress(self._dispatched[request_id][0], answer_tokens, now)

    def complete(
        self,
        request_id: int,
        usage: Usage | None,
        now: float,
        verdict: Verdict = Verdict.UNKNOWN,
        *,
        blind: bool = False,
    ) -> None:
        """A dispatched request has ended; its slot is free for the next one.

        Args:
            request_id: the request.
            usage: the tokens that its flow is charged for, or None if they are not known.
            now: monotonic seconds.
            verdict: what the answer says about the server.
            blind: the proxy will not report the end, so the slot is held until metrics do.

        Raises:
            KeyError: the request is not in flight.
        """
        request, endpoint = self._dispatched.pop(request_id)
        if verdict is Verdict.GOOD and not blind:
            self._waits.learn(now - request.dispatched_at)
        counted = usage is not None
        if usage is not None:
            self._charging.used(request, usage, now)
        self._endpoints.completed(endpoint, request, verdict, now, blind=blind, counted=counted)

    def poll(self, now: float) -> list[Decision]:
        """Return the decisions made since the last poll, including those that time brings."""
        if now >= self._endpoints.next_at:
            self._endpoints.elapse(now)
        if now >= self._expiry.next_at:
            self._expiry.run(now)
        opened = self._endpoints.opened
        if self._changed or opened:
            self._changed = False
            if self._waiting and self._endpoints.free > 0:
                self._dispatching.run(opened, now)
            if opened:
                opened.clear()
        if self._late:
            self._refuse_late(now)
        decisions = self._decisions
        if not decisions:
            return []
        self._decisions = []
        self._bands.sweep()
        return decisions

    def next_wakeup(self) -> float | None:
        """Return when to poll at the latest if nothing happens before, or None for never."""
        if not self._waiting:
            return None
        return min(self._expiry.next_at, self._endpoints.next_at)

    # --- state for people and programs

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def saturation(self) -> float:
        """Slots taken over slots there are, of all endpoints in use; 1.0 when there is none.

        At or above 1.0 exactly when no endpoint has a free slot.
        """
        load = self._endpoints.load()
        if self._endpoints.free <= 0:
            return max(1.0, load)
        return min(load, 1.0 - 1e-9)

    def state(self, now: float, max_flows: int | None = None) -> ControllerState:
        """Copy the whole state, or of each band the state of so many of its longest flows."""
        return ControllerState(
            pool=self._plan.pool,
            requests=len(self._waiting),
            size_bytes=self._size_bytes,
            in_flight=len(self._dispatched),
            saturation=self.saturation(),
            draining=self._draining,
            bands=tuple(band.state(now, max_flows) for band in self._bands.all),
            endpoints=tuple(tracked.state(now) for tracked in self._endpoints.present),
            prefix_blocks=self._endpoints.prefixes.size,
            mode=self._plan.mode,
        )

    # --- inside

    def _reschedule(self, now: float) -> None:
        """Look at every deadline, and at every free slot, again at the next poll."""
        self._expiry.next_at = now
        self._changed = True

    def _enqueue(self, request: Request, now: float) -> None:
        """Queue a classified request, or reject it."""
        band = self._bands.by_name[request.band]
        blocked = self._endpoints.free <= 0
        if request.subset is not None and self._endpoints.present:
            allowed = self._endpoints.within(request.subset)
            if not allowed:
                self._reject(
                    request,
                    Outcome.REJECTED_NO_ENDPOINTS,
                    self._retry_after_seconds(band, now),
                    "no endpoint of the pool is in the subset that the proxy allows",
                )
                return
            blocked = not any(endpoint.free > 0 for endpoint in allowed)
        full = band.full(request) or self._full(request, band, now)
        if full is not None:
            retry_after = self._retry_after_seconds(band, now)
            self._reject(request, Outcome.REJECTED_QUEUE_FULL, retry_after, full)
            return
        self._expiry.expect(request, band, now)
        due_in_seconds = request.due_in_seconds
        request.due_at = now + (band.plan.ttl_seconds if due_in_seconds is None else due_in_seconds)
        if blocked and request.subset is None:
            request.predicted_seconds = self._waits.predict(
                band, self._bands.all, self._dispatched, now
            )
        band.push(request, now, blocked=blocked)
        self._waiting[request.id] = request
        self._size_bytes += request.size_bytes
        self._changed = True
        if self._draining:
            self._late.append(request)

    def _refuse_late(self, now: float) -> None:
        """Refuse what came while draining and waits for all that: behind others, or for room."""
        for request in self._late:
            if self._waiting.get(request.id) is request:
                self._remove(request, Outcome.REJECTED_SHUTTING_DOWN, 1, _ENDS, now)
        self._late.clear()

    def _full(self, request: Request, band: Band, now: float) -> str | None:
        """Name the pool's cap that a request would exceed, or None once there is room for it."""
        limits = self._plan.limits
        requests = len(self._waiting) + 1 - limits.max_requests
        size_bytes = self._size_bytes + request.size_bytes - limits.max_bytes
        if requests <= 0 and size_bytes <= 0:
            return None
        displaces = band.plan.when_full is WhenFull.DISPLACE_LOWER and not self._draining
        if displaces and self._displace(band, requests, size_bytes, now):
            return None
        if requests > 0:
            return f"the pool's queue is full ({limits.max_requests} requests)"
        return f"the pool's queue is full ({limits.max_bytes} bytes)"

    def _displace(self, band: Band, requests: int, size_bytes: int, now: float) -> bool:
        """Evict what waits in lower bands, the lowest first and of each the newest, or nothing.

        Returns:
            Whether that made room for so many requests and bytes.
        """
        lower = [other for other in self._bands.all if other.plan.priority < band.plan.priority]
        if sum(len(other.arrival) for other in lower) < requests:
            return False
        if sum(other.size_bytes for other in lower) < size_bytes:
            return False
        for other in reversed(lower):
            while other.arrival and (requests > 0 or size_bytes > 0):
                victim = next(reversed(other.arrival.values()))
                requests -= 1
                size_bytes -= victim.size_bytes
                message = f"the pool's queue is full, and band {band.plan.name} is more important"
                self._evict(victim, Outcome.EVICTED_DISPLACED, message, now)
        return True

    def _pass(self, request: Request, now: float) -> None:
        """Send a request at once, as if there were a slot everywhere: the plan only observes."""
        self._footprints.expect(request)
        endpoint = self._selection.pick_regardless(request, now)
        if endpoint is None:
            text = "the pool has no endpoint for it, and requests are not queued in mode Observe"
            self._reject(request, Outcome.REJECTED_NO_ENDPOINTS, 1, text)
        else:
            self._send(request, endpoint, now)

    def _send_waiting(self, request: Request, endpoint: TrackedEndpoint, now: float) -> None:
        """Send a request that leaves its band now."""
        self._forget(request)
        self._send(request, endpoint, now)

    def _leave(self, request: Request) -> None:
        """Take a request out of its band without dispatching it from there."""
        self._bands.by_name[request.band].remove(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """Count a request that has left its band as waiting no more."""
        del self._waiting[request.id]
        self._size_bytes -= request.size_bytes

    def _send(self, request: Request, endpoint: TrackedEndpoint, now: float) -> None:
        request.endpoint = endpoint.address
        request.dispatched_at = now
        self._dispatched[request.id] = (request, endpoint)
        self._endpoints.dispatched(endpoint, request, now)
        self._decisions.append(
            Dispatched(
                request.id,
                endpoint.address,
                now - request.enqueued_at,
                self._classifier.draw_target(request.model, self._random),
            )
        )

    def _reject(
        self, request: Request, outcome: Outcome, retry_after_seconds: int, message: str
    ) -> None:
        self._decisions.append(Refused(request.id, outcome, retry_after_seconds, 0.0, message))

    def _evict(self, request: Request, outcome: Outcome, message: str, now: float) -> None:
        retry_after = self._retry_after_seconds(self._bands.by_name[request.band], now)
        self._remove(request, outcome, retry_after, message, now)

    def _remove(
        self,
        request: Request,
        outcome: Outcome,
        retry_after_seconds: int,
        message: str,
        now: float,
    ) -> None:
        self._leave(request)
        waited = now - request.enqueued_at
        self._decisions.append(Refused(request.id, outcome, retry_after_seconds, waited, message))

    def _retry_after_seconds(self, band: Band, now: float) -> int:
        if not band.arrival:
            return 1
        seconds = self._waits.predict(band, self._bands.all, self._dispatched, now)
        if seconds is None:
            return MAX_RETRY_AFTER_SECONDS
        return min(MAX_RETRY_AFTER_SECONDS, max(1, math.ceil(seconds)))
