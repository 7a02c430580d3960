"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# No test measures time, so no example has a deadline. The gate must not depend on luck: there every
# run tries the same examples; elsewhere each run tries new ones.
settings.register_profile("forebay", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("forebay")
