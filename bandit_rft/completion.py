"""What makes a shell complete commands, flags, keys, their values and files, made by the library shtab."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from bandit_rft.arguments import make_parser, subcommands

#: Metavars that stand for a file or a folder.
PLACES = re.compile(r"FILE|OUT|RUN|STUDY")


def completion_script(shell: str) -> str:
    """The script that a shell sources.

    Args:
        shell: bash, zsh or tcsh.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    import shtab

    parser = make_parser()
    _describe(parser, shtab.FILE)
    script: str = shtab.complete(parser, shell=shell)
    return script


def _describe(parser: argparse.ArgumentParser, file: object) -> None:
    """Say of every flag what may stand behind it."""
    from bandit_rft.advantages import ADVANTAGES
    from bandit_rft.config import keys
    from bandit_rft.options import choices
    from bandit_rft.presets import PRESETS
    from bandit_rft.tasks import TASKS

    named: dict[str, Iterable[str]] = {"preset": PRESETS, "advantage": ADVANTAGES, "task": TASKS, "dry_run": ("probe",)}
    known = keys()
    for action in parser._actions:
        key = known.get(action.dest)
        values = tuple(named.get(action.dest) or (choices(key.kind) if key else ()))
        if key is not None and key.switch:
            values = ("true", "false")
        if action.option_strings and values:
            action.choices = list(values)
        elif PLACES.search(str(action.metavar)) or action.dest.endswith(("_path", "_dir")) or action.dest == "resume":
            action.complete = file  # type: ignore[attr-defined]
    for sub in subcommands(parser).values():
        _describe(sub, file)
