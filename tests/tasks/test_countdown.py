"""The countdown task: its questions, and the reward, which must neither be fooled nor evaluate anything as code."""

import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandit_rft.rewards.spec import RewardFunction
from bandit_rft.tasks import countdown, load_task
from bandit_rft.tasks.countdown import cannot_reach, combine, is_solution

SMALL = {"train_size": 60, "test_size": 30, "harder_size": 20}


@pytest.mark.parametrize(
    "completion",
    [
        "3*4+5=17", "3*4+5", "5+3*4", "(3*4)+5", "((3)*(4))+((5))", "3*4=12,12+5=17", "3*4=12,12+5", "3*4=12,5+12=17",
        " 3 * 4 + 5 = 17\n", "5*4-3=17",
    ],
)  # fmt: skip
def test_solutions(completion: str) -> None:
    assert is_solution(completion, [3, 5, 4], 17)


@pytest.mark.parametrize(
    "completion",
    [
        "", "17", "=17", ",", "3*4+5=", "3*4+5=18", "3*4+5=017", "3*4+5=17=17", "3*4+5=17,", ",3*4+5=17",
        "3*4", "3*4+5+0", "3*4+5+3-3", "12+5=17", "3*4=12,12+5=17,17=17,", "3*4=12", "3*4=13,12+5=17",
        "3*4=12,3*4+5=17", "3*4,12+5=17", "3*4=12;12+5=17", "3*4+5=17 ok", "3*4+-5+10", "+3*4+5", "-3+4*5=17", "3(4)+5",
        "(3*4+5", "3*4+5)", "3*4+()5", "()", "3**4+5", "3*4+5#", "3*4+5.0", "3*4+0x5", "3*4+5e0", "3*4+x", "34-5*3+4",
        "__import__('os')", "\uff13*4+5", "3*4+5=\uff117", "\u0663*4+5", "3-4=-1,5*-1=17",
    ],
)  # fmt: skip
def test_what_is_no_solution(completion: str) -> None:
    assert not is_solution(completion, [3, 5, 4], 17)


@pytest.mark.parametrize(
    ("completion", "numbers", "target", "right"),
    [
        ("8/(3-8/3)", [8, 3, 8, 3], 24, True),  # exact only with fractions
        ("8/3=2,8/(3-2)=8", [8, 3, 8, 3], 8, False),  # a step must not round
        ("6/(3-3)", [6, 3, 3], 0, False),
        ("6/(3-3)*0", [6, 3, 3, 0], 0, False),
        ("10-4-3", [10, 4, 3], 3, True),
        ("10-(4-3)", [10, 4, 3], 9, True),
        ("10-(4-3)", [10, 4, 3], 3, False),
        ("12/3/2", [12, 3, 2], 2, True),
        ("2-5+4", [2, 5, 4], 1, True),  # a negative number within an expression
        ("5+5", [5, 5], 10, True),
        ("5+5", [5], 10, False),
        ("5", [5], 5, True),
        ("5", [5, 5], 5, False),
        ("5+5=10,10-10", [5, 5], 0, False),
    ],
)
def test_numbers_are_used_once_and_values_exact(completion: str, numbers: list[int], target: int, right: bool) -> None:
    assert is_solution(completion, numbers, target) is right


@pytest.mark.parametrize(
    "completion",
    [
        "(" * 10**5 + "3",
        "(" * 10**5 + "3*4+5" + ")" * 10**5,
        "9" * 10**5,
        "3*4+5" * 10**4,
        "3=3," * 10**4,
        "3" + "-3" * 10**5,
    ],
)
def test_long_completions_neither_crash_nor_hang(completion: str) -> None:
    start = time.perf_counter()
    assert is_solution(completion, [3, 5, 4], 17) == completion.endswith(")")
    assert time.perf_counter() - start < 2


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=countdown.ALPHABET, max_size=16), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_agrees_with_python_on_any_single_expression(text: str, numbers: list[int]) -> None:
    """Whatever is accepted without steps is an expression that Python computes to the target, of just these numbers."""
    target = next((v for v in range(200) if is_solution(text, numbers, v)), None)
    if target is not None and "," not in text:
        expression = text.partition("=")[0]
        tokens = countdown.TOKEN.findall(expression)
        assert Counter(int(token) for token in tokens if token.isdigit()) == Counter(numbers)
        assert (
            eval("".join(f"Fraction({int(t)})" if t.isdigit() else t for t in tokens), {"Fraction": Fraction}) == target
        )


@pytest.mark.parametrize("operators", ["+", "+-*", "+-*/"])
def test_a_way_reaches_its_value_both_as_expression_and_in_steps(operators: str) -> None:
    rng = random.Random(0)
    made = 0
    for _ in range(500):
        numbers = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
        way = combine(rng, numbers, operators)
        if way is None:
            continue
        made += 1
        assert is_solution(way.expression, numbers, way.value) and is_solution(way.steps, numbers, way.value)
        assert not is_solution(way.expression, numbers, way.value + 1)
        assert not is_solution(way.steps, numbers, way.value - 1)
        assert eval(way.expression.replace("/", "//")) == way.value
        assert way.steps.count(",") == len(numbers) - 2 and set(way.expression) <= set(countdown.ALPHABET)
    assert made > 100


# --- beginnings that lead nowhere -------------------------------------------------------------------------------------

HOPELESS = [
    "x", "=", ",", ")", "+", "3(", "3*4)", "3**", "6", "33", "3*3", "3*4+5*", "3*4+5+", "3+5=8,", "3+5=8", "3*4=13",
    "3-4=", "5/3=", "3*4,", "3*4=12,3", "3*4=12,12+5=17,5", "3*4=12,12+5=18", "3*4=12,12*", "4*5=20,3*", "3*5=1,", "0",
    "9" * 10, "4/(3-3)=", "3*4=2", "3*4+5 ok",
]  # fmt: skip
GOING = [
    "", " ", "3", "3*", "3*4", "(", "((3)", "3*4=", "3*4=1", "3*4=12", "3*4=12,", "3*4=12,1", "3*4=12,12", "5*4-3=17",
    "05", "3+", "3+5", "5/3", "3-4", "3*4=12,12+5=17", "3*4=12,12+5=17,", "0004+",
]  # fmt: skip


@pytest.mark.parametrize("begins", HOPELESS)
def test_beginnings_that_lead_nowhere_are_told(begins: str) -> None:
    unseen = {"3*4=12,12*", "0", "4*5=20,3*"}  # an unfinished expression is not searched; 0 may become 03
    assert cannot_reach(begins, [3, 5, 4], 17) != (begins in unseen)
    assert not is_solution(begins, [3, 5, 4], 17)


@pytest.mark.parametrize("begins", GOING)
def test_beginnings_that_may_become_solutions_are_let_go_on(begins: str) -> None:
    assert not cannot_reach(begins, [3, 5, 4], 17)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 5), st.sampled_from(["+-*/", "+-*", "-/"]))
def test_no_beginning_of_a_solution_is_told_to_lead_nowhere(seed: int, count: int, operators: str) -> None:
    """Solutions as expression and as steps, with spaces and brackets that change nothing."""
    rng = random.Random(seed)
    while (way := combine(rng, numbers := [rng.randint(1, 20) for _ in range(count)], operators)) is None:
        pass
    steps = way.steps.rpartition("=")[0] if rng.random() < 0.5 else way.steps
    for solution in (way.expression, f"{way.expression}={way.value}", f"(({way.expression}))", steps):
        spaced = "".join(rng.choice(["", "", " "]) + character for character in solution)
        assert is_solution(spaced, numbers, way.value)
        for end in range(len(spaced) + 1):
            assert not cannot_reach(spaced[:end], numbers, way.value), spaced[:end]


@settings(max_examples=300, deadline=None)
@given(
    st.text("0123458+-*/=(),. ", max_size=12), st.text("0123458+-*/=(),", max_size=8),
    st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 40),
)  # fmt: skip
def test_what_leads_nowhere_never_becomes_a_solution(
    begins: str, goes_on: str, numbers: list[int], target: int
) -> None:
    if is_solution(begins + goes_on, numbers, target):
        assert not cannot_reach(begins, numbers, target)


def test_all_that_follows_what_leads_nowhere_is_wrong() -> None:
    """Every text of up to six characters over a small alphabet, for 2, 1 and 3: exhaustive."""
    alphabet, numbers, target = "123+=,", [1, 2], 3
    solutions = {
        "".join(text)
        for length in range(1, 7)
        for text in itertools.product(alphabet, repeat=length)
        if is_solution("".join(text), numbers, target)
    }
    assert {"1+2", "2+1", "1+2=3", "2+1=3"} <= solutions
    assert not any(cannot_reach(text[:end], numbers, target) for text in solutions for end in range(len(text) + 1))


def test_splits_are_sized_disjoint_and_solvable() -> None:
    task = load_task("countdown")
    assert {name: len(examples) for name, examples in task.splits.items()} == {
        "train": 2000,
        "test": 500,
        "harder": 200,
    }
    asked = {
        name: {(e.columns["target"], *sorted(e.columns["numbers"])) for e in examples}
        for name, examples in task.splits.items()
    }
    assert all(len(asked[name]) == len(task.splits[name]) for name in asked)
    assert not asked["train"] & asked["test"]
    for name, examples in task.splits.items():
        for e in examples:
            numbers, target = e.columns["numbers"], e.columns["target"]
            assert e.prompt == countdown.question_text(numbers, target) and set(e.prompt) <= set(countdown.ALPHABET)
            assert len(numbers) == (4 if name == "harder" else 3)
            assert max(numbers) <= 20 and 1 <= target <= 99
            assert is_solution(e.columns["answer"], numbers, target)


def test_the_side_of_a_question_ignores_the_order_and_the_seed() -> None:
    tasks = [countdown.load(seed, {"max_number": 6, **SMALL}) for seed in range(4)]
    asked = [
        {(e.columns["target"], *sorted(e.columns["numbers"])) for task in tasks for e in task.splits[split]}
        for split in ("train", "test")
    ]
    assert len(asked[0]) > 60 and len(asked[1]) > 30 and not asked[0] & asked[1]
    assert countdown.is_held_out([3, 5, 4], 17) == countdown.is_held_out([5, 4, 3], 17)


def test_the_seed_decides_the_questions() -> None:
    first, again, other = (countdown.load(seed, SMALL).splits for seed in (3, 3, 4))
    assert first == again
    assert first["train"] != other["train"] and first["test"] != other["test"]
    assert first["test"][:5] == countdown.load(3, {**SMALL, "test_size": 5}).splits["test"]


def test_the_dial() -> None:
    options = {"numbers": 2, "max_number": 30, "max_target": 40, "operators": "+", "extra_numbers": 2, **SMALL}
    splits = countdown.load(0, options).splits
    assert all(sum(e.columns["numbers"]) == e.columns["target"] <= 40 for s in splits.values() for e in s)
    assert {len(e.columns["numbers"]) for e in splits["train"] + splits["test"]} == {2}
    assert {len(e.columns["numbers"]) for e in splits["harder"]} == {3, 4}
    assert "harder" not in countdown.load(0, {**SMALL, "extra_numbers": 0}).splits
    assert "harder" not in countdown.load(0, {**SMALL, "harder_size": 0}).splits


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"number": 3}, ValueError, "unknown option of task countdown.*numbers"),
        ({"numbers": 1}, ValueError, "numbers: expected 2 to 8, got 1"),
        ({"numbers": "3"}, TypeError, "numbers: expected a whole number, got '3'"),
        ({"test_size": True}, TypeError, "test_size: expected a whole number"),
        ({"max_target": 0}, ValueError, "max_target: expected 1"),
        ({"operators": ""}, ValueError, "operators: expected some of"),
        ({"operators": "+^"}, ValueError, r"operators: expected some of .*got '\+\^'"),
        ({"operators": "++"}, ValueError, "operators: expected each at most once"),
        ({"numbers": 2, "max_number": 3}, ValueError, "train_size: only [0-9]+ distinct questions"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        countdown.load(0, options)


def test_the_reward_scores_a_batch_and_can_be_named_for_a_worker() -> None:
    columns = {"numbers": [[3, 5, 4], [2, 2]], "target": [17, 4], "answer": ["3*4+5", "2+2"]}
    assert countdown.reaches_target(["", ""], ["3*4=12,12+5=17", "2+3"], **columns) == [1.0, 0.0]
    with pytest.raises(ValueError):
        countdown.reaches_target([""], ["1", "2"], numbers=[[1]], target=[1])
    reward = load_task("countdown", options=SMALL).rewards[0]
    assert isinstance(reward, RewardFunction) and reward.load() is countdown.reaches_target
