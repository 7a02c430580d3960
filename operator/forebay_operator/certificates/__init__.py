"""The control channel's certificates: decided purely, issued, reloaded."""
