"""What `import bandit_rft` gives: every name, loaded when it is used, with torch alone where torch is enough."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import bandit_rft

OPERATIONS = [
    "Packed", "PolicyLoss", "PolicyObjective", "Sample", "linear_logprobs", "linear_policy_loss", "linear_sample",
    "logprobs_from_logits", "ops", "pack", "policy_loss_from_logits", "sample_from_logits", "unpack",
]  # fmt: skip
OTHERS = sorted(set(bandit_rft.__all__) - set(OPERATIONS))


def python(code: str, *, without: tuple[str, ...] = ()) -> str:
    blocked = f"import sys\nfor name in {without!r}:\n    sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", bandit_rft.__all__)
def test_every_name_is_there(name: str) -> None:
    found = getattr(bandit_rft, name)
    assert name in dir(bandit_rft)
    assert getattr(found, "__doc__", None), f"{name} has no docstring"


def test_the_names_that_the_issue_asks_for() -> None:
    asked = [
        "Config", "Listener", "Policy", "Replay", "RolloutBatch", "RolloutEngine", "Sampling", "Task", "Trainer",
        "advantages", "pack", "sequence_ids", "unpack",
    ]  # fmt: skip
    assert set(asked) <= set(bandit_rft.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        bandit_rft.Trainr  # noqa: B018


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = "import bandit_rft; print(sorted(name for name in sys.modules if name.split('.')[0] in "
    assert python(f"{code}('torch', 'numpy', 'transformers', 'pydantic')))") == "[]"
    assert python("import bandit_rft\nbandit_rft.pack, bandit_rft.ops\nprint('transformers' in sys.modules)") == "False"


def test_the_operations_need_torch_alone() -> None:
    others = ("transformers", "pydantic", "yaml", "rich", "pyarrow", "datasets", "jinja2", "filelock", "safetensors")
    names = ", ".join(OPERATIONS)
    code = f"""
from bandit_rft import {names}
import torch
hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
packed, cu = pack(hidden, torch.ones(2, 3))
result = linear_policy_loss(packed, weight, torch.zeros(6).long(), torch.ones(2), cu, objective=PolicyObjective())
print(tuple(unpack(result.logprobs, torch.ones(2, 3)).shape))
"""
    assert python(code, without=others) == "(2, 3)"


@pytest.mark.parametrize(
    ("name", "lacks"), [("advantages", "pydantic"), ("Trainer", "transformers"), ("Task", "pydantic")]
)
def test_a_name_that_needs_more_says_what_to_install(name: str, lacks: str) -> None:
    code = f"""
try:
    from bandit_rft import {name}
except ModuleNotFoundError as error:
    print(error)
"""
    said = python(code, without=(lacks,))
    assert said == f"bandit_rft.{name} needs {lacks}, which is not installed: pip install 'bandit_rft[train]'"


def test_the_import_costs_little_beyond_torch() -> None:
    code = """
import time, torch
start = time.process_time()  # of the processor, whatever else runs beside
from bandit_rft import linear_logprobs, pack
print(time.process_time() - start)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_every_name_has_a_place_in_the_reference() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    missing = [name for name in bandit_rft.__all__ if name not in ("ops",) and f".{name}\n" not in f"{pages}\n"]
    assert not missing


def test_a_type_checker_is_told_of_every_name() -> None:
    """It reads what stands under TYPE_CHECKING: the same names from the same modules, which `make lint` checks."""
    tree = ast.parse(Path(bandit_rft.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(told) == bandit_rft.__all__
    for name, module in told.items():
        place = bandit_rft._MODULES.get(name, None if name in ("advantages", "ops") else "ops")
        assert module == place, name
