"""Names that may be a folder or of the Hugging Face hub: the folder is looked for first, the hub asked quietly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

#: What the hub calls things: a name, or an owner's name.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: Where the hub's library says, for every file and every try, that a request failed and that it waits.
_CHATTER = "huggingface_hub.utils._http"


def check_place(argument: str, name: str) -> None:
    """Refuse what can only be a path, where nothing is: asking the hub for it would take a minute to fail.

    Args:
        argument: its name, for the message.
        name: a folder, a file, or a name of the hub.

    Raises:
        FileNotFoundError: it is neither a path to something nor a possible name.
    """
    try:
        place = Path(name).expanduser()
        if place.exists():
            return
        # data/gsm: no such folder in the folder data that is there
        beside = len(place.parts) == 2 and place.parent.is_dir()
    except (OSError, ValueError) as error:  # a null byte, a name too long
        raise FileNotFoundError(f"{argument}: {name!r} is no path ({error})") from None
    if not _NAME.fullmatch(name):
        raise FileNotFoundError(f"{argument}: there is no folder or file {name!r}")
    if beside:
        found = sorted(path.name for path in place.parent.iterdir() if not path.name.startswith("."))[:10]
        raise FileNotFoundError(
            f"{argument}: there is no {name!r}; the folder {str(place.parent)!r} holds {', '.join(found) or 'nothing'}"
        )


class _Once(logging.Filter):
    """Lets the first failed request through as one line of ours, and holds back what follows."""

    def __init__(self, name: str):
        super().__init__()
        self._what, self._said = name, False

    def filter(self, record: logging.LogRecord) -> bool:
        if logger.isEnabledFor(logging.DEBUG):  # --verbose: all of it
            return True
        if not self._said and record.levelno >= logging.WARNING:
            self._said = True
            logger.warning("the Hugging Face hub does not answer for %s; trying again for up to a minute", self._what)
        return False


@contextmanager
def asking(name: str) -> Iterator[None]:
    """While the hub is asked for a name: that it does not answer, and is asked again, is said once."""
    once, chatter = _Once(name), logging.getLogger(_CHATTER)
    chatter.addFilter(once)
    try:
        yield
    finally:
        chatter.removeFilter(once)
