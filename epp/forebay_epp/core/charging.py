"""What a request is expected to use, and what its flow is charged for once it is known.

How a charge ranks flows does not belong here (fairness/), nor how answers are estimated that
are not seen (residency.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.terms import Usage

if TYPE_CHECKING:
    from forebay_epp.core.bands import Bands
    from forebay_epp.core.footprints import Footprints
    from forebay_epp.core.residency import Produced
    from forebay_epp.core.terms import Request


class Charging:
    """Charges the flows of a pool for the answers they get, beyond what a dispatch has cost them.

    Args:
        bands: the flows.
        footprints: learns from what answers come to.
    """

    __slots__ = ("_bands", "_estimates", "_footprints")

    def __init__(self, bands: Bands, footprints: Footprints) -> None:
        self._bands = bands
        self._footprints = footprints
        self._estimates: list[tuple[Request, Usage]] = []

    def used(self, request: Request, usage: Usage, now: float) -> None:
        """Correct what was charged for a request to what its answer says that it used."""
        self._footprints.learn(request, usage)
        band = self._bands.by_name.get(request.band)
        if band is not None:
            band.charge(request, usage, now)

    def progress(self, request: Request, answer_tokens: int, now: float) -> None:
        """Charge for an answer that has come to so many tokens, beyond what was charged so far."""
        if answer_tokens > request.answer_tokens:
            band = self._bands.by_name.get(request.band)
            if band is not None:
                band.charge_more(request, answer_tokens, now)

    def produced(self, produced: Produced, now: float) -> None:
        """Charge for what an unseen answer is taken to have come to."""
        request, tokens = produced.request, round(produced.tokens)
        if not produced.ended:
            self.progress(request, tokens, now)
            return
        usage = Usage(request.prompt_tokens, tokens)
        self._estimates.append((request, usage))
        self.used(request, usage, now)

    def take_estimates(self) -> list[tuple[Request, Usage]]:
        """Return the answers that have ended without usage since the last call, with estimates."""
        estimates, self._estimates = self._estimates, []
        return estimates
