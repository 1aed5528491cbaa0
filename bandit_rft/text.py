"""Text that a model, a data set or a reward wrote, made fit for a terminal, a log or an error message."""

import unicodedata
from collections.abc import Iterable, Sequence

LIMIT = 600  # characters shown of such a text unless the caller says otherwise


def printable(text: str, limit: int | None = None, *, one_line: bool = False) -> str:
    r"""Show a text as characters that do nothing but stand there.

    A terminal obeys what it is sent: control codes move its cursor, retitle its window, or hide what was written.

    Args:
        text: any text, lone surrogates included.
        limit: characters of it that are shown; None for all.
        one_line: whether newlines are escaped too, so that the text cannot pass for a line of ours.

    Returns:
        The text with every control, format, surrogate and unassigned character but newline and tab written as
        `\xNN`, `\uNNNN` or `\UNNNNNNNN`, and a word on how much was left out.
    """
    shown, left_out = (text, 0) if limit is None else (text[:limit], max(0, len(text) - limit))
    plain = "\t" if one_line else "\n\t"
    shown = "".join(
        c if c in plain or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in shown
    )
    return f"{shown} ... ({left_out} more characters)" if left_out else shown


def shown_error(error: BaseException, limit: int = LIMIT) -> str:
    """Say what was raised on one printable line: its type and its message, which may quote what a model wrote."""
    try:
        message = str(error)
    except Exception:
        message = "a message that cannot be shown"
    return f"{type(error).__name__}: {printable(message, limit, one_line=True)}"


def lone_surrogate(text: str) -> int | None:
    """Return where a text first holds half of a surrogate pair, which UTF-8 cannot encode; None where it does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def html_table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table for a notebook; whatever a cell quotes is shown as text."""
    from html import escape  # not needed where rewards run

    def line(cells: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{escape(printable(str(cell), LIMIT))}</{tag}>" for cell in cells)

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    title = f"<caption>{escape(printable(caption, LIMIT))}</caption>" if caption else ""
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"
