"""Figures of a replay. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_sim.report import percentile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forebay_replay.replay import Answer, Replay


def figures(replay: Replay, critical: str, slo_seconds: Mapping[str, float]) -> dict[str, float]:
    """Return what a run came to.

    Args:
        replay: a run that has ended.
        critical: the model whose first tokens count.
        slo_seconds: by model, how long its answers may take to begin, and after that on average
            for 100 tokens more. An answer without an entry has no goal and is always in time.

    Returns:
        Times of Critical's first tokens, the end of the last answer, answers in time per second of
        load, and the state of the servers while they were measured: requests waiting inside one,
        the part of batches that was used, preemptions, and milliseconds in which a server had room
        and nothing to fill it with while a request waited in the queue; and attempts at requests
        that failed, which are tried again.
    """
    answers = [answer for answer in replay.answers if not answer.failed]
    ttft = [a.ttft_seconds * 1e3 for a in answers if a.arrival.model == critical]
    load_seconds = max(a.arrival.at for a in answers) or 1.0
    start, end = replay.measured
    seconds = min(end, replay.now) - start
    servers = replay.servers
    return {
        "critical_ttft_p50_ms": round(percentile(ttft, 50) or 0.0, 1),
        "critical_ttft_p99_ms": round(percentile(ttft, 99) or 0.0, 1),
        "wall_seconds": round(replay.now, 3),
        "goodput_rps": round(sum(_in_time(a, slo_seconds) for a in answers) / load_seconds, 3),
        "mean_server_waiting": round(
            sum(s.waiting_seconds for s in servers) / len(servers) / seconds, 3
        ),
        "batch_occupancy": round(
            sum(s.running_seconds for s in servers) / seconds / sum(s.slots for s in servers), 4
        ),
        "preemptions": float(sum(s.engine.preemptions for s in servers)),
        "idle_beside_waiting_ms": round(max(s.idle_seconds for s in servers) * 1e3, 1),
        "failed_attempts": float(len(replay.answers) - len(answers)),
    }


def _in_time(answer: Answer, slo_seconds: Mapping[str, float]) -> bool:
    goal = slo_seconds.get(answer.arrival.model)
    if goal is None:
        return True
    return answer.ttft_seconds <= goal
