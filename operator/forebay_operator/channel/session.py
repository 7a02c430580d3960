"""One EPP's control stream as a state machine: messages sent and answers received.

The desired program is compared with what the EPP has *acknowledged*, never with what was sent: a
program that was lost or refused does not count as running (NGINX Gateway Fabric issue 5330). At
most one program is under way. Pure: the moment is an argument, in monotonic seconds. Streams and
pools belong in server.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from forebay_control import features
from forebay_control.v1 import control_pb2 as pb
from forebay_operator.pacing import RateLimit
from forebay_operator.resources import messages

if TYPE_CHECKING:
    from collections.abc import Mapping

ACK_SECONDS = 10.0
MAX_SENDS = 3
RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 300.0
MAX_REFUSALS = 16
STATS_SECONDS = 1.0
MAX_MESSAGES_PER_SECOND = 100  # reports of demand, and an answer to each message of shares
MAX_BURST = 250
MAX_NAME = 253
MAX_BAND_NAME = 63  # the schema's
MAX_STATS_BANDS = 64
MAX_COUNT = 1 << 50  # sums of what EPPs report stay numbers that an API server takes
MAX_ERROR = 200
# The EPP has seen a higher version, or this one with other content: not the program's fault.
_NOT_OURS = ("StaleEpoch", "HashConflict")


class UnansweredError(Exception):
    """A program was sent as often as it may be and not answered."""


class Answer(Enum):
    """The kind of a refusal: of the program, of its version, or of nothing under way."""

    NACK = auto()
    STALE = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Desired:
    """The desired program of a pool's EPPs that know the same features.

    Attributes:
        snapshot: serialised.
        sha256: of it.
        revision: of the program.
        generations: of what the plan was made from, by uid; None where the snapshot has no plan,
            so that EPPs keep theirs.
        left_out: what of the plan they are not sent since they do not know it, as field paths.
    """

    snapshot: bytes
    sha256: bytes
    revision: int
    generations: Mapping[str, int] | None = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Session:
    """The messages sent to an EPP and its answers.

    Args:
        now: the moment its Hello came.
        applied: what it runs, as its Hello says.
        features: what it knows, as its Hello says; see forebay_control.features.

    Attributes:
        heard_at: when it said something last.
        nacked: hash of the program it has refused, if it was the last.
        error: why it refused; the first word is the code.
    """

    def __init__(
        self,
        now: float,
        applied: pb.Applied | None = None,
        features: frozenset[str] = features.NAMES,
    ) -> None:
        self.heard_at = now
        self.features = features
        self.nacked = b""
        self.error = ""
        self._acked = (applied.version.epoch, applied.sha256) if applied is not None else None
        self._nonce = 0
        self._in_flight: pb.Program | None = None
        self._offered: Desired | None = None
        self._sent_at = 0.0
        self._sends = 0
        self._retry_at = 0.0
        self._refusals = 0  # in a row
        self._stale = False
        self._stats_at = -math.inf
        self._rate = RateLimit(MAX_MESSAGES_PER_SECOND, MAX_BURST, now)

    # --- programs

    def offer(self, desired: Desired, epoch: int, now: float) -> pb.Program | None:
        """Return the program to send now, if any.

        Raises:
            UnansweredError: the one under way has been sent often enough.
        """
        if self._in_flight is not None:
            if now - self._sent_at < ACK_SECONDS:
                return None
            if self._sends >= MAX_SENDS:
                raise UnansweredError
            self._sends += 1
        else:
            if self._acked == (epoch, desired.sha256):
                return None
            if self.nacked == desired.sha256 and now < self._retry_at:
                return None
            self._nonce += 1
            self._sends = 1
            self._in_flight = pb.Program(
                nonce=self._nonce,
                version=pb.Version(epoch=epoch, revision=desired.revision),
                sha256=desired.sha256,
                snapshot=desired.snapshot,
            )
            self._offered = desired
        self._sent_at = now
        return self._in_flight

    def offer_at(self, now: float) -> float:
        """Return when `offer` may have something although nothing else has happened."""
        if self._in_flight is not None:
            return self._sent_at + ACK_SECONDS
        if self.nacked and self._retry_at > now:
            return self._retry_at
        return math.inf

    def desired_changed(self) -> None:
        """Note that something else is desired: a refusal of it would be the first one."""
        self._refusals = 0

    def epoch_changed(self) -> None:
        """Note that the epoch is another: a program whose version was refused gets a new one.

        Once only: an EPP that refuses every version must not be sent one after the other.
        """
        if self._stale and self._refusals <= 1:
            self.nacked, self.error = b"", ""

    def on_ack(self, ack: pb.Ack) -> Desired | None:
        """Take an acknowledgement; return what is in force now, None if it is of nothing sent."""
        program = self._in_flight
        if program is None or ack.nonce != program.nonce or ack.sha256 != program.sha256:
            return None
        self._in_flight = None
        self._acked = (program.version.epoch, program.sha256)
        self.nacked, self.error = b"", ""
        self._refusals, self._stale = 0, False
        return self._offered

    def on_nack(self, nack: pb.Nack, now: float) -> Answer:
        """Take a refusal."""
        program = self._in_flight
        if program is None or nack.nonce != program.nonce:
            return Answer.UNKNOWN
        self._in_flight = None
        if nack.applied:  # a part: what it had acknowledged is not what it runs any more
            self._acked = None
        if self.nacked != program.sha256 and not self._stale:
            self._refusals = 0
        self.nacked = program.sha256
        self._retry_at = now + min(RETRY_SECONDS * 2**self._refusals, MAX_RETRY_SECONDS)
        self._refusals = min(self._refusals + 1, MAX_REFUSALS)
        self._stale = nack.code in _NOT_OURS
        if self._stale:
            self.error = f"{nack.code}: the EPP has seen a program of another leader"
            return Answer.STALE
        problems = "; ".join(
            f"{error.path[:MAX_ERROR]}: {error.message[:MAX_ERROR]}" for error in nack.errors[:5]
        )
        self.error = messages.printable(f"{nack.code[:32] or 'Internal'}: {problems}")
        return Answer.NACK

    # --- everything else

    def heard(self, now: float) -> bool:
        """Count a message; return whether it is within the rate limit."""
        self.heard_at = now
        return self._rate.take(now)

    def on_stats(self, stats: pb.Stats, now: float) -> pb.Stats | None:
        """Return what is kept of a report; None where it comes too soon after the one before."""
        if now - self._stats_at < STATS_SECONDS:
            return None
        self._stats_at = now
        stats.DiscardUnknownFields()
        bands = {b.band: b for b in stats.bands[:MAX_STATS_BANDS] if _is_band_name(b.band)}
        kept = [pb.BandStats.FromString(band.SerializeToString()) for band in bands.values()]
        del stats.bands[:]
        stats.bands.extend(kept)
        _check_shadow(stats)
        if not 0 <= stats.saturation < math.inf:
            stats.saturation = 0.0
        for band in stats.bands:
            if not 0 <= band.oldest_seconds < 1e9:
                band.oldest_seconds = 0.0
            for name in ("bytes", "dispatched", "rejected", "evicted"):
                setattr(band, name, min(getattr(band, name), MAX_COUNT))
        return stats


def _check_shadow(stats: pb.Stats) -> None:
    """Keep the part of a report of mode Observe that a status may hold."""
    shadow = {b.band: b for b in stats.shadow[:MAX_STATS_BANDS] if _is_band_name(b.band)}
    kept = [pb.ShadowStats.FromString(band.SerializeToString()) for band in shadow.values()]
    del stats.shadow[:]
    stats.shadow.extend(kept)
    for band in stats.shadow:
        if not 0 <= band.waited_seconds < MAX_COUNT:
            band.waited_seconds = 0.0
        for name in ("dispatched", "rejected", "evicted", "overtaken"):
            setattr(band, name, min(getattr(band, name), MAX_COUNT))


def _is_band_name(text: str) -> bool:
    """Return whether a status may hold it; otherwise one EPP's report would block all."""
    return 0 < len(text) <= MAX_BAND_NAME and text.isprintable()
