"""What only a cluster's resources have: pods, Services, objectives, ages and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_reading import pool_ref

from forebay_control.plan import MAX_MODELS
from forebay_operator import planning
from forebay_operator.resources import BY_NAME, Metadata, read

X = "inference.networking.x-k8s.io/v1alpha2"
T1, T2 = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def made(api_version, kind, name, *, uid=None, created=T1, labels=None, deleted=None, **body):
    metadata = {
        "name": name,
        "namespace": "default",
        "uid": uid or f"{kind}-{name}-uid",
        "creationTimestamp": created,
        "deletionTimestamp": deleted,
        "labels": labels or {},
        "annotations": body.pop("annotations", {}),
    }
    manifest = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}
    return read(BY_NAME[api_version, kind], manifest)


def pool(*ports, service="epp", **more):
    spec = {
        "selector": {"matchLabels": {"app": "vllm"}},
        "targetPorts": [{"number": port} for port in ports or (8000,)],
        "endpointPickerRef": {"name": service, "port": {"number": 9002}},
    }
    spec |= more
    return made("inference.networking.k8s.io/v1", "InferencePool", "chat", spec=spec)


def old_pool(**more):
    spec = {"selector": {"app": "old"}, "targetPortNumber": 9, "extensionRef": {"name": "epp"}}
    return made(X, "InferencePool", "chat", spec=spec, **more)


def policy(name, *, generation=1, created=T1, deleted=None, **spec):
    found = made(
        *("forebay.dev/v1alpha1", "FlowControlPolicy", name),
        created=created,
        deleted=deleted,
        spec={"targetRefs": [pool_ref("chat")], **spec},
    )
    return found.model_copy(
        update={"metadata": found.metadata.model_copy(update={"generation": generation})}
    )


def model(name, model_name="llama", **more):
    return made(
        X,
        "InferenceModel",
        name,
        spec={"modelName": model_name, "poolRef": {"name": "chat"}},
        **more,
    )


def objective(name, priority, api_version=X, **more):
    spec = {"priority": priority, "poolRef": {"name": more.pop("pool", "chat")}}
    return made(api_version, "InferenceObjective", name, spec=spec, **more)


def pod(name, ip="10.0.0.1", *, app="vllm", ready=True, phase="Running", **more):
    ready = [{"type": "Ready", "status": str(ready)}]
    status = {"phase": phase, "podIP": ip, "conditions": ready}
    return made("v1", "Pod", name, labels={"app": app, "other": "x"}, status=status, **more)


def service(name="epp", **selector):
    return made("v1", "Service", name, spec={"selector": selector or {"app": "epp"}})


def endpoint_slice(name, *addresses):
    return made(
        *("discovery.k8s.io/v1", "EndpointSlice", name),
        labels={"forebay.dev/inference-pool": "chat"},
        endpoints=[{"addresses": [a], "targetRef": {"name": name}} for a in addresses],
        ports=[{"port": 8000}],
    )


def plan(*resources, of=None, unread=()):
    of = of or pool()
    return planning.plan(of, [of, *resources], unread)


def endpoints(planned):
    return {e.address: e.name for e in planned.snapshot.endpoints.endpoints}


# --- the order in which things become known


EVERYTHING = [
    pool(),
    old_pool(),
    policy("b"),
    policy("a"),
    model("m-b"),
    model("m-a"),
    objective("night", -5, uid="2"),
    objective("night", 5, "llm-d.ai/v1alpha2", uid="1"),
    pod("server-b", "10.0.0.1"),
    pod("server-a", "10.0.0.1"),
    endpoint_slice("slice-b", "10.0.0.1", "10.0.0.2", "nonsense"),
    endpoint_slice("slice-a", "10.0.0.2", "no address"),
    service(),
    pod("epp-b", app="epp"),
    pod("epp-a", app="epp"),
]


@given(order=st.permutations(EVERYTHING))
def test_the_order_of_arrival_does_not_matter(order):
    """Same plan, same endpoints, same problems in the same order; names decide between equals."""
    (of,) = planning.pools(order)
    planned = planning.plan(of, order)
    (expected,) = planning.pools(EVERYTHING)
    assert of == expected == pool()
    assert planned == planning.plan(expected, EVERYTHING)
    assert planned.policy == policy("a")
    assert planned.snapshot.plan.objectives[0].band == "Standard"  # that of uid 1
    assert endpoints(planned)["10.0.0.1:8000"] == "server-a"


def test_a_policy_that_is_being_deleted_has_lost():
    """A foreign finalizer does not keep it in force; the same for models and objectives."""
    going = [
        policy("a", deleted=T2, limits={"maxRequests": 1}),
        model("m-a", deleted=T2),
        objective("night", -5, deleted=T2),
    ]
    planned = plan(*going, policy("b"), model("m-b"))
    assert planned.policy.metadata.name == "b"
    assert [source.name for source in planned.snapshot.sources] == ["b", "m-b"]
    assert not planned.snapshot.plan.objectives
    assert planned.problems == ()


# --- models


def test_a_model_beyond_what_fits_says_so():
    """The youngest ones, each by its own name."""
    many = [model(f"m-{i:05}", f"llama-{i}") for i in range(MAX_MODELS)]
    late = model("late", "llama-late", created=T2)
    planned = plan(late, *many)
    assert {(p.kind, p.name, p.reason) for p in planned.problems} == {
        ("InferencePool", "default/chat", "TooManyModels"),
        ("InferenceModel", "default/late", "TooManyModels"),
    }


# --- objectives


@pytest.mark.parametrize(
    ("priority", "band"),
    [
        (2**31 - 1, "Critical"),
        (100, "Critical"),
        (99, "Standard"),
        (0, "Standard"),
        (-1, "Sheddable"),
        (-100, "Sheddable"),
        (-101, "Sheddable"),
    ],
)
def test_an_objective_joins_the_nearest_band_at_or_below_it(priority, band):
    """Below the lowest there is none, so it joins that."""
    planned = plan(objective("o", priority), objective("elsewhere", 0, pool="other"))
    assert [(o.name, o.band) for o in planned.snapshot.plan.objectives] == [("o", band)]


def test_of_two_objectives_with_a_name_the_oldest_counts():
    """The groups llm-d.ai and x-k8s.io may both have one."""
    planned = plan(objective("o", 100, created=T2), objective("o", -100, "llm-d.ai/v1alpha2"))
    assert [o.band for o in planned.snapshot.plan.objectives] == ["Sheddable"]


# --- pods


def test_ready_pods_of_the_selector_are_endpoints():
    """Not those that are not ready, about to go, of another label or without an address."""
    planned = plan(
        pod("a", "10.0.0.1"),
        pod("not-ready", "10.0.0.2", ready=False),
        pod("going", "10.0.0.3", deleted=T2),
        pod("other", "10.0.0.4", app="other"),
        pod("no-ip", ""),
        pod("six", "fd00::1"),
    )
    assert endpoints(planned) == {"10.0.0.1:8000": "a", "[fd00::1]:8000": "six"}


def test_a_pod_serves_on_each_port_or_those_it_names():
    """A rank per port; the annotation leaves only some of them."""
    planned = plan(
        pod("a", "10.0.0.1"),
        pod("b", "10.0.0.2", annotations={"llm-d.ai/active-ports": "8001, 9999"}),
        of=pool(8000, 8001),
    )
    assert endpoints(planned) == {
        "10.0.0.1:8000": "a-rank-0",
        "10.0.0.1:8001": "a-rank-1",
        "10.0.0.2:8001": "b-rank-1",
    }


def test_pickers_are_the_running_pods_behind_the_service():
    """Ready or not, since unready ones wait for their program; none that are about to go."""
    pods = [
        pod("a", app="epp"),
        pod("unready", app="epp", ready=False),
        pod("pending", app="epp", phase="Pending"),
        pod("going", app="epp", deleted=T2),
        pod("server"),
    ]
    expected = {"Pod-a-uid": "a", "Pod-unready-uid": "unready"}
    assert plan(service(), *pods).epps == expected
    assert plan(service(), *pods, of=old_pool()).epps == expected
    assert plan(service("other"), *pods).epps == {}
    assert plan(*pods).epps == {}
    no_service = pool(endpointPickerRef={"kind": "Deployment", "name": "epp"})
    assert plan(service(), *pods, of=no_service).epps == {}


def test_a_service_without_selector_selects_nobody():
    """Every label set would match none of the labels."""
    empty = made("v1", "Service", "epp", spec={})
    assert plan(empty, pod("a", app="epp")).epps == {}


# --- plans that are held


def unread(name, created=T1):
    return [Metadata.model_validate({"name": name, "uid": name, "creationTimestamp": created})]


def test_a_plan_is_held_for_a_policy_that_would_count():
    """Endpoints go on; no source is named, so that nothing is taken for programmed."""
    planned = plan(policy("young", created=T2), model("m"), pod("a"), unread=unread("old"))
    assert planned.held_by == "old"
    assert not planned.snapshot.HasField("plan")
    assert not planned.snapshot.sources
    assert endpoints(planned) == {"10.0.0.1:8000": "a"}


def test_a_younger_invalid_policy_holds_nothing():
    """It would be Conflicted if it were valid."""
    planned = plan(policy("old"), unread=unread("young", T2))
    assert planned.held_by == ""
    assert planned.snapshot.HasField("plan")
    assert planned.policy.metadata.name == "old"
