"""The contract between operator and EPP: the messages, and the Plan that both judge alike."""
