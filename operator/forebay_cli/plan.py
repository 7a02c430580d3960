"""`forebay plan FILE...`: show the queues that manifests lead to, as a tree or as JSON.

The JSON is the message of control.proto that an EPP receives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format
from rich.tree import Tree

from forebay_cli import CommandError
from forebay_cli.output import console
from forebay_control.plan import Between, FairnessName, Mode, WhenFull
from forebay_operator import planning
from forebay_operator.resources import messages
from forebay_operator.standalone import sources

if TYPE_CHECKING:
    from forebay_control.plan import BandPlan, MetricsPlan, ModelPlan, Plan, SeriesPlan
    from forebay_operator.planning import Planned


MAX_NAMES = 5
BY_TOKENS = {FairnessName.WEIGHTED_FAIR_TOKENS: "WeightedFair by tokens"}


class Settings(argparse.Namespace):
    """The command's arguments."""

    paths: list[Path]
    output: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="FILE", help="a YAML file, or a folder of them")
    add("-o", "--output", choices=("tree", "json"), default="tree", help="output format")


def run(settings: Settings) -> int:
    """Print every pool's plan.

    Raises:
        CommandError: a manifest is not valid, or there is no pool.
    """
    manifests = sources.read(*settings.paths)
    if manifests.errors:
        raise CommandError("\n".join(manifests.errors))
    pools = planning.pools(manifests.resources)
    if not pools:
        raise CommandError("the files hold no InferencePool")
    planned = [planning.plan(pool, manifests.resources) for pool in pools]
    if settings.output == "json":
        items = [json_format.MessageToDict(each.snapshot) for each in planned]
        print(json.dumps({"items": items}, indent=2))  # noqa: T201  # what was asked for
        return 0
    out = console()
    for each in planned:
        out.print(tree(each), soft_wrap=False)
        for problem in each.problems:
            out.print(f"warning: {messages.printable(str(problem))}", style="yellow")
    return 0


def tree(planned: Planned) -> Tree:
    """Draw one pool: bands by priority with their models, then what holds for all."""
    root = Tree(f"InferencePool {planned.pool}")
    if planned.plan is None:
        root.add("no plan that an EPP would take: see the warnings")
    else:
        if planned.plan.mode is Mode.OBSERVE:
            root.add("mode Observe: requests are sent at once; the rest is computed beside them")
        _add_plan(root, planned.plan, planned.priorities)
        if planned.plan.shadow is not None and planned.shadow is not None:
            name = messages.printable(planned.shadow.metadata.name)
            beside = root.add(f"beside it, deciding nothing: FlowControlPolicy {name}")
            _add_plan(beside, planned.plan.shadow, planned.priorities)
    endpoints = planned.snapshot.endpoints.endpoints
    servers = root.add(f"{len(endpoints)} servers in the files")
    for endpoint in endpoints:
        servers.add(messages.printable(f"{endpoint.address} {endpoint.name}"))
    return root


def _add_plan(root: Tree, plan: Plan, priorities: dict[str, int]) -> None:
    for band in sorted(plan.bands, key=lambda band: -band.priority):
        branch = root.add(f"{band.name} (priority {band.priority})")
        _add_order(branch, band)
        _add_caps(branch, band)
        for model in plan.models:
            if model.band == band.name:
                branch.add(f"model {_model(model)}")
        for objective in plan.objectives:
            if objective.band == band.name:
                name = messages.printable(objective.name)
                branch.add(f"objective {name} (priority {priorities[objective.name]})")
    unmatched = plan.unmatched
    other = f"join {unmatched.band}" if unmatched.action == "Queue" else "are rejected"
    root.add(f"requests for other models {other}")
    if plan.objectives and not plan.trust_objective_header:
        root.add("objectives have no effect: trustedHeaders has no Objective")
    if plan.tenant_header:
        weights = "".join(f"{each.name} {each.weight}, " for each in plan.tenants)
        line = f"tenants by header {plan.tenant_header}, weights {weights}others 1"
        root.add(messages.printable(line))
    if plan.trust_deadline_headers:
        root.add("callers may say when a request is due and how long it may wait")
    limits, saturation = plan.limits, plan.saturation
    root.add(
        f"in total at most {limits.max_requests} requests and {_bytes(limits.max_bytes)}, "
        f"one at most {_bytes(limits.max_body_bytes)}"
    )
    room = (
        f"{saturation.max_concurrency} requests at once per server"
        if saturation.mode == "Concurrency"
        else f"learned; closed above {saturation.kv_cache_usage_threshold:.0%} of its KV cache, "
        f"prompts wait in it up to {saturation.time_to_first_token_seconds:g} s"
    )
    root.add(f"endpoint limit: {room}")
    scorers = ", ".join(f"{scorer.type} {scorer.weight}" for scorer in plan.choice.scorers)
    root.add(f"a server is chosen by {scorers}, picker {plan.choice.picker}")
    if plan.metrics is not None:
        _add_metrics(root, plan.metrics)
    root.add(f"without servers requests wait up to {plan.no_endpoints_ttl_seconds:g} s")
    _add_answers(root, plan)


def _add_answers(root: Tree, plan: Plan) -> None:
    """Say what the proxy's default leaves out; which one it is, no manifest says."""
    branch = root.add("answers by the proxy's `responses`: Observe, the default, leaves out")
    branch.add("tokens of each answer: they are shared out by what servers have counted")
    branch.add("times to first token: servers have them for the pool")
    renamed = [model.name for model in plan.models if model.targets]
    if renamed:
        names = ", ".join(renamed[:MAX_NAMES]) + (", ..." if len(renamed) > MAX_NAMES else "")
        branch.add(messages.printable(f"the client's name of a model in answers: {names}"))


def _add_order(branch: Tree, band: BandPlan) -> None:
    inner = Between.TENANTS if band.between is Between.MODELS else Between.MODELS
    levels = [(band.between, band.fairness)]
    if band.inner is not None:
        levels.append((inner, band.inner.fairness))
    shared = ", ".join(
        f"{BY_TOKENS.get(policy, policy)} between {between.lower()}" for between, policy in levels
    )
    branch.add(f"{shared}, {band.ordering} within one")
    if band.max_saturation_percent < 100:
        branch.add(f"fills the pool up to {band.max_saturation_percent} % of its slots")
    if band.reserved_percent:
        branch.add(f"has at least {band.reserved_percent} % of the dispatches while it waits")


def _add_caps(branch: Tree, band: BandPlan) -> None:
    branch.add(
        f"at most {band.max_requests} requests and {_bytes(band.max_bytes)}, "
        f"each for up to {band.ttl_seconds:g} s"
    )
    if (band.flow_max_requests, band.flow_max_bytes) != (band.max_requests, band.max_bytes):
        # The innermost level has the flows.
        tenants = (band.between is Between.TENANTS) is (band.inner is None)
        branch.add(
            f"of one {'tenant' if tenants else 'model'} at most {band.flow_max_requests} requests "
            f"and {_bytes(band.flow_max_bytes)}"
        )
    if band.when_full is WhenFull.DISPLACE_LOWER:
        branch.add("displaces what waits in lower bands when the pool's queue is full")


def _model(model: ModelPlan) -> str:
    total = sum(target.weight for target in model.targets)
    targets = ", ".join(f"{target.name} {target.weight / total:.0%}" for target in model.targets)
    line = f"{model.name} -> {targets}" if targets else model.name
    if model.weight != 1:
        line += f", weight {model.weight}"
    if model.time_to_first_token_seconds:
        line += f", due after {model.time_to_first_token_seconds:g} s"
    return messages.printable(line)


def _add_metrics(root: Tree, metrics: MetricsPlan) -> None:
    path, port = metrics.path or "/metrics or /prometheus/metrics", metrics.port or "of requests"
    branch = root.add(messages.printable(f"load of a server: {path}, port {port}"))
    for name, series in (
        ("running", metrics.running),
        ("waiting", metrics.waiting),
        ("KV", metrics.kv_cache_usage),
    ):
        if series is not None:
            branch.add(messages.printable(f"{name}: {_series(series)}"))


def _series(series: SeriesPlan) -> str:
    labels = ",".join(f'{label.name}="{label.value}"' for label in series.labels)
    return f"{series.name}{{{labels}}}" if labels else series.name


def _bytes(size: int) -> str:
    for unit, factor in (("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}B"
    return f"{size} B"
