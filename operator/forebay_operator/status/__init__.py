"""What `.status` says of resources, and what an author should look at again. Pure."""
