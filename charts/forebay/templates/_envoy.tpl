{{- /* The bootstrap of a pool's Envoy: (dict "root" $ "values" PROXY VALUES "name" SERVICE OF THE
ENDPOINT PICKERS "namespace" NAMESPACE "port" NUMBER "responses" Observe OR Read "several" BOOLEAN). It is what operator/forebay_cli/envoy.py makes for one machine, where
each setting's reason stands, and what pods need besides: a test holds the two together. */}}
{{- define "forebay.envoyBreakers" -}}
thresholds:
- {max_connections: 40000, max_pending_requests: 40000, max_requests: 40000, max_retries: 1024}
{{- end }}
{{- define "forebay.envoy" -}}
{{- $observe := eq .responses "Observe" }}
admin:
  address: {socket_address: {address: 127.0.0.1, port_value: 19000}}
static_resources:
  listeners:
  - name: inference
    address: {socket_address: {address: 0.0.0.0, port_value: {{ .values.listenPort }}}}
    per_connection_buffer_limit_bytes: 32768
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inference
          stream_idle_timeout: 0s
          request_timeout: 0s
          generate_request_id: true
          upgrade_configs: [{upgrade_type: websocket}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: /}
                route:
                  cluster: model_servers
                  timeout: 0s
                  idle_timeout: 0s
                  retry_policy: {retry_on: connect-failure, num_retries: 1}
          http_filters:
          # A client must not choose the server: the cluster below goes wherever this header says.
          - name: envoy.filters.http.header_mutation
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
              mutations:
                request_mutations:
                - {remove: x-gateway-destination-endpoint}
                - {remove: x-gateway-destination-endpoint-subset}
                - {remove: x-gateway-destination-endpoint-served}
          # Decides where a request goes.
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {cluster_name: epp, authority: epp}
                {{- if $observe }}
                initial_metadata: [{key: x-forebay-responses, value: Observe}]
                {{- end }}
                {{- if .several }}
                retry_policy:
                  num_retries: 5
                  retry_on: connect-failure,refused-stream,reset
                  retry_back_off: {base_interval: 0.005s, max_interval: 0.05s}
                  retry_host_predicate:
                  - name: envoy.retry_host_predicates.previous_hosts
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
                  host_selection_retry_max_attempts: 30
                {{- end }}
              failure_mode_allow: false
              processing_mode:
                request_header_mode: SEND
                request_body_mode: FULL_DUPLEX_STREAMED
                request_trailer_mode: SEND
                {{- if $observe }}
                response_header_mode: SKIP
                response_body_mode: NONE
                response_trailer_mode: SKIP
                {{- else }}
                response_header_mode: SEND
                response_body_mode: FULL_DUPLEX_STREAMED
                response_trailer_mode: SEND
                {{- end }}
              message_timeout: 3600s
              max_message_timeout: 3600s
              metadata_options:
                forwarding_namespaces: {untyped: [envoy.lb, envoy.lb.subset_hint]}
                receiving_namespaces: {untyped: [envoy.lb{{ if $observe }}, forebay{{ end }}]}
          {{- if $observe }}
          # Shows when the answer ends, to the endpoint picker that has decided.
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {cluster_name: epp, authority: epp}
                initial_metadata:
                - {key: x-forebay-tie, value: "%DYNAMIC_METADATA(forebay:tie)%"}
                - {key: x-forebay-owner, value: "%DYNAMIC_METADATA(forebay:owner)%"}
              observability_mode: true
              failure_mode_allow: true
              deferred_close_timeout: 0.001s
              processing_mode:
                request_header_mode: SEND
                request_body_mode: NONE
                request_trailer_mode: SKIP
                response_header_mode: SEND
                response_body_mode: NONE
                response_trailer_mode: SEND
          {{- end }}
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  # For the kubelet: the admin page listens on loopback only.
  - name: health
    address: {socket_address: {address: 0.0.0.0, port_value: 8082}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: health
          route_config: {}
          http_filters:
          # Ready while an endpoint picker is: without one every request would fail.
          - name: envoy.filters.http.health_check
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
              pass_through_mode: false
              cluster_min_healthy_percentages: {epp: {value: 1}}
              headers: [{name: ":path", string_match: {exact: /ready}}]
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  # Where the endpoint picker says. It names pods of the pool; Envoy need not know them.
  - name: model_servers
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 3s
    original_dst_lb_config: {use_http_header: true, http_header_name: x-gateway-destination-endpoint}
    upstream_connection_options:
      tcp_keepalive: {keepalive_time: 30, keepalive_interval: 10, keepalive_probes: 3}
    # Below the 5 s after which model servers close an idle connection.
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {idle_timeout: 3s}
        explicit_http_config: {http_protocol_options: {}}
    circuit_breakers:
      {{- include "forebay.envoyBreakers" . | nindent 6 }}
  - name: epp
    # Every address that the name has, as STRICT_DNS does; that type's own field is deprecated.
    cluster_type:
      name: envoy.clusters.dns
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster
        dns_refresh_rate: 2s
        dns_lookup_family: V4_PREFERRED  # endpoint pickers listen on 0.0.0.0
    connect_timeout: 5s
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
            override_host_sources: [{header: x-forebay-owner}]
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.least_request
                  typed_config:
                    "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest
    common_lb_config: {healthy_panic_threshold: {value: 0}}
    # A pod that DNS does not name any more gets no more requests; those that it has, it finishes.
    ignore_health_on_host_removal: true
    circuit_breakers:
      {{- include "forebay.envoyBreakers" . | nindent 6 }}
    {{- if .several }}
    outlier_detection:
      split_external_local_origin_errors: true
      consecutive_local_origin_failure: 1
      enforcing_consecutive_local_origin_failure: 100
      interval: 0.5s
      base_ejection_time: 5s
      max_ejection_time: 5s
      max_ejection_percent: 100
    {{- end }}
    # One that drains says so, and is out within a second.
    health_checks:
    - timeout: {{ .several | ternary "1s" "2s" }}
      interval: 1s
      no_traffic_interval: 1s
      unhealthy_threshold: 2
      healthy_threshold: 1
      grpc_health_check: {service_name: envoy.service.ext_proc.v3.ExternalProcessor}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {{ if .several }}{connection_keepalive: {interval: 5s, timeout: 5s}}{{ else }}{}{{ end }}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context: {alpn_protocols: [h2]}
    load_assignment:
      cluster_name: epp
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{ .name }}.{{ .namespace }}.svc.{{ .root.Values.clusterDomain }}, port_value: {{ .port }}}}}
{{- end }}
