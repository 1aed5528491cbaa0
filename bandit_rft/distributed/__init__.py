"""One run in several processes: who they are, what is split over them, and what becomes of the others when one dies.

The loop is the same for any number of ranks. It asks a `Ranks` object, which for one process does nothing.
"""

from bandit_rft.distributed.launch import join_ranks
from bandit_rft.distributed.ranks import RankError, Ranks

__all__ = ["RankError", "Ranks", "join_ranks"]
