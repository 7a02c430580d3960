"""observers.py: several watch the data plane as one, and tracing would be one more of them."""

from __future__ import annotations

import random

from forebay_control.plan import Plan, SaturationMode, SaturationPlan
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Dispatched, Endpoint, Outcome
from forebay_epp.data_plane import DataPlane
from forebay_epp.observers import Observer, Observers
from forebay_epp.traffic import Traffic
from forebay_extproc.v3 import external_processor_pb2 as pb

ADDRESS = "10.0.0.1:8000"


class Spans(Observer):
    """A tracer in miniature: one finished span per request, as (name, seconds) steps."""

    def __init__(self):
        self.begun: dict[int, float] = {}
        self.finished: list[tuple[str, list[tuple[str, float]]]] = []

    def arrived(self, request_id, event, now):  # noqa: ARG002  # has no use for it
        self.begun[request_id] = now

    def answered(self, request_id, outcome, now):
        steps = [(outcome.value, now - self.begun.pop(request_id, now))]
        self.finished.append(("unread", steps))

    def decided(self, request, decision, now):
        if not isinstance(decision, Dispatched):
            waited = now - self.begun.pop(request.id)
            self.finished.append((request.model, [(decision.outcome.value, waited)]))

    def completed(self, request, event, now):
        at = self.begun.pop(request.id)
        steps = [(request.endpoint, request.dispatched_at - at), (str(event.status), now - at)]
        self.finished.append((request.model, steps))


class Site:
    """A data plane in virtual time with one slot, metrics and a tracer."""

    def __init__(self):
        self.now = 100.0
        plan = Plan(saturation=SaturationPlan(SaturationMode.CONCURRENCY, max_concurrency=1))
        controller = ShadowedController(plan, random.Random(1))
        controller.set_endpoints([Endpoint(ADDRESS)], self.now)
        self.traffic, self.spans = Traffic(), Spans()
        both = Observers(self.traffic, self.spans)
        self.data_plane = DataPlane(controller, both, clock=lambda: self.now)

    def request(self, body=b'{"model":"m"}'):
        """Open a stream and send a whole request."""
        exchange = self.data_plane.open(lambda: None)
        path = pb.HeaderValue(key=":path", raw_value=b"/v1/completions")
        method = pb.HeaderValue(key=":method", raw_value=b"POST")
        headers = pb.HttpHeaders(headers=pb.HeaderMap(headers=[method, path]))
        self.say(exchange, request_headers=headers)
        self.say(exchange, request_body=pb.HttpBody(body=body, end_of_stream=True))
        return exchange

    def say(self, exchange, **fields):
        exchange.receive(pb.ProcessingRequest(**fields).SerializeToString())


def test_a_tracer_is_one_observer_beside_the_metrics():
    """Each request is one span: what was refused, what waited, what was answered."""
    site = Site()
    first = site.request()
    second = site.request()
    site.request(b"{")
    site.now += 2.0
    status = pb.HeaderValue(key=":status", raw_value=b"200")
    headers = pb.HttpHeaders(headers=pb.HeaderMap(headers=[status]), end_of_stream=True)
    site.say(first, response_headers=headers)
    site.now += 1.0
    second.close()

    assert site.spans.finished == [
        ("unread", [("RejectedBadRequest", 0.0)]),
        ("m", [(ADDRESS, 0.0), ("200", 2.0)]),
        ("m", [(ADDRESS, 2.0), ("0", 3.0)]),
    ]
    assert not site.spans.begun
    assert sum(site.traffic.outcomes.values()) == 3
    assert site.traffic.outcomes["", "", Outcome.REJECTED_BAD_REQUEST] == 1


def test_a_method_that_one_observer_overrides_is_its_own():
    """So a second observer costs the hot path nothing where it does not look."""
    traffic, spans = Traffic(), Spans()
    both = Observers(traffic, spans)

    assert both.first_token == traffic.first_token
    assert both.stream_opened == traffic.stream_opened


def test_without_observers_nothing_happens():
    """Every method may be called."""
    assert Observers().stalled(1.0) is None
