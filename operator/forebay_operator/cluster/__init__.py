"""All that knows Kubernetes: the API's caller, watches, the store that they fill, election."""
