"""Tokens in proportion to weights, as the model server has counted them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay_epp.core.fairness.virtual_time import VirtualTime

if TYPE_CHECKING:
    from forebay_epp.core.terms import Cost

PROMPT_TOKEN = 1.0
ANSWER_TOKEN = 2.0


class TokenFair(VirtualTime):
    """A virtual token counter: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024.

    A prompt token counts 1 and a token of an answer 2, as there; one that was in the server's cache
    counts nothing: at dispatch by what the prefix index believes, in the end by what the answer
    says, where it does. A dispatch is charged for the tokens to be expected of
    it, which is the paper's variant with predicted lengths: what an answer has beyond them is
    charged as it is produced, as far as it can be seen, and its end corrects the sum to the exact
    usage. An answer whose usage is not known, because the client went away for example, stays
    charged for what was expected or seen.

    Of two flows that wait all the time the services differ by at most 2 max(P, A), over weights of
    1, where P is the most that a prompt and A the most that the answers in flight count (theorem
    4.4 there, for which counters may lag behind by what is in flight).
    """

    __slots__ = ()

    def service(self, cost: Cost) -> float:
        """Weigh the tokens."""
        return PROMPT_TOKEN * cost.prompt_tokens + ANSWER_TOKEN * cost.completion_tokens
