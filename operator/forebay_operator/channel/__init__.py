"""The control channel: EPPs dial the operator, get plans from it and acknowledge them."""
