"""The control plane: turns resources into programs for EPPs."""
