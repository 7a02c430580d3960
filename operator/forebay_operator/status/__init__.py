"""The content of `.status`, and advice to authors of resources. Pure."""
