"""cells.npz: the report from it alone, byte for byte, and nothing that is not it is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pq = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402
from simulated_study import make_study  # noqa: E402

from bandit_rft.cli import main  # noqa: E402
from bandit_rft.study.cells import load_study  # noqa: E402
from bandit_rft.study.packed import Packed  # noqa: E402
from bandit_rft.study.report import write_study_report  # noqa: E402

REPORT = ("report.html", "report.md", "results.csv", "curves.csv", "costs.csv", "timings.csv", "cells.csv")
FAILED = "rollouts-n_16-models_llama_tiny-arithmetic-s1"


def test_the_report_from_the_packed_cells_alone_has_the_same_bytes(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", seeds=3, questions=40, problems={FAILED: "failed"})
    tuning = {
        "key": "learning_rate",
        "grid": [1e-4, 2e-4],
        "seeds": [9],
        "split": "validation",
        "chosen": [],
        "runs": [],
    }
    (folder / "tuning.json").write_text(json.dumps(tuning))
    first = write_study_report(folder, tmp_path / "first")
    alone = _only_cells(first.parent, tmp_path / "alone")
    assert main(["study", "report", str(alone)]) == 0
    for name in (*REPORT, "cells.npz", "clocks.csv"):
        assert (alone / name).read_bytes() == (first.parent / name).read_bytes(), name
    study = load_study(alone)
    assert study.tuning == tuning and [cell.id for cell in study.unused] == [FAILED]
    assert (alone / "cells.npz").stat().st_size < 200_000


def test_rewards_between_0_and_1_and_several_samples_come_back_as_they_were(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", seeds=2, questions=11, levels={})
    changed = sorted(folder.glob("cells/*s1/evaluations/*test.parquet"))[0]
    rng = np.random.default_rng(0)
    for path in folder.glob("cells/*/evaluations/*.parquet"):
        rewards = rng.random(33) if path.parent == changed.parent and "test" in path.name else rng.integers(0, 2, 33)
        table = {"query": np.repeat(np.arange(11), 3), "sample": np.tile(np.arange(3), 11), "reward": rewards * 1.0}
        pq.write_table(pa.table({**table, "prompt": ["?"] * 33}), path)
    report = write_study_report(folder)
    direct, packed = load_study(folder), load_study(_only_cells(report.parent, tmp_path / "alone"))
    for a, b in zip(direct.cells, packed.cells, strict=True):
        assert a.curves == b.curves and a.totals == b.totals and a.final == b.final
        for split in ("train", "test"):
            assert a.outcomes[split].samples == b.outcomes[split].samples == 3
            for name, values in a.outcomes[split].rewards.items():
                np.testing.assert_array_equal(values, b.outcomes[split].rewards[name])
    table = pq.read_table(changed.with_name("round-000020-test.parquet")).to_pydict()
    cell = next(cell for cell in packed.cells if cell.id == changed.parent.parent.name)
    mean = np.reshape(table["reward"], (11, 3)).mean(1)
    np.testing.assert_allclose(cell.outcomes["test"].rewards["final"], mean, rtol=1e-6)


def _only_cells(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("cells.npz", "clocks.csv"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.parametrize("content", [b"", b"PK not an archive", None])
def test_a_file_that_is_no_packed_study_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cells.npz"
    if content is None:
        np.savez(path, description=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is no file of a study's cells"):
        Packed(path)
    with pytest.raises(ValueError, match=r"cells\.npz is no file"):
        load_study(tmp_path)


@pytest.mark.parametrize("what", ["study", "cells", "places", "shape", "queries", "at", "in", "evaluations"])
def test_a_packed_study_that_lacks_something_is_one_error(tmp_path: Path, what: str) -> None:
    folder = make_study(tmp_path / "study", seeds=1, questions=10, levels={})
    path = write_study_report(folder).parent / "cells.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    description = json.loads(arrays["description"].tobytes())
    cell = description["cells"][0]
    block = cell["evaluations"]["test"]
    if what in description:
        del description[what]
    elif what == "evaluations":
        cell[what] = ["test"]
    elif what in cell:
        del cell[what]
    else:
        block[what] = {"shape": [3], "queries": 10**6, "at": 10**6, "in": None}[what]
    arrays["description"] = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
    np.savez(tmp_path / "cells.npz", **arrays)
    with pytest.raises(ValueError, match=r"cells\.npz is no file of a study's cells"):
        load_study(tmp_path)
