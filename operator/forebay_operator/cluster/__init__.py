"""Everything that knows Kubernetes: API client, watches, the store that they fill, election."""
