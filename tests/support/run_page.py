"""A page as its reader follows it: `python run_page.py PAGE [CHECK ...]`, in a folder and an environment of their own.

Blocks run from top to bottom, those of Python in one session. One whose first line is a comment with a file's name is
that file. Of the commands, `pip install` takes JOURNEY_WHEEL for the "." of the clone, and is left out where that is
not set; left out is also what a reader must complete first ("..."), or needs a trainer that is not there ("# needs").
Each check is an expression that must hold in the session at the end.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main(page: str, *checks: str) -> None:
    """Follow the page; an error of a block or a command is raised."""
    text = Path(page).read_text(encoding="utf-8")
    wheel = os.environ.get("JOURNEY_WHEEL")
    session = {"__name__": "__main__"}
    for block in re.finditer(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        kind, code = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        named = re.match(r"# ([\w.]+)\n", code)
        needed = re.search(r"# needs (\w+)$", code, re.MULTILINE)
        if needed and find_spec(needed[1]) is None:
            continue
        if kind == "sh":
            if "..." in code or (code.startswith("pip install") and not wheel):
                continue
            if code.startswith("pip install"):
                code, found = re.subn(r'(?<=install )("?)\.', rf"\g<1>{wheel}", code, count=1)
                assert found == 1, f"the command of line {line} installs no clone"
            done = subprocess.run(code, shell=True, executable="/bin/bash")
            assert done.returncode == 0, f"the command of line {line} failed"
        elif named:
            Path(named[1]).write_text(code)
        else:
            exec(compile("\n" * line + code, page, "exec"), session)
    for check in checks:
        assert eval(check, session), check


if __name__ == "__main__":
    main(*sys.argv[1:])
