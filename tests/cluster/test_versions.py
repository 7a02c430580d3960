"""How the FlowControlPolicy's schema changes, on a real API server: crds/VERSIONING.md.

The CRD is tried as a copy in a group of its own, so that no other test sees it change.
"""

from __future__ import annotations

import copy
import json

import pytest
import yaml
from api_server import MERGE
from control_plane import policy
from ext_proc_peer import until

from forebay_operator.resources import POLICY, ResourceError, crdschema, read

GROUP = "versions.forebay.test"
CRD = f"{POLICY.plural}.{GROUP}"
SECONDS = 30
CRDS_PATH = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD}"


class Definition:
    """The copy of the CRD."""

    def __init__(self, cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self.crd = yaml.safe_load(crdschema.files()[f"{POLICY.group}_{POLICY.plural}.yaml"])
        self.crd["metadata"] = {"name": CRD}
        self.crd["spec"]["group"] = GROUP
        del self.crd["spec"]["names"]["shortNames"]

    @property
    def versions(self) -> list[dict]:
        return self.crd["spec"]["versions"]

    def apply(self) -> None:
        self._cluster.apply(json.dumps(self.crd), "--force-conflicts")
        self._cluster.wait_established(CRD)

    def refused(self, *, without: dict) -> str:
        """Why the CRD cannot lack a version."""
        spec = self.crd["spec"] | {"versions": [v for v in self.versions if v is not without]}
        text = json.dumps(self.crd | {"spec": spec})
        done = self._cluster.kubectl("apply", "--server-side", "-f", "-", input=text, check=False)
        assert done.returncode != 0
        return done.stderr

    def ask(self, method: str, version: str, body: dict | None = None, part: str = "", **content):
        """Make a request about the object `p`, or about all for POST."""
        name = "" if method == "POST" else f"/p{part}"
        path = f"/apis/{GROUP}/{version}/namespaces/{self._namespace}/{POLICY.plural}{name}"
        return self._cluster.ask(method, path, body, **content)

    def serves(self, version: str) -> bool:
        done = self._cluster.kubectl("get", "--raw", f"/apis/{GROUP}/{version}", check=False)
        return done.returncode == 0

    @property
    def stored(self) -> list[str]:
        return self._cluster.get("crd", CRD)["status"]["storedVersions"]

    def store_only(self, version: str) -> None:
        body = {"status": {"storedVersions": [version]}}
        status, answer = self._cluster.ask("PATCH", f"{CRDS_PATH}/status", body, MERGE)
        assert status == 200, answer


@pytest.fixture
def definition(cluster, namespace):
    yield Definition(cluster, namespace)
    cluster.kubectl("delete", "crd", CRD, "--ignore-not-found")


def made(version: str, **spec) -> dict:
    return policy("p", "chat", **spec) | {"apiVersion": f"{GROUP}/{version}"}


def test_a_version_takes_over_without_a_webhook(definition):
    """A field more is all that is new: what is stored is read as both, rewritten, and let go."""
    definition.apply()
    status, old = definition.ask("POST", "v1alpha1", made("v1alpha1", limits={"maxRequests": 7}))
    assert status == 201, old

    (alpha,) = definition.versions
    beta = copy.deepcopy(alpha) | {"name": "v1beta1"}
    spec = beta["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    spec["burst"] = {"type": "integer", "minimum": 0, "description": "New."}
    alpha["storage"] = False
    definition.versions.append(beta)
    definition.crd["spec"]["conversion"] = {"strategy": "None"}
    definition.apply()

    status, found = definition.ask("GET", "v1beta1")
    assert (status, found["apiVersion"]) == (200, f"{GROUP}/v1beta1")
    assert found["spec"] == old["spec"]
    assert definition.stored == ["v1alpha1", "v1beta1"]

    found["spec"]["burst"] = 3
    assert definition.ask("PUT", "v1beta1", found)[0] == 200
    # A reader of the earlier version does not see the field.
    assert "burst" not in definition.ask("GET", "v1alpha1")[1]["spec"]
    assert "storedVersions" in definition.refused(without=alpha)
    definition.store_only("v1beta1")
    definition.versions.remove(alpha)
    definition.apply()

    until(lambda: not definition.serves("v1alpha1"), SECONDS)
    status, found = definition.ask("GET", "v1beta1")
    assert (status, found["spec"]) == (200, old["spec"] | {"burst": 3})
    assert definition.stored == ["v1beta1"]


def test_a_policy_stored_in_an_earlier_shape_is_served_and_gets_a_status(definition):
    """Without the fields that the schema does not know: the operator reads an invalid policy."""
    (version,) = definition.versions
    parts = version["schema"]["openAPIV3Schema"]["properties"]
    spec = parts["spec"]
    parts["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definition.apply()
    old = made(
        "v1alpha1",
        bands=[{"criticality": "Critical", "fairness": {"policy": "RoundRobin"}}],
        models=[{"name": "a", "criticality": "Critical"}],
        saturation={"mode": "Concurrency", "maxConcurrency": 8},
        trust={"objectiveHeader": True},
    )
    assert definition.ask("POST", "v1alpha1", old)[0] == 201
    parts["spec"] = spec
    definition.apply()
    until(lambda: "trust" not in definition.ask("GET", "v1alpha1")[1]["spec"], SECONDS)

    status, found = definition.ask("GET", "v1alpha1")
    assert status == 200, found
    with pytest.raises(ResourceError) as error:
        read(POLICY, found)
    assert [path for path, _ in error.value.problems] == [
        "spec.bands[0].name",
        "spec.bands[0].fairness",
        "spec.saturation.type",
    ]

    condition = {
        "type": "Accepted",
        "status": "False",
        "reason": "Invalid",
        "message": str(error.value),
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    body = {"status": {"conditions": [condition]}}
    status, found = definition.ask("PATCH", "v1alpha1", body, "/status", content=MERGE)
    assert status == 200, found["message"]
    assert found["status"]["conditions"] == [condition]

    new = made("v1alpha1", limits={"maxRequests": 7})
    new["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
    status, found = definition.ask("PUT", "v1alpha1", new)
    assert status == 200, found["message"]
    assert found["spec"] == new["spec"]
