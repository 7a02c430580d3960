"""The words of flow control as plain data. Behaviour does not belong here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from forebay_control.plan import Mode

NEVER = float("inf")
PREFIX_BLOCK_BYTES = 1024  # of a prompt, for which it has one name
PREFIX_BLOCK_TOKENS = 256  # that these are taken for when the size of a cache is counted in them


class RandomSource(Protocol):
    """The random numbers that the core needs; `random.Random` fits."""

    def randrange(self, stop: int, /) -> int:
        """Return an integer of 0 to stop - 1."""


class Outcome(StrEnum):
    """How a request left flow control. Rejected: before it was queued. Evicted: after.

    Answered: the endpoint picker knew the answer, and the request was never submitted.
    """

    DISPATCHED = "Dispatched"
    ANSWERED = "Answered"
    REJECTED_BAD_REQUEST = "RejectedBadRequest"
    REJECTED_TOO_LARGE = "RejectedTooLarge"
    REJECTED_UNSUPPORTED_ENCODING = "RejectedUnsupportedEncoding"
    REJECTED_INCOMPLETE = "RejectedIncomplete"
    REJECTED_UNKNOWN_MODEL = "RejectedUnknownModel"
    REJECTED_QUEUE_FULL = "RejectedQueueFull"
    REJECTED_NO_ENDPOINTS = "RejectedNoEndpoints"
    REJECTED_POOL_DELETED = "RejectedPoolDeleted"
    REJECTED_SHUTTING_DOWN = "RejectedShuttingDown"
    EVICTED_TTL = "EvictedTTL"
    EVICTED_DISPLACED = "EvictedDisplaced"
    EVICTED_NO_ENDPOINTS = "EvictedNoEndpoints"
    EVICTED_CANCELLED = "EvictedCancelled"
    EVICTED_POOL_DELETED = "EvictedPoolDeleted"
    EVICTED_SHUTTING_DOWN = "EvictedShuttingDown"


class Verdict(StrEnum):
    """What the end of an answer says about the server that gave it."""

    GOOD = "Good"
    """It answered; an error that is the request's own fault counts as good."""

    ERROR = "Error"
    """It failed at this request, which may or may not be the request's fault: 500."""

    UNREACHABLE = "Unreachable"
    """It could not be reached, or says that it cannot serve: 502, 503, 504."""

    UNKNOWN = "Unknown"
    """There was no answer to judge, because the client went away for example."""


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens as the model server counted them.

    `cached_tokens` are those of the prompt that were in its cache; None where it does not say.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None


@dataclass(slots=True)  # made once a request: to freeze it would take most of the time
class Cost:
    """What a flow is charged for: a dispatch with the tokens to be expected of it.

    Later what its answer proves to be longer, while it is produced; and once it has ended and its
    tokens are known, what they are more than was charged, or less. Then `requests` is 0.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through flow control.

    The first ten fields are the caller's; the rest belongs to the controller and is written by
    `FlowController.submit`, at dispatch and later.

    Attributes:
        id: unique among all requests the controller ever sees.
        model: model name as the client wrote it; "" when none could be read.
        size_bytes: what the request holds in memory while it waits.
        subset: addresses the proxy restricts the choice to; None means all.
        objective: what the request's header names as its objective; "" for none.
        deadline: monotonic seconds after which the caller does not want the answer any more. It
            ends the wait where it comes before the end of the band's TTL.
        tenant: whose it is, by a header that the plan trusts; "" when there is none.
        due_in_seconds: how soon the caller wants the answer to begin, None when it does not say.
        prefix: a name for each `PREFIX_BLOCK_BYTES` of its prompt that is full, which also says
            what comes before it; empty where the plan has no use for it.
        streamed: whether its answer is expected to be seen to begin.
        band: the band's name.
        flow: the name of the plan's model that the request belongs to; "" where it matches none.
        path: the names of the flows that it waits in, outermost first.
        charged_by: the levels of fairness that its dispatch was charged to, which alone may correct
            that.
        sequence: grows by order of arrival in the band.
        due_at: monotonic seconds at which its answer should begin.
        enqueued_at: monotonic seconds.
        dispatched_at: monotonic seconds.
        first_token_at: monotonic seconds, infinity until then.
        endpoint: address of the endpoint that it was dispatched to.
        prompt_tokens: that its prompt is expected to have.
        answer_tokens: that its answer is expected to have, and its flow is charged for; more once
            it has come to more.
        block_tokens: of its prompt that a block of `prefix` is expected to have.
        cached_tokens: of its prompt that its endpoint is trusted to have in its prefix cache.
        kv_tokens: tokens of KV cache that it is expected to take.
        prefill_mark: prompt tokens sent to its endpoint up to its own.
        predicted_seconds: how long it is expected to wait in the queue, None where nothing is
            expected.
        shadow: the same where another plan is computed beside, once its answer has ended there
            without usage.
    """

    id: int
    model: str
    size_bytes: int
    subset: frozenset[str] | None = None
    objective: str = ""
    deadline: float = NEVER
    tenant: str = ""
    due_in_seconds: float | None = None
    prefix: tuple[int, ...] = ()
    streamed: bool = True
    band: str = ""
    flow: str = ""
    path: tuple[str, ...] = ()
    charged_by: object = None
    sequence: int = 0
    due_at: float = NEVER
    enqueued_at: float = 0.0
    dispatched_at: float = 0.0
    first_token_at: float = NEVER
    endpoint: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    block_tokens: float = 0.0
    cached_tokens: int = 0
    kv_tokens: int = 0
    prefill_mark: float = 0.0
    predicted_seconds: float | None = None
    shadow: Request | None = None

    @property
    def uncached_tokens(self) -> int:
        """Those that its endpoint is expected to compute of its prompt; no request is free."""
        tokens = self.prompt_tokens - self.cached_tokens
        return tokens if tokens > 0 else 1


@dataclass(slots=True)  # as `Cost`
class Dispatched:
    """The request goes to `endpoint` now and occupies one of its slots until completed.

    `target_model` is the name to send upstream instead of the client's, or None to leave it.
    """

    request_id: int
    endpoint: str
    waited_seconds: float
    target_model: str | None = None


@dataclass(slots=True, frozen=True)
class Refused:
    """The request was rejected or evicted, as `outcome` says; it holds nothing any more.

    `retry_after_seconds` is how long it would wait if it came back at once, clamped to 1-60.
    """

    request_id: int
    outcome: Outcome
    retry_after_seconds: int
    waited_seconds: float
    message: str


Decision = Dispatched | Refused


@dataclass(slots=True)  # as `Cost`
class Shadowed:
    """What a plan that is computed beside the one in force would have decided about a request.

    `overtaken`: a request that came later would have been sent before it.
    """

    request: Request
    decision: Decision
    overtaken: bool


@dataclass(slots=True, frozen=True)
class Endpoint:
    """One model server of the pool.

    `address` is ip:port, `name` is for people. `uid` is the pod's: another one at the same address
    is another endpoint. Empty where it is not known, which is then no reason to think so.
    """

    address: str
    name: str = ""
    uid: str = ""


@dataclass(slots=True, frozen=True)
class EndpointMetrics:
    """What one scrape of an endpoint said.

    Attributes:
        address: the endpoint's ip:port.
        running: requests in the batch, summed over engines.
        waiting: requests queued inside the server, summed over engines.
        kv_usage: fraction 0-1 of KV cache in use, the fullest engine; None when not reported.
        started_at: monotonic seconds at which the scrape was sent: what was dispatched later
            cannot be in it.
        interval_seconds: from then to the next scrape.
        steps: of the engine since it started, summed over engines; None when not reported.
        step_tokens: prompt and answer tokens that these steps have processed.
        kv_capacity_tokens: size of the KV cache; None when not reported.
        prefix_hits: tokens found in the prefix cache since the start; None when not reported.
        answer_tokens: generated since the start; None when not reported.
    """

    address: str
    running: int
    waiting: int
    kv_usage: float | None
    started_at: float
    interval_seconds: float = 0.2
    steps: float | None = None
    step_tokens: float = 0.0
    kv_capacity_tokens: int | None = None
    prefix_hits: float | None = None
    answer_tokens: float | None = None


@dataclass(slots=True, frozen=True)
class HealthChange:
    """An endpoint was left out, or is back in. `cause` is why it was left out."""

    address: str
    name: str
    out: bool
    cause: str


@dataclass(slots=True, frozen=True)
class FlowState:
    """One flow's queue at a moment.

    `model` is "" for requests that match none, and None where the band does not tell models apart;
    `tenant` is "" for requests without one, and None where it does not tell tenants apart.
    """

    model: str | None
    requests: int
    size_bytes: int
    tenant: str | None = None


@dataclass(slots=True, frozen=True)
class BandState:
    """One band's queues at a moment.

    `drain_rate` is dispatches per second, averaged. `flow_count` flows have something waiting, of
    which `flows` may be the longest only.
    """

    band: str
    priority: int
    requests: int
    size_bytes: int
    oldest_seconds: float
    drain_rate: float
    draining: bool
    flows: tuple[FlowState, ...]
    flow_count: int = 0


@dataclass(slots=True, frozen=True)
class EndpointState:
    """One endpoint's slots at a moment.

    Attributes:
        address: ip:port.
        name: for people.
        in_flight: requests of this EPP.
        foreign: requests of others.
        limit: its slots.
        free: those that could be given away now.
        running: in its batch, by the last scrape.
        waiting: inside it, by the last scrape.
        kv_usage: fraction 0-1, by the last scrape; None when not reported.
        fresh: whether the last scrape is recent enough to be believed.
        out: whether it is left out because it fails.
        cause: why it was left out last; "" if it never was.
        trial_seconds: until it may get a trial request; 0 when that is due, None when it is in.
    """

    address: str
    name: str
    in_flight: int
    foreign: int
    limit: int
    free: int
    running: int
    waiting: int
    kv_usage: float | None
    fresh: bool
    out: bool = False
    cause: str = ""
    trial_seconds: float | None = None


@dataclass(slots=True, frozen=True)
class ControllerState:
    """The whole controller at a moment.

    `saturation` >= 1.0 means no free slot. `prefix_blocks` are what endpoints are believed to have
    in their prefix caches.

    `mode` is the plan's; where it is Observe, `shadow` is what would be if it were Enforce, and
    where it is Enforce, what would be under the plan's shadow if it has one.
    """

    pool: str
    requests: int
    size_bytes: int
    in_flight: int
    saturation: float
    draining: bool
    bands: tuple[BandState, ...]
    endpoints: tuple[EndpointState, ...]
    prefix_blocks: int = 0
    mode: Mode = Mode.ENFORCE
    shadow: ControllerState | None = None
