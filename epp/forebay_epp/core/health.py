"""Whether an endpoint can be trusted with requests: outlier ejection.

Free slots say nothing about a server that fails: each failed answer frees its slot at once, so the
emptiest server of a pool is the one that is dead. Evidence is what answers and scrapes show:

* an answer of 502, 503 or 504, which is also what a proxy makes of a connection that fails;
* `MAX_ERRORS` answers of 500 with no better one in between (a single one may be the request's own
  fault, as any 4xx is);
* a scrape that begins to be refused or to fail. One that goes on failing is no news: a server whose
  answers are good stays in although its metrics cannot be read.

An endpoint that is out gets no request for a period of 1 s, then one request as a trial. If that
succeeds the endpoint is back; otherwise it is out for twice as long, up to 60 s. While scrapes
are refused outright they stand in for the trial, so that no request is lost to it, and the first
one that is answered makes the trial due. Requests sent before the endpoint went out prove nothing
either way. The period starts at 1 s again once the endpoint has been in for `WELL_SECONDS`.

The idea and its constants are those of Envoy's outlier detection, with a trial instead of a return
at full load (a half-open circuit breaker: Nygard, Release It!, 2007). That never all endpoints of a
pool are left out is up to the controller, which sees all of them.
"""

from __future__ import annotations

from forebay_epp.core.terms import NEVER, Verdict

FIRST_PERIOD_SECONDS = 1.0
MAX_PERIOD_SECONDS = 60.0
WELL_SECONDS = 60.0
REFUSED_SECONDS = 12.0  # longer than the pause between two scrapes in the largest pools
MAX_ERRORS = 3

UNREACHABLE = "unreachable"
ERRORS = "errors"
SCRAPE = "scrape"
CAUSES = (UNREACHABLE, ERRORS, SCRAPE)


class Health:
    """The health of one endpoint.

    Attributes:
        out: whether the endpoint is left out; otherwise everything else here is history.
        cause: one of `CAUSES`, of the last time that it went out; "" if it never did.
        failures: periods in a row that ended badly, the current one included.
        trial_at: when the period ends, in monotonic seconds.
        trial_due: whether the endpoint may get the one request that decides.
    """

    __slots__ = (
        "_errors",
        "_in_since",
        "_out_since",
        "_refused_until",
        "_scrapes_fail",
        "_trying",
        "cause",
        "failures",
        "out",
        "trial_at",
        "trial_due",
    )

    def __init__(self) -> None:
        self.out = False
        self.cause = ""
        self.failures = 0
        self.trial_at = NEVER
        self.trial_due = False
        self._errors = 0
        self._in_since = -NEVER
        self._out_since = -NEVER
        self._scrapes_fail = False
        self._refused_until = -NEVER
        self._trying = False

    @property
    def wake_at(self) -> float:
        """When a trial becomes due by time alone, or infinity."""
        if not self.out or self.trial_due or self._trying:
            return NEVER
        return max(self.trial_at, self._refused_until)

    def dispatched(self) -> None:
        """A request is on its way to the endpoint; if it is out, no other one follows."""
        self._trying = self.out
        self.trial_due = False

    def answered(self, verdict: Verdict, dispatched_at: float, now: float) -> None:
        """Take the end of a request that was sent at `dispatched_at`."""
        if verdict is Verdict.GOOD and not self.out:
            self._errors = 0
            return
        if dispatched_at < self._out_since:
            return
        self._trying = False
        match verdict:
            case Verdict.GOOD:
                self._errors = 0
                self.out = False
                self.trial_due = False
                self._in_since = now
            case Verdict.UNREACHABLE:
                self._failed(UNREACHABLE, now)
            case Verdict.ERROR:
                self._errors += 1
                if self.out or self._errors >= MAX_ERRORS:
                    self._failed(ERRORS, now)
            case Verdict.UNKNOWN:
                self.elapse(now)

    def scraped(self, now: float) -> None:
        """A scrape has been answered."""
        self._scrapes_fail = False
        if self._refused_until > now:
            self._refused_until = -NEVER
            self.trial_at = min(self.trial_at, now)
            self.elapse(now)

    def scrape_failed(self, now: float, *, refused: bool) -> None:
        """A scrape has failed; `refused`: there was not even a connection."""
        begins = not self._scrapes_fail
        self._scrapes_fail = True
        self._refused_until = now + REFUSED_SECONDS if refused else -NEVER
        if self.out:
            if refused and not self._trying:
                self._failed(SCRAPE, now)
        elif begins:
            self._failed(SCRAPE, now)

    def elapse(self, now: float) -> None:
        """Let the period end, if it has; the trial is then due."""
        due = now >= self.trial_at and now >= self._refused_until
        self.trial_due = self.out and not self._trying and due

    def _failed(self, cause: str, now: float) -> None:
        """Begin a period; within one further failures add nothing."""
        if self.out:
            if now < self.trial_at:
                return
        elif now - self._in_since >= WELL_SECONDS:
            self.failures = 0
        self.failures += 1
        self.out = True
        self.cause = cause
        self.trial_due = False
        self._errors = 0
        self._out_since = now
        period = FIRST_PERIOD_SECONDS * 2.0 ** min(self.failures - 1, 10)
        self.trial_at = now + min(MAX_PERIOD_SECONDS, period)
