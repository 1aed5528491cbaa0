"""The pictures of the README's first screen, from a run of the demo: what the terminal shows, and its curves.

pip install pyte && python tools/pictures.py    writes docs/images/demo.svg and demo-learning.svg
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from bandit_rft.report.picture import learning_picture

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMNS, LINES = 116, 60
BOLD = "bold"


def terminal(command: list[str], folder: Path) -> Text:
    """What a terminal shows when a command has ended."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    ours, theirs = pty.openpty()
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    while True:
        try:
            sent = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not sent:
            break
        stream.feed(sent.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    if process.wait():
        raise SystemExit("\n".join(screen.display))
    shown = Text()
    for number in range(LINES):
        for column in range(COLUMNS):
            cell = screen.buffer[number][column]
            shown.append(cell.data, BOLD if cell.bold else "")
        shown.rstrip()
        shown.append("\n")
    shown.rstrip()
    return shown


def main() -> None:
    """Write both pictures."""
    command = [sys.executable, "-m", "bandit_rft", "train", "--preset", "demo", "--output_dir", "demo"]
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text("$ bandit-rft train --preset demo", style=BOLD))
    with tempfile.TemporaryDirectory() as folder:
        console.print(terminal(command, Path(folder)))
        picture = console.export_svg(title="bandit-rft")
        (IMAGES / "demo.svg").write_text(
            re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
        )  # fetches nothing
        (IMAGES / "demo-learning.svg").write_text(learning_picture(Path(folder) / "demo"))


if __name__ == "__main__":
    main()
