"""When the EPPs of a pool hear that it is deleted, by a clock that the test moves."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from forebay_control.v1 import control_pb2 as pb
from forebay_operator.channel.admission import RefusedError
from forebay_operator.channel.server import ControlServer
from forebay_operator.channel.trust import Pods, unauthenticated
from forebay_operator.cluster.api import ApiError, Page
from forebay_operator.reconcile import deletion
from forebay_operator.reconcile.deletion import CONFIRM_SECONDS, Deletions, is_absent
from forebay_operator.resources import InferencePool, InferencePoolV1Alpha2

POOL = "default/chat"


class World:
    """An operator whose looks for a pool give the answers of a test."""

    def __init__(self, *answers: bool | None) -> None:
        self.now = 100.0
        self.answers = list(answers)
        self.control = ControlServer(
            unauthenticated, lambda _: None, lambda _: None, lambda: self.now
        )
        self.deletions = Deletions(self.control, self._is_absent, lambda: self.now)

    async def _is_absent(self, _namespace: str, _name: str) -> bool | None:
        return self.answers.pop(0)

    def look(self, after: float = 0.0) -> None:
        self.now += after
        asyncio.run(self.deletions.look())

    @property
    def wanted(self) -> pb.Snapshot | None:
        desired = self.control._rollouts[POOL].desired_for()
        return pb.Snapshot.FromString(desired.snapshot) if desired else None


def test_a_pool_that_two_looks_do_not_find_is_deleted():
    """Not before; its uid says which one it was."""
    world = World(True, True)
    world.deletions.suspect(POOL, "uid-1")
    world.look()
    world.look(CONFIRM_SECONDS - 0.1)
    assert (world.wanted, world.answers) == (None, [True])

    world.look(0.1)
    assert world.wanted == pb.Snapshot(deleted=True, pool_uid="uid-1")
    world.look(1000.0)  # nothing is looked for any more


@pytest.mark.parametrize("answers", [(False,), (True, False)])
def test_a_pool_that_is_found_is_not_deleted(answers):
    """The store had not heard of it, or it was made again meanwhile."""
    world = World(*answers)
    world.deletions.suspect(POOL)
    for _ in range(5):
        world.look(CONFIRM_SECONDS)

    assert world.wanted is None


def test_looks_that_fail_prove_nothing():
    """Both looks have to say so, one after the other."""
    world = World(None, True, None, True, None)
    world.deletions.suspect(POOL)
    for _ in range(5):
        world.look(CONFIRM_SECONDS)
    assert world.wanted is None

    world.answers = [True, True]
    world.look(CONFIRM_SECONDS)
    world.look(CONFIRM_SECONDS)
    assert world.wanted.deleted


def test_a_pool_that_comes_back_is_not_looked_for_any_more():
    """It was deleted and made again, within the ten seconds."""
    world = World(True)
    world.deletions.suspect(POOL, "uid-1")
    world.look()
    world.deletions.exists(POOL)
    world.look(CONFIRM_SECONDS)

    assert world.wanted is None


def test_an_epp_that_was_away_is_told_at_one_of_its_next_dials():
    """Any pod of the namespace may hear it; no other, and nothing before it is certain."""
    world = World(True, True)
    pods = Pods(lambda _: None, None, world.deletions.is_deleted)

    def refusal(namespace: str) -> str:
        with pytest.raises(RefusedError) as error:
            pods.check(POOL, namespace, "uid-of-a-pod", "10.0.0.9")
        return error.value.reason

    assert refusal("other") == "other_namespace"
    assert refusal("default") == "no_pool"
    world.look()
    assert refusal("default") == "no_pool"
    world.look(CONFIRM_SECONDS)
    pods.check(POOL, "default", "uid-of-a-pod", "10.0.0.9")
    assert refusal("other") == "other_namespace"


def test_pools_that_epps_make_up_do_not_fill_the_memory(monkeypatch):
    """The oldest is forgotten, and asked for again when its EPP dials."""
    monkeypatch.setattr(deletion, "MAX_SUSPECTS", 10)
    world = World()
    for number in range(100):
        world.deletions.is_deleted(f"default/made-up-{number}")

    assert len(world.deletions._suspects) == 10


class Api:
    """An API server that has these answers; a fake, since no real one can be made to fail so."""

    def __init__(self, v1: object, alpha: object) -> None:
        self._answers = {InferencePool: v1, InferencePoolV1Alpha2: alpha}

    async def pages(self, kind, _namespace):
        answer = self._answers[kind.model]
        if isinstance(answer, int):
            raise ApiError(answer, "no")
        for name in answer:
            yield Page([{"metadata": {"name": name}}], "1")


@pytest.mark.parametrize(
    ("v1", "alpha", "absent"),
    [
        ([], [], True),
        (["other"], 404, True),
        (404, [], True),
        (["chat"], [], False),
        ([], ["chat"], False),
        (404, 404, None),
        (403, [], None),
        ([], 403, None),
        ([], 503, None),
        ([], 0, None),
    ],
)
def test_only_a_list_that_succeeds_proves_that_a_pool_is_gone(v1, alpha, absent):
    """No right to read, no API server and no CRD say nothing."""
    assert asyncio.run(is_absent(Api(v1, alpha), "default", "chat")) is absent


def test_the_refusal_of_an_unknown_pool_asks_to_come_again():
    """An EPP dials on UNAVAILABLE."""
    with pytest.raises(RefusedError) as error:
        Pods(lambda _: None, None).check(POOL, "default", "uid", "10.0.0.9")

    assert error.value.code is grpc.StatusCode.UNAVAILABLE
