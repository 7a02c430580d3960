"""`python -m forebay_operator`."""

from __future__ import annotations

import asyncio
import logging
import sys

from forebay_control import memory
from forebay_operator import app, logs, settings
from forebay_operator.cluster.api import ApiError

_log = logging.getLogger("forebay_operator")


def main() -> int:
    """Run and return the exit status."""
    memory.limit_fragmentation()
    given = settings.parse()
    logs.configure(given.verbosity)

    async def run() -> int:
        if given.manifests is not None:
            return await app.run_folder(given, given.manifests)
        return await app.ClusterOperator(given).run()

    try:
        return asyncio.run(run())
    except (app.StartError, ApiError) as error:
        _log.critical("cannot start: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
