"""The Envoy that stands in front of an EPP on one machine: its bootstrap.

What the settings are for is written beside them; the measurements behind them are in
epp/README.md. Running Envoy (stack.py) does not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DESTINATION = "x-gateway-destination-endpoint"

# Every queued request holds a stream to the EPP and, once dispatched, a connection to
# its model server. Envoy's default of 1,024 would answer the next one with 500.
MAX_REQUESTS = 40_000

# A queue's TTL must end a wait, never the proxy. In full duplex this timer is not armed.
MESSAGE_TIMEOUT = "3600s"

# vLLM, SGLang and trtllm-serve (uvicorn) close a connection that has been idle for 5 s. A request
# sent at that moment fails and must not be retried: the server may have it. So Envoy closes first,
# with 2 s in hand for machines that stall.
IDLE_TIMEOUT = "3s"

# Linux sends SYN again after 1 s. Two attempts, then the client learns that the server is away.
CONNECT_TIMEOUT = "3s"

# A server that vanishes in the middle of an answer is noticed after 60 s.
KEEPALIVE = {"keepalive_time": 30, "keepalive_interval": 10, "keepalive_probes": 3}

# Also the size of the pieces in which bodies reach the EPP. A proxy that buffers has to
# hold a whole body instead, or it answers 413 by itself.
BUFFER_BYTES = 32_768
WHOLE_BODY_BYTES = 64 << 20

# How the EPP learns of answers, see `bootstrap`.
OBSERVE, READ = "Observe", "Read"
EPP_NAMESPACE = "forebay"
# What the EPP and its cluster read in the metadata of a call; clients cannot write it.
RESPONSES_KEY, TIE_KEY, OWNER_KEY = "x-forebay-responses", "x-forebay-tie", "x-forebay-owner"

_TYPE = "type.googleapis.com/envoy."


@dataclass(frozen=True, slots=True)
class Ports:
    """Where Envoy listens and where it finds the EPP, or several; all on `address`."""

    http: int
    grpc: int
    admin: int = 0
    address: str = "127.0.0.1"
    more_grpc: tuple[int, ...] = ()


def bootstrap(
    ports: Ports,
    *,
    secure: bool,
    request_body_mode: str = "FULL_DUPLEX_STREAMED",
    response_body_mode: str = "FULL_DUPLEX_STREAMED",
    subset: tuple[str, ...] = (),
    max_message_timeout: str = MESSAGE_TIMEOUT,
    message_timeout: str = MESSAGE_TIMEOUT,
    responses: str = READ,
) -> dict[str, Any]:
    """Return the configuration of an Envoy that asks the EPP where requests go.

    Args:
        ports: listeners.
        secure: whether the EPP serves TLS; its certificate is not verified, as all
            gateways that speak this protocol do.
        request_body_mode: ext_proc's body mode on the way in.
        response_body_mode: the same on the way out.
        subset: addresses to hint the EPP at, as a gateway would.
        max_message_timeout: how far the EPP may extend `message_timeout`.
        message_timeout: how long Envoy waits for an answer in modes with a timeout.
        responses: OBSERVE shows the EPP an answer's headers and its end, in a stream of their own;
            with READ the answer passes through the EPP in `response_body_mode`.
    """
    observe = responses == OBSERVE
    if observe:
        response_body_mode = "NONE"
    trailers = "SEND" if "FULL_DUPLEX" in request_body_mode + response_body_mode else "SKIP"
    filters = [
        _filter(
            # A client must not choose the server. A route's header removal would come too late:
            # it runs after the EPP and would remove its choice.
            "header_mutation",
            "header_mutation.v3.HeaderMutation",
            mutations={
                "request_mutations": [
                    {"remove": name}
                    for name in (DESTINATION, f"{DESTINATION}-subset", f"{DESTINATION}-served")
                ]
            },
        )
    ]
    if subset:
        filters.append(
            _filter(
                "set_metadata",
                "set_metadata.v3.Config",
                metadata=[
                    {
                        "metadata_namespace": "envoy.lb.subset_hint",
                        "allow_overwrite": True,
                        "value": {f"{DESTINATION}-subset": list(subset)},
                    }
                ],
            )
        )
    filters.append(
        _filter(
            "ext_proc",
            "ext_proc.v3.ExternalProcessor",
            grpc_service=_retrying(
                _grpc_service(**({RESPONSES_KEY: OBSERVE} if observe else {})),
                several=bool(ports.more_grpc),
            ),
            # Without the EPP there is no destination: fail rather than guess.
            failure_mode_allow=False,
            processing_mode={
                "request_header_mode": "SEND",
                "request_body_mode": request_body_mode,
                "request_trailer_mode": trailers,
                "response_header_mode": "SKIP" if observe else "SEND",
                "response_body_mode": response_body_mode,
                "response_trailer_mode": "SKIP" if observe else trailers,
            },
            message_timeout=message_timeout,
            max_message_timeout=max_message_timeout,
            metadata_options={
                "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]},
                "receiving_namespaces": {
                    "untyped": ["envoy.lb", EPP_NAMESPACE] if observe else ["envoy.lb"]
                },
            },
        )
    )
    if observe:
        filters.append(_observer())
    model_servers = _model_servers(
        type="ORIGINAL_DST",
        lb_policy="CLUSTER_PROVIDED",
        original_dst_lb_config={"use_http_header": True, "http_header_name": DESTINATION},
    )
    whole = "BUFFERED" in (request_body_mode, response_body_mode)
    return _envoy(
        ports,
        filters,
        [model_servers, _epp_cluster(ports, secure=secure)],
        WHOLE_BODY_BYTES if whole else BUFFER_BYTES,
    )


def _observer() -> dict[str, Any]:
    """Return the filter that shows the EPP the answer's headers and its end, and waits for nothing.

    The EPP's answer to the filter before it has left the metadata with which this one calls.
    """
    return _filter(
        "ext_proc",
        "ext_proc.v3.ExternalProcessor",
        grpc_service=_grpc_service(
            **{
                TIE_KEY: f"%DYNAMIC_METADATA({EPP_NAMESPACE}:tie)%",
                OWNER_KEY: f"%DYNAMIC_METADATA({EPP_NAMESPACE}:owner)%",
            }
        ),
        observability_mode=True,
        # An answer goes on without an EPP that sees it.
        failure_mode_allow=True,
        # By default a stream is kept for 5 s after its answer has ended. Its end frees the slot.
        deferred_close_timeout="0.001s",
        processing_mode={
            "request_header_mode": "SEND",  # or the stream would begin with the answer
            "request_body_mode": "NONE",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
            "response_trailer_mode": "SEND",
        },
    )


def _grpc_service(**metadata: str) -> dict[str, Any]:
    service: dict[str, Any] = {"envoy_grpc": {"cluster_name": "epp", "authority": "epp"}}
    if metadata:
        service["initial_metadata"] = [
            {"key": key, "value": value} for key, value in metadata.items()
        ]
    return service


def _retrying(service: dict[str, Any], *, several: bool) -> dict[str, Any]:
    """Have another EPP take a stream that is lost with an EPP which has not answered it yet.

    What the EPP had decided has not reached Envoy then, so the request is nowhere twice.
    """
    if several:
        service["retry_policy"] = {
            "num_retries": 5,
            "retry_on": "connect-failure,refused-stream,reset",
            "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
            # The balancer chooses at random among the EPPs that are not known to be dead.
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": f"{_TYPE}extensions.retry.host.previous_hosts.v3."
                        "PreviousHostsPredicate"
                    },
                }
            ],
            "host_selection_retry_max_attempts": 30,
        }
    return service


def direct(ports: Ports, endpoints: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration of an Envoy without EPP: least request.

    This is what the demo compares with.
    """
    model_servers = _model_servers(
        type="STATIC",
        lb_policy="LEAST_REQUEST",
        load_assignment=_assignment(
            "model_servers", [endpoint.rpartition(":") for endpoint in endpoints]
        ),
    )
    return _envoy(ports, [], [model_servers])


def _filter(name: str, kind: str, **config: Any) -> dict[str, Any]:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"{_TYPE}extensions.filters.http.{kind}", **config},
    }


def _breakers() -> dict[str, Any]:
    return {
        "thresholds": [
            {
                "max_connections": MAX_REQUESTS,
                "max_pending_requests": MAX_REQUESTS,
                "max_requests": MAX_REQUESTS,
                "max_retries": 1024,
            }
        ]
    }


def _assignment(name: str, endpoints: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "cluster_name": name,
        "endpoints": [
            {
                "lb_endpoints": [
                    {"endpoint": {"address": _socket(host.strip("[]"), int(port))}}
                    for host, _, port in endpoints
                ]
            }
        ],
    }


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _http_options(**options: Any) -> dict[str, Any]:
    name = "extensions.upstreams.http.v3.HttpProtocolOptions"
    return {f"envoy.{name}": {"@type": f"{_TYPE}{name}", **options}}


def _model_servers(**options: Any) -> dict[str, Any]:
    return {
        "name": "model_servers",
        "connect_timeout": CONNECT_TIMEOUT,
        "circuit_breakers": _breakers(),
        "upstream_connection_options": {"tcp_keepalive": KEEPALIVE},
        "typed_extension_protocol_options": _http_options(
            common_http_protocol_options={"idle_timeout": IDLE_TIMEOUT},
            explicit_http_config={"http_protocol_options": {}},
        ),
        **options,
    }


def _policies(kind: str, **config: Any) -> dict[str, Any]:
    name = kind.partition(".")[0]
    policy = {
        "name": f"envoy.load_balancing_policies.{name}",
        "typed_config": {"@type": f"{_TYPE}extensions.load_balancing_policies.{kind}", **config},
    }
    return {"policies": [{"typed_extension_config": policy}]}


def _epp_cluster(ports: Ports, *, secure: bool) -> dict[str, Any]:
    http2: dict[str, Any] = {}
    cluster: dict[str, Any] = {
        "name": "epp",
        "type": "STATIC",
        "connect_timeout": "5s",
        # To the owner of an answer, else to the least loaded.
        "load_balancing_policy": _policies(
            "override_host.v3.OverrideHost",
            override_host_sources=[{"header": OWNER_KEY}],
            fallback_policy=_policies("least_request.v3.LeastRequest"),
        ),
        # With the default of 50 % a dead EPP would go on getting requests.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": _breakers(),
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "5s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {
                    "service_name": "envoy.service.ext_proc.v3.ExternalProcessor"
                },
            }
        ],
        "typed_extension_protocol_options": _http_options(
            explicit_http_config={"http2_protocol_options": http2}
        ),
        "load_assignment": _assignment(
            "epp", [(ports.address, ":", str(port)) for port in (ports.grpc, *ports.more_grpc)]
        ),
    }
    if ports.more_grpc:
        # An EPP that has died is left out at its first refused connection, not by a health check.
        cluster["outlier_detection"] = {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_consecutive_local_origin_failure": 100,
            "interval": "0.5s",
            "base_ejection_time": "5s",
            "max_ejection_time": "5s",
            "max_ejection_percent": 100,
        }
        # One that is frozen still takes connections. What waits in it goes to another one when it
        # answers no ping; one that drains answers.
        cluster["health_checks"][0] |= {"timeout": "1s", "interval": "1s"}
        http2["connection_keepalive"] = {"interval": "5s", "timeout": "5s"}
    if secure:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPE}extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {"alpn_protocols": ["h2"]},
            },
        }
    return cluster


def _envoy(
    ports: Ports,
    filters: list[dict[str, Any]],
    clusters: list[dict[str, Any]],
    buffer_bytes: int = BUFFER_BYTES,
) -> dict[str, Any]:
    connection_manager = {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3."
        "HttpConnectionManager",
        "stat_prefix": "inference",
        # A queued request is idle and a long answer is long: neither is to be cut.
        "stream_idle_timeout": "0s",
        "request_timeout": "0s",
        "generate_request_id": True,
        # Without it Envoy answers an upgrade with 403.
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {
                                "cluster": "model_servers",
                                "timeout": "0s",
                                "idle_timeout": "0s",
                                # Safe: the server has not seen a request that fails like this.
                                # No other failure is. reset-before-request is no help against
                                # a server that closes: by then the headers have been sent.
                                "retry_policy": {"retry_on": "connect-failure", "num_retries": 1},
                            },
                        }
                    ],
                }
            ]
        },
        "http_filters": [*filters, _filter("router", "router.v3.Router")],
    }
    return {
        "admin": {"address": _socket("127.0.0.1", ports.admin)},
        "static_resources": {
            "listeners": [
                {
                    "name": "inference",
                    "address": _socket(ports.address, ports.http),
                    "per_connection_buffer_limit_bytes": buffer_bytes,
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": connection_manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": clusters,
        },
    }
