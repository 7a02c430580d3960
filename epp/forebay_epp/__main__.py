"""`python -m forebay_epp`: one EPP for one pool."""

import sys

from forebay_epp import app, settings


def main() -> int:
    """Run until SIGTERM or SIGINT; the exit status is 0 after a drain."""
    return app.run(settings.parse())


if __name__ == "__main__":
    sys.exit(main())
