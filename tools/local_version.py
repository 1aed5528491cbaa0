"""The package's version, for scikit-build-core: the base of pyproject.toml, and what a wheel was built for.

BANDIT_RFT_LOCAL_VERSION=cu130 makes 0.1.0 into 0.1.0+cu130; without it a build has no local version.
"""

from __future__ import annotations

import os
import re


def dynamic_metadata(field: str, settings: dict[str, str]) -> str:
    """The version (`field` is always "version"); ValueError if the environment's local label is no valid one."""
    local = os.environ.get("BANDIT_RFT_LOCAL_VERSION", "")
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise ValueError(f"BANDIT_RFT_LOCAL_VERSION must be lower-case letters, digits and dots; got {local!r}")
    return f"{settings['base']}+{local}" if local else settings["base"]
