"""A real Kubernetes without Docker: what hack/local-cluster and hack/images are made of."""
