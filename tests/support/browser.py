"""What the tests of pages share: hostile text, a parser that checks the markup, and a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script>",
    "<!-- <script> --><img src=x onerror='window.pwned = 1'>",
    "<!--<script>",
    "]]></pre></td></table><svg onload=window.pwned=1>",
    '<a href="javascript:window.pwned=1">click</a> javascript:window.pwned=1',
    "a NUL \x00 and a bell \x07, escape \x1b[31m, \x7f",
    "\u202egnp.exe\u202c right-to-left override, \u200bzero width, \U000e0041tag",
    "مرحبا بالعالم שלום",
    "🧑\u200d🔬 🇩🇪 数学 e\u0301",
    "\u2028line\u2029separators\r\n& &amp; &lt;b&gt; ' \" ` ${window.pwned=1}",
    "",
]


class Page(HTMLParser):
    """What a browser would build from the text: elements, attributes, visible text, and the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: dict[str, str] = {}
        self.text = ""
        self.open: list[str] = []
        self.block = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.block = dict(attrs).get("id") or tag
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        self.block = ""

    def handle_data(self, data: str) -> None:
        if self.block:
            self.blocks[self.block] = self.blocks.get(self.block, "") + data
        else:
            self.text += data

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


class Browser:
    """A small WebDriver client: chromedriver speaks plain HTTP and JSON."""

    def __init__(self, port: int, chromium: str, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--window-size=1200,900",
        ]
        wanted = {"goog:chromeOptions": {"binary": chromium, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.as_uri()})

    def resize(self, width: int, height: int = 900) -> None:
        """The page's own size; a window is never narrower than about 500 pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def scheme(self, name: str) -> None:
        """What the system asks for: "dark" or "light"."""
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def log(self) -> list[dict[str, Any]]:
        return list(self.call("POST", "/se/log", {"type": "browser"}))


#: Texts that are hard to read: contrast below 4.5 (3 where large), as WCAG 2.1 defines it, section 1.4.3.
HARD_TO_READ = """
    const rgba = text => { const c = text.match(/[0-9.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c; };
    const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
    const behind = e => { const c = rgba(getComputedStyle(e).backgroundColor);
        return c[3] === 1 || !e.parentElement ? over(c, [255, 255, 255]) : over(c, behind(e.parentElement)); };
    const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
    return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('script, style')
        && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
        const style = getComputedStyle(e), back = behind(e);
        const front = over(rgba(e instanceof SVGElement ? style.fill : style.color), back);
        const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), parseFloat(style.fontSize) >= 24 ? 3 : 4.5, e];
    }).filter(([contrast, least]) => contrast < least).map(([contrast, , e]) =>
        `${e.tagName}.${e.className.baseVal ?? e.className} ${contrast.toFixed(2)} ${e.textContent.slice(0, 30)}`);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = next(int(m[1]) for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        session = Browser(port, chromium, tmp_path_factory.mktemp("profile"))
        yield session
        session.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)
