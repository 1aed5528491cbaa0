"""`bandit-rft`, run by torchrun, whose ranks take each other for dead after seconds: for tests of a failing network."""

from __future__ import annotations

import sys

from bandit_rft.cli import main
from bandit_rft.distributed import watch

if __name__ == "__main__":
    watch.DEAD_AFTER_S, watch.GRACE_S = 5.0, 2.0
    sys.exit(main())
