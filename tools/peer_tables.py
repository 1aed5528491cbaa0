"""Writes the tables of docs/guides/from-trl.md and from-verl.md: names (from bandit_rft/peer_names.py) and parity.

python tools/peer_tables.py          the names alone
python tools/peer_tables.py trl      and what is measured against TRL, which must be installed
python tools/peer_tables.py verl     and against verl (pip install verl==0.9.1, in an environment of its own)
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]


def write(guide: str, table: str, text: str) -> None:
    """Put a table between its two markers."""
    path = ROOT / guide
    page = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {table}: [^\n]*-->\n)(.*?)(<!-- end of {table} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{guide} has no place for the table of {table}")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[3]}", page), encoding="utf-8")


def main(wanted: list[str]) -> None:
    from bandit_rft.peer_names import GUIDES, markdown

    for peer, guide in GUIDES.items():
        write(guide, "names", markdown(peer))
    if "trl" in wanted:
        from tiny_models import save_tiny_llama
        from trl_parity import parity_table

        with tempfile.TemporaryDirectory() as folder:
            write(GUIDES["TRL"], "parity", parity_table(save_tiny_llama(Path(folder))))
    if "verl" in wanted:
        from verl_parity import parity_table as verl_parity_table

        write(GUIDES["verl"], "parity", verl_parity_table())


if __name__ == "__main__":
    main(sys.argv[1:])
