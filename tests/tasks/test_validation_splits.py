"""A split to choose by shares no question with what is trained on or reported, whatever the seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bandit_rft.tasks import Example, arithmetic, countdown, load_task

KEYS: dict[str, Callable[[Example], object]] = {
    "arithmetic": lambda example: example.prompt,
    "countdown": lambda example: (example.columns["target"], *sorted(example.columns["numbers"])),
}


@pytest.mark.parametrize("name", KEYS)
def test_no_seed_of_validation_shares_a_question_with_any_seed_of_test_or_train(name: str) -> None:
    options = {"train_size": 300, "test_size": 300, "validation_size": 300}
    tasks = [load_task(name, seed=seed, options=options) for seed in range(4)]
    asked = {
        split: {KEYS[name](example) for task in tasks for example in task.splits[split]}
        for split in ("train", "test", "validation")
    }
    assert len(tasks[0].splits["validation"]) == 300
    assert not asked["validation"] & (asked["test"] | asked["train"]) and not asked["test"] & asked["train"]


@pytest.mark.parametrize("module", [arithmetic, countdown])
def test_without_one_the_splits_are_what_they_were(module: object) -> None:
    name = "arithmetic" if module is arithmetic else "countdown"
    plain = load_task(name, seed=1, options={"train_size": 50, "test_size": 200})
    assert "validation" not in plain.splits
    sides = {arithmetic.side(e.prompt) for e in plain.splits["test"]} if name == "arithmetic" else {
        countdown.side(e.columns["numbers"], e.columns["target"]) for e in plain.splits["test"]}  # fmt: skip
    assert sides == {"test", "validation"}, "the whole test side is asked"
