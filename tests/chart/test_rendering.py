"""What the chart renders, without a cluster.

golden/*.yaml is what `helm template` makes of values/*.yaml, without CRDs and the dashboard, which
other tests look at. `FOREBAY_REWRITE=1` rewrites the files: read the difference before you
believe it.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import chart
import pytest
import yaml

from forebay_epp import settings as epp
from forebay_operator import settings as operator
from forebay_operator.resources import POOL_LABEL

FOLDER = Path(__file__).parent
VALUES = sorted((FOLDER / "values").glob("*.yaml"))
SETS = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
BARE = ("--set=crds.install=false", "--set=monitoring.dashboard.enabled=false")


@pytest.mark.parametrize("values", [None, *VALUES], ids=lambda path: path.stem if path else "none")
def test_helm_finds_nothing_wrong(values):
    """Nor anything to warn of."""
    flags = [f"--values={values}"] if values else []

    said = chart.helm("lint", "--strict", str(chart.CHART), *flags).stdout

    assert "[WARNING]" not in said


@SETS
def test_what_is_rendered_is_what_was_read(values):
    """A change of the chart shows as a change of golden/."""
    golden = FOLDER / "golden" / values.name
    rendered = chart.render(f"--values={values}", *BARE).stdout
    if os.environ.get("FOREBAY_REWRITE"):
        golden.write_text(rendered)

    assert rendered == golden.read_text()


@SETS
def test_programs_understand_their_flags(values):
    """Names and values of flags, of those that the chart sets and of those that users add."""
    parsers = {"operator": operator.parse, "epp": epp.parse}
    parsed = 0
    for each in chart.objects(f"--values={values}"):
        if each["kind"] == "Deployment":
            found = chart.container(each)
            if found["name"] in parsers:
                parsers[found["name"]](found["args"])
                parsed += 1
    assert parsed >= 2


@SETS
def test_every_object_says_what_it_is(values):
    """The labels that Kubernetes recommends; our own CRD is not part of a release."""
    for each in chart.objects(f"--values={values}", "--set=crds.install=false"):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == chart.RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/version"] == "0.1.0"
        assert labels.keys() >= {"app.kubernetes.io/name", "app.kubernetes.io/component"}


def test_the_versions_are_the_project_s():
    """Image tags come from the chart's appVersion."""
    project = tomllib.loads((chart.ROOT / "pyproject.toml").read_text())["project"]["version"]
    charts = [chart.CHART, chart.CHART / "charts" / "inference-crds"]
    found = [yaml.safe_load((each / "Chart.yaml").read_text()) for each in charts]

    assert {(each["version"], each["appVersion"]) for each in found} == {(project, project)}


# --- CRDs


def test_our_kind_comes_with_the_release_and_stays_after_it():
    """The very CRD of crds/, except for the annotation by which helm keeps it."""
    source = yaml.safe_load(
        (chart.ROOT / "crds" / "forebay.dev_flowcontrolpolicies.yaml").read_text()
    )

    found = chart.one(chart.objects(), "CustomResourceDefinition", source["metadata"]["name"])

    assert found["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert found == source


def test_kinds_of_others_come_only_if_asked_for():
    """As files of crds/, which helm installs where they are missing and never touches again."""
    before = chart.objects("--include-crds")
    asked = chart.objects("--include-crds", "--set=crds.inference=true")

    new = [each["metadata"]["name"] for each in asked if each not in before]
    assert sorted(new) == [
        "inferencemodels.inference.networking.x-k8s.io",
        "inferenceobjectives.inference.networking.x-k8s.io",
        "inferencepools.inference.networking.k8s.io",
        "inferencepools.inference.networking.x-k8s.io",
    ]


# --- images


def test_a_digest_wins_over_a_tag():
    """Of each image by itself; without either the tag is the chart's appVersion."""
    digest = f"sha256:{'ab' * 32}"
    found = chart.objects(
        f"--values={FOLDER / 'values' / 'standalone.yaml'}",
        f"--set=epp.image.digest={digest},epp.image.tag=edge,standalone.proxy.image.digest={digest}",
    )

    images = {
        each["metadata"]["name"]: chart.container(each)["image"]
        for each in found
        if each["kind"] == "Deployment"
    }
    assert images == {
        "forebay-operator": "docker.io/forebay/operator:0.1.0",
        "chat-epp": f"docker.io/forebay/epp@{digest}",
        "chat-envoy": f"docker.io/envoyproxy/envoy@{digest}",
    }


# --- names


def test_a_release_of_another_name_says_so_in_names_and_flags():
    """All of them follow: what EPPs dial is what the certificate says."""
    found = chart.objects(
        f"--values={FOLDER / 'values' / 'pool.yaml'}", release="prod", namespace="other"
    )

    epp = chart.container(chart.one(found, "Deployment", "chat-epp"))["args"]
    server = chart.container(chart.one(found, "Deployment", "prod-forebay-operator"))["args"]
    service = chart.one(found, "Service", "prod-forebay-operator")
    name = f"{service['metadata']['name']}.other.svc"
    assert f"--control-address={name}:8443" in epp
    assert f"--control-server-name={name}" in server
    assert "--lease-name=prod-forebay-operator" in server


def test_services_are_not_taken_for_model_servers():
    """A Service's labels get onto its EndpointSlices, and one of ours there names servers."""
    for each in chart.objects(f"--values={FOLDER / 'values' / 'standalone.yaml'}"):
        assert POOL_LABEL not in each["metadata"].get("labels", {})


@SETS
def test_notes_name_deployments_that_there_are(values):
    """Each of them, in the commands to see that it runs."""
    options = (f"--values={values}", f"--namespace={chart.NAMESPACE}", "--dry-run=client")
    said = chart.helm("install", chart.RELEASE, str(chart.CHART), *options).stdout
    notes = said.partition("NOTES:")[2]

    named = re.findall(r"-n (\S+) rollout status deployment/(\S+)", notes)

    made = [each for each in chart.objects(f"--values={values}") if each["kind"] == "Deployment"]
    metadata = [each["metadata"] for each in made]
    assert sorted(named) == sorted((each["namespace"], each["name"]) for each in metadata)


@pytest.mark.parametrize(
    ("values", "file"), [("pool", "cluster-wide"), ("namespaced", "namespaced")]
)
def test_the_operator_s_roles_are_those_of_its_own_folder(values, file):
    """And the rights to its certificates, which they do not know."""

    def rules(items: list[dict]) -> list[str]:
        roles = [
            each
            for each in items
            if each["kind"] in ("Role", "ClusterRole")
            and not any("aggregate" in label for label in each["metadata"].get("labels", {}))
        ]
        every = [rule for role in roles for rule in role["rules"]]
        kept = [rule for rule in every if rule["resources"][0] not in ("secrets", "configmaps")]
        return sorted(json.dumps(rule, sort_keys=True) for rule in kept)

    source = chart.ROOT / "operator" / "rbac" / f"{file}.yaml"

    rendered = rules(
        chart.objects(
            f"--values={FOLDER / 'values' / f'{values}.yaml'}", "--set=operator.endpointSlices=true"
        )
    )

    assert rendered == rules(list(yaml.safe_load_all(source.read_text())))


# --- what is refused


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("epp.replica=2", "'replica'"),
        ("epp.replicas=two", "/epp/replicas"),
        ("epp.image.tga=1", "'tga'"),
        ("epp.image.digest=sha256:abc", "/epp/image/digest"),
        ("epp.extProcPort=0", "/epp/extProcPort"),
        ("epp.flags.max-streams={1}", "/epp/flags/max-streams"),
        ("epp.flags.--verbosity=1", "--verbosity"),
        ("pools[0].nam=x", "'nam'"),
        ("pools[0].name=Not_A_Name", "/pools/0/name"),
        ("pools[0].namespace=", "/pools/0/namespace"),
        ("pools[0].epp.pools=x", "'pools'"),
        ("pools[0].targetPorts[0].number=70000", "/pools/0/targetPorts/0/number"),
        ("pools[0].failureMode=Open", "/pools/0/failureMode"),
        ("crds.inferencepool=true", "'inferencepool'"),
        ("crds.install=maybe", "/crds/install"),
        ("controlTls.mode=none", "/controlTls/mode"),
        ("controlTls.certManager.issuer=x", "'issuer'"),
        ("operator.watchNamespaces=x", "/operator/watchNamespaces"),
        ("operator.resource.limits=x", "'resource'"),
        ("standalone.proxy.port=1", "'port'"),
        ("standalone.proxy.serviceType=x", "/standalone/proxy/serviceType"),
        ("networkPolicy.apiServerPorts[0]=https", "/networkPolicy/apiServerPorts/0"),
        ("monitoring.interval=15", "/monitoring/interval"),
        ("provider.name=aws", "/provider/name"),
        ("runAsUser=0", "/runAsUser"),
        ("replicas=2", "'replicas'"),
    ],
)
def test_a_wrong_value_is_named(option, named):
    """Helm says which key it is, before it asks a cluster anything."""
    refused = chart.render(
        f"--values={FOLDER / 'values' / 'pool.yaml'}", f"--set={option}", check=False
    )

    assert refused.returncode != 0
    assert named in refused.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["controlTls.mode=certManager"], "controlTls.certManager.issuerRef"),
        (["controlTls.mode=secret"], "controlTls.secretName"),
        (["operator.watchNamespaces={a,b}"], "operator.watchNamespaces: add forebay-system"),
        (["pools[1].name=chat"], "pools[1].name"),
        (["pools[0].create=true"], "pools[0].modelServers.matchLabels"),
        (["networkPolicy.clients=null"], "networkPolicy.clients: name the pods of your gateway"),
        (
            ["controlTls.mode=secret", "controlTls.secretName=s", "pools[0].namespace=serving"],
            "controlTls.caConfigMap",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_do_not_go_together_are_explained(options, named):
    """What the schema cannot say."""
    refused = chart.render(
        f"--values={FOLDER / 'values' / 'pool.yaml'}",
        *(f"--set={option}" for option in options),
        check=False,
    )

    assert refused.returncode != 0
    assert named in refused.stderr


def test_a_pool_of_that_name_may_be_in_each_namespace():
    """Only both together are one pool."""
    values = f"--values={FOLDER / 'values' / 'pool.yaml'}"

    found = chart.objects(values, "--set=pools[1].name=chat", "--set=pools[1].namespace=serving")

    places = [
        each["metadata"]["namespace"]
        for each in found
        if (each["kind"], each["metadata"]["name"]) == ("Deployment", "chat-epp")
    ]
    assert sorted(places) == ["forebay-system", "serving"]
    server = chart.container(chart.one(found, "Deployment", "forebay-operator"))["args"]
    assert [flag for flag in server if "configmap" in flag] == [
        "--control-ca-configmap=forebay-system/forebay-control-ca",
        "--control-ca-configmap=serving/forebay-control-ca",
    ]


# --- documentation


def test_the_readme_s_first_install_is_the_standalone_one():
    """What it has people type is what is tested as values/standalone.yaml."""
    readme = (chart.CHART / "README.md").read_text()
    typed = re.search(r"<<END\n(.*?)^END$", readme, re.DOTALL | re.MULTILINE)

    tested = yaml.safe_load((FOLDER / "values" / "standalone.yaml").read_text())
    assert yaml.safe_load(typed[1]) == tested


def schema_paths(node: dict, root: dict, path: str = "") -> list[str]:
    """Paths of properties that the schema knows, with what is said of them."""
    node = root["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    node = node.get("items", node)
    if "properties" not in node:
        return [path]
    return [
        found
        for key, part in node["properties"].items()
        for found in schema_paths(part, root, f"{path}.{key}" if path else key)
    ]


def test_every_value_is_explained():
    """The README has a row for it or for what it is part of, and for nothing else."""
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    known = {
        path
        for path in schema_paths(schema, schema)
        if path not in {"global", "inference-crds"} and not path.startswith("pools.epp.")
    } | {"pools.epp"}
    readme = (chart.CHART / "README.md").read_text().partition("## Values")[2]
    rows = set(re.findall(r"^\| `([a-zA-Z.*]+)` \|", readme, re.MULTILINE))

    def rows_of(path: str) -> set[str]:
        parent, _, name = path.rpartition(".")
        every = {f"*.{name}"} if parent in {"operator", "epp", "standalone.proxy"} else set()
        return {path, parent, *every} & rows

    assert [path for path in sorted(known) if not rows_of(path)] == []
    assert rows == {row for path in known for row in rows_of(path)}


def test_the_dashboard_shows_metrics_that_exist():
    """Names that the operator's and the EPPs' pages have."""
    dashboard = json.loads((chart.CHART / "files" / "dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"\b(?:forebay|process)_\w+", target["expr"])
    } - {"forebay_dev_pool"}
    source = "".join(
        (chart.ROOT / path).read_text()
        for path in (
            "epp/forebay_epp/adapters/prometheus.py",
            "operator/forebay_operator/metrics.py",
        )
    )
    named = set(re.findall(r'"(forebay_\w+)"', source))
    named |= {"process_resident_memory_bytes", "process_cpu_seconds"}

    assert len(asked) > 20
    bases = {re.sub(r"_(total|bucket)$", "", name) for name in asked}
    assert bases <= named
