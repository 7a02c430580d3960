"""The contract between operator and endpoint picker: messages only, no behaviour."""
