"""The Plan and its message: one mapping for every field, which neither loses nor invents any."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import attrgetter

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_control import fields, mapping
from forebay_control.fields import Length, Matches, Range
from forebay_control.plan import (
    BandPlan,
    FairnessName,
    LimitsPlan,
    MetricsPlan,
    Mode,
    ModelPlan,
    Plan,
    PlanError,
    SelectionPlan,
)
from forebay_control.v1 import control_pb2 as pb
from forebay_epp.codec.control import Nacked, Programs

INTEGERS = {
    descriptor_pb2.FieldDescriptorProto.TYPE_INT32: (-(2**31), 2**31 - 1),
    descriptor_pb2.FieldDescriptorProto.TYPE_UINT32: (0, 2**32 - 1),
    descriptor_pb2.FieldDescriptorProto.TYPE_UINT64: (0, 2**64 - 1),
}


def values(field):
    """Anything that a field's type and bounds allow."""
    bounds = {type(bound): bound for bound in field.bounds}
    if field.part:
        one = parts(field.kind)
    elif issubclass(field.kind, StrEnum):
        one = st.sampled_from(field.kind)
    elif field.kind is bool:
        one = st.booleans()
    elif field.kind is str and Matches in bounds:
        one = st.from_regex(bounds[Matches].pattern, fullmatch=True).filter(lambda t: len(t) < 200)
    elif field.kind is str:
        least = bounds[Length].least if Length in bounds else 0
        one = st.text(min_size=least, max_size=6)
    else:
        within: Range = bounds[Range]
        numbers = st.floats if field.kind is float else st.integers
        one = numbers(within.least, within.most, **({"exclude_min": True} if within.above else {}))
    if field.many:
        inner = {inner.name for inner in fields.fields_of(field.kind)}
        key = next((attrgetter(name) for name in ("name", "type") if name in inner), None)
        least = bounds[Length].least
        return st.lists(one, min_size=least, max_size=4, unique_by=key).map(tuple)
    return st.none() | one if field.optional else one


@functools.cache
def parts(kind):
    """Anything of a kind; what has that kind itself is left at its default."""
    return st.builds(
        kind,
        **{field.name: values(field) for field in fields.fields_of(kind) if field.kind is not kind},
    )


BANDS = st.lists(
    parts(BandPlan), min_size=1, max_size=4, unique_by=(lambda b: b.name, lambda b: b.priority)
)


@st.composite
def plans(draw, *, shadowed=False):
    """Any valid plan: what refers to a band names one that it has."""
    plan, bands = draw(parts(Plan)), draw(BANDS)
    names = st.sampled_from([band.name for band in bands])
    metrics = plan.metrics
    if metrics is not None and (metrics.running is None or metrics.waiting is None):
        metrics = replace(metrics, running=None, waiting=None, kv_cache_usage=None)
    shadow = draw(st.none() | plans()) if shadowed and plan.mode is Mode.ENFORCE else None
    return replace(
        plan,
        shadow=shadow,
        bands=tuple(
            replace(band, reserved_percent=band.reserved_percent // len(bands)) for band in bands
        ),
        models=tuple(replace(model, band=draw(names)) for model in plan.models),
        objectives=tuple(replace(objective, band=draw(names)) for objective in plan.objectives),
        unmatched=replace(plan.unmatched, band=draw(names)),
        metrics=metrics,
    )


WORDS = st.sampled_from(["FCFS", "Adaptive", "Queue", "Standard", "", "m"]) | st.text(max_size=3)
FLOATS = st.sampled_from([0.5, 0.0, -1.0]) | st.floats()


@functools.cache
def messages(descriptor):
    """Any message, valid or not; what it has is set or not."""
    kind = message_factory.GetMessageClass(descriptor)
    return st.fixed_dictionaries(
        {}, optional={field.name: field_values(field) for field in descriptor.fields}
    ).map(lambda given_fields: kind(**given_fields))


def field_values(field):
    if field.message_type is not None:
        inner = st.deferred(lambda: messages(field.message_type))
        return st.lists(inner, max_size=3) if field.is_repeated else inner
    if field.type in INTEGERS:
        return st.sampled_from([0, 1, 60, 100]) | st.integers(*INTEGERS[field.type])
    return {field.TYPE_DOUBLE: FLOATS, field.TYPE_BOOL: st.booleans()}.get(field.type, WORDS)


@settings(max_examples=50)
@given(plan=plans(shadowed=True))
def test_a_plan_survives_the_way_there_and_back(plan):
    """Through the bytes on the wire, whatever its fields are."""
    data = mapping.plan_to_message(plan).SerializeToString(deterministic=True)

    assert mapping.plan_from_message(pb.Plan.FromString(data)) == plan


@settings(max_examples=50)
@given(message=messages(pb.Plan.DESCRIPTOR) | plans().map(mapping.plan_to_message))
def test_a_message_is_a_valid_plan_or_says_what_is_wrong(message):
    """Nothing is lost of one, and every error of the other names a field of the message."""
    problems = []
    try:
        plan = mapping.plan_from_message(message)
    except PlanError as error:
        problems = error.problems
    else:
        written = mapping.plan_to_message(plan)
        assert written == without_defaults(message, written)

    for path, what in problems:
        assert path.startswith("plan.")
        assert what
        assert names_a_field(pb.Plan.DESCRIPTOR, path.removeprefix("plan."))


def without_defaults(message, written):
    """Clear what says no more than its absence, which is not written."""
    for field, value in message.ListFields():
        short = getattr(written, field.name)
        if field.message_type is not None:
            pairs = zip(value, short, strict=True) if field.is_repeated else [(value, short)]
            for pair in pairs:
                without_defaults(*pair)
        elif field.has_presence and not written.HasField(field.name):
            message.ClearField(field.name)
    return message


def names_a_field(descriptor, path):
    first, _, rest = path.partition(".")
    name, _, index = first.partition("[")
    field = next((field for field in descriptor.fields if field.json_name == name), None)
    if field is None or bool(index) > field.is_repeated:
        return False
    return not rest or names_a_field(field.message_type, rest)


@given(
    plan=plans(), where=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5)
)
def test_damaged_bytes_are_a_plan_or_refused(plan, where):
    """As they may come from the disk: never a traceback."""
    data = bytearray(mapping.plan_to_message(plan).SerializeToString())
    for position, value in where:
        data[position % len(data)] = value

    read = Programs(plan.pool).read_plan(bytes(data))

    assert isinstance(read, Plan) or (isinstance(read, Nacked) and read.problems)


def test_every_unknown_word_is_told_with_the_words_that_are_known():
    """Beside all that is wrong with the rest of the plan."""
    message = mapping.plan_to_message(Plan())
    message.bands[1].fairness = "Coin"
    message.unmatched.action = ""
    message.limits.max_bytes = 0

    with pytest.raises(PlanError) as raised:
        mapping.plan_from_message(message)

    assert dict(raised.value.problems) == {
        "plan.bands[1].fairness": "'Coin' is not one of " + ", ".join(FairnessName),
        "plan.unmatched.action": "'' is not one of Queue, Reject",
        "plan.limits.maxBytes": "must be 1 to 1099511627776, is 0",
    }


def test_a_list_that_is_too_long_is_not_read_to_its_end():
    """Half a million bands fit into a program, and the error only says how many are allowed."""
    message = mapping.plan_to_message(Plan())
    message.bands.extend([pb.Band()] * 500_000)
    read = []

    with pytest.raises(PlanError) as raised:
        read.append(mapping.plan_from_message(message))

    assert raised.value.problems[0] == ("plan.bands", "must have 1-64 entries, has 500003")
    assert len(raised.value.problems) < 64 * len(fields.fields_of(BandPlan))


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        (replace(Plan(), pool="\ud800"), "pool"),
        (Plan(models=(ModelPlan("\ud800", "Standard"),)), "models[0].name"),
    ],
)
def test_what_its_message_cannot_hold_names_the_field(plan, path):
    """Half of a character pair is text to Python and not to the wire."""
    with pytest.raises(PlanError) as raised:
        mapping.plan_to_message(plan)

    assert [problem for problem, _ in raised.value.problems] == [path]


def test_a_plan_of_an_operator_that_knows_no_selection_has_the_default():
    """It comes without that field, and so does a last good program of an earlier release."""
    message = mapping.plan_to_message(Plan())
    assert not message.HasField("selection")

    plan = mapping.plan_from_message(message)

    assert plan.choice == SelectionPlan()
    assert plan.choice.scorers


def test_what_is_not_valid_is_not_sent():
    """The operator refuses what an EPP would, in the same words."""
    with pytest.raises(PlanError, match=r"limits.maxRequests: must be 1 to 1000000, is 0"):
        mapping.plan_to_message(Plan(limits=LimitsPlan(max_requests=0)))


def test_metrics_that_say_nothing_are_not_the_same_as_none():
    """As in the message, whose field is set or is not."""
    assert mapping.plan_to_message(Plan(metrics=MetricsPlan())).HasField("metrics")
    assert not mapping.plan_to_message(Plan()).HasField("metrics")


# --- another declaration, to show that no field has code of its own


class Colour(StrEnum):
    RED = "Red"
    BLUE = "Blue"


@dataclass(frozen=True)
class Leaf:
    colour: Colour = Colour.RED
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    height_metres: float = 1.0
    leaves: tuple[Leaf, ...] = ()
    crown: Leaf | None = None
    root: Leaf = Leaf()


def _messages(**types):
    """Make message types at run time of {name: [(field, number, type, repeated)]}."""
    file = descriptor_pb2.FileDescriptorProto(name="tree.proto", package="tree", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, given_fields in types.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(given_fields, 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            made.type = kinds.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                made.type_name = f".tree.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tree.Tree"))


STRING = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
DOUBLE = descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE
LEAF = [("colour", STRING, False), ("tags", STRING, True)]
TREE = [
    *(("height_metres", DOUBLE, False), ("leaves", "Leaf", True)),
    *(("crown", "Leaf", False), ("root", "Leaf", False)),
]


def test_any_dataclass_goes_into_the_message_of_its_fields():
    """Enums, lists, parts that may be unset and parts that may not."""
    tree = Tree(2.5, (Leaf(Colour.BLUE, ("a", "b")), Leaf()), None, Leaf(Colour.BLUE))
    message = _messages(Leaf=LEAF, Tree=TREE)()
    problems = []

    mapping.write(tree, message)

    assert mapping.read(Tree, message, problems) == tree
    assert (problems, message.HasField("crown"), message.HasField("root")) == ([], False, True)
    message.leaves[1].colour = "Green"
    mapping.read(Tree, message, problems)
    assert problems == [("leaves[1].colour", "'Green' is not one of Red, Blue")]


@pytest.mark.parametrize("fewer", [TREE[:-1], [*TREE, ("age", DOUBLE, False)]])
def test_declarations_that_differ_are_an_error_at_once(fewer):
    """A field of one that the other has not would be dropped in silence."""
    message = _messages(Leaf=LEAF, Tree=fewer)()

    with pytest.raises(TypeError, match=r"Tree and tree.Tree differ in \['(root|age)'\]"):
        mapping.write(Tree(), message)
    with pytest.raises(TypeError, match="differ in"):
        mapping.read(Tree, message, [])
