"""Secondary programs, run from the root as python -m tools.NAME."""

import config  # noqa: F401  before torch, see there
