"""Make text written by a model safe to put on a page, and honest about what cannot be seen in it."""

import json
import re
from html import escape
from typing import Any

MAX_CHARACTERS = 4000

# Controls except tab and newline, soft hyphen, bidirectional controls, zero-width characters other than the joiners
# that scripts and emoji need, line separators, lone surrogates, tag characters: all change or hide what is read.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)
_JSON_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def _name(match: re.Match[str]) -> str:
    # Not the control pictures of U+2400: few fonts have them.
    return f"\u27e6U+{ord(match[0]):04X}\u27e7"


def visible(text: object, limit: int | None = MAX_CHARACTERS) -> str:
    """`text` with invisible and direction-changing characters replaced by ⟦U+XXXX⟧, cut at `limit` (None: whole)."""
    whole = text if isinstance(text, str) else "" if text is None else str(text)
    shown = _INVISIBLE.sub(_name, whole[:limit])
    if limit is None or len(whole) <= limit:
        return shown
    return f"{shown}\n\u27e6{len(whole) - limit:,} more characters\u27e7"


def html(text: object, limit: int = MAX_CHARACTERS) -> str:
    """`visible(text)` escaped for an element's content or a quoted attribute."""
    return escape(visible(text, limit))


def embed_json(value: Any) -> str:
    """JSON for the inside of a <script> element: no character of it can end the element or open a comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_JSON_ESCAPES)
