"""The control plane: from resources to what an EPP is told."""
