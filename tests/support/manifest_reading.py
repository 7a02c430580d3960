"""Reads one manifest as the folder source does, without the folder; and writes references in it."""

from __future__ import annotations

from typing import Any

from forebay_operator import resources


def resource_of(manifest: dict[str, Any]) -> resources.Resource | None:
    """Turn a manifest into its resource; None for a kind that has no effect in a folder."""
    kind = resources.kind_of(manifest)
    return None if kind is None else resources.read(kind, manifest)


def pool_ref(name: Any, group: str = "inference.networking.k8s.io") -> dict[str, Any]:
    """Return an entry of `targetRefs` of a FlowControlPolicy."""
    return {"group": group, "kind": "InferencePool", "name": name}
