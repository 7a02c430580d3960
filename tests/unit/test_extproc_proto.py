"""Our .proto against Envoy's own, as PyPI's xds-protos has it.

Both register the same names, so the oracle runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from forebay_extproc.v3 import external_processor_pb2 as pb

ORACLE = """
import json, sys
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from envoy.config.core.v3 import base_pb2
from envoy.type.v3 import http_status_pb2
from google.protobuf.json_format import MessageToDict
asked = json.load(sys.stdin)
if "fields" in asked:
    def describe(message):
        return {f.name: [f.number, f.type, f.is_repeated] for f in message.DESCRIPTOR.fields}
    def find(name):
        for module in (ep, base_pb2, http_status_pb2):
            if hasattr(module, name):
                return getattr(module, name)
        from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
        return getattr(processing_mode_pb2, name)
    print(json.dumps({name: describe(find(name)) for name in asked["fields"]}))
elif "decode" in asked:
    message = getattr(ep, asked["decode"]).FromString(bytes.fromhex(asked["bytes"]))
    again = message.SerializeToString(deterministic=True).hex()
    print(json.dumps({"dict": MessageToDict(message), "bytes": again}))
else:
    from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as pm
    print(json.dumps({
        "modes": dict(pm.ProcessingMode.BodySendMode.items()),
        "service": ep.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name,
    }))
"""


def oracle(question: dict) -> dict:
    """Ask xds-protos."""
    return json.loads(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ORACLE],
            input=json.dumps(question),
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )


def messages() -> dict:
    """All our messages by name."""
    return dict(pb.DESCRIPTOR.message_types_by_name)


def test_every_field_has_envoys_number_and_type():
    """Message by message, field by field; enums of HTTP status codes travel as integers."""
    theirs = oracle({"fields": [name for name in messages() if name != "BodySendMode"]})
    integers = {5, 13, 14}  # int32, uint32, enum: the same varint for our values

    different = []
    for name, descriptor in messages().items():
        for field in descriptor.fields:
            number, kind, repeated = theirs[name][field.name]
            same_kind = kind == field.type or {kind, field.type} <= integers
            if (number, repeated) != (field.number, field.is_repeated) or not same_kind:
                different.append(f"{name}.{field.name}")

    assert different == []


def test_service_and_modes_have_envoys_names():
    """The path of the RPC and the numbers of the body modes."""
    theirs = oracle({})

    assert theirs["service"] == pb.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name
    assert theirs["modes"] == dict(pb.BodySendMode.items())


@pytest.mark.parametrize("kind", ["ProcessingRequest", "ProcessingResponse"])
def test_a_message_means_the_same_to_envoy(kind):
    """Bytes that we write are read there field for field, and come back unchanged."""
    if kind == "ProcessingRequest":
        message = pb.ProcessingRequest(
            request_headers=pb.HttpHeaders(
                headers=pb.HeaderMap(headers=[pb.HeaderValue(key=":path", raw_value=b"/v1")]),
                end_of_stream=True,
            ),
            protocol_config=pb.ProtocolConfiguration(
                request_body_mode=pb.FULL_DUPLEX_STREAMED,
                response_body_mode=pb.BUFFERED,
                send_body_without_waiting_for_header_response=True,
            ),
        )
        message.metadata_context.filter_metadata["envoy.lb"]["key"] = "value"
    else:
        message = pb.ProcessingResponse()
        immediate = message.immediate_response
        immediate.status.code = 429
        immediate.headers.set_headers.add().header.CopyFrom(
            pb.HeaderValue(key="retry-after", raw_value=b"3")
        )
        immediate.body = b"{}"
        immediate.details = "why"
        message.dynamic_metadata.get_or_create_struct("envoy.lb")["key"] = "value"

    theirs = oracle({"decode": kind, "bytes": message.SerializeToString().hex()})

    assert bytes.fromhex(theirs["bytes"]) == message.SerializeToString(deterministic=True)
    assert theirs["dict"]
