"""The `forebay` command."""


class CommandError(Exception):
    """What keeps a command from going on; the text says what to do."""


OPERATOR_PORT = 9091
