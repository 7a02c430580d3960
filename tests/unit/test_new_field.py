"""A new field costs a line in the resource, in the Plan and in the proto, and none elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# (file, the text after which it is added, what): a number of a band, and an object with one.
ADDED = [
    (
        "operator/forebay_operator/resources/policy.py",
        "    ttl: Seconds = BAND.ttl_seconds\n",
        "    patience: Seconds = BAND.patience_seconds\n",
    ),
    (
        "operator/forebay_operator/resources/policy.py",
        "class PolicySpec(Own):\n",
        "    burst: Burst | None = None\n",
    ),
    (
        "operator/forebay_operator/resources/policy.py",
        "BAND = DEFAULT_BANDS[0]\n",
        "class Burst(Own):\n    size: Count | None = None\n",
    ),
    (
        "epp/forebay_control/plan.py",
        "    ordering: OrderingName = OrderingName.FCFS\n",
        "    patience_seconds: Seconds = 7.0\n",
    ),
    (
        "epp/forebay_control/plan.py",
        "    metrics: MetricsPlan | None = None\n",
        "    burst: BurstPlan | None = None\n",
    ),
    (
        "epp/forebay_control/plan.py",
        "Seconds = Annotated[float, Range(0, MAX_SECONDS, above=True)]\n",
        "@dataclass(frozen=True)\nclass BurstPlan:\n    size: Count = 3\n",
    ),
    (
        "epp/forebay_control/v1/control.proto",
        "message Band {\n",
        "  double patience_seconds = 100;\n",
    ),
    ("epp/forebay_control/v1/control.proto", "message Plan {\n", "  Burst burst = 100;\n"),
    (
        "epp/forebay_control/v1/control.proto",
        "package forebay.control.v1;\n",
        "message Burst { uint32 size = 1; }\n",
    ),
]
PROGRAM = """
import json, sys
from pathlib import Path

from forebay_control.mapping import plan_from_message
from forebay_control.plan import PlanError
from forebay_control.v1 import control_pb2 as pb
from forebay_operator import planning
from forebay_operator.standalone import sources

for path in sys.argv[1:]:
    manifests = sources.read(Path(path))
    (pool,) = planning.pools(manifests.resources)
    data = planning.plan(pool, manifests.resources).snapshot.SerializeToString()
    message = pb.Snapshot.FromString(data).plan
    plan = plan_from_message(message)
    message.bands[0].patience_seconds = -1
    try:
        plan_from_message(message)
    except PlanError as error:
        refused = str(error)
    patience = {band.name: band.patience_seconds for band in plan.bands}
    print(json.dumps([manifests.errors, patience, plan.burst and plan.burst.size, refused]))
"""
POOL = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: chat}
spec: {selector: {matchLabels: {app: a}}, targetPorts: [{number: 8000}]}
---
apiVersion: forebay.dev/v1alpha1
kind: FlowControlPolicy
metadata: {name: p}
spec:
  targetRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: chat}]
"""
GIVEN = "  bands: [{name: Standard, queue: {patience: 90s}}]\n  burst: {%s}\n"
REFUSED = "plan.bands[0].patienceSeconds: must be above 0 and at most 3600, is -1.0"


@pytest.fixture
def source(tmp_path):
    """The source with two more fields, and the messages made from its proto."""
    for package in ("epp/forebay_control", "operator/forebay_operator"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for path, after, line in ADDED:
        text = (tmp_path / path).read_text()
        assert text.count(after) == 1, (path, after)
        (tmp_path / path).write_text(text.replace(after, after + line))
    proto = "forebay_control/v1/control.proto"
    protoc = [sys.executable, "-P", "-m", "grpc_tools.protoc", "-I.", "--python_out=."]
    subprocess.run([*protoc, proto], cwd=tmp_path / "epp", check=True)
    return tmp_path


def test_a_field_goes_from_yaml_to_the_plan_of_an_epp(source):
    """With its default, its unit and its bounds; and so does an object that may be unset."""
    paths = []
    for number, spec in enumerate(["", GIVEN % "", GIVEN % "size: 5"]):
        paths.append(source / f"{number}.yaml")
        paths[-1].write_text(POOL + spec)

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths],
        env=os.environ | {"PYTHONPATH": f"{source / 'epp'}:{source / 'operator'}"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert [json.loads(line) for line in ran.stdout.splitlines()] == [
        [[], {"Critical": 7, "Standard": 7, "Sheddable": 7}, None, REFUSED],
        [[], {"Critical": 7, "Standard": 90, "Sheddable": 7}, 3, REFUSED],
        [[], {"Critical": 7, "Standard": 90, "Sheddable": 7}, 5, REFUSED],
    ]
