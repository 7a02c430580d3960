"""The CRDs: what every field in them has, and that they are the ones in crds/."""

from __future__ import annotations

from pathlib import Path

import yaml

from forebay_operator.resources import crdschema

CRDS = Path(__file__).parents[2] / "crds"
DEFINITIONS = {name: yaml.safe_load(text) for name, text in crdschema.files().items()}
KEYS = {
    *("type", "description", "default", "enum", "pattern", "format", "anyOf"),
    *("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "required"),
    *("properties", "items", "additionalProperties"),
    *("x-kubernetes-int-or-string", "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


def nodes(schema: dict, path: str = ""):
    """Every part of a schema with its path; entries of lists and maps end with []."""
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        if (path, name) != ("", "metadata"):  # the API server's
            yield from nodes(part, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


NODES = {
    f"{name}{path}": node
    for name, definition in DEFINITIONS.items()
    for path, node in nodes(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
}


def test_the_files_in_crds_are_these():
    """What is committed is what the models say; hack/generate writes it."""
    assert {path.name: path.read_text() for path in CRDS.glob("*.yaml")} == crdschema.files()


def test_every_field_is_described():
    """`kubectl explain` has something to say, in a sentence."""
    mute = [
        path
        for path, node in NODES.items()
        if not node.get("description", "").endswith(".")
        and ("properties" in node or not path.endswith("[]"))
    ]

    assert len(NODES) > 200
    assert mute == []


def test_everything_is_bounded():
    """No field can fill etcd, and the API server knows the maximum cost of a rule."""
    assert [path for path, node in NODES.items() if not bounded(path, node)] == []


def bounded(path: str, node: dict) -> bool:
    match node.get("type"):
        case "string":
            # apiVersion and kind are the API server's to check.
            ends = {"maxLength", "enum", "format"}
            return bool(ends & node.keys()) or path.endswith((".yaml.apiVersion", ".yaml.kind"))
        case "array":
            return "maxItems" in node
        case "object":
            return "properties" in node or "maxProperties" in node
        case "integer" | "number":
            return "minimum" in node
        case "boolean":
            return True
        case None:
            return node["x-kubernetes-int-or-string"] and "maxLength" in node
    return False


def test_only_what_openapi_has_is_said():
    """Another key would be dropped or refused by the API server, with what it was to hold."""
    assert {key for node in NODES.values() for key in node} <= KEYS


def test_every_list_says_how_it_is_merged():
    """By keys or as a whole: with server-side apply several writers own parts of it."""
    lists = [node for node in NODES.values() if node.get("type") == "array"]

    assert {node.get("x-kubernetes-list-type") for node in lists} == {"map", "atomic", "set"}


def test_the_api_server_writes_no_defaults_into_policies():
    """What is unset stays unset in the cluster, so that a later default holds for it."""
    ours = [node for path, node in NODES.items() if path.startswith("forebay.dev_")]

    assert len(ours) > 50
    assert [node for node in ours if "default" in node] == []


def test_a_policy_is_found_by_its_short_name_and_as_a_policy_of_the_gateway_api():
    """What tools look for."""
    definition = DEFINITIONS["forebay.dev_flowcontrolpolicies.yaml"]

    assert definition["spec"]["names"]["shortNames"] == ["fcp"]
    assert definition["spec"]["names"]["categories"] == ["forebay"]
    assert definition["metadata"]["labels"] == {"gateway.networking.k8s.io/policy": "Direct"}
