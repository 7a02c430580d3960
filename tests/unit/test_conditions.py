"""What statuses say: from plans, acknowledgements and stats to conditions and numbers."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_control.plan import ObjectivePlan, Plan
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.status import comparing, conditions, numbers
from forebay_operator.status.comparing import Transition
from forebay_operator.status.observed import EPP, Attachment, EPPState, Subject

GROUP = "inference.networking.k8s.io"
SUBJECT = Subject("u", "default", generation=3)
INVALID = Subject("u", "default", 3, problems=[("spec.limits.maxRequests", "must be at least 1")])
HELD_BACK = Subject("u", "default", 3, INVALID.problems, valid_generation=2)


def epp(name="epp-0", generation=3, state=EPPState.PROGRAMMED, **more):
    return EPP(name, state, connected=True, generations={"u": generation}, **more)


def at(*epps, pool="chat", endpoints=1, **more):
    more.setdefault("service", "epp")
    return Attachment(pool, GROUP, list(epps), endpoints=endpoints, **more)


ABSENT = Attachment("chat", GROUP, None)
REFUSED = at(epp(), refused=("Conflicted", "FlowControlPolicy old is older"))


def told(subject, *attachments):
    """{type: (status, reason)} of a policy."""
    status = conditions.policy_status(subject, attachments)
    assert all(c["observedGeneration"] == subject.generation for c in status["conditions"])
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def message(which, subject, *attachments):
    status = conditions.policy_status(subject, attachments)
    return next(c["message"] for c in status["conditions"] if c["type"] == which)


@pytest.mark.parametrize(
    ("which", "subject", "attachments", "status", "reason", "words"),
    [
        ("Accepted", SUBJECT, [at(epp())], "True", "Accepted", ""),
        ("Accepted", SUBJECT, [ABSENT], "False", "TargetNotFound", "see ResolvedRefs"),
        ("Accepted", INVALID, [at()], "False", "Invalid", "spec.limits.maxRequests: must be"),
        ("Accepted", HELD_BACK, [at()], "False", "Invalid", "Generation 2, the last valid one"),
        ("Accepted", SUBJECT, [REFUSED], "False", "Conflicted", "old is older"),
        ("Accepted", SUBJECT, [at(epp()), REFUSED], "False", "Conflicted", "old is older"),
        ("ResolvedRefs", SUBJECT, [at()], "True", "ResolvedRefs", ""),
        ("ResolvedRefs", SUBJECT, [ABSENT], "False", "TargetNotFound", "no InferencePool chat"),
        ("ResolvedRefs", SUBJECT, [at(pool="b"), ABSENT], "False", "TargetNotFound", "chat"),
        ("ResolvedRefs", INVALID, [], "Unknown", "Invalid", "see Accepted"),
        ("Programmed", SUBJECT, [at(epp())], "True", "Programmed", "every EPP"),
        ("Programmed", INVALID, [at(epp())], "False", "Invalid", "see Accepted"),
        ("Programmed", SUBJECT, [REFUSED], "False", "Conflicted", "see Accepted"),
        ("Programmed", SUBJECT, [ABSENT], "False", "TargetNotFound", "does not exist"),
        (
            *("Programmed", SUBJECT, [at(epp(), pool="b"), ABSENT]),
            *("False", "TargetNotFound", "InferencePool chat: has no effect"),
        ),
        ("Programmed", SUBJECT, [at(epp(generation=2))], "False", "Pending", "epp-0"),
        (
            *("Programmed", SUBJECT, [at(epp(generation=2), unsent=("TooLarge", "has 2 MiB"))]),
            *("False", "TooLarge", "has 2 MiB"),
        ),
        (
            "Programmed",
            SUBJECT,
            [at(epp(), unsent=("TooLarge", "has 2 MiB"))],
            "True",
            "Programmed",
            "",
        ),
        (
            *("Programmed", SUBJECT, [at(epp(unsupported=("plan.metrics",)))]),
            *("False", "UnsupportedByEndpointPicker", "does not know plan.metrics: update it"),
        ),
        ("Programmed", SUBJECT, [at()], "False", "NoEndpointPickers", "Service epp"),
        ("Programmed", SUBJECT, [at(service=None)], "False", "NoEndpointPickers", "names no"),
        (
            *("Programmed", SUBJECT, [at(shared_with=("code",))]),
            *("False", "NoEndpointPickers", "InferencePool code names Service epp, too"),
        ),
        ("Programmed", SUBJECT, [at(service="")], "False", "NoEndpointPickers", "is connected"),
        ("Programmed", SUBJECT, [at(epp()), at(pool="b")], "False", "NoEndpointPickers", "b"),
        ("Programmed", SUBJECT, [at(held_by="old")], "Unknown", "PlanHeld", "old is not valid"),
        ("Accepted", SUBJECT, [at(epp(), shadow_of="p")], "True", "Accepted", "shadow of"),
        ("Programmed", SUBJECT, [at(epp(), shadow_of="p")], "False", "Shadow", "decides nothing"),
        (
            *("Programmed", SUBJECT, [at(epp(generation=2), shadow_of="p")]),
            *("False", "Pending", "epp-0"),
        ),
        ("Degraded", SUBJECT, [at(epp())], "False", "AsExpected", ""),
        ("Degraded", HELD_BACK, [at(epp())], "True", "LastValidInForce", "generation 2"),
        ("Degraded", INVALID, [at(epp())], "False", "AsExpected", ""),
        ("Degraded", INVALID, [at(held_by="p")], "True", "PlanHeld", "keep the plan they have"),
        (
            "Degraded",
            SUBJECT,
            [at(epp(), notes=("no room",))],
            "True",
            "PoolDegraded",
            "no room",
        ),
    ],
)
def test_each_condition_says_why(which, subject, attachments, status, reason, words):
    """A False one always has a message, which says what to do or where to look."""
    assert told(subject, *attachments)[which] == (status, reason)
    text = message(which, subject, *attachments)
    assert words in text
    assert text or status == "True" or which == "Degraded"


@pytest.mark.parametrize(
    ("state", "reason", "degraded"),
    [
        (EPPState.REJECTED, "Rejected", "EndpointPickersReject"),
        (EPPState.STALE, "Stale", "EndpointPickersStale"),
    ],
)
def test_a_picker_that_does_not_follow_is_named(state, reason, degraded):
    """Among others that do; what it said is part of the message."""
    bad = epp("epp-1", 2, state, error="Invalid: spec.bands[0]: no such band")
    found = told(SUBJECT, at(epp(), bad))
    assert found["Programmed"] == ("False", reason)
    assert found["Degraded"] == ("True", degraded)
    assert "epp-1" in message("Programmed", SUBJECT, at(epp(), bad))
    assert ("spec.bands[0]" in message("Programmed", SUBJECT, at(bad))) == (reason == "Rejected")


def test_a_picker_of_another_release_is_a_reason_of_its_own():
    """Only where all that refuse do so for that."""
    old = epp("old", 2, EPPState.REJECTED, error="Unsupported: plan.x: not known here")
    bad = epp("bad", 2, EPPState.REJECTED, error="Invalid: plan.y: no")
    assert told(SUBJECT, at(old))["Programmed"] == ("False", "UnsupportedByEndpointPicker")
    assert told(SUBJECT, at(old, bad))["Programmed"] == ("False", "Rejected")


def test_a_long_list_of_pickers_is_cut():
    """Names of five, and how many more; no message is longer than an Event takes."""
    many = [epp(f"epp-{i}", 2, EPPState.STALE) for i in range(40)]
    text = message("Programmed", SUBJECT, at(*many))
    assert "epp-4 and 35 more" in text
    loud = [epp(f"epp-{i}", 2, EPPState.REJECTED, error="Invalid: " + "x" * 900) for i in "ab"]
    assert len(message("Programmed", SUBJECT, at(*loud))) == 1024


def test_the_least_generation_counts():
    """ProgrammedGeneration is what every EPP runs; nothing, while one runs none of it."""

    def least(*generations):
        epps = [epp(str(i), g) for i, g in enumerate(generations)]
        return conditions.policy_status(SUBJECT, [at(*epps)]).get("programmedGeneration")

    assert least(3, 2, 3) == 2
    assert least(3) == 3
    assert least(3, 0) is None
    assert least() is None


def test_pickers_are_counted():
    """Over all pools where the policy counts."""
    epps = [
        epp("a"),
        EPP("b", EPPState.STALE),
        epp("c", 2, EPPState.REJECTED),
        epp("d", 2, EPPState.PENDING),
    ]
    status = conditions.policy_status(SUBJECT, [at(*epps), REFUSED, at(epp("e"), pool="b")])
    assert status["endpointPickers"] == {
        "desired": 5,
        "connected": 4,
        "programmed": 2,
        "rejected": 1,
        "stale": 1,
        "ready": "2/5",
    }


def test_ancestors_are_the_pools_as_gep_713_has_them():
    """One per target, each with its own verdict."""
    status = conditions.policy_status(SUBJECT, [at(epp()), REFUSED, ABSENT])
    assert [a["conditions"][0]["reason"] for a in status["ancestors"]] == [
        "Accepted",
        "Conflicted",
        "TargetNotFound",
    ]
    assert status["ancestors"][0]["ancestorRef"] == {
        "group": GROUP,
        "kind": "InferencePool",
        "namespace": "default",
        "name": "chat",
    }
    assert {a["controllerName"] for a in status["ancestors"]} == {"forebay.dev/operator"}


ABSENT_B = Attachment("b", GROUP, None)
STALE = epp("epp-1", 2, EPPState.STALE)


@pytest.mark.parametrize(
    "attachments",
    [
        [at(epp())],
        [ABSENT],
        [REFUSED],
        [at(epp()), ABSENT_B],
        [REFUSED, at(epp(), pool="b")],
        [at(STALE), at(epp(), pool="b"), Attachment("c", GROUP, None)],
        [at(held_by="old"), at(epp(), pool="b")],
    ],
)
@pytest.mark.parametrize("subject", [SUBJECT, INVALID, HELD_BACK])
def test_the_summary_is_the_worst_of_the_ancestors(subject, attachments):
    """Of all four conditions; one that is bad says at which pool, unless there is one only."""
    status = conditions.policy_status(subject, attachments)

    for condition in status["conditions"]:
        bad = "True" if condition["type"] == "Degraded" else "False"
        per_pool = {
            ancestor["ancestorRef"]["name"]: c
            for ancestor in status["ancestors"]
            for c in ancestor["conditions"]
            if c["type"] == condition["type"]
        }
        assert len(per_pool) == len(attachments)
        order = [bad, "Unknown", {"True": "False", "False": "True"}[bad]]
        worst = min((c["status"] for c in per_pool.values()), key=order.index)
        assert condition["status"] == worst
        if len(attachments) > 1 and worst == bad:
            culprits = [
                pool
                for pool, c in per_pool.items()
                if (c["status"], c["reason"]) == (worst, condition["reason"])
            ]
            assert culprits
            assert all(f"{pool}" in condition["message"] for pool in culprits)
    verdicts = told(subject, *attachments)
    if verdicts["Accepted"][0] == "False":
        assert verdicts["Programmed"][0] == "False"


def test_a_policy_that_loses_at_one_pool_is_not_told_to_be_programmed():
    """Where it is in force is said by that pool's conditions."""
    status = conditions.policy_status(SUBJECT, [REFUSED, at(epp(), pool="b")])
    b = {c["type"]: c["status"] for c in status["ancestors"][1]["conditions"]}

    assert told(SUBJECT, REFUSED, at(epp(), pool="b"))["Programmed"] == ("False", "Conflicted")
    assert b == {
        "Accepted": "True",
        "ResolvedRefs": "True",
        "Programmed": "True",
        "Degraded": "False",
    }


@pytest.mark.parametrize(
    ("out", "degraded"), [((0, 0), False), ((2, 2), False), ((1, 4), True), ((2**32 - 1, 0), False)]
)
def test_a_pool_with_most_endpoints_out_is_degraded(out, degraded):
    """More than half, over what its two EPPs report; one that lies counts as one."""
    epps = [
        epp(str(number), stats=pb.Stats(endpoints=4, endpoints_out=count))
        for number, count in enumerate(out)
    ]

    reason = "EndpointsFailing" if degraded else "AsExpected"
    assert told(SUBJECT, at(*epps, endpoints=4))["Degraded"] == (str(degraded), reason)


def model(subject, attachment):
    status = conditions.model_status(subject, attachment)
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def test_models_have_their_conditions():
    """Accepted and Programmed."""
    in_use = at(epp(), refused=("ModelNameInUse", "modelName x is that of InferenceModel y"))
    yes, invalid = ("True", "Accepted"), ("False", "Invalid")
    assert model(SUBJECT, at(epp())) == {"Accepted": yes, "Programmed": ("True", "Programmed")}
    assert model(SUBJECT, in_use) == dict.fromkeys(
        ("Accepted", "Programmed"), ("False", "ModelNameInUse")
    )
    assert model(SUBJECT, ABSENT)["Accepted"] == ("Unknown", "Pending")
    assert model(SUBJECT, ABSENT)["Programmed"] == ("False", "TargetNotFound")
    assert model(INVALID, ABSENT) == {"Accepted": invalid, "Programmed": invalid}
    assert model(SUBJECT, at(held_by="p"))["Programmed"] == ("Unknown", "PlanHeld")


def objective(subject, attachment, name="night", *, trusted=True):
    plan = Plan(objectives=(ObjectivePlan("night", "Standard"),), trust_objective_header=trusted)
    band = {each.name: each.band for each in plan.objectives}.get(name)
    status = conditions.objective_status(subject, attachment, plan, band)
    (accepted,) = status["conditions"]
    return accepted["status"], accepted["reason"], accepted["message"]


def test_an_objective_says_whether_it_has_an_effect():
    """Its band, or what keeps requests from naming it, or why it does not count."""
    elsewhere = at(epp(), refused=("InvalidPoolRef", "poolRef.kind: no"))

    assert "join band Standard" in objective(SUBJECT, at(epp()))[2]
    assert "trustedHeaders: [Objective]" in objective(SUBJECT, at(epp()), trusted=False)[2]
    assert objective(SUBJECT, at(epp()), "day")[:2] == ("False", "TooManyObjectives")
    assert objective(SUBJECT, ABSENT)[:2] == ("Unknown", "Pending")
    assert objective(SUBJECT, elsewhere)[:2] == ("False", "InvalidPoolRef")
    assert objective(INVALID, ABSENT)[:2] == ("False", "Invalid")


@pytest.mark.parametrize(
    "epps",
    [
        [epp(), epp("epp-1")],
        [epp(), EPP("new", EPPState.PENDING)],
        [epp(), EPP("unheard", EPPState.STALE)],
        [epp(), epp("epp-1", state=EPPState.STALE)],
        [epp(), epp("epp-1", state=EPPState.REJECTED, error="Invalid: x: no")],
    ],
)
def test_endpoint_pickers_that_come_and_go_are_no_news_about_a_model(epps):
    """As long as all that serve run it; a pool has thousands of models."""
    written = comparing.with_times(conditions.model_status(SUBJECT, at(epp())), {}, "T1")

    assert comparing.differs(conditions.model_status(SUBJECT, at(*epps)), written) == ""


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (epp("e", 2, EPPState.PENDING), "Pending"),
        (epp("e", 2, EPPState.STALE), "Stale"),
        (epp("e", 2, EPPState.REJECTED, error="Invalid: x: no"), "Rejected"),
        (
            epp("e", 2, EPPState.REJECTED, error="Unsupported: x: no"),
            "UnsupportedByEndpointPicker",
        ),
    ],
)
def test_a_model_that_some_serve_otherwise_is_not_programmed(behind, reason):
    """An EPP still serves an older generation of it."""
    assert model(SUBJECT, at(epp(), behind))["Programmed"] == ("False", reason)


def test_a_model_is_only_told_of_what_concerns_it():
    """A field of the policy that an older EPP does not know, unless it costs the whole plan."""
    unsupported = ("False", "UnsupportedByEndpointPicker")
    policys = {"unsupported": ("plan.metrics",)}
    mine = {"unsupported": ("plan.models[3].weight",)}

    assert model(SUBJECT, at(epp(**policys)))["Programmed"] == ("True", "Programmed")
    assert model(SUBJECT, at(epp(generation=2, **policys)))["Programmed"] == unsupported
    assert model(SUBJECT, at(epp(**mine)))["Programmed"] == unsupported


# --- times


def test_times_move_only_when_the_status_flips():
    """A new reason or message is no transition; ancestors' conditions have theirs."""
    first = comparing.with_times(
        conditions.policy_status(SUBJECT, [at(epp(generation=2))]), {}, "T1"
    )
    assert {c["lastTransitionTime"] for c in first["conditions"]} == {"T1"}
    assert first["ancestors"][0]["conditions"][0]["lastTransitionTime"] == "T1"

    stale = conditions.policy_status(SUBJECT, [at(epp(generation=2, state=EPPState.STALE))])
    second = comparing.with_times(stale, first, "T2")
    times = {c["type"]: c["lastTransitionTime"] for c in second["conditions"]}
    assert times == {"Accepted": "T1", "ResolvedRefs": "T1", "Programmed": "T1", "Degraded": "T2"}

    refused = conditions.policy_status(SUBJECT, [REFUSED])
    third = comparing.with_times(refused, second, "T3")
    assert third["ancestors"][0]["conditions"][0]["lastTransitionTime"] == "T3"


# --- comparing


def status(**more):
    """A status as it is read back after it has been written."""
    found = conditions.policy_status(SUBJECT, [at(epp(stats=stats()), **more)])
    return comparing.with_times(found, {}, "T1")


def stats(requests=7, saturation=0.5, **more):
    band = pb.BandStats(band="Standard", requests=requests, **more)
    return pb.Stats(saturation=saturation, bands=[band])


def test_the_status_tells_the_mode_and_what_enforce_would_do():
    """Summed over EPPs; a pool is observing when all of them are."""
    would = pb.ShadowStats(
        band="Standard", requests=5, dispatched=40, rejected=2, overtaken=7, waited_seconds=20.0
    )
    one = pb.Stats(mode="Observe", shadow=[would])
    (both,) = conditions.policy_status(SUBJECT, [at(epp(stats=one), epp(stats=one))])["pools"]
    (mixed,) = conditions.policy_status(SUBJECT, [at(epp(stats=one), epp(stats=stats()))])["pools"]

    assert both["mode"] == "Observe"
    assert both["shadow"] == [
        {
            "band": "Standard",
            "requests": 10,
            "dispatched": 80,
            "rejected": 4,
            "evicted": 0,
            "overtaken": 14,
            "meanWaitMilliseconds": 500,
        }
    ]
    assert mixed["mode"] == "Enforce"


def desired(**more):
    return conditions.policy_status(SUBJECT, [at(epp(stats=stats(**more)))])


def test_a_status_that_was_written_does_not_differ():
    """Times aside; or each write would lead to the next."""
    assert comparing.differs(desired(), status()) == ""


def test_other_writers_conditions_are_theirs():
    """Neither a condition nor an ancestor of another controller makes a difference."""
    observed = status()
    observed["conditions"].append({"type": "Checked", "status": "False", "reason": "X"})
    other = copy.deepcopy(observed["ancestors"][0])
    other["controllerName"] = "example.com/other"
    observed["ancestors"].append(other)
    assert comparing.differs(desired(), observed) == ""


def test_numbers_are_told_from_meaning():
    """Queues and saturation are numbers; counts, conditions and generations mean something."""
    assert comparing.differs(desired(requests=8), status()) == "numbers"
    assert comparing.differs(desired(saturation=0.9), status()) == "numbers"
    for name in ("programmedGeneration", "endpointPickers", "conditions", "ancestors"):
        observed = status()
        del observed[name]
        assert comparing.differs(desired(), observed) == "meaning", name
    for field in ("status", "reason", "message", "observedGeneration"):
        observed = status()
        observed["conditions"][0][field] = "other"
        assert comparing.differs(desired(), observed) == "meaning", field
    assert comparing.differs(desired(), {}) == "meaning"


def test_transitions_are_new_statuses_and_reasons():
    """Not new messages: each is reported once."""
    observed = status()
    observed["conditions"][0]["message"] = "other"
    assert comparing.transitions(desired(), observed) == []
    observed["conditions"][2]["reason"] = "Pending"
    observed["conditions"][2]["status"] = "False"
    text = "every EPP runs it"
    assert comparing.transitions(desired(), observed) == [
        Transition("Programmed", "True", "Programmed", text, before="False")
    ]


def test_what_repeats_a_refusal_is_no_transition():
    """A policy that loses to another is reported once, not in each condition."""
    refused = at(epp(), refused=("Conflicted", "an older one is there"), notes=("no endpoints",))
    changes = comparing.transitions(conditions.policy_status(SUBJECT, [refused]), {})
    assert [(c.type, c.reason) for c in changes if c.bad] == [("Accepted", "Conflicted")]


# --- numbers


@given(st.integers(0, 10**12))
def test_two_digits_are_kept(value):
    """Of any number: it is never more than the exact one, and less by under a tenth."""
    kept = numbers.quantised(value)
    assert value * 0.9 <= kept <= value
    assert len(str(kept).rstrip("0")) <= 2
    assert numbers.quantised(kept) == kept


def test_the_numbers_of_an_endpoint_picker_that_is_away_do_not_count():
    """What it said last is not what waits now."""
    gone = epp("gone", state=EPPState.STALE, stats=stats(requests=50, saturation=2.0))
    found = conditions.policy_status(SUBJECT, [at(epp(stats=stats()), gone)])

    assert (found["queued"], found["saturation"]) == (7, "0.50")


def test_bands_that_one_endpoint_picker_makes_up_give_way():
    """The schema takes 64; those that more EPPs report are kept."""
    liar = pb.Stats(bands=[pb.BandStats(band=f"a{number}") for number in range(64)])
    honest = [epp(name, stats=stats()) for name in ("x", "y")]
    found = conditions.policy_status(SUBJECT, [at(*honest, epp("liar", stats=liar))])

    bands = [queue["band"] for queue in found["pools"][0]["queues"]]
    assert (len(bands), bands[0]) == (64, "Standard")


def test_pickers_reports_are_added_up():
    """Counts are summed, ages and saturation are the greatest, bands are in order of names."""
    reports = [
        pb.Stats(
            saturation=0.51,
            bands=[pb.BandStats(band="Standard", requests=70, bytes=1234, oldest_seconds=2.4)],
        ),
        pb.Stats(
            saturation=1.239,
            bands=[
                pb.BandStats(band="Standard", requests=61, bytes=1, oldest_seconds=31.7, evicted=2),
                pb.BandStats(band="Critical", dispatched=5),
            ],
        ),
    ]
    epps = [epp(str(i), stats=report) for i, report in enumerate(reports)]
    found = conditions.policy_status(SUBJECT, [at(*epps, epp("silent"), endpoints=4)])
    assert (found["queued"], found["saturation"]) == (130, "1.25")
    (pool,) = found["pools"]
    assert (pool["endpoints"], [q["band"] for q in pool["queues"]]) == (4, ["Critical", "Standard"])
    assert pool["queues"][1] == {
        "band": "Standard",
        "requests": 130,
        "bytes": 1200,
        "oldestSeconds": 32,
        "dispatched": 0,
        "rejected": 0,
        "evicted": 2,
    }
