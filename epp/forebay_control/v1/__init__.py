"""The contract between operator and EPP: messages only, no behaviour."""
