"""Pure translators between the wire and the core; nothing here waits."""
