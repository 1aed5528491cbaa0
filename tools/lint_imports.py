"""import-linter on this folder's sources: `lint-imports`, without the editable install's finder.

That finder also names this folder itself as a place of the package's modules (it installs `kernels` as
`bandit_rft.kernels`), so that every module would be seen twice, once as bandit_rft.bandit_rft.
"""

import sys
from pathlib import Path

from importlinter.cli import lint_imports_command

sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_skbc_")]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
lint_imports_command()
