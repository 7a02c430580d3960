"""From the models in resources/ to CustomResourceDefinitions. Pure.

The schemas are structural: no references, a type everywhere. Unknown fields are pruned, and refused
where the client asks for strict validation, as kubectl does. Fields, their
meaning and their rules do not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic.json_schema import GenerateJsonSchema

from forebay_operator import resources

if TYPE_CHECKING:
    from pydantic_core import core_schema

    from forebay_operator.resources import Kind

HEADER = "# Made by hack/generate from operator/forebay_operator/resources.\n"
# A title repeats the name; strict validation is up to the client.
_LEFT_OUT = ("title", "$defs", "additionalProperties")
_API_VERSION = "The version of the schema this object follows."
_KIND = "The kind of this object."


@dataclass(frozen=True, slots=True)
class _Names:
    """A kind's definition besides its schema; columns are (name, type, path)."""

    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    columns: tuple[tuple[str, str, str], ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def _condition(kind: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].status'


_VERDICTS = tuple((kind, "string", _condition(kind)) for kind in ("Accepted", "Programmed"))
_AGE = ("Age", "date", ".metadata.creationTimestamp")
_POOL = ("Inference Pool", "string", ".spec.poolRef.name")
_OBJECTIVE = _Names(columns=(_POOL, ("Priority", "string", ".spec.priority"), _AGE))
_NAMES = {
    ("forebay.dev/v1alpha1", "FlowControlPolicy"): _Names(
        short=("fcp",),
        categories=("forebay",),
        columns=(
            ("Pools", "string", ".status.poolNames"),
            ("Mode", "string", ".status.pools[0].mode"),
            *_VERDICTS,
            ("Reason", "string", '.status.conditions[?(@.type=="Programmed")].reason'),
            ("EPPs", "string", ".status.endpointPickers.ready"),
            ("Queued", "integer", ".status.queued"),
            ("Saturation", "string", ".status.saturation"),
            _AGE,
        ),
        labels={"gateway.networking.k8s.io/policy": "Direct"},
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _Names(
        short=("infpool",),
        annotations={
            "api-approved.kubernetes.io": (
                "https://github.com/kubernetes-sigs/gateway-api-inference-extension/pull/1173"
            )
        },
    ),
    ("inference.networking.x-k8s.io/v1alpha2", "InferencePool"): _Names(short=("xinfpool",)),
    ("inference.networking.x-k8s.io/v1alpha2", "InferenceModel"): _Names(
        columns=(
            ("Model Name", "string", ".spec.modelName"),
            _POOL,
            ("Criticality", "string", ".spec.criticality"),
            *_VERDICTS,
            _AGE,
        )
    ),
    ("inference.networking.x-k8s.io/v1alpha2", "InferenceObjective"): _OBJECTIVE,
    ("llm-d.ai/v1alpha2", "InferenceObjective"): _OBJECTIVE,
}


def files() -> dict[str, str]:
    """Return the definitions as YAML, by the name of their file."""
    found = {}
    for kind in resources.KINDS:
        if names := _NAMES.get((kind.api_version, kind.kind)):
            text = yaml.dump(_definition(kind, names), Dumper=_Dumper, sort_keys=False, width=100)
            found[f"{kind.group}_{kind.plural}.yaml"] = HEADER + text
    return found


def _definition(kind: Kind, names: _Names) -> dict[str, Any]:
    metadata = {
        "name": f"{kind.plural}.{kind.group}",
        "labels": names.labels,
        "annotations": names.annotations,
    }
    columns = [
        {"name": name, "type": type_, "jsonPath": path} for name, type_, path in names.columns
    ]
    version = {
        "name": kind.version,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        **({"additionalPrinterColumns": columns} if columns else {}),
        "schema": {"openAPIV3Schema": schema(kind)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {key: value for key, value in metadata.items() if value},
        "spec": {
            "group": kind.group,
            "scope": "Namespaced",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                **({"shortNames": list(names.short)} if names.short else {}),
                **({"categories": list(names.categories)} if names.categories else {}),
            },
            "versions": [version],
        },
    }


def schema(kind: Kind) -> dict[str, Any]:
    """Return the structural schema of a kind."""
    generated = kind.model.model_json_schema(schema_generator=_Generator)
    root = _structural(generated, generated["$defs"])
    parts = root["properties"]
    root["properties"] = {
        "apiVersion": {"description": _API_VERSION, "type": "string"},
        "kind": {"description": _KIND, "type": "string"},
        "metadata": {"type": "object"},
        "spec": parts["spec"],
        "status": parts["status"],
    }
    root["required"] = ["spec"]
    return root


class _Generator(GenerateJsonSchema):
    """A JSON schema without null, in which even a single choice is an enum."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        """Leave null out: the API server treats it as unset."""
        return self.generate_inner(schema["schema"])

    def literal_schema(self, schema: core_schema.LiteralSchema) -> dict[str, Any]:
        """Write every literal as an enum of strings."""
        return {"type": "string", "enum": list(schema["expected"])}


def _structural(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Inline references, and convert to OpenAPI 3.0."""
    node = dict(node)
    if "$ref" in node:
        referred = definitions[node.pop("$ref").rpartition("/")[2]]
        return _structural({**referred, **node}, definitions)
    found: dict[str, Any] = {}
    for key, value in node.items():
        match key:
            case "description":
                found[key] = " ".join(value.split())
            case "properties":
                found[key] = {name: _structural(part, definitions) for name, part in value.items()}
            case "items" | "additionalProperties" if isinstance(value, dict):
                found[key] = _structural(value, definitions)
            case "exclusiveMinimum":
                found |= {"minimum": value, "exclusiveMinimum": True}
            case "default" if value is None or value == []:
                pass
            case _ if key not in _LEFT_OUT:
                found[key] = value
    return found


class _Dumper(yaml.SafeDumper):
    """Emits no YAML anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # as in the parent
        """Write repeated values out: kubectl reads anchors, but they are hard on people."""
        return True
