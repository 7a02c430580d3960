"""Random messages through the real data plane in virtual time: nothing is lost, nothing is kept.

Each run is one data plane with a few streams. Most proxies keep to the protocol for a while; any
may send garbage, messages out of turn, half-close or reset, while plans, endpoints, scrapes and
time change underneath. `FOREBAY_FUZZ_RUNS` says how many runs there are; the seed of a run that
fails is in the error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import pytest

from forebay_control.plan import (
    BandPlan,
    FairnessName,
    LimitsPlan,
    ModelPlan,
    Plan,
    SaturationMode,
    SaturationPlan,
    TargetPlan,
    UnmatchedAction,
    UnmatchedPlan,
)
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Endpoint, EndpointMetrics
from forebay_epp.data_plane import DataPlane
from forebay_epp.traffic import Traffic
from forebay_extproc.v3 import external_processor_pb2 as pb

if TYPE_CHECKING:
    from forebay_epp.data_plane import Exchange

RUNS = int(os.environ.get("FOREBAY_FUZZ_RUNS", "2000"))
SHARES = 4  # a failure names a quarter of the runs, and they can run side by side
STEPS = 60
PEERS = ("ipv4:10.1.0.1:1000", "ipv4:10.1.0.1:1001", "unix:")
MAX_STREAMS = 12
PATHS = (
    *(b"/v1/completions", b"/v1/chat/completions", b"/tokenize", b"/x"),
    *(b"/v1/models", b"/v1/models/chat", b"/v1/models/unknown"),
)
ADDRESSES = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")
MODELS = {"critical": "Critical", "chat": "Standard", "code": "Standard", "batch": "Sheddable"}
MODES = (pb.FULL_DUPLEX_STREAMED,) * 4 + (pb.BUFFERED, pb.BUFFERED_PARTIAL, pb.STREAMED, pb.NONE)
GARBAGE = (b"", b"\x00", b"\xff" * 40, b"\x0a\x02\x08\x01", b"\x3a\x01\x08", b"not a message")
DESTINATION = "x-gateway-destination-endpoint"


class Recording(ShadowedController):
    """The controller, and what it was asked and has decided."""

    def __init__(self, plan, random):
        super().__init__(plan, random)
        self.submitted: set[int] = set()
        self.decided: set[int] = set()

    def submit(self, request, now):
        assert request.id not in self.submitted
        self.submitted.add(request.id)
        super().submit(request, now)

    def poll(self, now):
        decisions = super().poll(now)
        for decision in decisions:
            assert decision.request_id not in self.decided, "a second decision"
            self.decided.add(decision.request_id)
        return decisions


@dataclass(eq=False)
class Proxy:
    """One ext_proc stream as its proxy holds it, and what came back on it."""

    exchange: Exchange
    request_mode: int
    response_mode: int
    honest: bool
    sent_headers: bool = False
    sent_body: bool = False
    answering: bool = False
    replied_itself: bool = False
    shows_answer_only: bool = False
    conversation: bool = False
    half_closed: bool = False
    closed: bool = False
    routed: int = 0
    refused: int = 0
    outgoing: list[bytes] = field(default_factory=list)

    def take(self):
        """Read what the EPP has to say."""
        outbox = self.exchange.outbox
        while outbox:
            answer = pb.ProcessingResponse.FromString(outbox.popleft())
            kind = answer.WhichOneof("response")
            self.refused += kind == "immediate_response"
            if kind in ("request_headers", "request_body"):
                mutation = getattr(answer, kind).response.header_mutation
                self.routed += any(h.header.key == DESTINATION for h in mutation.set_headers)
        assert self.routed + self.refused <= 1, "more than one answer"
        if self.exchange.ended and not self.closed and self.exchange.failure is None:
            answered = self.routed or self.refused or self.replied_itself
            assert answered or not self.sent_headers, "a clean end lets the request bypass the EPP"


def headers(**values):
    return pb.HttpHeaders(
        headers=pb.HeaderMap(
            headers=[pb.HeaderValue(key=key, raw_value=value) for key, value in values.items()]
        )
    )


def plan(random):
    names = ["Critical", "Standard", "Sheddable"][random.choice([0, 0, 0, 1]) :]
    return Plan(
        bands=tuple(
            BandPlan(
                name,
                -number,
                fairness=random.choice(list(FairnessName)),
                ttl_seconds=random.choice([0.5, 3.0, 30.0]),
                max_requests=random.choice([2, 50]),
                max_bytes=random.choice([100, 50_000]),
                flow_max_requests=random.choice([2, 50]),
                flow_max_bytes=random.choice([90, 50_000]),
            )
            for number, name in enumerate(names)
        ),
        models=tuple(
            ModelPlan(model, band, random.choice([(), (TargetPlan("v1"), TargetPlan("v2", 3))]))
            for model, band in MODELS.items()
            if band in names
        ),
        limits=LimitsPlan(
            max_requests=random.choice([3, 100]),
            max_bytes=random.choice([200, 100_000]),
            max_body_bytes=random.choice([60, 4000]),
        ),
        saturation=SaturationPlan(random.choice(list(SaturationMode)), random.choice([1, 2, 5])),
        unmatched=UnmatchedPlan(random.choice(list(UnmatchedAction))),
        no_endpoints_ttl_seconds=random.choice([1.0, 8.0]),
    )


class Run:
    """One data plane, its streams, and everything that happens to them."""

    def __init__(self, seed):
        self.random = random = Random(seed)
        self.now = 100.0
        self.controller = Recording(plan(random), Random(seed))
        self.traffic = Traffic()
        self.data_plane = DataPlane(
            self.controller, self.traffic, MAX_STREAMS, clock=lambda: self.now
        )
        self.proxies: list[Proxy] = []
        self.opened = 0
        self.set_endpoints()

    def everything(self):
        act = self.random.choices
        doings = [
            *(self.open, self.speak, self.time, self.scrape, self.set_endpoints, self.replan),
            self.scrape_failed,
        ]
        for _ in range(STEPS):
            act(doings, weights=[6, 30, 5, 4, 1, 1, 1])[0]()
            self.check()
        if self.random.random() < 0.3:
            self.data_plane.drain()
            self.speak()
            self.data_plane.flush(self.now)
            self.check()
        self.end()

    # --- what happens

    def open(self):
        if len(self.proxies) >= MAX_STREAMS + 2:
            return
        random = self.random
        exchange = self.data_plane.open(lambda: None, random.choice(PEERS))
        self.opened += 1
        self.proxies.append(
            Proxy(
                exchange,
                random.choice(MODES),
                random.choice(MODES),
                honest=random.random() < 0.8,
                shows_answer_only=random.random() < 0.05,
                conversation=random.random() < 0.1,
            )
        )

    def time(self):
        self.now += self.random.choice([0.001, 0.02, 0.3, 2.5, 11.0, 40.0])
        self.data_plane.tick()

    def scrape(self):
        random = self.random
        metrics = EndpointMetrics(
            random.choice(ADDRESSES),
            random.choice([0, 1, 3, 9]),
            random.choice([0, 0, 1, 5]),
            random.choice([None, 0.0, 0.5, 1.0]),
            self.now - random.choice([0.0, 0.1, 3.0]),
        )
        self.data_plane.post(lambda now: self.controller.observe(metrics, now))
        self.data_plane.tick()

    def scrape_failed(self):
        address, refused = self.random.choice(ADDRESSES), self.random.random() < 0.5
        self.data_plane.post(
            lambda now: self.controller.scrape_failed(address, now, refused=refused)
        )
        self.data_plane.tick()

    def set_endpoints(self):
        present = self.random.sample(ADDRESSES, self.random.choice([0, 1, 2, 3, 3]))
        endpoints = [Endpoint(address) for address in present]
        self.data_plane.post(lambda now: self.controller.set_endpoints(endpoints, now))
        self.data_plane.tick()

    def replan(self):
        new = plan(self.random)
        self.data_plane.post(lambda now: self.data_plane.reconfigure(new, now))
        self.data_plane.tick()

    def speak(self):
        if not self.proxies:
            return
        proxy = self.random.choice(self.proxies)
        if not proxy.honest and self.random.random() < 0.3:
            self.misbehave(proxy)
        elif proxy.exchange.ended or self.random.random() < 0.04:
            self.close(proxy)
        elif self.random.random() < 0.04:
            self.half_close(proxy)
        elif not proxy.half_closed:
            self.go_on(proxy)

    def misbehave(self, proxy):
        if proxy.half_closed:
            return
        random = self.random
        message = random.choice(
            [
                random.choice(GARBAGE),
                pb.ProcessingRequest(request_body=pb.HttpBody(body=b"x" * 70)),
                pb.ProcessingRequest(request_trailers=pb.HttpTrailers()),
                pb.ProcessingRequest(response_body=pb.HttpBody(body=b"x", end_of_stream=True)),
                pb.ProcessingRequest(response_trailers=pb.HttpTrailers()),
                pb.ProcessingRequest(response_headers=headers()),
                pb.ProcessingRequest(request_headers=headers()),
            ]
        )
        if isinstance(message, pb.ProcessingRequest):
            if message.HasField("request_headers"):
                proxy.sent_headers = True
            answering = message.WhichOneof("request").startswith("response")
            first = answering and not proxy.sent_headers
            if first or (message.HasField("response_headers") and not proxy.routed):
                proxy.replied_itself = True
            message = message.SerializeToString()
        proxy.exchange.receive(message)

    def go_on(self, proxy):
        """Send what a proxy sends next."""
        random = self.random
        shown = proxy.routed or proxy.shows_answer_only
        if not (proxy.sent_headers or proxy.shows_answer_only):
            self.send_request_headers(proxy)
        elif proxy.conversation and random.random() < 0.4:
            if proxy.request_mode in (pb.FULL_DUPLEX_STREAMED, pb.STREAMED):
                piece = pb.HttpBody(body=b"c" * random.choice([1, 1, 40_000]))
                self.send(proxy, pb.ProcessingRequest(request_body=piece))
        elif not (proxy.sent_body or shown):
            self.send_request_body(proxy)
        elif shown and not proxy.answering:
            proxy.answering = True
            proxy.replied_itself = proxy.replied_itself or not proxy.routed
            found = {
                ":status": random.choice([b"200", b"200", b"500", b"503", b"429"]),
                "content-type": random.choice([b"application/json", b"text/event-stream"]),
            }
            if random.random() < 0.1:
                found["content-encoding"] = b"gzip"
            message = pb.ProcessingRequest(response_headers=headers(**found))
            message.response_headers.end_of_stream = random.random() < 0.1
            self.send(proxy, message)
        elif shown:
            end = random.random() < 0.4
            if end and random.random() < 0.2:
                self.send(proxy, pb.ProcessingRequest(response_trailers=pb.HttpTrailers()))
            else:
                body = random.choice([b"", b'{"usage":{"prompt_tokens":3}}', b'data: {"model":"v1'])
                piece = pb.HttpBody(body=body, end_of_stream=end)
                self.send(proxy, pb.ProcessingRequest(response_body=piece))
        elif random.random() < 0.05:
            proxy.replied_itself = True
            self.send(proxy, pb.ProcessingRequest(response_headers=headers(**{":status": b"504"})))

    def send_request_headers(self, proxy):
        random = self.random
        proxy.sent_headers = True
        bodiless = random.random() < 0.15
        message = pb.ProcessingRequest(
            request_headers=headers(
                **{
                    ":method": b"GET" if bodiless or proxy.conversation else b"POST",
                    ":path": random.choice(PATHS),
                    **({"upgrade": b"websocket"} if proxy.conversation else {}),
                }
            ),
            protocol_config=pb.ProtocolConfiguration(
                request_body_mode=proxy.request_mode, response_body_mode=proxy.response_mode
            ),
        )
        message.request_headers.end_of_stream = bodiless
        proxy.sent_body = bodiless or proxy.conversation or proxy.request_mode == pb.NONE
        if random.random() < 0.2:
            hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"].fields[
                "x-gateway-destination-endpoint-subset"
            ]
            hint.string_value = random.choice([ADDRESSES[0], ",".join(ADDRESSES[:2]), "10.9.9.9:1"])
        self.send(proxy, message)

    def send_request_body(self, proxy):
        random = self.random
        model = random.choice([*MODELS, "unknown"])
        body = b'{"model":"%b","prompt":"%b"}' % (model.encode(), b"p" * random.randrange(40))
        if random.random() < 0.1:
            body = random.choice([b"", b"{", b"{}", b"[]", b'{"model":3}', b"\xff"])
        buffered = proxy.request_mode in (pb.BUFFERED, pb.BUFFERED_PARTIAL)
        end = buffered or random.random() < 0.7
        self.send(
            proxy, pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=end))
        )
        proxy.sent_body = end
        if not end and random.random() < 0.3:
            proxy.sent_body = True
            self.send(proxy, pb.ProcessingRequest(request_trailers=pb.HttpTrailers()))

    def send(self, proxy, message):
        proxy.exchange.receive(message.SerializeToString())

    def half_close(self, proxy):
        if not proxy.half_closed:
            proxy.half_closed = True
            proxy.exchange.half_close()

    def close(self, proxy):
        proxy.take()
        proxy.closed = True
        proxy.exchange.close()
        self.proxies.remove(proxy)

    # --- what must hold

    def check(self):
        for proxy in self.proxies:
            proxy.take()
        state = self.controller.state(self.now)
        assert state.requests + state.in_flight == self.data_plane.unfinished
        assert state.requests == sum(band.requests for band in state.bands)
        assert state.size_bytes == sum(band.size_bytes for band in state.bands)
        for band in state.bands:
            assert band.requests == sum(flow.requests for flow in band.flows)
            assert band.size_bytes == sum(flow.size_bytes for flow in band.flows)
        free = any(endpoint.free > 0 for endpoint in state.endpoints)
        assert free == (state.saturation < 1.0)
        waiting = [request for request in self.controller._waiting.values() if not request.subset]
        assert not (free and waiting), "a request waits beside a free slot"

    def end(self):
        """When all streams are gone and time has passed, nothing is left of them."""
        for proxy in list(self.proxies):
            self.close(proxy)
        self.data_plane.tick()
        state = self.controller.state(self.now)
        assert (state.requests, state.size_bytes, state.in_flight) == (0, 0, 0)
        assert all(endpoint.in_flight == 0 for endpoint in state.endpoints)
        assert self.controller.decided == self.controller.submitted
        data_plane = self.data_plane
        intake = data_plane._intake
        assert (data_plane.open_streams, data_plane.unfinished, intake._refused) == (0, 0, 0)
        assert (intake._reading.size_bytes, len(intake._reading)) == (0, 0)
        assert not intake._reading._connections
        traffic = self.traffic
        assert (traffic.streams_opened, traffic.streams_open) == (self.opened, 0)
        assert sum(traffic.outcomes.values()) <= self.opened


@pytest.mark.parametrize("share", range(SHARES))
def test_random_messages_lose_and_keep_nothing(share):
    """Every request has one outcome; slots, bytes and streams return to zero."""
    for seed in range(share, RUNS, SHARES):
        try:
            Run(seed).everything()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
