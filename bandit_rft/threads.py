"""How the CPU threads of a command wait for work: the one setting that must be made before torch is imported.

torch's threads (GNU OpenMP) spin between two parallel regions, for up to some milliseconds, so that the next one starts
at once. Beside other busy processes such a thread burns a time slice that the thread it waits for would have needed.
So they spin for some microseconds, long enough for the gaps within a round, and then sleep.
benchmarks/test_thread_wait.py measures what each costs.
"""

from __future__ import annotations

import os
import sys

#: Turns of the waiting loop before a thread goes to sleep, where libgomp's own default is 300,000.
SPINS = 3000
#: What a user sets to choose for themselves; nothing here overrides it.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def choose_wait(policy: str) -> bool:
    """Set how OpenMP threads wait in this process and its children, unless the environment says it already.

    Args:
        policy: bounded (spin for some microseconds, then sleep) | active (always spin) | passive (sleep at once).

    Returns:
        Whether the choice takes effect: not where a variable of OpenMP is set, nor where torch has been imported.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return False
    if policy == "bounded":
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    else:
        os.environ["OMP_WAIT_POLICY"] = policy.upper()
    return True
