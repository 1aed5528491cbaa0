"""Reward functions: the built-in ones, every way a user's can fail, and the processes they fail in."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from paths import ROOT

import bandit_rft.rewards as rewards_module
from bandit_rft.rewards import BUILTINS, RewardError, RewardFunction, RewardRunner
from bandit_rft.rewards.builtin import exact_match
from bandit_rft.rewards.spec import refuse_foreign_code
from bandit_rft.tasks import math_problems
from bandit_rft.tasks.gsm8k import gsm8k
from bandit_rft.tasks.math_problems import last_boxed, math_verify, normalize_math
from bandit_rft.tasks.math_problems import math as math_reward
from bandit_rft.tasks.summarize import rouge_l
from bandit_rft.text import printable

REWARDS = """
import asyncio, os, sys, time

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def match(prompts, completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]

def trl_style(completions, **kwargs):
    return [float(len(text) + len(kwargs["prompts"][0])) for text in completions]

def one_at_a_time(completion, answer):
    return 1.0

def misspelt(completion, anwser):
    return 1.0

def needs_level(prompts, completions, answer, level):
    return [1.0] * len(completions)

async def asynchronous(prompts, completions, **columns):
    await asyncio.sleep(0.001)
    return [2.0] * len(completions)

def unsure(prompts, completions, **columns):
    return [None if text == "?" else 1.0 for text in completions]

def raises(prompts, completions, **columns):
    raise KeyError("the grader lost its key")

def hangs(prompts, completions, **columns):
    while True:
        pass

def hangs_in_c(prompts, completions, **columns):
    return [float(10 ** 10 ** 9 > 0)]

def eats(prompts, completions, **columns):
    hoard = []
    while True:
        hoard.append(bytearray(2 ** 24))

def exits(prompts, completions, **columns):
    os._exit(3)

def crashes(prompts, completions, **columns):
    os.kill(os.getpid(), 11)

def leaves(prompts, completions, **columns):
    sys.exit("enough")

def nan(prompts, completions, **columns):
    return [1.0, float("nan")] + [1.0] * (len(completions) - 2)

def infinite(prompts, completions, **columns):
    return [float("inf")] * len(completions)

def too_few(prompts, completions, **columns):
    return [1.0]

def words(prompts, completions, **columns):
    return ["good"] * len(completions)

def number(prompts, completions, **columns):
    return 1.0

def chatty(prompts, completions, **columns):
    print("[1, 2, 3]")
    os.write(1, b'"ready"\\n')
    return [float(sys.stdin.read() == "")] * len(completions)

def debugs(prompts, completions, **columns):
    print(completions[0])
    print(completions[0], file=sys.stderr)
    return [1.0] * len(completions)

def process(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)

def has_torch(prompts, completions, **columns):
    return [float("torch" in sys.modules)] * len(completions)

def spawns(prompts, completions, **columns):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    open(columns["answer"][0], "w").write(str(child.pid))
    time.sleep(60)

def _fork(child):
    # The child runs on as if it were the worker; wait until it is gone.
    pid = os.fork()
    if pid == 0:
        return child()
    os.waitpid(pid, 0)

def forks(prompts, completions, answer):
    stray = _fork(lambda: [0.25] * len(completions))
    return stray or [float(text == right) for text, right in zip(completions, answer)]

def forks_each(completion, answer):
    stray = _fork(lambda: 0.25)
    return stray or completion == answer

def forks_in_c(prompts, completions, answer):
    import ctypes
    pid = ctypes.PyDLL(None).fork()  # Python is not told: the child still has the pipe
    if pid == 0:
        return [0.25] * len(completions)
    os.waitpid(pid, 0)
    return [float(text == right) for text, right in zip(completions, answer)]

def forks_and_raises(prompts, completions, answer):
    def child():
        raise ValueError("from the child")
    _fork(child)
    return [float(text == right) for text, right in zip(completions, answer)]

def _scribble():
    for number in range(3, 64):
        try:
            os.write(number, b"[0.25, 0.25, 0.25]\\n")
        except OSError:
            pass

def forks_and_scribbles(prompts, completions, answer):
    _fork(lambda: (_scribble(), os._exit(0)))
    return [float(text == right) for text, right in zip(completions, answer)]

def scribbles(prompts, completions, **columns):
    _scribble()
    return [1.0] * len(completions)

def quotes(prompts, completions, **columns):
    raise ValueError("cannot read " + completions[0])

def unspeakable(prompts, completions, **columns):
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError("no")
    raise Unspeakable

def about(text, **columns):
    return len(text) + len(columns)

def picky(completion, answer):
    if completion == "hang":
        time.sleep(60)
    if completion == "raise":
        raise ValueError("no such thing")
    if completion == "die":
        os._exit(9)
    return completion == answer

def slow_each(completion, answer):
    time.sleep(0.15)
    return 1

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(data_source == "d" and solution_str == ground_truth and extra_info["k"] == 7), "acc": 0}

def reward_func(queries, prompts, labels):
    return {"rewards": [float(q == p + l) for q, p, l in zip(queries, prompts, labels)], "scores": [0.0] * len(queries)}

def arrays(queries, prompts, labels):
    class Array:
        def tolist(self):
            return [0.25] * len(queries)
    return Array()
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def score(spec, completions=("a", "bb", "a"), answers=None, **arguments):
    answers = answers or ["a"] * len(completions)
    with RewardRunner([spec], **{"timeout_s": 5.0, **arguments}) as runner:
        return runner.score(["q"] * len(completions), list(completions), {"answer": answers})


# ---------------------------------------------------------------- the built-in rewards


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("5 + 13 = 18\n#### 18", "18", 1),
        ("#### 17 no wait #### 18", "18", 1),  # the last match
        ("#### 18 no wait #### 17", "18", 0),
        ("#### 70,000", "70000", 1),
        ("#### -3", "-3", 1),
        ("#### 18.0", "18", 0),  # strings are compared
        ("#### 18.", "18", 0),
        ("#### $18", "18", 0),  # the paper's expression knows no dollar sign
        ("####18", "18", 0),  # the space belongs to the format
        ("18", "18", 0),
        ("#### ,", "", 0),  # an answer that says nothing is never earned
        ("", "18", 0),
        ("#### 18" + "x" * 293, "18", 1),  # exactly the last 300 characters
        ("#### 18" + "x" * 294, "18", 0),
    ],
)
def test_gsm8k(completion, answer, reward):
    assert gsm8k(completion, answer) == reward


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} ok", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace opens nothing
        (r"\boxed{a \\}", "a \\\\"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 7$ apples", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{3", None),  # cut off
        (r"\boxed{1} and \boxed{2", None),  # the last one counts, even unfinished
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_last_boxed(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{9}{7}", r"\frac{9}{7}"),
        (r"\tfrac97", r"\frac{9}{7}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", "0.5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"10\%", "10"),
        (r"\$5", "5"),
        (r"12\text{ cm}^2", "12"),
        ("x = 5", "5"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"10,\!000", "10,000"),
        (" 7\n", "7"),
    ],
)
def test_math_equal(one, other):
    assert math_reward(rf"I think \boxed{{{one}}}.", other) == 1
    assert math_reward(rf"I think \boxed{{{other}}}.", one) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "6"),
        ("10,000", "10000"),  # a pair of numbers is no number
        (r"3\text{ and }5", "3"),
        (r"\leftarrow", "arrow"),
        ("1/3", r"\frac{1}{2}"),
        ("f(x) = 5", "5"),
        (r"\text{east}", ""),
        (r"\text{ A}", r"\text{ B}"),  # a unit stands behind a value
        ("-x=5", "x=5"),
        ("-x=5", "5"),
        ("2x=5", "5"),
        ("2=5", "5"),
    ],
)
def test_math_different(one, other):
    assert normalize_math(one) != normalize_math(other)
    assert math_reward(rf"\boxed{{{one}}}", other) == 0


@pytest.mark.parametrize("completion", [r"\boxed{}", r"\boxed{ }", r"\boxed{\%}", r"\boxed{5}", "", r"\boxed{x=}"])
@pytest.mark.parametrize("answer", ["", " ", r"\%", "x="])
def test_an_empty_answer_is_never_earned(completion, answer):
    assert math_reward(completion, answer) == 0
    assert math_verify(completion, answer) == 0


@pytest.mark.parametrize(
    ("answer", "boxed"),
    [
        (r"\sqrt{\pi}", r"\sqrt\pi"),
        (r"2\sqrt{\pi}", r"2\sqrt \pi"),
        (r"\frac{\pi}{2}", r"\frac\pi2"),
        (r"\frac{2}{\pi}", r"\dfrac{2}\pi"),
        ("90", r"90^\circ"),
        (r"90^\circ", "90.0"),
        ("1000", r"1\,000"),
        ("1234567", r"1\,234\,567"),
        (r"1\,000", "1{,}000"),
        ("12000", r"12{\,}000"),
        (r"\emptyset", r"\varnothing"),
        (r"\emptyset", r"\{\}"),
        (r"\varnothing", "\u2205"),
        ("5", r"f(2)=5"),
        ("60", r"\angle ABC = 60^\circ"),
        ("15", "x_{1} = 15.0"),
        ("5", "2+3=5"),
        ("5", "x = 2+3 = 5.0"),
        ("x=5", "5=x"),
    ],
)
def test_what_math_verify_misread_is_written_for_it(answer, boxed):
    assert math_verify(rf"So \boxed{{{boxed}}}.", answer) == 1


@pytest.mark.parametrize(
    ("answer", "boxed"),
    [
        ("x=5", "-x=5"),
        ("5", "-x=5"),
        ("15", "3x=15"),  # the library compares what stands right of the sign
        ("15", "2=15"),
        ("15", "x+y=15"),
        ("15", "2=3=15"),
        ("15", "x=3=15"),
        ("15", "15=16"),
        ("25", "x^2=25"),
        ("5", r"\sqrt x=5"),
        (r"\text{ A}", r"\text{ B}"),
        (r"\sqrt{\pi}", r"\sqrt\theta"),
        ("1000", r"1\,001"),
        ("10", r"1\,0"),
        (r"5,\,-11", "5"),
        (r"\emptyset", "0"),
    ],
)
def test_math_verify_different(answer, boxed):
    assert math_verify(rf"So \boxed{{{boxed}}}.", answer) == 0


def test_math_demands_a_box():
    assert math_reward("the answer is 5", "5") == 0


def test_math_verify_sees_what_strings_do_not():
    texts = [r"\boxed{\frac{2}{4}}", r"\boxed{x^2+2x+1}", r"\boxed{7}", "0.5", r"\boxed{\frac{}{}\sqrt[}"]
    with RewardRunner(["math_verify", "math"]) as runner:
        result = runner.score(["q"] * 5, texts, {"answer": ["0.5", "(x+1)^2", "8", "0.5", "1"]})
    assert result.per_function == {"math_verify": [1, 1, 0, 0, 0], "math": [0, 0, 0, 0, 0]}
    assert result.failures == {"math_verify": 0, "math": 0}


def test_a_verifier_that_hangs_scores_zero_and_is_counted(rewards):
    function = RewardFunction(f"{rewards}:picky", "sample", timeout_s=0.5, killed_score=0.0)
    result = score(function, ["a", "hang", "a"], on_error="raise")
    assert result.total == [1, 0, 1]
    assert result.failures == {"picky": 1}
    assert BUILTINS["math_verify"].killed_score == 0.0


def test_exact_match():
    assert exact_match(" 7\n", 7) == 1 and exact_match("77", "7") == 0
    assert exact_match("0", 0) == 1 and exact_match("False", False) == 1


@pytest.mark.parametrize("reward", ["exact_match", "gsm8k", "math", "math_verify", "rouge_l"])
@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_nothing_is_earned_where_the_answer_says_nothing(reward, answer):
    function = BUILTINS[reward].load()
    for completion in ("", " ", "#### ,", "#### ", "\\boxed{}", "\\boxed{ }", "None"):
        assert function(completion, answer) == 0, completion


@pytest.mark.parametrize("answer", [None, math.nan])
def test_an_answer_that_is_not_there_is_not_matched_by_its_name(answer):
    for completion in ("None", "nan", "NaN", "null", ""):
        assert exact_match(completion, answer) == 0


def test_rouge_l():
    assert rouge_l("the cat sat", "the cat sat") == 1
    # Longest common subsequence 2 of 3 and 4 words: precision 2/3, recall 1/2.
    assert rouge_l("the cat ran", "the big cat sat") == pytest.approx(4 / 7)
    assert rouge_l("the cat ran", ["dogs", "the cat ran", "the"]) == 1  # the best of many
    assert rouge_l("", "the cat") == 0
    with pytest.raises(ValueError, match="at least one reference"):
        rouge_l("text", [])


def test_rouge_l_length_penalty():
    plain = rouge_l("a b c d e f", "a b c")
    assert rouge_l("a b c d e f", "a b c", length_penalty=1.0) == pytest.approx(plain * math.exp(-1))
    assert rouge_l("a b c d e f", "a b c", length_penalty=0.5) == pytest.approx(plain * math.exp(-0.5))
    assert rouge_l("a b", "a b c", length_penalty=9.0) == rouge_l("a b", "a b c")  # shorter costs nothing
    # The penalty is each reference's own: the longer one is the better match here.
    assert rouge_l("a b c d", ["a b", "a b c d e"], length_penalty=9.0) == rouge_l("a b c d", "a b c d e")


def test_chat_completions_are_read_as_text():
    with RewardRunner(["gsm8k"]) as runner:
        completions = [[{"role": "assistant", "content": "#### 5"}], [{"role": "assistant", "content": "5"}]]
        prompts = [[{"role": "user", "content": "2+3?"}]] * 2
        assert runner.score(prompts, completions, {"answer": ["5", "5"]}).total == [1, 0]


# ---------------------------------------------------------------- calling conventions


def test_conventions(rewards):
    assert score(f"{rewards}:length").total == [1, 2, 1]
    assert score(f"{rewards}:match").total == [1, 0, 1]  # takes the columns of its signature only
    assert score(f"{rewards}:trl_style").total == [2, 3, 2]  # arguments go by name
    assert score(f"{rewards}:asynchronous").total == [2, 2, 2]
    assert score(f"sample:{rewards}:picky").total == [1, 0, 1]


def test_a_column_named_like_the_first_argument_is_not_passed_twice(rewards):
    with RewardRunner([f"sample:{rewards}:about"]) as runner:
        assert runner.score(["q"], ["abc"], {"text": ["x"], "other": ["y"]}).total == [5]  # prompt and other


def test_verl(rewards):
    for spec in (f"verl:{rewards}:compute_score", f"verl:{rewards}"):
        with RewardRunner([spec]) as runner:
            columns = {"answer": ["a", "a"], "data_source": ["d", "d"], "extra_info": [{"k": 7}, {"k": 7}]}
            assert runner.score(["q", "q"], ["a", "b"], columns).total == [1, 0]
            assert runner.names == ["compute_score"]
    with RewardRunner([f"verl:{rewards}"]) as runner:  # without extra_info the row's columns take its place
        assert runner.score(["q"], ["a"], {"answer": ["a"], "data_source": ["d"], "k": [7]}).total == [1]


def test_openrlhf(rewards):
    assert score(f"openrlhf:{rewards}:reward_func").total == [1, 0, 1]
    assert score(f"openrlhf:{rewards}").total == [1, 0, 1]
    assert score(f"openrlhf:{rewards}:arrays").total == [0.25] * 3


def test_functions_of_a_module_and_of_a_script(rewards, tmp_path):
    assert score("sample:bandit_rft.rewards.builtin:exact_match").total == [1, 0, 1]
    assert score(module_level).total == [5, 5, 5]
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from bandit_rft import __version__  # a script may use all of the package
        from bandit_rft.rewards import RewardRunner
        def reward(prompts, completions, **columns):
            return [4.0] * len(completions)
        if __name__ == "__main__":
            with RewardRunner([reward]) as runner:
                print(runner.score(["q"], ["c"], {}).total)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "[4.0]\n", done.stderr


def module_level(prompts, completions, **columns):
    return [5.0] * len(completions)


def test_closures_run_here_only():
    def closure(prompts, completions, **columns):
        return [3.0] * len(completions)

    with pytest.raises(TypeError, match=r"'closure' is a lambda, a closure.*isolation=\"none\""):
        RewardRunner([closure])
    with RewardRunner([closure], isolation="none") as runner:
        assert runner.score(["q"], ["c"], {}).total == [3]


def test_weights_none_and_names(rewards):
    functions = [f"{rewards}:length", f"{rewards}:unsure", f"{rewards}:length"]
    with RewardRunner(functions, [1.0, 10.0, 0.5]) as runner:
        result = runner.score(["q"] * 2, ["aa", "?"], {})
    assert result.total == [2 + 10 + 1, 1 + 0.5]  # None is left out of the sum
    assert result.per_function == {"length": [2, 1], "unsure": [1, None], "length_2": [2, 1]}
    assert result.failures == {"length": 0, "unsure": 0, "length_2": 0}
    assert score(f"{rewards}:unsure", ["?"]).total == [None]


def test_empty_batch(rewards):
    with RewardRunner([f"{rewards}:raises"]) as runner:
        result = runner.score([], [], {"answer": []})
    assert (result.total, result.per_function, result.failures) == ([], {"raises": []}, {"raises": 0})


# ---------------------------------------------------------------- failures

FAILURES = [
    ("raises", r"raised KeyError: 'the grader lost its key' \(my_rewards.py, line \d+\)"),
    ("hangs", r"hung and was killed \(timeout_s=1"),
    ("eats", "ran out of memory .*memory_mb=256"),
    ("exits", "ended its worker process, with exit status 3"),
    ("crashes", "died in its worker process, of SIGSEGV"),
    ("leaves", "raised SystemExit: enough"),
    ("infinite", r"returned inf \(float\) where a finite number or None is expected"),
    ("too_few", "returned 1 scores for 3 completions"),
    ("words", r"returned 'good' \(str\) where a finite number"),
    ("number", r"returned 1.0 \(float\) where a list of 3 numbers is expected"),
]


@pytest.mark.parametrize(("name", "message"), FAILURES)
def test_failure(rewards, name, message, caplog):
    start = time.monotonic()
    with RewardRunner([f"{rewards}:{name}", f"{rewards}:length"], timeout_s=1.0, memory_mb=256) as runner:
        with pytest.raises(RewardError, match=f"reward '{name}' {message}"):
            runner.score(["q"] * 3, ["a", "bb", "a"], {"answer": ["a"] * 3})
        runner.on_error = "none"
        result = runner.score(["q"] * 3, ["a", "bb", "a"], {"answer": ["a"] * 3})
    assert result.total == [None] * 3
    assert result.per_function == {name: [None] * 3, "length": [1, 2, 1]}
    assert result.failures == {name: 3, "length": 0}
    assert f"reward '{name}' failed on 3 of 3 completions" in caplog.text
    assert time.monotonic() - start < 8


def test_nan_costs_its_own_rollout_only(rewards):
    with pytest.raises(RewardError, match=r"'nan' returned nan .* expected, on completion 1"):
        score(f"{rewards}:nan")
    result = score(f"{rewards}:nan", on_error="none")
    assert result.total == [1, None, 1]
    assert result.failures == {"nan": 1}


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_one_bad_completion_costs_its_own_rollout_only(rewards, isolation):
    completions = ["a", "raise", "a", "b"] + (["hang", "a", "die", "a"] if isolation == "process" else [])
    expected = [1, None, 1, 0] + ([None, 1, None, 1] if isolation == "process" else [])
    result = score(f"sample:{rewards}:picky", completions, on_error="none", timeout_s=0.6, isolation=isolation)
    assert result.total == expected
    assert result.failures == {"picky": expected.count(None)}
    with pytest.raises(RewardError, match=r"'picky' raised ValueError: no such thing .*, on completion 1\n.*in picky"):
        score(f"sample:{rewards}:picky", completions, isolation=isolation)


def test_a_hang_inside_c_is_killed(rewards):
    """A single bytecode that never lets another thread, or a signal handler, run."""
    start = time.monotonic()
    with pytest.raises(RewardError, match="hung and was killed"):
        score(f"{rewards}:hangs_in_c", ["a"], timeout_s=1.0)
    assert time.monotonic() - start < 4


def test_the_limit_is_for_one_call_not_for_the_batch(rewards):
    assert score(f"sample:{rewards}:slow_each", ["a"] * 8, timeout_s=0.6).total == [1] * 8


def test_from_another_thread(rewards):
    """Where SIGALRM does not work."""
    outcome = []

    def run():
        try:
            score(f"{rewards}:hangs", timeout_s=0.5)
        except RewardError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert outcome and "hung and was killed" in outcome[0]


def test_no_alarm_is_set(rewards, monkeypatch):
    """An alarm fires in the main thread alone, and there belongs to the program around us."""

    def refuse(*arguments):
        raise AssertionError(f"an alarm: {arguments}")

    for name in ("alarm", "setitimer", "signal"):
        monkeypatch.setattr(signal, name, refuse)
    assert score(f"{rewards}:length").total == [1, 2, 1]
    with pytest.raises(RewardError, match="hung and was killed"):
        score(f"{rewards}:hangs", timeout_s=0.3)


def test_what_a_reward_started_is_killed_with_it(rewards, tmp_path):
    note = tmp_path / "pid"
    with pytest.raises(RewardError, match="hung"):
        score(f"{rewards}:spawns", ["a"], [str(note)], timeout_s=1.0)
    assert not _alive(int(note.read_text()))


def _alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


# ---------------------------------------------------------------- strays


@pytest.mark.parametrize(
    "spec", ["{}:forks", "sample:{}:forks_each", "{}:forks_and_raises", "{}:forks_in_c", "{}:forks_and_scribbles"]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_child_that_a_reward_forked_answers_nothing(rewards, spec, workers):
    """Its reply would be taken for the worker's, and every later reply for that to the request before."""
    with RewardRunner([spec.format(rewards)], timeout_s=5.0, workers=workers) as runner:
        for completions, answers in (("aba", "aaa"), ("bab", "bbb"), ("aaa", "bbb"), ("a", "a")):
            result = runner.score(["q"] * len(completions), list(completions), {"answer": list(answers)})
            assert result.total == [float(x == y) for x, y in zip(completions, answers, strict=True)]


def test_what_is_no_reply_is_never_taken_for_one(rewards):
    with RewardRunner([f"{rewards}:scribbles", f"{rewards}:length"], on_error="none") as runner:
        for _ in range(2):
            result = runner.score(["q"] * 3, ["a", "bb", "a"], {})
            assert result.per_function == {"scribbles": [None] * 3, "length": [1, 2, 1]}
    with pytest.raises(RewardError, match=r"'scribbles' wrote into its worker's pipe: '\[0.25, .*' is no reply"):
        score(f"{rewards}:scribbles")


def test_a_worker_leaves_no_pipe_open(rewards):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        score(f"{rewards}:length")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_reward_starts_finds_the_users_environment(rewards, monkeypatch, tmp_path):
    script = tmp_path / "environment.py"
    script.write_text(
        "import os, sys\ndef path(prompts, completions, **columns):\n"
        "    return [float(os.environ.get('PYTHONPATH') == columns['answer'][0])] * len(completions)\n"
    )
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert score(f"{script}:path", answers=[None] * 3).total == [1, 1, 1]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert score(f"{script}:path", answers=[str(tmp_path)] * 3).total == [1, 1, 1]


# ---------------------------------------------------------------- what a model or a reward wrote


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_an_exception_that_quotes_a_completion_is_shown_as_text(rewards, isolation, caplog):
    """A terminal obeys control codes: this one would retitle the window, clear the screen and forge a line of ours."""
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\nINFO reward 1.0\ud800" + "x" * 5000
    with pytest.raises(RewardError) as caught:
        score(f"{rewards}:quotes", [nasty], isolation=isolation)
    headline = str(caught.value).splitlines()[0]
    assert headline.isprintable() and len(headline) < 1000
    assert r"cannot read \x1b]0;owned\x07\x1b[2J\x9b1m\u202e\nINFO reward 1.0\ud800xxx" in headline
    assert "more characters" in headline and "on completion 0" in headline
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))
    score(f"{rewards}:quotes", [nasty], isolation=isolation, on_error="none")
    assert all(c.isprintable() or c in "\n" for c in caplog.text)


def test_what_a_reward_prints_is_shown_as_text(rewards, capfd):
    assert score(f"{rewards}:debugs", ["\x1b[2J\ud800 and ü"]).total == [1]
    assert capfd.readouterr().err.splitlines() == [r"\x1b[2J\ud800 and ü"] * 2


def test_an_exception_without_words(rewards):
    with pytest.raises(RewardError, match="Unspeakable: a message that cannot be shown"):
        score(f"{rewards}:unspeakable")


def test_printable():
    assert printable("plain \tüñ 漢字\n🙂") == "plain \tüñ 漢字\n🙂"
    assert printable("a\nb", one_line=True) == r"a\nb"
    assert printable("\x00\x1b\x7f\x85\u200b\u2066\ud800\U000e0041") == r"\x00\x1b\x7f\x85\u200b\u2066\ud800\U000e0041"
    assert printable("x" * 10, 10) == "x" * 10 and printable("x" * 11, 10) == "x" * 10 + " ... (1 more characters)"
    assert printable("", 0) == "" and printable("xx", 0) == " ... (2 more characters)"


def test_printable_leaves_nothing_that_a_terminal_obeys():
    everything = "".join(
        map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x1F000), *range(0xE0000, 0xE0200)])
    )
    shown = printable(everything)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c not in "\n\t"]
    assert printable(shown) == shown and shown.encode()


def test_code_named_by_somebodys_configuration_is_refused():
    refuse_foreign_code([], source="config.yaml")
    refuse_foreign_code([*BUILTINS, "sample:gsm8k"], source="config.yaml")
    for name in ("rewards.py:f", "os:system", "sample:os:system", "verl:score.py", "bandit_rft.cli:main", "nothing"):
        with pytest.raises(ValueError, match=r"reward.functions: run/config.yaml names code .*--allow_code") as caught:
            refuse_foreign_code(["gsm8k", name], source="run/config.yaml")
        assert name in str(caught.value) and "gsm8k" not in str(caught.value)
        refuse_foreign_code(["gsm8k", name], source="run/config.yaml", allowed=True)


# ---------------------------------------------------------------- the processes


def test_workers_are_reused_and_replaced(rewards):
    with RewardRunner([f"{rewards}:process", f"{rewards}:exits"], on_error="none") as runner:
        runs = [runner.score(["q"], ["c"], {}).per_function["process"][0] for _ in range(2)]
        assert runs[0] != runs[1] != os.getpid()  # "exits" ended the first one
    with RewardRunner([f"{rewards}:process"]) as runner:
        assert runner.score(["q"], ["c"], {}).total == runner.score(["q"], ["c"], {}).total
        os.kill(int(runner.score(["q"], ["c"], {}).total[0]), signal.SIGKILL)  # between calls: nothing was lost
        time.sleep(0.2)
        pid = int(runner.score(["q"], ["c"], {}).total[0])
    assert not _alive(pid)


def test_a_worker_imports_no_torch(rewards):
    assert score(f"{rewards}:has_torch").total == [0, 0, 0]


def test_what_a_reward_prints_disturbs_nothing(rewards, capfd):
    assert score(f"{rewards}:chatty").total == [1, 1, 1]
    assert "[1, 2, 3]" in capfd.readouterr().err


def test_many_workers_give_the_same_as_one(rewards):
    completions = [str(n) for n in range(1000)]
    answers = [str(n - n % 3) for n in range(1000)]
    expected = [float(n % 3 == 0) for n in range(1000)]
    for workers in (1, 3):
        assert score(f"sample:{rewards}:picky", completions, answers, workers=workers).total == expected
    with pytest.raises(RewardError, match="on completion 999"):
        score(f"sample:{rewards}:picky", [*completions[:-1], "raise"], answers, workers=3)


def test_a_large_batch_crosses_the_pipes(rewards):
    assert score(f"{rewards}:length", ["x" * 100_000] * 100).total == [100_000] * 100


def test_a_worker_outlives_neither_context_nor_parent(rewards, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, types
        package = sys.modules["bandit_rft"] = types.ModuleType("bandit_rft")  # without torch, which takes seconds
        package.__path__ = ["{Path(rewards_module.__file__).parent.parent}"]
        from bandit_rft.rewards import RewardRunner
        runner = RewardRunner(["{rewards}:process"]).__enter__()
        print(int(runner.score(["q"], ["c"], {{}}).total[0]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not _alive(int(done.stdout))


# ---------------------------------------------------------------- refused before work is lost


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("gsm8", ValueError, "unknown reward 'gsm8'; did you mean 'gsm8k'"),
        ("no_file.py:f", ValueError, "names a file that does not exist"),
        ("{path}", ValueError, "expected file.py:function or module:function, got .*my_rewards.py"),
        ("{path}:lenght", RewardError, "unknown reward function 'lenght'; did you mean 'length'"),
        ("{path}:os", RewardError, "is a module, not a function"),
        ("no_such_module:f", RewardError, "no_such_module could not be imported: ModuleNotFoundError"),
        (
            "{path}:one_at_a_time",
            RewardError,
            r"takes 'completion', one at a time: write sample:my_rewards.py:one_at_a_t",
        ),
        (
            "sample:{path}:misspelt",
            RewardError,
            r"takes \['anwser'\], but .* columns \['answer'\]; did you mean 'answer'",
        ),
        ("{path}:needs_level", RewardError, r"'needs_level' takes \['level'\], but the data have only .*'answer'"),
    ],
)
def test_refused_at_the_start(rewards, spec, error, message):
    with pytest.raises(error, match=message), RewardRunner([spec.format(path=rewards)], columns=["answer"]):
        pass


def test_a_column_that_may_be_the_answer_is_named():
    message = (
        "takes .'answer'., but the data have only the columns .'anser'.; did you mean 'anser', answer_column=anser"
    )
    with pytest.raises(RewardError, match=message), RewardRunner(["exact_match"], columns=["anser"]):
        pass


def test_a_broken_file_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def f(:\n")
    with pytest.raises(RewardError, match=r"broken.py could not be imported: SyntaxError"), RewardRunner([f"{path}:f"]):
        pass


def test_an_import_that_dies_or_a_library_that_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "deadly.py"
    path.write_text("import os\nos._exit(4)\n")
    with (
        pytest.raises(
            RewardError, match=r"worker that imports .*deadly.py:f ended its worker process, with exit status 4"
        ),
        RewardRunner([f"{path}:f"]),
    ):
        pass
    math_problems._math_verify_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with (
        pytest.raises(RewardError, match="'math_verify': the math-verify library is missing: pip install"),
        RewardRunner(["math_verify"], isolation="none"),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"memory_mb": 1}, "memory_mb"),
        ({"workers": 0}, "workers"),
        ({"on_error": "ignore"}, "on_error"),
        ({"isolation": "docker"}, "isolation"),
        ({"weights": [1.0, 2.0]}, "weights: expected 1"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardRunner(["gsm8k"], **arguments)


def test_impossible_batches(rewards):
    with RewardRunner([f"{rewards}:length"]) as runner:
        with pytest.raises(ValueError, match="answer: expected 2 entries, one a completion, got 1"):
            runner.score(["q", "q"], ["a", "b"], {"answer": ["a"]})
        with pytest.raises(ValueError, match="prompts: expected 1 entries"):
            runner.score([], ["a"], {})
        with pytest.raises(ValueError, match="columns: one holds a object"):
            runner.score(["q"], ["a"], {"answer": [object()]})
        with pytest.raises(ValueError, match=r"'completions'.* cannot be names of columns"):
            runner.score(["q"], ["a"], {"completions": ["a"]})
        assert runner.score(["q"], ["a"], {}).total == [1]  # and goes on


# ---------------------------------------------------------------- at the edges of the system

EDGES = """
import os, time
def unnamed_signal(completions): os.kill(os.getpid(), 40); time.sleep(9)
def around(completions):
    import subprocess, sys
    sys.stdout.buffer.write(b"\\x1b]0;buffer\\x07\\n"); sys.stdout.buffer.flush()
    os.write(2, b"\\x1b[2Jwritten\\xff\\n")
    subprocess.run(["printf", r"\\033]0;child\\007\\n"])
    return [1.0] * len(completions)
def fine(completions): return [1.0] * len(completions)
"""


def test_a_signal_without_a_name_is_a_failure_like_any_other(tmp_path):
    (tmp_path / "edges.py").write_text(EDGES)
    with RewardRunner([f"{tmp_path}/edges.py:unnamed_signal"], on_error="none", timeout_s=5) as runner:
        assert runner.score(["q"], ["a"], {}).failures == {"unnamed_signal": 1}


@pytest.mark.parametrize("limits", [{"timeout_s": 1e10}, {"timeout_s": 1e300}, {"memory_mb": 10**15}])
def test_limits_that_are_no_limits(tmp_path, limits):
    """What says "never" is longer than poll() and larger than setrlimit() can be told."""
    (tmp_path / "edges.py").write_text(EDGES)
    with RewardRunner([f"{tmp_path}/edges.py:fine"], **limits) as runner:
        assert runner.score(["q"], ["a"], {}).total == [1.0]


def test_what_goes_around_print_is_shown_as_text(tmp_path, capfd):
    """A reward that runs a completion as a program has its output, and the program's, on the terminal too."""
    (tmp_path / "edges.py").write_text(EDGES)
    with RewardRunner([f"{tmp_path}/edges.py:around"]) as runner:
        assert runner.score(["q"], ["a"], {}).total == [1.0]
    shown = capfd.readouterr().err.splitlines()
    assert shown == [r"\x1b]0;buffer\x07", r"\x1b[2Jwritten\xff", r"\x1b]0;child\x07"]
