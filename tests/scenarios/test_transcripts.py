"""Stories told to the controller, with what it decided: transcripts/*.txt.

A transcript is blocks of commands, `----`, and what they printed. A command is a line; indented
lines below it belong to it; `#` starts a comment. After each command the controller is polled, as
its caller must, and decisions are printed with the time. `FOREBAY_REWRITE=1` rewrites the files:
read the difference before you believe it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forebay_control.plan import (
    BandPlan,
    Between,
    FairnessName,
    InnerPlan,
    LimitsPlan,
    Mode,
    ModelPlan,
    OrderingName,
    Plan,
    PlanError,
    SaturationMode,
    SaturationPlan,
    TargetPlan,
    TenantPlan,
    UnmatchedAction,
    UnmatchedPlan,
    WhenFull,
)
from forebay_epp.codec.answers import verdict
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Dispatched, Endpoint, EndpointMetrics, Request, Usage

FOLDER = Path(__file__).parent / "transcripts"
SEPARATOR = "----"


class Lots:
    """Draws 0 unless the transcript has said what to draw."""

    def __init__(self):
        self.coming = []

    def randrange(self, stop, /):
        return self.coming.pop(0) if self.coming and stop != 1 << 32 else 0


class Story:
    """One controller and its clock."""

    def __init__(self):
        self.lots = Lots()
        self.controller = None
        self.now = 0.0
        self.lines = []

    def run(self, words, more):
        name, *rest = words
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        arguments = [word for word in rest if "=" not in word]
        getattr(self, f"do_{name.replace('-', '_')}")(arguments, options, more)
        self.poll()

    def poll(self):
        for decision in self.controller.poll(self.now):
            self.tell(decision)
        for shadowed in self.controller.take_shadowed(self.now):
            self.tell(shadowed.decision, " would be", " overtaken" if shadowed.overtaken else "")

    def tell(self, decision, would="", overtaken=""):
        waited = f"waited {decision.waited_seconds:g}"
        if isinstance(decision, Dispatched):
            target = f" as {decision.target_model}" if decision.target_model else ""
            what = f"dispatched to {decision.endpoint}{target}, {waited}{overtaken}"
        else:
            retry = f"retry after {decision.retry_after_seconds}"
            what = f"{decision.outcome}, {waited}, {retry}: {decision.message}"
        self.lines.append(f"{self.now:g}s {decision.request_id}{would} {what}")

    # --- commands

    def do_plan(self, _arguments, options, more):
        """Build the controller, or reconfigure it."""
        plan = read_plan(options, more)
        if self.controller is None:
            self.controller = ShadowedController(plan, self.lots)
            return
        try:
            self.controller.reconfigure(plan, self.now)
        except PlanError as error:
            self.lines.append(f"refused: {error}")

    def do_endpoints(self, arguments, _options, _more):
        self.controller.set_endpoints([Endpoint(address) for address in arguments], self.now)

    def do_submit(self, arguments, options, _more):
        """`submit 1-3 chat tenant=acme due=0.5 size=400`: all before the next poll."""
        numbers, *model = arguments
        first, _, last = numbers.partition("-")
        subset = frozenset(options["subset"].split(",")) if "subset" in options else None
        for number in range(int(first), int(last or first) + 1):
            request = Request(number, " ".join(model), int(options.get("size", 1)), subset)
            request.tenant = options.get("tenant", "")
            request.due_in_seconds = float(options["due"]) if "due" in options else None
            self.controller.submit(request, self.now)

    def do_cancel(self, arguments, _options, _more):
        self.controller.cancel(int(arguments[0]), self.now)

    def do_complete(self, arguments, options, _more):
        """`complete 1 2 status=503`, or `blind`: one after the other, polled between.

        With `answer=10` of so many tokens, and one token of prompt.
        """
        blind = "blind" in arguments
        judged = verdict(int(options.get("status", 0)))
        usage = Usage(1, int(options["answer"])) if "answer" in options else None
        for number in arguments:
            if number != "blind":
                self.controller.complete(int(number), usage, self.now, judged, blind=blind)
                self.poll()

    def do_scrape(self, arguments, _options, _more):
        """`scrape A refused`, or `failed`."""
        address, how = arguments
        self.controller.scrape_failed(address, self.now, refused=how == "refused")

    def do_observe(self, arguments, options, _more):
        kv_usage = float(options["kv"]) if "kv" in options else None
        started_at = self.now - float(options.get("age", 0))
        running, waiting = int(options.get("running", 0)), int(options.get("waiting", 0))
        metrics = EndpointMetrics(arguments[0], running, waiting, kv_usage, started_at)
        self.controller.observe(metrics, self.now)

    def do_at(self, arguments, _options, _more):
        """Go on to this second, and poll at each wakeup on the way."""
        until = float(arguments[0])
        while (wakeup := self.controller.next_wakeup()) is not None and wakeup <= until:
            self.now = wakeup
            self.poll()
        self.now = until

    def do_drain(self, _arguments, _options, _more):
        self.controller.drain()

    def do_flush(self, _arguments, _options, _more):
        self.controller.flush(self.now)

    def do_lots(self, arguments, _options, _more):
        self.lots.coming = [int(word) for word in arguments]

    def do_wakeup(self, _arguments, _options, _more):
        wakeup = self.controller.next_wakeup()
        self.lines.append("never" if wakeup is None else f"at {wakeup:g}")

    def do_queues(self, _arguments, _options, _more):
        snapshot = self.controller.state(self.now)
        draining = ", draining" if snapshot.draining else ""
        self.lines.append(f"{snapshot.requests} requests, {snapshot.size_bytes} bytes{draining}")
        for band in snapshot.bands:
            flows = " ".join(f"{name_of(flow)}={flow.requests}" for flow in band.flows)
            ending = " (draining)" if band.draining else ""
            self.lines.append(f"  {band.band}{ending}: {flows or 'empty'}")

    def do_slots(self, _arguments, _options, _more):
        snapshot = self.controller.state(self.now)
        for state in snapshot.endpoints:
            self.lines.append(
                f"{state.address}: {state.in_flight} in flight, {state.foreign} foreign, "
                f"limit {state.limit}, {state.free} free, {'fresh' if state.fresh else 'stale'}"
            )
        self.lines.append(f"{snapshot.in_flight} in flight, saturation {snapshot.saturation:.2f}")


def name_of(flow):
    """The model, the tenant, or both with a slash."""
    model = None if flow.model is None else flow.model or "unmatched"
    return "/".join(name for name in (model, flow.tenant) if name is not None)


def read_plan(options, more):
    """Read `plan` and its lines.

    `plan limit=1 mode=Observe`, then `band NAME PRIORITY [FAIRNESS]`,
    `model NAME BAND TARGET:W weight=W` and `tenant NAME WEIGHT`.
    """
    bands, models, tenants = [], [], []
    for line in more:
        kind, name, third, *rest = line.split()
        given = dict(word.split("=", 1) for word in rest if "=" in word)
        if kind == "tenant":
            tenants.append(TenantPlan(name, int(third)))
            continue
        if kind == "model":
            targets = [word.rsplit(":", 1) for word in rest if "=" not in word]
            weighted = tuple(TargetPlan(target, int(weight)) for target, weight in targets)
            models.append(
                ModelPlan(
                    *(name, third, weighted, int(given.get("weight", 1))),
                    float(given.get("ttft", 0)),
                )
            )
            continue
        fairness = next((word for word in rest if "=" not in word), "FCFS")
        bands.append(
            BandPlan(
                name,
                int(third),
                FairnessName(fairness),
                OrderingName(given.get("ordering", "FCFS")),
                ttl_seconds=float(given.get("ttl", 60)),
                max_requests=int(given.get("requests", 5000)),
                max_bytes=int(given.get("bytes", 1 << 20)),
                flow_max_requests=int(given.get("flow-requests", 5000)),
                flow_max_bytes=int(given.get("flow-bytes", 1 << 20)),
                between=Between(given.get("between", "Models")),
                inner=InnerPlan(FairnessName(given["inner"])) if "inner" in given else None,
                when_full=WhenFull(given.get("full", "Reject")),
                max_saturation_percent=int(given.get("ceiling", 100)),
                reserved_percent=int(given.get("reserved", 0)),
            )
        )
    adaptive = SaturationPlan(kv_cache_usage_threshold=float(options.get("kv", 0.95)))
    given_limit = "limit" in options
    return Plan(
        bands=tuple(bands),
        models=tuple(models),
        tenants=tuple(tenants),
        limits=LimitsPlan(
            max_requests=int(options.get("requests", 10_000)),
            max_bytes=int(options.get("bytes", 1 << 30)),
        ),
        saturation=(
            SaturationPlan(SaturationMode.CONCURRENCY, int(options["limit"]))
            if given_limit
            else adaptive
        ),
        unmatched=UnmatchedPlan(
            UnmatchedAction(options.get("unmatched", "Queue")),
            options.get("unmatched-band", "Standard"),
        ),
        no_endpoints_ttl_seconds=float(options.get("no-endpoints-ttl", 60)),
        mode=Mode(options.get("mode", "Enforce")),
    )


def told_again(text):
    """Run all commands of a transcript and return it with what they print now."""
    story = Story()
    blocks = []
    for block in text.strip().split("\n\n"):
        commands = block.split(f"\n{SEPARATOR}", 1)[0].split("\n")
        story.lines = []
        script = [line for line in commands if line.strip() and not line.startswith("#")]
        while script:
            words = script.pop(0).split()
            more = []
            while script and script[0].startswith(" "):
                more.append(script.pop(0))
            story.run(words, more)
        if any(not line.startswith("#") for line in commands):
            blocks.append("\n".join([*commands, SEPARATOR, *story.lines]))
        else:
            blocks.append("\n".join(commands))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path):
    """The controller decides what the transcript says."""
    text = path.read_text(encoding="utf-8")
    told = told_again(text)
    if os.environ.get("FOREBAY_REWRITE"):
        path.write_text(told, encoding="utf-8")
        return

    assert told == text


def test_there_are_transcripts():
    """An empty folder would pass silently."""
    assert len(list(FOLDER.glob("*.txt"))) > 15
