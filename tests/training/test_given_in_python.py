"""Data and rewards that a program gave: the run folder says so, and no command measures by others instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import character_tokenizer, tiny_llama

from bandit_rft import Example, RewardFunction, Task, Trainer, cli
from bandit_rft.checkpoint import state_checksum
from bandit_rft.config import ConfigError, build_config
from bandit_rft.data import fingerprint
from bandit_rft.rewards.session import code_digest, reward_text
from bandit_rft.run_data import check_evaluated
from bandit_rft.tasks import load_task

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]
SMALL = {
    "preset": "minimal", "batch_size": 4, "max_rounds": 1, "max_prompt_length": 40, "max_completion_length": 3,
    "eval_steps": 0, "device": "cpu", "progress": False, "output_dir": "run", "verify_steps": 0,
    "evaluation": {"max_queries": 2, "greedy": False},
}  # fmt: skip
SIZES = {"train_size": 20, "test_size": 20}
CELL = """
def helper(text):
    return text.strip()

def paid(completion, answer):
    return 1.0 if helper(completion) in {"1", "2", "3"} else 0.25
"""


def cell(source: str = CELL, name: str = "paid", file: str = "<cell>", **around: Any) -> Callable[..., Any]:
    """The function as a notebook's cell of this source defines it."""
    space: dict[str, Any] = {"__name__": "a cell", **around}
    exec(compile(source, file, "exec"), space)
    found: Callable[..., Any] = space[name]
    return found


def trainer(**given: Any) -> Trainer:
    return Trainer(**{**SMALL, "model": tiny_llama(), "tokenizer": character_tokenizer(), **given})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(CELL)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def command(line: str, capsys: Any) -> tuple[int, str]:
    status = cli.main(line.split())
    return status, re.sub(r"\s+", " ", "".join(capsys.readouterr()))


def test_functions_of_the_session_are_not_replaced_by_the_tasks_own(capsys: Any) -> None:
    def make(**given: Any) -> Trainer:
        return trainer(task="arithmetic", task_options=SIZES, reward_funcs=[cell()], **given)

    result = make().run()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["reward"]["functions"] == ["session:sample:paid"]
    (saved,) = json.loads((result.checkpoint / "state.json").read_text())["rewards"]
    assert saved["name"] == "paid" and saved["given"] == "session" and saved["weight"] == 1.0
    for line in ("eval run", "eval run/checkpoints/checkpoint-1", "train --config run/config.yaml --max_rounds 2"):
        status, said = command(line, capsys)
        assert status == 2 and "functions given in Python" in said and "--reward.functions sample:FILE.py:paid" in said
    with pytest.raises(ValueError, match="paid: the rewards were functions given in Python"):
        Trainer(build_config(file="run/config.yaml"))
    status, said = command("eval run --json --reward.functions sample:rewards.py:paid", capsys)
    lines = [json.loads(line) for line in re.findall(r"{.*?}(?= |$)", said)]
    assert status == 0 and [line["split"] for line in lines] == ["train", "test", "longer"]
    for line in lines:
        name = f"eval/{line['split']}/pass@1"
        assert line[name] == result[-1][name]
    assert make(max_rounds=2).run()[-1]["round"] == 2  # a program goes on with the same functions


def test_another_reward_does_not_continue_a_run() -> None:
    def found(reward: Any, **given: Any) -> Any:
        """The checkpoint that a run continues from, which it looks for before it loads anything."""
        made = trainer(train_dataset=ROWS, reward_funcs=reward, max_rounds=2, **given)
        return made.run_folder.find_checkpoint("auto", asdict(made.config), made.rewards)

    trainer(train_dataset=ROWS, reward_funcs=cell()).run()
    assert found(cell("# a remark\n\n" + CELL.replace("answer):", 'answer):\n    "What it pays."'), file="<other>"))
    for other in (CELL.replace("0.25", "0.5"), CELL.replace(".strip()", ".lower()"), CELL.replace('"3"', '"4"')):
        with pytest.raises(ConfigError, match=r"reward\.functions: the code of paid is another"):
            trainer(train_dataset=ROWS, reward_funcs=cell(other), max_rounds=2).run()
    with pytest.raises(ConfigError, match=r"reward.functions: \['session:sample:paid'\] -> \['session:sample:fee'\]"):
        found(cell(CELL.replace("paid", "fee"), "fee"))
    with pytest.raises(ConfigError, match=r"reward\.weights"):
        found(cell(), reward_weights=[2.0])
    state_file = Path("run/checkpoints/checkpoint-1/state.json")  # as an earlier version has written it
    state = json.loads(state_file.read_text())
    del state["rewards"]
    state["config"]["reward"]["functions"] = []
    state["state_sha256"] = state_checksum(state)
    state_file.write_text(json.dumps(state))
    assert found(cell(CELL.replace("0.25", "0.5")))  # it does not say which reward it had


def test_a_reward_file_that_was_edited_does_not_continue_a_run(capsys: Any) -> None:
    def found() -> Any:
        made = trainer(**named, max_rounds=2)
        return made.run_folder.find_checkpoint("auto", asdict(made.config), made.rewards)

    named = {"task": "arithmetic", "task_options": SIZES, "reward": {"functions": ["sample:rewards.py:paid"]}}
    trainer(**named).run()
    Path("rewards.py").write_text("# a remark\n\n" + CELL.replace("answer):", 'answer):\n    "What it pays."'))
    status, said = command("eval run --evaluation.splits test --allow_code", capsys)
    assert status == 0 and found(), said
    for other in (CELL.replace("0.25", "0.5"), CELL.replace(".strip()", ".lower()")):
        Path("rewards.py").write_text(other)
        with pytest.raises(ConfigError, match=r"reward\.functions: the code of paid is another.*Choose another"):
            found()
        status, said = command("eval run --allow_code", capsys)
        assert status == 2 and "the code of paid is another" in said and "--reward.functions" in said
        status, said = command("train --config run/config.yaml --max_rounds 2", capsys)
        assert status == 2 and "the code of paid is another" in said
    state_file = Path("run/checkpoints/checkpoint-1/state.json")  # as an earlier version has written it
    state = json.loads(state_file.read_text())
    state["rewards"][0]["code"] = None
    state["state_sha256"] = state_checksum(state)
    state_file.write_text(json.dumps(state))
    assert found()


def test_a_function_that_moved_to_a_file_continues_the_run(capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer(task="arithmetic", task_options=SIZES, reward_funcs=cell()).run()
    line = "train --config run/config.yaml --max_rounds 2 --reward.functions sample:rewards.py"
    Path("rewards.py").write_text(CELL + "\nfee = paid\n")
    status, said = command(f"{line}:fee", capsys)
    assert status == 2 and "made with other settings (reward.functions: ['session:sample:paid'] ->" in said
    status, said = command(f"{line}:paid", capsys)
    assert status == 0 and "sample:rewards.py:paid is taken for the function of that name" in caplog.text, said


def test_a_task_that_borrows_a_name_is_not_taken_for_the_built_in(capsys: Any) -> None:
    examples = [Example(row["prompt"], {"answer": row["answer"]}) for row in ROWS]
    trainer(task=Task("arithmetic", {"train": examples, "test": examples[:4]}, ["exact_match"])).run()
    status, said = command("eval run", capsys)
    assert status == 2 and "the data of task 'arithmetic' are not those of the run" in said and "--data_path" in said
    status, said = command("eval run --task arithmetic --reward.functions exact_match", capsys)
    assert status == 0 and "Pass@1" in said


def test_a_built_in_with_rewards_of_a_program_is_not_taken_for_itself(capsys: Any) -> None:
    made = load_task("arithmetic", options=SIZES)
    trainer(task=Task(made.name, made.splits, ["exact_match"], [0.5]), task_options=SIZES).run()
    status, said = command("eval run", capsys)
    assert status == 2 and "the rewards of task 'arithmetic' are not those of the run (reward.functions:" in said
    assert command("eval run --reward.functions exact_match", capsys)[0] == 0
    with pytest.raises(ConfigError, match=r"reward.weights: \[0.5\] -> \[1.0\]"):
        trainer(task=Task(made.name, made.splits, ["exact_match"]), task_options=SIZES, max_rounds=2).run()


@pytest.mark.parametrize("kind", ["rows", "task"])
def test_data_of_a_program_are_asked_for(kind: str, capsys: Any) -> None:
    examples = [Example(row["prompt"], {"answer": row["answer"]}) for row in ROWS]
    if kind == "rows":
        trainer(train_dataset=ROWS, reward_funcs=cell()).run()
    else:
        trainer(task=Task("sums", {"train": examples}, [cell()])).run()
    name = "dataset" if kind == "rows" else "sums"
    for line in ("eval run", "train --config run/config.yaml"):
        status, said = command(line, capsys)
        assert status == 2 and f"the data (task {name!r}) were given in Python" in said, said
        assert "--task dataset --data_path FILE_OR_FOLDER" in said and "--reward.functions" in said
    data = "eval run --task dataset --data_path rows.jsonl"
    status, said = command(f"{data} --evaluation.splits train", capsys)
    assert status != 0 and "reward" in said  # it is never scored by something else
    status, said = command(f"{data} --evaluation.splits train --reward.functions sample:rewards.py:paid", capsys)
    assert status == 0, said


def test_other_data_are_measured_where_a_flag_asks_for_them() -> None:
    def examples(sign: str) -> list[Example]:
        return [Example(f"{i}{sign}{i}=", {"answer": "0"}) for i in range(5)]

    config = build_config({"evaluation.files": "new=new.jsonl"}, check=False)
    before = {"train": examples("+"), "new": examples("*")}
    state = {"data": {name: asdict(fingerprint(part)) for name, part in before.items()}}
    check_evaluated(Task("t", before, ["exact_match"]), config, state, [])
    task = Task("t", {"train": examples("+"), "new": examples("-")}, ["exact_match"])
    with pytest.raises(ConfigError, match=r"not those of the run \(new: the prompts differ, first in row 0\)"):
        check_evaluated(task, config, state, ["seeds", "evaluation.splits"])
    for asked in ("evaluation.files", "data_path", "task_options.prompt_column"):
        check_evaluated(task, config, state, [asked])
    check_evaluated(task, config, {}, [])  # of an earlier version
    task.splits["train"] = examples("-")
    with pytest.raises(ConfigError, match=r"not those of the run \(train: the prompts differ"):
        check_evaluated(task, config, state, ["evaluation.files"])


def test_how_a_configuration_calls_a_reward() -> None:
    assert reward_text(RewardFunction.of("gsm8k")) == "gsm8k"
    assert reward_text(RewardFunction.of(load_task)) == "bandit_rft.tasks:load_task"
    assert reward_text(RewardFunction.of(cell())) == "session:sample:paid"
    named = RewardFunction.parse("sample:rewards.py:paid")
    assert RewardFunction.parse(reward_text(named)) == named


def test_a_digest_is_of_what_a_function_computes() -> None:
    def made(weight: float) -> Callable[..., float]:
        return lambda completion: weight * len(completion)

    class Judge:
        def __init__(self, weight: float) -> None:
            self.weight, self.seen = weight, [weight]

        def __call__(self, completion: str) -> float:
            return self.weight

    for of in (made, Judge):
        assert code_digest(of(1.0)) == code_digest(of(1.0)) != code_digest(of(2.0))
    limited = "def f(completion):\n    return float(len(completion) < LIMIT)"
    digests = [code_digest(cell(limited, "f", LIMIT=limit)) for limit in (5, 5, 6)]
    assert digests[0] == digests[1] != digests[2]
    searched = (
        "import re\nWORDS = re.compile('{}')\ndef f(completion):\n    return float(bool(WORDS.search(completion)))"
    )
    assert code_digest(cell(searched, "f")) != code_digest(cell(searched.replace("{}", "a+"), "f"))
    calls = [code_digest(cell(f"def f():\n    return g(1.5, 2.5, {last})", "f")) for last in (1.5, 2.5)]
    assert calls[0] != calls[1]
    counted = "def f(completion):\n    global N\n    N += 1\n    return 1.0"
    assert code_digest(cell(counted, "f", N=0)) == code_digest(cell(counted, "f", N=7))
    again = "def f(n):\n    return f(n - 1) if n else 0"
    assert code_digest(cell(again, "f")) == code_digest(cell(again, "f"))
    # Forty functions that call each other; what they are is said once each.
    many = "".join(f"def f{i}():\n    return [{', '.join(f'f{j}()' for j in range(40))}, {i}]\n" for i in range(40))
    assert code_digest(cell(many, "f0")) == code_digest(cell(many, "f0"))
    assert code_digest(cell(many, "f0")) != code_digest(cell(many.replace(", 39]", ", 40]"), "f0"))
    cached = "import functools\n@functools.cache\ndef f(completion):\n    return 1.0"
    assert code_digest(cell(cached, "f")) == code_digest(cell(cached, "f"))
    assert code_digest(cell(cached, "f")) != code_digest(cell(cached.replace("1.0", "2.0"), "f"))
    function = cell()
    before = code_digest(function)
    for _ in range(2000):  # Python specializes what runs often
        function("1", "2")
    assert code_digest(function) == before


class Refuses:
    """An object that lets nobody look."""

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        raise RuntimeError("not to be looked at")


def test_a_digest_never_ends_a_run() -> None:
    """What cannot be described is known by the function's name alone; what is nested deeply, too."""
    refuses = Refuses()
    deep: Any = ()
    for _ in range(5000):
        deep = (deep,)

    def one(completions: list[str], **columns: Any) -> list[float]:
        return [float(refuses is None)] * len(completions)

    def other(completions: list[str], **columns: Any) -> list[float]:
        return [float(deep is None)] * len(completions)

    assert code_digest(one) == code_digest(one) != code_digest(other)
