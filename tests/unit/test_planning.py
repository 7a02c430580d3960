"""From resources to an EPP's program, and what the EPP makes of it."""

from __future__ import annotations

import json
import random

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from manifest_reading import pool_ref, resource_of

from forebay_control import plan as core
from forebay_epp.codec import metricstext
from forebay_epp.codec import plan as plan_codec
from forebay_operator import planning
from forebay_operator.resources import SHADOW_LABEL

X = "inference.networking.x-k8s.io/v1alpha2"


def pool(name="chat", namespace="default", ports=(8000,)):
    return resource_of(
        {
            "apiVersion": "inference.networking.k8s.io/v1",
            "kind": "InferencePool",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": {"app": "a"}},
                "targetPorts": [{"number": port} for port in ports],
            },
        }
    )


def model(name, model_name=None, created=None, namespace="default", **spec):
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return resource_of(
        {
            "apiVersion": X,
            "kind": "InferenceModel",
            "metadata": metadata,
            "spec": {"modelName": model_name or name, "poolRef": {"name": "chat"}, **spec},
        }
    )


def objective(name, priority):
    return resource_of(
        {
            "apiVersion": X,
            "kind": "InferenceObjective",
            "metadata": {"name": name},
            "spec": {"poolRef": {"name": "chat"}, "priority": priority},
        }
    )


def policy(name="p", created=None, namespace="default", shadow_of=None, **spec):
    return resource_of(
        {
            "apiVersion": "forebay.dev/v1alpha1",
            "kind": "FlowControlPolicy",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "creationTimestamp": created,
                "labels": {} if shadow_of is None else {SHADOW_LABEL: shadow_of},
            },
            "spec": {"targetRefs": [pool_ref("chat")], **spec},
        }
    )


def endpoint_slice(*endpoints, ports=(), label="chat"):
    return resource_of(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "s", "labels": {"forebay.dev/inference-pool": label}},
            "endpoints": endpoints,
            "ports": [{"port": port} for port in ports],
        }
    )


def picked_up(*given):
    """Plan the pool and read the result as the EPP does."""
    planned = planning.plan(pool(), [pool(), *given])
    plan, endpoints = plan_codec.parse_snapshot(planned.snapshot)
    return plan, endpoints, planned.problems


def test_no_policy_is_the_core_s_default():
    """The resources' defaults are the Plan's."""
    assert picked_up()[0] == core.Plan(pool="default/chat")


def test_an_empty_policy_is_no_policy():
    """`targetRefs` alone."""
    assert picked_up(policy())[0] == picked_up()[0]


def test_a_policy_reaches_every_field_of_the_plan():
    """Nothing in the resource is without effect."""
    plan, _, problems = picked_up(
        policy(
            bands=[
                {
                    "name": "Critical",
                    "fairness": [{"between": "Models", "policy": "RoundRobin"}],
                    "queue": {
                        "maxRequests": 7,
                        "maxBytes": "1Ki",
                        "ttl": "5s",
                        "perFlow": {"maxRequests": 3, "maxBytes": 100},
                    },
                }
            ],
            models=[{"name": "only-here", "band": "Sheddable"}],
            limits={"maxRequests": 11, "maxBytes": 12, "maxBodyBytes": 13},
            saturation={"type": "Concurrency", "concurrency": {"maxRequestsPerEndpoint": 4}},
            unmatched={"action": "Reject", "band": "Sheddable"},
            noEndpoints={"ttl": "2m"},
        )
    )

    assert problems == ()
    assert plan.bands[0] == core.BandPlan(
        "Critical",
        100,
        core.FairnessName.ROUND_ROBIN,
        ttl_seconds=5.0,
        max_requests=7,
        max_bytes=1024,
        flow_max_requests=3,
        flow_max_bytes=100,
    )
    assert plan.bands[1:] == core.DEFAULT_BANDS[1:]
    assert plan.models == (core.ModelPlan("only-here", "Sheddable"),)
    assert plan.limits == core.LimitsPlan(11, 12, 13)
    assert plan.saturation == core.SaturationPlan(core.SaturationMode.CONCURRENCY, 4)
    assert plan.unmatched == core.UnmatchedPlan(core.UnmatchedAction.REJECT, "Sheddable")
    assert plan.no_endpoints_ttl_seconds == 120


def test_adaptive_limits_close_servers_at_a_share_of_their_cache():
    """The policy says percent, the plan a share."""
    plan, _, _ = picked_up(
        policy(saturation={"type": "Adaptive", "adaptive": {"maxKVCacheUsagePercent": 90}})
    )

    assert plan.saturation == core.SaturationPlan(kv_cache_usage_threshold=0.9)


def test_bands_of_other_names_are_planned_beside_the_three():
    """By priority; models, unmatched requests and objectives join them."""
    plan, _, problems = picked_up(
        model("a", criticality="Critical"),
        objective("nightly", -60),
        policy(
            bands=[
                {"name": "batch", "priority": -50, "queue": {"ttl": "1h"}},
                {"name": "night", "priority": -70},
                {"name": "Standard", "ordering": {"policy": "FCFS"}},
            ],
            models=[{"name": "a", "band": "batch"}],
            unmatched={"band": "night"},
        ),
    )

    assert problems == ()
    assert [(band.name, band.priority) for band in plan.bands] == [
        ("Critical", 100),
        ("Standard", 0),
        ("batch", -50),
        ("night", -70),
        ("Sheddable", -100),
    ]
    assert plan.bands[2] == core.BandPlan("batch", -50, ttl_seconds=3600)
    assert [model.band for model in plan.models] == ["batch"]
    assert plan.unmatched.band == "night"
    assert [objective.band for objective in plan.objectives] == ["night"]


def test_criticality_decides_the_band():
    """Unset means Standard; the policy's word is above the model's."""
    plan, _, _ = picked_up(
        model("a", criticality="Critical"),
        model("b"),
        model("c", criticality="Critical"),
        policy(models=[{"name": "c", "band": "Sheddable"}]),
    )

    assert {m.name: m.band for m in plan.models} == {
        "a": "Critical",
        "b": "Standard",
        "c": "Sheddable",
    }


def test_targets_without_weights_weigh_the_same():
    """And weights are taken as they are."""
    plan, _, _ = picked_up(
        model("a", targetModels=[{"name": "x"}, {"name": "y"}]),
        model("b", targetModels=[{"name": "x", "weight": 3}]),
    )

    assert [m.targets for m in plan.models] == [
        (core.TargetPlan("x"), core.TargetPlan("y")),
        (core.TargetPlan("x", 3),),
    ]


@given(seed=st.integers(0, 10_000))
def test_the_oldest_wins_whatever_the_order(seed):
    """By creation time, then by name; the losers name the winner."""
    given_ = [
        policy("young", "2026-02-01T00:00:00Z", limits={"maxRequests": 2}),
        policy("old", "2026-01-01T00:00:00Z", limits={"maxRequests": 1}),
        model("m-young", "same", "2026-02-01T00:00:00Z", criticality="Sheddable"),
        model("m-old", "same", "2026-01-01T00:00:00Z", criticality="Critical"),
        model("a-no-time", "same"),
    ]
    random.Random(seed).shuffle(given_)

    plan, _, problems = picked_up(*given_)

    assert plan.limits.max_requests == 1
    assert plan.models == (core.ModelPlan("same", "Critical"),)
    assert {(p.name, p.reason) for p in problems} == {
        ("default/young", "Conflicted"),
        ("default/m-young", "ModelNameInUse"),
        ("default/a-no-time", "ModelNameInUse"),
    }
    assert all("old" in problem.message for problem in problems)


def test_another_namespace_has_no_effect():
    """Resources for a pool elsewhere change nothing here, and say so."""
    others = (policy(namespace="other", limits={"maxRequests": 1}), model("m", namespace="other"))

    told = planning.unattached([pool(), *others])

    assert picked_up(*others) == picked_up()
    assert [problem.kind for problem in told] == ["FlowControlPolicy", "InferenceModel"]
    assert all("InferencePool chat is in namespace default" in p.message for p in told)


def test_endpoints_are_addresses_times_ports():
    """The slice's ports, else the pool's; not ready is left out; IPv6 is bracketed."""
    _, endpoints, _ = picked_up(
        endpoint_slice(
            {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "pod-1"}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": False}},
            {"addresses": ["fd00::1"], "conditions": {"ready": True}},
        ),
        endpoint_slice({"addresses": ["10.0.0.3"]}, ports=(1, 2)),
        endpoint_slice({"addresses": ["10.0.0.4"]}, label="another-pool"),
    )

    assert {e.address: e.name for e in endpoints} == {
        "10.0.0.1:8000": "pod-1",
        "[fd00::1]:8000": "[fd00::1]:8000",
        "10.0.0.3:1": "10.0.0.3:1",
        "10.0.0.3:2": "10.0.0.3:2",
    }


def test_a_name_is_no_address():
    """Envoy connects to it, so it must be an IP."""
    _, endpoints, problems = picked_up(endpoint_slice({"addresses": ["example.com"]}))

    assert (endpoints, [p.reason for p in problems]) == ((), ["InvalidAddress"])


def test_one_address_is_one_endpoint_however_it_is_written():
    """Slices may overlap, and IPv6 has many spellings."""
    _, endpoints, problems = picked_up(
        endpoint_slice({"addresses": ["fd00::0:1", "10.0.0.1"]}),
        endpoint_slice({"addresses": ["FD00::1", "10.0.0.1"]}),
    )

    assert [endpoint.address for endpoint in endpoints] == ["10.0.0.1:8000", "[fd00::1]:8000"]
    assert problems == ()


def test_more_models_than_an_endpoint_picker_takes_are_cut_and_told():
    """Refusing the whole plan would not help. What the policy names is never cut."""
    overrides = [
        {"name": "override", "band": "Critical"},
        {"name": f"m{core.MAX_MODELS - 1}", "band": "Critical"},
    ]

    plan, _, problems = picked_up(
        *(model(f"m{number:04}") for number in range(core.MAX_MODELS)), policy(models=overrides)
    )

    assert {entry.name for entry in plan.models} == {
        "override",
        *(f"m{number:04}" for number in range(core.MAX_MODELS)),
    } - {f"m{core.MAX_MODELS - 2}"}
    assert [(p.kind, p.name) for p in problems] == [
        ("InferencePool", "default/chat"),
        ("InferenceModel", f"default/m{core.MAX_MODELS - 2}"),
    ]
    assert "4097 models" in problems[0].message


@pytest.mark.parametrize(
    ("criticality", "unmatched", "band"),
    [
        ("Sheddable", "Standard", "Sheddable"),
        ("Critical", "Standard", "Standard"),
        ("Standard", "Sheddable", "Sheddable"),
        (None, "Critical", "Standard"),
    ],
)
def test_a_model_gains_nothing_by_being_one_too_many(criticality, unmatched, band):
    """It is unmatched, so unmatched requests wait no better than it should."""
    late = {"criticality": criticality} if criticality else {}

    plan, _, _ = picked_up(
        *(model(f"m{number:04}", criticality="Critical") for number in range(core.MAX_MODELS)),
        model("zz", **late),
        policy(unmatched={"band": unmatched}),
    )

    assert plan.unmatched.band == band


def test_what_is_for_no_pool_is_told():
    """A mistyped name would otherwise just have no effect."""
    told = planning.unattached(
        [
            pool("chatt"),
            model("m"),
            policy(targetRefs=[pool_ref("chatt"), pool_ref("chat")]),
            endpoint_slice(label=""),
            endpoint_slice(label="chatt"),
        ]
    )

    assert [str(problem) for problem in told] == [
        "InferenceModel default/m: TargetNotFound: there is no InferencePool chat",
        "FlowControlPolicy default/p: TargetNotFound: there is no InferencePool chat",
        "EndpointSlice default/s: TargetNotFound: no label forebay.dev/inference-pool names a pool",
    ]


def test_pools_of_one_name_in_two_namespaces_are_apart():
    """Each takes what is of its own namespace, and no problem is reported."""
    pools = [pool(), pool(namespace="other")]
    everything = [*pools, policy(limits={"maxRequests": 1}), policy(namespace="other"), model("m")]

    here, there = (planning.plan(each, everything) for each in pools)

    assert planning.unattached(everything) == here.problems == there.problems == ()
    assert (here.snapshot.plan.limits.max_requests, len(here.snapshot.plan.models)) == (1, 1)
    assert there.snapshot.plan.limits.max_requests == core.LimitsPlan().max_requests
    assert not there.snapshot.plan.models


def test_a_plan_that_an_epp_would_refuse_is_not_sent():
    """Whatever let its resources in: EPPs keep the plan they have, and the pool names the field."""
    slice_ = endpoint_slice({"addresses": ["10.0.0.1"]})
    old = policy()
    limits = old.spec.limits.model_copy(update={"max_requests": 0})
    old = old.model_copy(update={"spec": old.spec.model_copy(update={"limits": limits})})

    planned = planning.plan(pool(), [old, slice_])

    assert (planned.plan, planned.policy) == (None, old)
    assert not planned.snapshot.HasField("plan")
    assert not planned.snapshot.sources
    assert len(planned.snapshot.endpoints.endpoints) == 1
    (problem,) = planned.problems
    assert (problem.kind, problem.reason, problem.message) == ("InferencePool", *planned.unsent)
    assert problem.reason == "InvalidPlan"
    assert "limits.maxRequests: must be 1 to 1000000, is 0" in problem.message


def test_differences_are_told_by_name():
    """What people see when they have edited a manifest."""
    before = planning.plan(pool(), [model("a"), model("b", criticality="Critical")]).snapshot
    after = planning.plan(
        pool(),
        [
            model("b", targetModels=[{"name": "x"}]),
            model("c"),
            policy(bands=[{"name": "Standard", "queue": {"ttl": "5s"}}]),
            endpoint_slice({"addresses": ["10.0.0.1"], "targetRef": {"name": "pod"}}),
        ],
    ).snapshot

    assert planning.differences(before, before) == []
    assert planning.differences(before, after) == [
        "endpoints.endpoints[10.0.0.1:8000] added",
        "plan.bands[Standard].ttlSeconds: 60.0 -> 5.0",
        "plan.models[a] removed",
        "plan.models[b].band: Critical -> Standard",
        "plan.models[b].targets[x] added",
        "plan.models[c] added",
    ]


# --- the file between them


def snapshot_json(**changes):
    message = json_format.MessageToDict(planning.plan(pool(), []).snapshot)
    message["plan"].update(changes)
    return json.dumps(message)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("nonsense", "snapshot"),
        ("3", "snapshot"),
        ('{"plan": {"unknown": 1}}', "snapshot"),
        (snapshot_json(bands=[]), "bands"),
        (snapshot_json(saturation={"mode": "Magic"}), "plan.saturation.mode"),
        (snapshot_json(unmatched={"action": "Queue", "band": "Nowhere"}), "unmatched.band"),
        (snapshot_json(models=[{"name": "m", "band": "Nowhere"}]), "models[0].band"),
        (snapshot_json(noEndpointsTtlSeconds=0), "noEndpointsTtlSeconds"),
        (snapshot_json(noEndpointsTtlSeconds="NaN"), "noEndpointsTtlSeconds"),
        (snapshot_json(noEndpointsTtlSeconds="Infinity"), "noEndpointsTtlSeconds"),
    ],
)
def test_a_plan_that_cannot_be_applied_names_the_field(text, path):
    """The EPP does not trust what it reads."""
    with pytest.raises(core.PlanError) as error:
        plan_codec.parse_snapshot_json(text)

    assert any(found.endswith(path) for found, _ in error.value.problems)


@pytest.mark.parametrize(
    "address", ["", "host:80", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:99999", "::1:80", "[::1]"]
)
def test_an_address_is_ip_and_port(address):
    """Anything else would be Envoy's problem later."""
    message = json.loads(snapshot_json()) | {"endpoints": {"endpoints": [{"address": address}]}}

    with pytest.raises(core.PlanError, match="is not ip:port"):
        plan_codec.parse_snapshot_json(json.dumps(message))


def test_an_address_is_there_once():
    """Two endpoints with one address would share slots."""
    twice = {"endpoints": [{"address": "10.0.0.1:1"}] * 2}

    with pytest.raises(core.PlanError, match="twice"):
        plan_codec.parse_snapshot_json(
            json.dumps(json.loads(snapshot_json()) | {"endpoints": twice})
        )


@given(text=st.text(max_size=100))
def test_no_text_raises_anything_else(text):
    """A plan, or PlanError."""
    with pytest.raises(core.PlanError):
        plan_codec.parse_snapshot_json(text)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_header_names_an_objective_where_the_policy_trusts_callers(trusted):
    """By default it does not: who may send requests could put itself before the others."""
    spec = {"trustedHeaders": ["Objective"]} if trusted else {}

    planned = planning.plan(pool(), [policy(**spec), objective("urgent", 100)])

    plan, _ = plan_codec.parse_snapshot(planned.snapshot)
    assert plan.trust_objective_header is trusted
    assert plan.objectives == (core.ObjectivePlan("urgent", "Critical"),)


def test_series_are_told_apart_into_name_and_labels():
    """Quotes of either kind and their escapes; nothing is said of what the policy does not."""
    metrics = {"running": """a:b { x = "1\\"\\\\\\n}" , y='"=,' , }""", "waiting": "w{}"}
    (planned,) = [planning.plan(pool(), [policy(modelServerMetrics=metrics)])]

    plan, _ = plan_codec.parse_snapshot(planned.snapshot)

    assert plan.metrics == core.MetricsPlan(
        running=core.SeriesPlan(
            "a:b", (core.SeriesLabelPlan("x", '1"\\\n}'), core.SeriesLabelPlan("y", '"=,'))
        ),
        waiting=core.SeriesPlan("w"),
    )
    assert not planning.plan(pool(), [policy()]).snapshot.plan.HasField("metrics")


def _quoted(text: str) -> str:
    """A label's value as PromQL and as a page write it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


_LABEL_VALUES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=12
)


@given(
    st.dictionaries(
        st.from_regex("[a-zA-Z_][a-zA-Z0-9_]{0,5}", fullmatch=True), _LABEL_VALUES, max_size=4
    ),
    st.sampled_from(["{%s}", " { %s , } "]),
)
def test_a_series_finds_its_sample_whatever_its_labels(labels, form):
    """From the policy's text over the plan to a page on which only one label is different."""
    pairs = [f"{name}={_quoted(value)}" for name, value in labels.items()]
    text = "jobs" + (form.rstrip() % ", ".join(pairs) if pairs else "{}")
    page = f"jobs{{{','.join(reversed(pairs))}}} 7\n"
    for name in labels:
        others = [
            f"{other}={_quoted(value + 'x' * (other == name))}" for other, value in labels.items()
        ]
        page += f"jobs{{{','.join(others)}}} 100\n"
    given_policy = policy(modelServerMetrics={"running": text, "waiting": "jobs"})

    plan, _ = plan_codec.parse_snapshot(planning.plan(pool(), [given_policy]).snapshot)
    found = metricstext.parse_page(page.encode(), metricstext.engines(plan.metrics))

    assert found == metricstext.PageMetrics(7, 7 + 100 * len(labels), None)


@pytest.mark.parametrize(
    ("metrics", "path"),
    [
        ({"path": "metrics"}, "plan.metrics.path"),
        ({"port": 70000}, "plan.metrics.port"),
        ({"running": {"name": "a"}}, "plan.metrics"),
        ({"kvCacheUsage": {"name": "a"}}, "plan.metrics.kvCacheUsage"),
        ({"running": {"name": "a"}, "waiting": {"name": "a{"}}, "plan.metrics.waiting.name"),
        (
            {"running": {"name": "a", "labels": [{"name": "a b"}]}, "waiting": {"name": "a"}},
            "plan.metrics.running.labels[0].name",
        ),
    ],
)
def test_an_endpoint_picker_refuses_metrics_that_it_cannot_read(metrics, path):
    """Regardless of the leader that planned them."""
    snapshot = planning.plan(pool(), []).snapshot
    json_format.ParseDict(metrics, snapshot.plan.metrics)

    with pytest.raises(core.PlanError) as error:
        plan_codec.parse_snapshot(snapshot)

    assert [problem for problem, _ in error.value.problems] == [path]


def test_levels_of_fairness_and_bounds_reach_the_plan():
    """The outer level is the band's, and estimated tokens are a policy of their own there."""
    levels = [
        {"between": "Models", "policy": "WeightedFair", "weightedFair": {"cost": "Tokens"}},
        {"between": "Tenants", "policy": "TokenFair"},
    ]
    band = {
        "name": "Standard",
        "fairness": levels,
        "ordering": {"policy": "EarliestDeadline"},
        "queue": {"whenFull": "DisplaceLower"},
        "maxSaturationPercent": 90,
        "reservedPercent": 10,
    }

    planned = planning.plan(pool(), [policy(bands=[band])]).plan

    found = next(band for band in planned.bands if band.name == "Standard")
    assert (found.between, found.fairness) == ("Models", "WeightedFairTokens")
    assert found.inner == core.InnerPlan(core.FairnessName.TOKEN_FAIR)
    assert (found.ordering, found.when_full) == ("EarliestDeadline", "DisplaceLower")
    assert (found.max_saturation_percent, found.reserved_percent) == (90, 10)


def test_settings_of_models_and_tenants_reach_the_plan():
    """A model that is only weighted keeps the band of its InferenceModel."""
    spec = {
        "models": [{"name": "a", "weight": 3, "timeToFirstToken": "2s"}, {"name": "new"}],
        "tenants": {"header": "x-team", "weights": [{"name": "acme", "weight": 2}]},
        "trustedHeaders": ["Tenant", "Deadline"],
    }

    planned = planning.plan(pool(), [policy(**spec), model("a", criticality="Critical")]).plan

    assert planned.models == (
        core.ModelPlan("a", "Critical", (), 3, 2.0),
        core.ModelPlan("new", "Standard"),
    )
    assert (planned.tenant_header, planned.trust_deadline_headers) == ("x-team", True)
    assert planned.tenants == (core.TenantPlan("acme", 2),)
    assert planned.trust_objective_header is False


def test_the_header_of_tenants_counts_only_where_it_is_trusted():
    """Its name has a default."""
    trusted = planning.plan(pool(), [policy(trustedHeaders=["Tenant"])]).plan
    untrusted = planning.plan(pool(), [policy(tenants={"header": "x-team"})]).plan

    assert trusted.tenant_header == "x-llm-d-inference-fairness-id"
    assert untrusted.tenant_header == ""


def test_a_plan_that_is_held_leaves_pool_and_endpoints():
    """EPPs keep the plan they have and take the endpoints; the original is not touched."""
    planned = planning.plan(pool(), [pool(), policy()])

    held = planning.held(planned)

    assert (held.plan, held.snapshot.HasField("plan"), len(held.snapshot.sources)) == (
        None,
        False,
        0,
    )
    assert held.snapshot.pool_uid == planned.snapshot.pool_uid
    assert held.snapshot.endpoints == planned.snapshot.endpoints
    assert planned.snapshot.HasField("plan")


EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def reasons(planned):
    return {problem.name: problem.reason for problem in planned.problems}


def test_a_policy_with_the_label_is_the_plans_shadow():
    """Although it is older, it is not in force; both generations are named to EPPs."""
    shadow = policy("next", EARLY, shadow_of="p", limits={"maxRequests": 7})

    planned = planning.plan(pool(), [pool(), shadow, policy(created=LATE), model("m")])

    assert planned.problems == ()
    assert (planned.policy.metadata.name, planned.shadow.metadata.name) == ("p", "next")
    assert planned.plan.limits.max_requests == core.LimitsPlan().max_requests
    assert planned.plan.shadow.limits.max_requests == 7
    assert planned.plan.shadow.models == planned.plan.models
    assert [source.name for source in planned.snapshot.sources] == ["p", "next", "m"]


@pytest.mark.parametrize(
    ("others", "refused"),
    [
        pytest.param([policy("next", LATE, shadow_of="p")], {"next": "NotInForce"}, id="of none"),
        pytest.param(
            [policy(created=EARLY), policy("next", LATE, shadow_of="other")],
            {"next": "NotInForce"},
            id="of another",
        ),
        pytest.param(
            [policy(created=EARLY), policy("next", LATE, shadow_of="next")],
            {"next": "NotInForce"},
            id="of itself",
        ),
        pytest.param(
            [
                policy(created=EARLY),
                policy("first", EARLY, shadow_of="p"),
                policy("second", LATE, shadow_of="p"),
            ],
            {"second": "Conflicted"},
            id="two of one",
        ),
        pytest.param(
            [policy(mode="Observe"), policy("next", shadow_of="p")],
            {"next": "InForceObserves"},
            id="of one that observes",
        ),
        pytest.param(
            [policy(), policy("next", shadow_of="p", trustedHeaders=["Tenant"])],
            {"next": "HeadersDiffer"},
            id="trusts more",
        ),
        pytest.param(
            [
                policy(trustedHeaders=["Tenant"]),
                policy(
                    "next", shadow_of="p", trustedHeaders=["Tenant"], tenants={"header": "x-team"}
                ),
            ],
            {"next": "HeadersDiffer"},
            id="another header",
        ),
        pytest.param(
            [
                policy(),
                policy("next", shadow_of="p", targetRefs=[pool_ref("chat"), pool_ref("code")]),
            ],
            {},
            id="one pool more",
        ),
    ],
)
def test_a_policy_that_cannot_be_a_shadow_is_told_why(others, refused):
    """It has no effect, and the one in force is not touched."""
    planned = planning.plan(pool(), [pool(), *others])

    assert reasons(planned) == {f"default/{name}": reason for name, reason in refused.items()}
    assert (planned.plan.shadow is None) == ("next" in refused)
    assert "next" not in (planned.policy.metadata.name if planned.policy else "")


def test_a_shadow_of_another_pools_policy_is_told_at_its_own_pool():
    """Of the two pools that it is for, the policy that it names is in force at one."""
    shadow = policy("next", shadow_of="p", targetRefs=[pool_ref("chat"), pool_ref("code")])
    resources = [pool(), pool("code"), policy(), shadow]

    here, there = (planning.plan(each, resources) for each in resources[:2])

    assert (reasons(here), reasons(there)) == ({}, {"default/next": "NotInForce"})
    assert there.plan.shadow is None


def test_a_shadow_that_makes_the_plan_too_large_is_left_out(monkeypatch):
    """The policy in force is sent all the same, and the shadow is told."""
    alone = planning.plan(pool(), [pool(), policy()]).snapshot.plan.ByteSize()
    monkeypatch.setattr("forebay_operator.planning.planned.MAX_PLAN_BYTES", alone + 9)

    planned = planning.plan(pool(), [pool(), policy(), policy("next", shadow_of="p")])

    assert reasons(planned) == {"default/next": "TooLarge"}
    assert (planned.plan.shadow, planned.shadow, planned.unsent) == (None, None, None)
