"""The generated bootstrap, judged by Envoy itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_cli import envoy

PORTS = envoy.Ports(18080, 19002, 19901)
CONFIGS = {
    "default": envoy.bootstrap(PORTS, secure=True),
    "plaintext": envoy.bootstrap(PORTS, secure=False),
    "buffered": envoy.bootstrap(
        PORTS, secure=True, request_body_mode="BUFFERED", response_body_mode="NONE"
    ),
    "streamed": envoy.bootstrap(
        PORTS, secure=True, request_body_mode="STREAMED", response_body_mode="STREAMED"
    ),
    "observe": envoy.bootstrap(PORTS, secure=True, responses=envoy.OBSERVE),
    "subset": envoy.bootstrap(PORTS, secure=True, subset=("10.0.0.1:80",)),
    "ipv6": envoy.bootstrap(envoy.Ports(18080, 19002, address="::1"), secure=True),
    "direct": envoy.direct(PORTS, ("127.0.0.1:1", "[::1]:2")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_envoy_accepts_the_bootstrap(name, tmp_path):
    """Every variant passes Envoy's own validation."""
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps(CONFIGS[name]))

    result = subprocess.run(
        [
            *(Path(sys.executable).with_name("envoy"), "--mode", "validate"),
            *("-l", "error", "-c", config),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr


def test_forged_headers_are_removed_before_the_endpoint_picker_is_asked():
    """After it would be too late: its own choice would go as well."""
    listener = CONFIGS["default"]["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    names = [one["name"].rpartition(".")[2] for one in manager["http_filters"]]

    assert names == ["header_mutation", "ext_proc", "router"]
    mutations = manager["http_filters"][0]["typed_config"]["mutations"]["request_mutations"]
    assert {"remove": "x-gateway-destination-endpoint"} in mutations
