"""A kernel of one's own is asked first, and the tests of the operations see it: right ones pass, a wrong one fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paths import ROOT

from bandit_rft import logprobs_from_logits
from bandit_rft.ops import backends
from bandit_rft.ops.torch_backend import TorchBackend


class Mine(TorchBackend):
    name = "mine"


@pytest.fixture
def _forgotten() -> Iterator[None]:
    entries, names = list(backends.BACKENDS), dict(backends._ENTRIES)
    yield
    backends.BACKENDS[:] = entries
    backends._ENTRIES.clear()
    backends._ENTRIES.update(names)


@pytest.mark.usefixtures("_forgotten")
def test_it_is_asked_first_and_can_refuse() -> None:
    backends.register(Mine(), "mine", lambda call: None if call.dtype == torch.float32 else "float32 only")
    assert backends.select(torch.device("cpu"), torch.float32) == "mine"
    assert backends.select(torch.device("cpu"), torch.bfloat16) != "mine"
    assert "mine" in backends.describe()
    assert backends.registered(backends.Call("cpu", torch.float32)) == ["mine"]
    with backends.use_backend("mine"), pytest.raises(ValueError, match="cannot serve this call: float32 only"):
        logprobs_from_logits(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("backend", "refusal", "message"),
    [
        (object(), lambda call: None, "backend must be a bandit_rft.ops.backend.Backend; got object"),
        (TorchBackend(), lambda call: None, "backend.name must be a new one; cpu, cuda, triton, torch are taken"),
        (type("", (TorchBackend,), {"name": "no word"})(), lambda call: None, "got 'no word'"),
        (Mine(), None, "refusal must be a function of a Call; got NoneType"),
    ],
)
def test_what_is_no_backend(backend: object, refusal: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        backends.register(backend, "", refusal)  # type: ignore[arg-type]


@pytest.mark.parametrize("right", [True, False])
def test_the_tests_take_it_in(right: bool, tmp_path: Path) -> None:
    """The example of docs/operations.md, and the same with the scaling forgotten."""
    (program,) = re.findall(
        r"```python\n(# my_kernels.py\n.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL
    )
    (tmp_path / "my_kernels.py").write_text(program if right else program.replace("scaling.scaled(logits)", "logits"))
    command = f"{sys.executable} -m pytest -p my_kernels -p no:cacheprovider -k mine tests/ops/test_logprobs.py"
    done = subprocess.run(
        command.split(),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    assert (done.returncode == 0) == right, done.stdout[-3000:]
    assert counts.get("passed", 0) >= 5 and counts.get("skipped", 0) >= 1, done.stdout[-3000:]  # bfloat16: refused
    assert ("failed" in counts) != right
