"""Refusals as OpenAI's API words them: the status of each outcome, and the error object."""

from __future__ import annotations

import msgspec

from forebay_epp.core.terms import Outcome

HTTP_STATUS = {
    Outcome.REJECTED_BAD_REQUEST: 400,
    Outcome.REJECTED_UNKNOWN_MODEL: 404,
    Outcome.REJECTED_INCOMPLETE: 408,
    Outcome.REJECTED_TOO_LARGE: 413,
    Outcome.REJECTED_UNSUPPORTED_ENCODING: 415,
    Outcome.REJECTED_QUEUE_FULL: 429,
    Outcome.REJECTED_NO_ENDPOINTS: 503,
    Outcome.REJECTED_POOL_DELETED: 503,
    Outcome.REJECTED_SHUTTING_DOWN: 503,
    Outcome.EVICTED_TTL: 429,
    Outcome.EVICTED_DISPLACED: 429,
    Outcome.EVICTED_CANCELLED: 503,
    Outcome.EVICTED_POOL_DELETED: 503,
    Outcome.EVICTED_NO_ENDPOINTS: 503,
    Outcome.EVICTED_SHUTTING_DOWN: 503,
}


class BadRequestError(ValueError):
    """A body that cannot be read; the text is for the client. `param` names the field, if one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def error_body(outcome: Outcome, message: str, param: str | None = None) -> bytes:
    """Return OpenAI's error object for a refusal."""
    status = HTTP_STATUS[outcome]
    if status < 429:
        kind = "invalid_request_error"
    elif status == 429:
        kind = "rate_limit_error"
    else:
        kind = "service_unavailable_error"
    error = {"message": message, "type": kind, "param": param, "code": str(outcome)}
    return msgspec.json.encode({"error": error})
