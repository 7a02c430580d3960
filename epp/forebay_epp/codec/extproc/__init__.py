"""Envoy's external processing protocol: its messages (framing) and one stream of it (stream)."""
