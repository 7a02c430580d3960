"""Pure translators between what is on the wire and what the core understands; nothing here waits."""
