"""The shell of every page: templates that escape whatever they print, one style sheet, one script, no request.

Text from a model, a reward, a file or a user reaches a page through a template expression and nowhere else: it is made
visible (text.visible) and escaped there. Only `Markup` passes as it is, and only this package's own drawing makes it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from bandit_rft.report.plot import number
from bandit_rft.report.text import embed_json, visible


def asset(name: str) -> str:
    """The text of a file beside the templates."""
    return resources.files("bandit_rft.report").joinpath("templates", name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else "" if value is None else visible(value, None)


@cache
def environment(markdown: bool = False) -> Environment:
    """Jinja2 with this package's templates: HTML with everything escaped, or Markdown (see `markdown_text`)."""
    made = Environment(
        loader=FunctionLoader(asset),
        autoescape=not markdown,
        finalize=_markdown if markdown else _shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "cut": visible, "signed": signed, "count": lambda value: f"{value:,}"}
    return made


def signed(value: float) -> str:
    """+0.012, with a real minus sign; a dash for what is not known."""
    return "\u2013" if value != value else f"{value:+.3f}".replace("-", "\u2212")


def render_page(template: str, charts: dict[str, Any], rows: list[dict[str, Any]] | None = None, **context: Any) -> str:
    """A whole page. Its policy allows its one style sheet and one script, by hash, and no request at all.

    Args:
        template: name of a template that extends base.html.
        charts: what the readout of each chart needs, by the chart's id (`Charts.hover`).
        rows: the rollouts of the browser on the page; None where it has none.
        context: what the template names.
    """
    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; style-src {source_hash(style)}; script-src {source_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment().get_template(template).render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        charts=Markup(embed_json(charts)),
        rows=None if rows is None else Markup(embed_json(rows)),
        **context,
    )  # fmt: skip


def source_hash(text: str) -> str:
    """The name of an inline script or style sheet in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def markdown_text(text: object) -> str:
    """Text for a Markdown line: no markup of its own, no HTML, no table cell ended, one line."""
    shown = visible(text, None)
    for character in "\\`*_[]#|~":
        shown = shown.replace(character, "\\" + character)
    return " ".join(shown.replace("<", "&lt;").replace(">", "&gt;").split())


def markdown_block(text: str) -> Markup:
    """A fenced block that nothing inside it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return Markup(f"{fence}\n{visible(text, None).rstrip()}\n{fence}")


def _markdown(value: Any) -> str:
    return str(value) if isinstance(value, Markup) else markdown_text("" if value is None else value)
