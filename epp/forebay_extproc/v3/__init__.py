"""Generated ext_proc v3 messages."""
