"""What NetworkPolicies allow, worked out from the objects: no network plugin here enforces them.

As far as the chart's go: pod and namespace selectors by labels, ports by number or name. Addresses
(ipBlock) and expressions are not judged. Source: the API reference of networking.k8s.io/v1.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pod:
    """A pod as far as policies see it; `ports` are the named ones."""

    namespace: str
    labels: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)


def pod_of(found: list[dict], name: str) -> Pod:
    """A pod of the Deployment of this name."""
    (deployment,) = (
        each for each in found if (each["kind"], each["metadata"]["name"]) == ("Deployment", name)
    )
    template = deployment["spec"]["template"]
    ports = {
        port["name"]: port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }
    return Pod(deployment["metadata"]["namespace"], template["metadata"]["labels"], ports)


def allowed(found: list[dict], source: Pod, target: Pod, port: int | str) -> bool:
    """Whether one pod may open a connection to a port of another."""
    policies = [each for each in found if each["kind"] == "NetworkPolicy"]
    number = target.ports[port] if isinstance(port, str) else port

    def side(subject: Pod, peer: Pod, kind: str, peers: str) -> bool:
        mine = [
            policy["spec"]
            for policy in policies
            if policy["metadata"]["namespace"] == subject.namespace
            and kind in policy["spec"]["policyTypes"]
            and _selects(policy["spec"]["podSelector"], subject.labels)
        ]
        rules = [rule for spec in mine for rule in spec.get(kind.lower()) or ()]
        return not mine or any(
            _port(rule, target, number)
            # Without peers, or with none of them, a rule is for all.
            and (
                not rule.get(peers)
                or any(_peer(each, peer, subject.namespace) for each in rule[peers])
            )
            for rule in rules
        )

    return side(target, source, "Ingress", "from") and side(source, target, "Egress", "to")


def _port(rule: dict, target: Pod, number: int) -> bool:
    wanted = [each["port"] for each in rule.get("ports", ()) if each.get("protocol") != "UDP"]
    return not rule.get("ports") or number in (target.ports.get(port, port) for port in wanted)


def _peer(peer: dict, pod: Pod, home: str) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        there = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
    else:
        there = pod.namespace == home
    return there and _selects(peer.get("podSelector", {}), pod.labels)


def _selects(selector: dict, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()
