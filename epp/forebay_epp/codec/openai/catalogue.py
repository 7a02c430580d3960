"""The models that clients may ask for: GET /v1/models, and each by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from forebay_control.plan import UnmatchedAction
from forebay_epp.codec.openai.paths import decoded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forebay_control.plan import Plan

MAX_SERVED_MODELS = 4096
MAX_NAME_LENGTH = 256
OWNER = "forebay"
_PATH = "/v1/models"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a model server lists it; `created` is in Unix seconds."""

    name: str
    created: int
    owner: str


class _Card(msgspec.Struct):
    id: str
    created: int = 0
    owned_by: str = ""


class _Page(msgspec.Struct):
    data: list[_Card]


_page = msgspec.json.Decoder(_Page)


def asked_model(method: str, path: str) -> str | None:
    """Return the model that a request asks about, "" for all, or None where it asks for no list."""
    if method != "GET":
        return None
    path = decoded(path)
    if path.endswith(_PATH):
        return ""
    _, found, name = path.rpartition(f"{_PATH}/")
    return name if found else None


def read_served(page: bytes) -> tuple[ServedModel, ...]:
    """Read a model server's answer to GET /v1/models; names that no request can have are left out.

    Raises:
        ValueError: it is no such answer.
    """
    try:
        cards = _page.decode(page).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a list of models: {error}") from None
    return tuple(
        ServedModel(
            card.id,
            card.created if 0 < card.created < 1 << 40 else 0,
            card.owned_by[:MAX_NAME_LENGTH] if card.owned_by.isprintable() else "",
        )
        for card in cards[:MAX_SERVED_MODELS]
        if 0 < len(card.id) <= MAX_NAME_LENGTH and card.id.isprintable()
    )


class Catalogue:
    """The models that clients of a pool may ask for, and the answers that say so.

    These are the plan's models, and the servers' own unless the plan rejects unmatched ones.

    Args:
        plan: in force.
        created: Unix seconds, shown for the plan's models.
    """

    def __init__(self, plan: Plan, created: int) -> None:
        self._created = created
        self._plan = plan
        self._served: tuple[ServedModel, ...] = ()
        self._answers: dict[str, bytes] | None = None

    def configure(self, plan: Plan) -> None:
        """Take a new plan."""
        self._plan = plan
        self._answers = None

    def serve(self, models: Iterable[ServedModel]) -> None:
        """Take what the servers list now."""
        self._served = tuple(models)
        self._answers = None

    @property
    def complete(self) -> bool:
        """Whether there is no other model than those that are listed.

        Not while no server has said what it serves: it may just have started, or want a key.
        """
        return bool(self._served) or self._plan.unmatched.action is UnmatchedAction.REJECT

    def answer(self, name: str) -> bytes | None:
        """Return OpenAI's object of the model of this name, or the list of all for "".

        None where the model, or any at all, is not known.
        """
        if self._answers is None:
            self._answers = self._make()
        return self._answers.get(name)

    def _make(self) -> dict[str, bytes]:
        served = self._served
        if self._plan.unmatched.action is UnmatchedAction.REJECT:
            served = ()
        models = {
            model.name: ServedModel(model.name, self._created, OWNER) for model in self._plan.models
        }
        for model in served:
            models.setdefault(model.name, model)
        cards = {
            model.name: {
                "id": model.name,
                "object": "model",
                "created": model.created or self._created,
                "owned_by": model.owner or OWNER,
            }
            for model in models.values()
        }
        answers = {name: msgspec.json.encode(card) for name, card in cards.items()}
        if cards or self.complete:
            answers[""] = msgspec.json.encode({"object": "list", "data": list(cards.values())})
        return answers
