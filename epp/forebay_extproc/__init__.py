"""The part of Envoy's ext_proc v3 API that an EPP speaks, as generated messages.

The .proto carries the real package and service name; field numbers are Envoy's. PyPI xds-protos is
not used because it overwrites files of OpenTelemetry's packages; tests compare against it.
"""
