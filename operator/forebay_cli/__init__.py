"""The `forebay` command."""


class CommandError(Exception):
    """An error that ends a command; the text says what to do."""


OPERATOR_PORT = 9091
