"""The control plane: from resources to what an endpoint picker is told."""
