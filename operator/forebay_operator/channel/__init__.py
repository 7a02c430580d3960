"""The control channel: EPPs dial the operator, receive programs and acknowledge them."""
