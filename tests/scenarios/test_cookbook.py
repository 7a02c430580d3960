"""The recipes of crds/README.md do what it says: planned, programmed and played in virtual time.

From the files of a recipe through planning, the program's bytes and the EPP's codec to
the controller. tests/cluster checks that a real API server takes the files.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import yaml

from forebay_cli import check
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec import metricstext
from forebay_epp.codec import plan as plan_codec
from forebay_epp.core.fairness.token_fair import ANSWER_TOKEN, PROMPT_TOKEN
from forebay_epp.core.observation.shadowed import ShadowedController
from forebay_epp.core.terms import Dispatched, Endpoint, Request, Usage, Verdict
from forebay_operator import planning
from forebay_operator.resources import FlowControlPolicy
from forebay_operator.standalone import sources

CRDS = Path(__file__).parents[2] / "crds"
FOLDERS = sorted(path for path in (CRDS / "examples").iterdir() if path.is_dir())
RECIPES = [path.name for path in FOLDERS if path.name != "quickstart"]
COOKBOOK = (CRDS / "README.md").read_text()
SERVER = "10.0.0.1:8000"
SLOTS = 4  # of a server that has not shown any metrics


def planned(name: str, *, without: str = "") -> planning.Planned:
    """Plan a recipe; `without` is a field of the policy's spec to leave out."""
    found = list(sources.read(CRDS / "examples" / name).resources)
    for number, resource in enumerate(found):
        if without and isinstance(resource, FlowControlPolicy):
            empty = type(resource.spec).model_fields[without].default
            spec = resource.spec.model_copy(update={without: empty})
            found[number] = resource.model_copy(update={"spec": spec})
    (pool,) = planning.pools(found)
    return planning.plan(pool, found)


class Play:
    """A recipe's controller, and the moment it is."""

    def __init__(self, name: str) -> None:
        self._plan, self.endpoints = self._read(planned(name))
        self.controller = ShadowedController(self._plan, Random(7))
        self.now = 0.0
        self.sent: list[Request] = []
        self.usages: list[Usage | None] = []
        self.decisions: list = []
        self.dispatched: list[Request] = []
        self.ended = 0  # so many of these, the first ones

    @staticmethod
    def _read(program: planning.Planned):
        snapshot = pb.Snapshot.FromString(program.snapshot.SerializeToString())
        return plan_codec.parse_snapshot(snapshot)

    def reprogram(self, program: planning.Planned) -> None:
        self.controller.reconfigure(self._read(program)[0], self.now)

    def servers(self, *addresses: str) -> None:
        self.controller.set_endpoints([Endpoint(address) for address in addresses], self.now)
        self._poll()

    def send(
        self,
        model: str,
        count: int = 1,
        *,
        objective: str = "",
        tenant: str = "",
        due: float | None = None,
        usage: Usage | None = None,
    ) -> list[int]:
        """Send requests; return their ids. `due` and `usage` are in seconds and of each answer."""
        numbers = range(len(self.sent), len(self.sent) + count)
        for number in numbers:
            size_bytes = 4 * usage.prompt_tokens if usage else 100
            request = Request(number, model, size_bytes, objective=objective, tenant=tenant)
            request.due_in_seconds = due
            self.sent.append(request)
            self.usages.append(usage)
            self.controller.submit(request, self.now)
            self._poll()
        return list(numbers)

    def at(self, seconds: float) -> None:
        """Go on to a moment, and poll at each wakeup on the way."""
        while (wakeup := self.controller.next_wakeup()) is not None and wakeup <= seconds:
            self.now = max(self.now, wakeup)
            self._poll()
        self.now = seconds
        self._poll()

    def served(self, count: int) -> list[Request]:
        """End what runs, one by one, until so many more have got a slot; return these."""
        before = len(self.dispatched)
        while len(self.dispatched) < before + count:
            assert self.ended < len(self.dispatched), f"only {self.dispatched[before:]} were served"
            number = self.dispatched[self.ended].id
            self.ended += 1
            self.controller.complete(number, self.usages[number], self.now, Verdict.GOOD)
            self._poll()
        return self.dispatched[before : before + count]

    def next_served(self, count: int) -> list[str]:
        """Return the models of what is served next."""
        return [request.model for request in self.served(count)]

    def band(self, name: str) -> int:
        """How many wait in a band."""
        snapshot = self.controller.state(self.now)
        return next(band.requests for band in snapshot.bands if band.band == name)

    def outcomes(self, numbers: list[int]) -> Counter[str]:
        wanted = set(numbers)
        return Counter(
            "Dispatched" if isinstance(each, Dispatched) else each.outcome.value
            for each in self.decisions
            if each.request_id in wanted
        )

    def waits(self, numbers: list[int]) -> set[float]:
        wanted = set(numbers)
        return {each.waited_seconds for each in self.decisions if each.request_id in wanted}

    def _poll(self) -> None:
        while fresh := self.controller.poll(self.now):
            self.decisions += fresh
            self.dispatched += [
                self.sent[each.request_id] for each in fresh if isinstance(each, Dispatched)
            ]


# --- the files and the text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_is_valid_and_has_no_problem(folder, capsys):
    """`forebay check` has neither an error nor a warning, and the plan none either."""
    assert check.run(SimpleNamespace(paths=[folder], strict=False)) == 0
    assert "warning" not in capsys.readouterr().out
    assert planned(folder.name).problems == ()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_can_be_applied_as_it_is(folder):
    """No address is one that an API server refuses, so `kubectl apply -f FOLDER` has no error."""
    for path in folder.iterdir():
        assert "127.0.0." not in path.read_text()


def test_the_cookbook_names_every_folder():
    """A heading for each recipe, none for anything else."""
    headings = re.findall(r"^## .*\(examples/([a-z-]+)\)$", COOKBOOK, re.MULTILINE)

    assert sorted(headings) == RECIPES


def within(part, whole) -> bool:
    """Whether everything in `part` is in `whole`; lists may have more entries there."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and within(value, whole[key]) for key, value in part.items()
        )
    if isinstance(part, list):
        return isinstance(whole, list) and all(
            any(within(one, other) for other in whole) for one in part
        )
    return part == whole


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_cookbook_shows_is_in_the_files(name):
    """The YAML of a section is a part of one of the recipe's objects."""
    section = COOKBOOK.split(f"(examples/{name})", 1)[1].split("\n## ", 1)[0]
    shown = [yaml.safe_load(text) for text in re.findall("```yaml\n(.*?)```", section, re.DOTALL)]
    objects = [
        manifest
        for path in (CRDS / "examples" / name).iterdir()
        for manifest in yaml.safe_load_all(path.read_text())
    ]

    assert shown
    for part in shown:
        assert any(within(part, manifest) for manifest in objects), part


# --- what the recipes do


def test_interactive_before_batch():
    """A queue full of batch does not hold up one interactive request; batch may wait 30 minutes."""
    play = Play("interactive-before-batch")
    play.servers(SERVER)
    batch = play.send("llama-batch", 1000)
    play.send("llama-chat", 3)

    assert play.next_served(5) == ["llama-chat"] * 3 + ["llama-batch"] * 2
    waiting = play.band("Sheddable")
    play.at(1799)
    assert play.band("Sheddable") == waiting
    play.at(1800)
    assert play.outcomes(batch)["EvictedTTL"] == waiting > 900


def test_interactive_requests_are_refused_after_their_ttl():
    """Waiting longer than 15 s has no use."""
    play = Play("interactive-before-batch")
    play.servers(SERVER)
    waiting = play.send("llama-chat", 20)[SLOTS:]

    play.at(15)

    assert play.outcomes(waiting) == {"EvictedTTL": len(waiting)}
    assert play.waits(waiting) == {15}


def test_tenants_take_turns():
    """A flood of one fills only its own share, and the others are served in between."""
    play = Play("tenants-take-turns")
    play.servers(SERVER)
    flood = play.send("team-a", 3000)

    assert play.outcomes(flood) == {"Dispatched": SLOTS, "RejectedQueueFull": 2800 - SLOTS}
    assert not play.outcomes(play.send("team-b", 100) + play.send("team-c", 100))
    served = play.next_served(30)
    assert Counter(served) == {"team-a": 10, "team-b": 10, "team-c": 10}
    assert play.outcomes(play.send("team-x")) == {"RejectedUnknownModel": 1}


def test_scale_from_zero():
    """Requests wait for the first server for up to five minutes, then they are refused with 503."""
    play = Play("scale-from-zero")
    early = play.send("llama-chat", 2)
    play.at(240)
    late = play.send("llama-chat", 2)
    assert not play.outcomes(early + late)

    play.at(301)
    play.servers(SERVER)

    assert play.outcomes(early) == {"EvictedNoEndpoints": 2}
    assert play.outcomes(late) == {"Dispatched": 2}


def test_known_models_only():
    """Another model is refused at once."""
    play = Play("known-models-only")
    play.servers(SERVER)

    assert play.outcomes(play.send("llama-chat")) == {"Dispatched": 1}
    assert play.outcomes(play.send("gpt-x")) == {"RejectedUnknownModel": 1}


def test_servers_with_other_metrics():
    """The series that it names are found on a page, and only with the right labels."""
    plan, _ = Play._read(planned("servers-with-other-metrics"))
    page = (
        b'jobs{state="running",node="a"} 3\njobs{state="running",node="b"} 4\n'
        b'jobs{state="queued"} 2\njobs{state="done"} 900\n'
        b'cache_used_ratio{kind="disk"} 0.9\ncache_used_ratio{kind="kv"} 0.5\n'
    )

    read = metricstext.parse_page(page, metricstext.engines(plan.metrics))

    assert (plan.metrics.port, plan.metrics.path) == (9400, "/stats")
    assert read == metricstext.PageMetrics(7, 2, 0.5)


def test_servers_without_metrics():
    """Each gets 16 at once without having shown anything, and the next one waits."""
    play = Play("servers-without-metrics")
    play.servers(SERVER, "10.0.0.2:8000")
    sent = play.send("llama-chat", 40)

    assert play.outcomes(sent) == {"Dispatched": 32}
    in_flight = [endpoint.in_flight for endpoint in play.controller.state(0).endpoints]
    assert in_flight == [16, 16]


def test_fail_fast():
    """The 51st that waits is refused at once, and the others after two seconds."""
    play = Play("fail-fast")
    play.servers(SERVER)
    sent = play.send("llama-autocomplete", 100)

    assert play.outcomes(sent) == {"Dispatched": SLOTS, "RejectedQueueFull": 50 - SLOTS}
    play.at(2)
    assert play.outcomes(sent)["EvictedTTL"] == 50
    assert play.waits(sent) == {0, 2}


def test_fail_fast_without_servers():
    """One second, then 503."""
    play = Play("fail-fast")
    sent = play.send("llama-autocomplete")
    play.at(1)

    assert play.outcomes(sent) == {"EvictedNoEndpoints": 1}
    assert play.waits(sent) == {1}


def test_canary():
    """About a tenth of the requests is sent on under the new name."""
    play = Play("canary")
    play.servers(*(f"10.0.0.{number}:8000" for number in range(1, 251)))
    play.send("llama-chat", 1000)

    names = Counter(each.target_model for each in play.decisions)
    assert set(names) == {"llama-chat-v1", "llama-chat-v2"}
    assert names.total() == 1000
    assert 70 <= names["llama-chat-v2"] <= 130  # three standard deviations


def test_try_a_policy():
    """The report waits behind 60 of chat; beside it is computed that it need not."""
    play = Play("try-a-policy")
    play.servers(SERVER)
    play.send("llama-chat", SLOTS + 60)
    (report,) = play.send("llama-report")
    play.send("llama-chat", 60)
    while play.band("Standard"):
        play.now += 0.1
        play.served(1)

    assert play.dispatched.index(play.sent[report]) == SLOTS + 60
    shadowed = play.controller.take_shadowed(play.now)
    dispatched = [each.request.id for each in shadowed if isinstance(each.decision, Dispatched)]
    assert dispatched.index(report) <= SLOTS + 2
    refused = [each.decision for each in shadowed if not isinstance(each.decision, Dispatched)]
    assert len(refused) == 20  # of chat, beyond 100 that wait
    assert "the model's queue is full (100 requests)" in {each.message for each in refused}


def test_trusted_objectives():
    """The header decides about the queue, and an unknown one changes nothing."""
    play = Play("trusted-objectives")
    play.send("llama-chat", 1, objective="paying")
    play.send("llama-chat", 2, objective="trial")
    play.send("llama-chat", 3, objective="no-such")
    play.send("llama-chat", 4)

    assert [play.band(name) for name in ("Critical", "Standard", "Sheddable")] == [1, 7, 2]


def test_objectives_have_no_effect_without_trust():
    """What a client writes into the header is not believed by default."""
    play = Play("trusted-objectives")
    play.reprogram(planned("trusted-objectives", without="trusted_headers"))
    play.send("llama-chat", 1, objective="paying")

    assert play.band("Standard") == 1


def test_demote_a_model():
    """New requests of the model wait behind all others; earlier ones keep their position."""
    play = Play("demote-a-model")
    play.reprogram(planned("demote-a-model", without="models"))
    play.servers(SERVER)
    play.send("llama-report", 10)
    before = play.band("Critical")

    play.reprogram(planned("demote-a-model"))
    play.send("llama-report", 5)
    play.send("llama-chat", 5)

    assert (play.band("Critical"), play.band("Sheddable")) == (before + 5, 5)
    served = play.next_served(before + 10)
    assert served == ["llama-report"] * before + ["llama-chat"] * 5 + ["llama-report"] * 5


def test_servers_outside():
    """The endpoints are the slice's addresses."""
    play = Play("servers-outside")

    assert [endpoint.address for endpoint in play.endpoints] == [
        "192.0.2.11:8000",
        "192.0.2.12:8000",
    ]


def test_tenants_by_token():
    """Each gets as many tokens as any other, however long its requests are and however many."""
    play = Play("tenants-by-token")
    play.servers(SERVER)
    flood = play.send("llama-chat", 1000, tenant="greedy", usage=Usage(1000, 500))
    for tenant in ("a", "b"):
        play.send("llama-chat", 400, tenant=tenant, usage=Usage(200, 100))

    assert play.outcomes(flood) == {"Dispatched": SLOTS, "RejectedQueueFull": 500 - SLOTS}
    service: Counter[str] = Counter()
    for request in play.served(600):
        usage = play.usages[request.id]
        service[request.tenant] += (
            PROMPT_TOKEN * usage.prompt_tokens + ANSWER_TOKEN * usage.completion_tokens
        )
    for tenant in ("greedy", "a", "b"):
        assert service[tenant] == pytest.approx(service.total() / 3, rel=0.05)


def test_a_greedy_tenant_does_not_hold_up_another():
    """One request beside 500 that came before it gets the next slot."""
    play = Play("tenants-by-token")
    play.servers(SERVER)
    play.send("llama-chat", 500, tenant="greedy", usage=Usage(1000, 500))
    play.served(50)

    play.send("llama-chat", tenant="modest", usage=Usage(1000, 500))

    assert [request.tenant for request in play.served(1)] == ["modest"]


def test_subscription():
    """A tenth for those who do not pay, and the rest three to one."""
    play = Play("subscription")
    play.servers(SERVER)
    for _ in range(300):
        play.send("llama-chat", objective="free", tenant="someone")
        play.send("llama-chat", tenant="globex")
        play.send("llama-chat", tenant="acme")
    play.served(20)  # what the first slots went to

    counts = Counter(request.tenant for request in play.served(200))

    for tenant, share in {"someone": 20, "globex": 45, "acme": 135}.items():
        assert abs(counts[tenant] - share) <= 2


@pytest.mark.parametrize("caller", [{"tenant": "globex"}, {"objective": "free"}])
def test_a_subscriber_that_is_alone_gets_everything(caller):
    """No slot is kept free for those who have a share and do not come."""
    play = Play("subscription")
    play.servers(SERVER)
    sent = play.send("llama-chat", 50, **caller)

    play.served(40)

    assert play.outcomes(sent) == {"Dispatched": SLOTS + 40}
    assert play.controller.state(0).in_flight == SLOTS


def test_deadline_chat():
    """What is due first is next: by the header, or by the model; so agents do not starve either."""
    play = Play("deadline-chat")
    play.servers(SERVER)
    play.send("llama-agent", 10)
    play.send("llama-chat", 3)
    play.send("llama-agent", due=0.5)

    first, *rest = play.served(4)
    assert (first.model, first.due_at) == ("llama-agent", 0.5)
    assert [request.model for request in rest] == ["llama-chat"] * 3
    play.at(18.5)
    play.send("llama-chat")
    assert play.next_served(7) == ["llama-agent"] * 6 + ["llama-chat"]


def test_chat_takes_the_place_of_batch_in_a_full_queue():
    """Of the newest; more batch is refused, and no chat is."""
    play = Play("deadline-chat")
    play.servers(SERVER)
    batch = play.send("llama-batch", SLOTS + 10_000)
    late = play.send("llama-batch")

    chat = play.send("llama-chat", 5)

    assert play.outcomes(late) == {"RejectedQueueFull": 1}
    assert not play.outcomes(chat)
    assert play.outcomes(batch[-5:]) == {"EvictedDisplaced": 5}
    assert play.outcomes(batch) == {"Dispatched": SLOTS, "EvictedDisplaced": 5}


def test_batch_trickle():
    """One of 20 dispatches is batch while chat fills the servers and waits."""
    play = Play("batch-trickle")
    play.servers(SERVER)
    play.send("llama-chat", 400)
    play.send("llama-batch", 100)

    served = play.next_served(200)

    assert abs(served.count("llama-batch") - 10) <= 1
    between = [place for place, model in enumerate(served) if model == "llama-batch"]
    assert {later - place for place, later in pairwise(between)} == {20}


def test_batch_leaves_a_fifth_of_the_slots_free():
    """Chat that comes gets one at once, and batch fills no more than its part afterwards."""
    play = Play("batch-trickle")
    play.servers(*(f"10.0.0.{number}:8000" for number in range(1, 6)))
    batch = play.send("llama-batch", 100)

    assert play.outcomes(batch) == {"Dispatched": 16}
    assert play.outcomes(play.send("llama-chat", 4)) == {"Dispatched": 4}
    assert play.outcomes(batch) == {"Dispatched": 16}
