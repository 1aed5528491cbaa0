"""What the C library does with memory that a round on a CPU frees: keep it for the next round.

glibc gives the end of its heap back to the system as soon as some megabytes of it are free, and the system clears
every page that it hands out again. A round allocates and frees the same activations each time, so it would wait for
those pages over and over.
"""

from __future__ import annotations

import ctypes
import os

# of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Bytes at the end of the heap that stay there though they are free.
KEPT = 256 << 20
#: Blocks smaller than this come from the heap: the most that glibc allows.
FROM_HEAP = 32 << 20
#: What a user sets to choose for themselves; nothing here overrides it.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep up to 256 MiB that are free at the end of its heap, unless the environment sets its thresholds.

    Returns:
        Whether the C library took them: another one has no such thresholds, and an allocator loaded in place of
        glibc's may take them and not heed them.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no library of that name
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, FROM_HEAP) and mallopt(_M_TRIM_THRESHOLD, KEPT))
