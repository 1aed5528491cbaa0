"""The numbers by which the kernels know an objective and a KL estimator: the same in Python, Triton, C++ and CUDA.

csrc/row_math.h has the same two enumerations, and the compiled module exports them; a test holds the two together.
Names are those of `bandit_rft.PolicyObjective`.
"""

from __future__ import annotations

from enum import IntEnum


class ObjectiveKind(IntEnum):
    """How a token's dL/dlogp comes about. `given`: the caller has it. gspo is `given`: it needs the whole sequence."""

    given = 0
    reinforce = 1
    importance = 2
    ppo = 3
    cispo = 4
    importance_mask = 5


class KLKind(IntEnum):
    """The estimator of KL(policy || reference) whose derivative is added to dL/dlogp."""

    none = 0
    k1 = 1
    k2 = 2
    k3 = 3
