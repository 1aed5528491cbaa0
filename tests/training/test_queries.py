"""Which queries a round asks: the epochs that always were, and draws by past rewards that follow their definition."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare
from tiny_models import sums
from tiny_rewards import longer, starts_with_vowel

from bandit_rft.config import Config, build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.queries import Epochs, Learnable, query_order
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer

ROWS = [0, 2, 3, 7, 8]  # of the split; the others had prompts that were too long


def learnable(**options: Any) -> Learnable:
    return Learnable(**{"batch_size": 2, "seed": 3, "floor": 0.05, "half_life": 4.0, **options})


def asked(queries: Epochs, rows: list[int], answers: list[tuple[int, list[tuple[int, float]]]]) -> None:
    """Record rewards: (round, [(row, reward), ...]) each."""
    for number, pairs in answers:
        of, rewards = zip(*pairs, strict=True)
        queries.record(rows, np.array(of), np.array(rewards, dtype=np.float64), number)


ANSWERS = [
    (1, [(0, 1.0), (0, 0.0), (2, 0.0), (2, 0.0)]),
    (2, [(3, 0.25), (2, 0.0)]),
    (6, [(0, 1.0), (8, np.nan)]),  # never scored: nothing is known of row 8
]


# --- what a query is worth --------------------------------------------------------------------------------------------


def test_scores_are_the_formula() -> None:
    """Each reward by itself, halved every 4 passes of 5 / 2 rounds; nothing is summed up on the way."""
    queries = learnable()
    asked(queries, ROWS, ANSWERS)
    for now in (7, 40):
        for row, score in zip(ROWS, queries.scores(ROWS, now), strict=True):
            past = [(n, r) for n, pairs in ANSWERS for of, r in pairs if of == row and not np.isnan(r)]
            weights = [0.5 ** ((now - n) * 2 / 5 / 4) for n, _ in past]
            a = 0.5 + sum(w * r for w, (_, r) in zip(weights, past, strict=True))
            b = 0.5 + sum(w * (1 - r) for w, (_, r) in zip(weights, past, strict=True))
            p = a / (a + b)
            assert score == pytest.approx(p * (1 - p) + 0.05, rel=1e-12), (row, now)
    unknown = queries.scores(ROWS, 7)[[3, 4]]
    assert (unknown == 0.3).all() and (queries.scores(ROWS, 7)[:3] < 0.3).all()
    np.testing.assert_allclose(queries.scores(ROWS, 10_000), 0.3)  # what is long past is forgotten


def test_rewards_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes rewards in \[0, 1\]; round 4 has 1.5 for row 3 of the training split"):
        learnable().record(ROWS, np.array([2, 3]), np.array([1.0, 1.5]), 4)
    with pytest.raises(ValueError, match=r"floor and half_life must be > 0; got 0 and 4\.0"):
        learnable(floor=0)
    queries, whole = learnable(), learnable()  # a weighted sum of ones is not always 1
    for one, reward in ((queries, 0.05 + 0.55 + 0.3 + 0.1), (whole, 1.0)):
        one.record(ROWS, np.array([2]), np.array([reward]), 1)
    assert np.array_equal(queries.scores(ROWS, 2), whole.scores(ROWS, 2))


def test_what_is_said_of_the_queries() -> None:
    queries = learnable()
    said = queries.record(ROWS, np.array([0, 2]), np.array([1.0, 0.0]), 1)
    scores = queries.scores(ROWS, 2)
    assert said == {"queries/seen": 0.4, "queries/effective": pytest.approx(scores.sum() ** 2 / (scores**2).sum())}
    assert 4 < float(said["queries/effective"] or 0) < 5


# --- how they are drawn -----------------------------------------------------------------------------------------------


def test_draws_are_in_proportion_to_the_scores_without_replacement() -> None:
    """Every ordered pair of 5 queries against its chance, over 8,000 rounds with the same scores."""
    queries = learnable(half_life=1e12, floor=0.001)
    asked(queries, ROWS, [*ANSWERS, (6, [(2, 0.0)] * 5)])
    scores, drawn = queries.scores(ROWS, 7), Counter[tuple[int, ...]]()
    assert scores.max() > 4 * scores.min()
    for number in range(7, 8_007):
        places, first = queries.next(ROWS, 10, 2, set(), number)
        assert first == 12
        drawn[tuple(places)] += 1
    pairs, total = list(itertools.permutations(range(5), 2)), scores.sum()
    expected = [8_000 * scores[i] / total * scores[j] / (total - scores[i]) for i, j in pairs]
    assert set(drawn) == set(pairs)
    assert chisquare([drawn[pair] for pair in pairs], expected).pvalue > 1e-3


def test_a_round_goes_on_in_its_order_and_ends_when_none_is_left() -> None:
    queries, taken = learnable(), set[int]()
    asked(queries, ROWS, ANSWERS)
    whole, _ = queries.next(ROWS, 0, 5, set(), 7)
    assert sorted(whole) == [0, 1, 2, 3, 4]
    parts = [queries.next(ROWS, first, count, taken, 7) for first, count in ((0, 2), (2, 1), (3, 9), (5, 1))]
    assert [place for places, _ in parts for place in places] == whole and taken == set(whole)
    assert [first for _, first in parts] == [2, 3, 5, 5]
    assert queries.next(ROWS, 0, 5, set(), 8)[0] != whole


def test_what_is_half_solved_is_asked_most_and_nothing_is_given_up() -> None:
    """A third of 96 queries is never solved, a third always, a third half of the time; batches of 8."""
    rows, chances = list(range(96)), np.repeat([0.0, 0.5, 1.0], 32)
    queries, counts, rng = learnable(batch_size=8, floor=0.02, half_life=5.0), np.zeros(96), np.random.default_rng(0)
    for number in range(1, 241):  # 20 passes
        places, _ = queries.next(rows, 0, 8, set(), number)
        counts[places] += 1
        queries.record(rows, np.array(places), (rng.random(8) < chances[places]).astype(np.float64), number)
    hopeless, half, solved = counts.reshape(3, 32).mean(1)
    assert half > 2 * hopeless and half > 2 * solved and counts.min() >= 4


def test_epochs_are_the_order_of_queries() -> None:
    """24 of 25 in batches of 8; what a round has already is passed over."""
    epochs, rows = Epochs(8, seed=1), list(range(100, 125))
    assert epochs.next(rows, 24, 8, set(), 3) == (query_order(25, 8, 1, 24, 8), 32)
    order, taken = query_order(25, 8, 1, 0, 48), set(query_order(25, 8, 1, 0, 20))
    found, first = epochs.next(rows, 20, 9, taken, 1)
    assert found == order[20:24] and len(taken) == 24  # then the first epoch is used up, and so is the round
    assert first == 24 and epochs.next(rows, first, 1, taken, 1) == ([], 24)
    assert epochs.arrays() == {} and epochs.record(rows, np.array([100]), np.array([7.0]), 1) == {}


# --- through the trainer ----------------------------------------------------------------------------------------------


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(folder: str = "run", **overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / folder), "max_rounds": 6, "learning_rate": 3e-3, "max_prompt_length": 12,
            "max_completion_length": 6, "save_steps": 0, "eval_steps": 0, "evaluation.max_queries": 2, "device": "cpu",
            "evaluation.greedy": False, "queries.order": "learnable", **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config, reward: Any = starts_with_vowel) -> Trainer:
    task = sums()
    trainer = Trainer(config, task=Task(task.name, task.splits, [reward]))
    trainer.run()
    return trainer


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "eval/"))}
        for line in read_metrics(trainer.folder)
    ]


def test_a_run_asks_what_its_rewards_say(configure: Callable[..., Config]) -> None:
    """From the rollouts that it wrote: the queries of each round follow from the rewards of those before."""
    trainer = run(configure(num_generations=2))
    queries, rows = Learnable(6, 0, floor=0.02, half_life=5.0), list(range(24))
    for number, line in enumerate(lines(trainer)[1:], start=1):
        table = pq.read_table(trainer.folder / "rollouts" / f"round-{number:06d}.parquet").to_pydict()
        places, _ = queries.next(rows, 0, 6, set(), number)
        assert table["query"] == [query for query in places for _ in range(2)]
        said = queries.record(rows, np.array(table["query"]), np.array(table["reward"]), number)
        assert said.items() <= line.items()
    assert 0.5 < line["queries/seen"] < 1 and trainer.position == 36


def test_a_continued_run_has_the_same_bits(configure: Callable[..., Config]) -> None:
    whole = run(configure("whole"))
    parts = [run(configure(max_rounds=rounds)) for rounds in (2, 3, 6)][-1]
    assert lines(parts) == lines(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "replay.safetensors"):
        one, other = (of.folder / "checkpoints" / "checkpoint-6" / name for of in (parts, whole))
        assert one.read_bytes() == other.read_bytes(), name


def test_nothing_is_kept_or_said_where_queries_come_in_epochs(configure: Callable[..., Config]) -> None:
    trainer = run(configure(max_rounds=2, **{"queries.order": "epochs"}))
    asked_for = [
        pq.read_table(trainer.folder / "rollouts" / f"round-{n:06d}.parquet").column("query").to_pylist()
        for n in (1, 2)
    ]
    assert asked_for == [query_order(24, 6, 0, first, 6) for first in (0, 6)]
    assert not any(key.startswith("queries/") for line in lines(trainer) for key in line)
    assert not (trainer.folder / "checkpoints" / "checkpoint-2" / "replay.safetensors").exists()


def test_a_pass_is_so_many_queries_whichever_they_are(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "bandit_rft"):
        assert len(lines(run(configure(num_train_epochs=0.75, max_rounds=40)))) == 1 + 3
    assert "num_train_epochs=0.75 counts 24 queries as a pass, whichever they are" in caplog.text
    assert "3 rounds of 6 ask each of 24 prompts at most once on average: there is little to choose by" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bandit_rft"):
        run(configure("all", batch_size=24, max_rounds=1))
    assert "every round asks all 24 prompts, so that none is chosen" in caplog.text


def test_a_reward_that_is_no_chance_ends_the_run_before_its_update(configure: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"queries.order=learnable takes rewards in \[0, 1\]; round 1 has"):
        run(configure(), longer)
    folder = Path(configure().output_dir)
    assert [line["round"] for line in read_metrics(folder)] == [0] and not list(folder.glob("checkpoints/*"))
