"""The control channel's certificates: decided purely, then issued."""
