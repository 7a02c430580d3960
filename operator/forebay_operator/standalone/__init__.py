"""The operator of a folder of manifests, without a cluster."""
