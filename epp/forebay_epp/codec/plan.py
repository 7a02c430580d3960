"""From the control plane's Snapshot message to the core's plan and endpoints.

The contract is control.proto; what a plan means belongs in forebay_control/plan.py.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, TypeVar

from google.protobuf import json_format

from forebay_control.limits import MAX_ENDPOINTS
from forebay_control.plan import (
    BandPlan,
    FairnessName,
    LimitsPlan,
    MetricsPlan,
    ModelPlan,
    ObjectivePlan,
    OrderingName,
    Plan,
    PlanError,
    SaturationMode,
    SaturationPlan,
    SeriesLabelPlan,
    SeriesPlan,
    TargetPlan,
    UnmatchedAction,
    UnmatchedPlan,
)
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.core.terms import Endpoint

if TYPE_CHECKING:
    from enum import StrEnum

Problems = list[tuple[str, str]]

_Name = TypeVar("_Name", bound="StrEnum")


def parse_snapshot_json(text: str) -> tuple[Plan, tuple[Endpoint, ...]]:
    """Read a Snapshot in protobuf's JSON form; see `parse_snapshot`.

    Raises:
        PlanError: the text is not a Snapshot, or not a valid one.
    """
    try:
        message = json_format.Parse(text, pb.Snapshot())
    except json_format.ParseError as error:
        raise PlanError([("snapshot", f"is not a Snapshot message: {error}")]) from None
    return parse_snapshot(message)


def parse_snapshot(message: pb.Snapshot) -> tuple[Plan, tuple[Endpoint, ...]]:
    """Translate and validate.

    Raises:
        PlanError: with the path of every field that is wrong.
    """
    problems: Problems = []
    try:
        plan = parse_plan(message.plan)
    except PlanError as error:
        problems += error.problems
    endpoints = _endpoints(message.endpoints, problems)
    if problems:
        raise PlanError(problems)
    return plan, endpoints


def parse_plan(message: pb.Plan) -> Plan:
    """Translate and validate a plan that comes without endpoints.

    Raises:
        PlanError: with the path of every field that is wrong.
    """
    problems: Problems = []
    plan = _plan(message, problems)
    try:
        plan.validate()
    except PlanError as error:
        problems.extend((f"plan.{path}", what) for path, what in error.problems)
    if problems:
        raise PlanError(problems)
    return plan


def parse_endpoints(message: pb.Endpoints) -> tuple[Endpoint, ...]:
    """Translate and validate endpoints that come without a plan.

    Raises:
        PlanError: with the path of every field that is wrong.
    """
    problems: Problems = []
    endpoints = _endpoints(message, problems)
    if problems:
        raise PlanError(problems)
    return endpoints


def _plan(message: pb.Plan, problems: Problems) -> Plan:
    return Plan(
        pool=message.pool,
        bands=tuple(
            BandPlan(
                name=band.name,
                priority=band.priority,
                fairness=_one_of(
                    FairnessName, band.fairness, f"plan.bands[{index}].fairness", problems
                ),
                ordering=_one_of(
                    OrderingName, band.ordering, f"plan.bands[{index}].ordering", problems
                ),
                ttl_seconds=band.ttl_seconds,
                max_requests=band.max_requests,
                max_bytes=band.max_bytes,
                flow_max_requests=band.flow_max_requests,
                flow_max_bytes=band.flow_max_bytes,
            )
            for index, band in enumerate(message.bands)
        ),
        models=tuple(
            ModelPlan(
                model.name,
                model.band,
                tuple(TargetPlan(target.name, target.weight) for target in model.targets),
            )
            for model in message.models
        ),
        limits=LimitsPlan(
            message.limits.max_requests,
            message.limits.max_bytes,
            message.limits.max_body_bytes,
        ),
        saturation=SaturationPlan(
            _one_of(SaturationMode, message.saturation.mode, "plan.saturation.mode", problems),
            message.saturation.max_concurrency,
            message.saturation.kv_cache_usage_threshold,
        ),
        unmatched=UnmatchedPlan(
            _one_of(UnmatchedAction, message.unmatched.action, "plan.unmatched.action", problems),
            message.unmatched.band,
        ),
        no_endpoints_ttl_seconds=message.no_endpoints_ttl_seconds,
        objectives=tuple(
            ObjectivePlan(objective.name, objective.band) for objective in message.objectives
        ),
        trust_objective_header=message.trust_objective_header,
        metrics=MetricsPlan(
            message.metrics.path,
            message.metrics.port,
            _series(message.metrics, "running"),
            _series(message.metrics, "waiting"),
            _series(message.metrics, "kv_cache_usage"),
        )
        if message.HasField("metrics")
        else None,
    )


def _series(message: pb.Metrics, field: str) -> SeriesPlan | None:
    if not message.HasField(field):
        return None
    series: pb.Series = getattr(message, field)
    return SeriesPlan(
        series.name, tuple(SeriesLabelPlan(label.name, label.value) for label in series.labels)
    )


def _one_of(names: type[_Name], value: str, path: str, problems: Problems) -> _Name:
    try:
        return names(value)
    except ValueError:
        problems.append((path, f"{value!r} is not one of {', '.join(names)}"))
        return next(iter(names))


def _endpoints(message: pb.Endpoints, problems: Problems) -> tuple[Endpoint, ...]:
    if len(message.endpoints) > MAX_ENDPOINTS:
        text = f"must be at most {MAX_ENDPOINTS}, are {len(message.endpoints)}"
        problems.append(("endpoints.endpoints", text))
        return ()
    seen: set[str] = set()
    endpoints: list[Endpoint] = []
    for index, endpoint in enumerate(message.endpoints):
        path = f"endpoints.endpoints[{index}].address"
        if not _is_address(endpoint.address):
            problems.append((path, f"{endpoint.address!r} is not ip:port"))
        elif endpoint.address in seen:
            problems.append((path, f"{endpoint.address!r} is given twice"))
        seen.add(endpoint.address)
        endpoints.append(Endpoint(endpoint.address, endpoint.name, endpoint.uid))
    return tuple(endpoints)


def _is_address(text: str) -> bool:
    """Check for ip:port in the one form that makes equal addresses equal texts."""
    host, _, port = text.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError:
        return False
    return 0 < number <= 65535 and text == (
        f"[{ip}]:{number}" if ip.version == 6 else f"{ip}:{number}"
    )
