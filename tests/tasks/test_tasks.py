"""Tasks: the real files row by row, the paper's prompts, users' own data in every form, and what bad data get."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from paths import ROOT

from bandit_rft.rewards import RewardRunner
from bandit_rft.tasks import TASKS, Example, Task, collate, load_task
from bandit_rft.tasks.gsm8k import gold_answer
from bandit_rft.tasks.math_problems import last_boxed

ROWS = [{"prompt": f"What is {n}+1?", "answer": str(n + 1), "level": n} for n in range(10)]


def score(task, split, completions):
    examples = task.splits[split]
    with RewardRunner(task.rewards, task.reward_weights, columns=task.columns) as runner:
        return runner.score([example.prompt for example in examples], completions, collate(examples)).total


def write(path: Path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- the real files


def test_gsm8k(data_dir):
    task = load_task("gsm8k", data_path=str(data_dir / "gsm8k"))
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 7473, "test": 1319}
    first = task.splits["train"][0]
    assert first.prompt == (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May? "
        'Let\'s think step by step and output the final answer after "####".'
    )
    assert first.columns["answer"] == "72"
    for split, examples in task.splits.items():
        answers = [example.columns["answer"] for example in examples]
        assert not any("," in answer or answer != answer.strip() for answer in answers)
        assert all(value == 1 for value in score(task, split, [f"I think so.\n#### {answer}" for answer in answers]))
        examples = task.splits[split] = examples[::5]
        assert all(value == 1 for value in score(task, split, [example.columns["solution"] for example in examples]))
        assert all(value == 0 for value in score(task, split, [f"#### {answer}1" for answer in answers[::5]]))
        assert all(value == 0 for value in score(task, split, answers[::5]))  # the number alone


def test_math(data_dir):
    task = load_task("math", data_path=str(data_dir / "math"))
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 7500, "test": 5000}
    first = task.splits["test"][0]
    assert first.prompt == (
        r"How many vertical asymptotes does the graph of $y=\frac{2}{x^2+x-6}$ have? "
        r"Let's think step by step and output the final answer within \boxed{}."
    )
    columns = {
        "answer": "2",
        "subject": "Algebra",
        "level": "Level 3",
        "data_source": "DigitalLearningGmbH/MATH-lighteval",
    }
    assert {name: first.columns[name] for name in columns} == columns
    for split, examples in task.splits.items():
        answers = [example.columns["answer"] for example in examples]
        empty = [row for row, answer in enumerate(answers) if not answer]  # two solutions box nothing: never earned
        assert empty == ([5341, 5343] if split == "train" else [])
        values = score(task, split, [rf"So \boxed{{{answer}}}." for answer in answers])
        assert all(value == (row not in empty) for row, value in enumerate(values))
        for example in examples:  # the answer is what the solution boxes, so rows without the column lose nothing
            assert last_boxed(example.columns["solution"]) is not None
        examples = task.splits[split] = examples[::5]
        assert all(value == 1 for value in score(task, split, [example.columns["solution"] for example in examples]))
        assert all(value == 0 for value in score(task, split, [rf"\boxed{{{answer}+1}}" for answer in answers[::5]]))
        assert all(value == 0 for value in score(task, split, [rf"\boxed{{{answer}" for answer in answers[::5]]))


def test_math_500_and_math_verify(data_dir):
    task = load_task("math", data_path=str(data_dir / "math500"), options={"verify": "math_verify"})
    examples = task.splits["test"]
    assert list(task.splits) == ["test"] and len(examples) == 500
    assert [reward.name for reward in task.rewards] == ["math_verify"]
    assert all(value == 1 for value in score(task, "test", [rf"\boxed{{{one.columns['answer']}}}" for one in examples]))
    both = load_task(
        "math",
        data_path=str(data_dir / "math" / "train.jsonl"),
        options={"test_path": str(data_dir / "math500" / "test.jsonl")},
    )
    assert {split: len(examples) for split, examples in both.splits.items()} == {"train": 7500, "test": 500}


def test_summarize(data_dir):
    task = load_task("summarize", data_path=str(data_dir / "summarization-scitldr"))
    assert {split: len(examples) for split, examples in task.splits.items()} == {
        "train": 1992,
        "test": 618,
        "validation": 619,
    }
    examples = task.splits["test"]
    assert examples[0].prompt.startswith(
        "Summarize the following abstract in one sentence.\n\nIncremental class learning"
    )
    assert examples[0].prompt.endswith("benchmarks.\n\nTL;DR:")
    assert len(examples[0].columns["answer"]) == 2  # many references
    task.splits["test"] = examples[::12]
    last = [example.columns["answer"][-1] for example in task.splits["test"]]
    assert score(task, "test", last) == pytest.approx([1.0] * 52)
    penalized = load_task(
        "summarize", data_path=str(data_dir / "summarization-scitldr"), options={"length_penalty": 0.5}
    )
    penalized.splits["test"] = penalized.splits["test"][::12]
    assert score(penalized, "test", last) == pytest.approx([1.0] * 52)
    long = [text + " and so on and so on" * 5 for text in last]
    assert all(
        0 < short < plain
        for short, plain in zip(score(penalized, "test", long), score(task, "test", long), strict=True)
    )


# ---------------------------------------------------------------- your own data


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_forms(tmp_path, form):
    path = tmp_path / f"mine.{form}"
    if form == "jsonl":
        write(path)
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "csv":
        path.write_text("prompt,answer,level\n" + "".join(f"{r['prompt']},{r['answer']},{r['level']}\n" for r in ROWS))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    for name, data_path in (("dataset", str(path)), (str(path), None), ("jsonl", str(path))):
        task = load_task(name, data_path=data_path, reward=["exact_match"])
        assert list(task.splits) == ["train"] and len(task.splits["train"]) == 10
        example = task.splits["train"][3]
        assert (
            example.prompt == "What is 3+1?" and example.columns["answer"] == "4" and int(example.columns["level"]) == 3
        )
        assert score(task, "train", ["4"] * 10) == [float(n == 3) for n in range(10)]


def test_held_out_rows_beside_a_test_split_are_said(tmp_path, caplog):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:2])
    task = load_task("dataset", data_path=str(tmp_path), reward=["exact_match"], options={"test_size": 3})
    assert len(task.splits["train"]) == 10 and len(task.splits["test"]) == 2
    assert caplog.messages == ["test_size=3 cannot act: the data have a split test (2 rows)"]


def test_a_folder_and_held_out_rows(tmp_path):
    write(tmp_path / "train.jsonl")
    task = load_task("dataset", data_path=str(tmp_path), reward=["exact_match"], options={"test_size": 3}, seed=1)
    train, test = ([example.prompt for example in task.splits[split]] for split in ("train", "test"))
    assert len(test) == 3 and sorted(train + test) == [row["prompt"] for row in ROWS]
    again, other = (
        load_task("dataset", data_path=str(tmp_path), reward=["exact_match"], options={"test_size": 3}, seed=seed)
        for seed in (1, 2)
    )
    assert again.splits == task.splits != other.splits
    write(tmp_path / "test.jsonl", ROWS[:2])
    write(tmp_path / "dev.jsonl", ROWS[:1])
    task = load_task("dataset", data_path=str(tmp_path), reward=["exact_match"])
    assert {split: len(examples) for split, examples in task.splits.items()} == {
        "train": 10,
        "test": 2,
        "validation": 1,
    }


@pytest.mark.parametrize("prompt", ["prompt", "question", "problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth", "label"])
def test_aliases(tmp_path, prompt, answer):
    path = write(tmp_path / "rows.jsonl", [{prompt: "Why?", answer: "So.", "other": 1}])
    example = load_task("dataset", data_path=path, reward=["exact_match"]).splits["train"][0]
    assert example == Example("Why?", {"answer": "So.", "other": 1})


def test_named_columns_and_suffix(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "Why?", "gold": 7, "answer": "unused"}])
    options = {"prompt_column": "text", "answer_column": "gold", "suffix": "Be brief."}
    example = load_task("dataset", data_path=path, reward=["exact_match"], options=options).splits["train"][0]
    assert example == Example("Why? Be brief.", {"answer": 7})


def test_chat_and_verl_rows(tmp_path):
    messages = [{"role": "system", "content": "You add."}, {"role": "user", "content": "2+3?"}]
    row = {"prompt": messages, "data_source": "d", "reward_model": {"style": "rule", "ground_truth": "5"}}
    task = load_task("dataset", data_path=write(tmp_path / "rows.jsonl", [row]), reward=["gsm8k"])
    example = task.splits["train"][0]
    assert example.prompt == messages and example.columns["answer"] == "5"
    assert score(task, "train", [[{"role": "assistant", "content": "#### 5"}]]) == [1]


def test_messages_keep_what_a_template_may_ask_for(tmp_path):
    """Left out, a conversation with tools would be another prompt."""
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    messages = [{"role": "user", "content": "2+3?"}, called, {"role": "tool", "content": "5", "tool_call_id": "x"}]
    rows = [{"prompt": [{"name": None, **message} for message in messages], "answer": "5"}]  # null: not said
    task = load_task("dataset", data_path=write(tmp_path / "rows.jsonl", rows), reward=["exact_match"])
    assert task.splits["train"][0].prompt == messages
    rows[0]["prompt"][2]["tool_call_id"] = "\ud800"
    with pytest.raises(ValueError, match=r"row 0, column prompt: .*lone surrogate"):
        load_task("dataset", data_path=write(tmp_path / "rows.jsonl", rows), reward=["exact_match"])


def test_a_users_reward_and_prompts_without_answers(tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def dogs(prompts, completions, **columns):\n    return [text.count('dog') for text in completions]\n"
    )
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Once upon a time"}])
    task = load_task("dataset", data_path=path, reward=[f"{reward}:dogs"])
    assert task.splits["train"][0].columns == {} and task.columns == []
    with RewardRunner(task.rewards, columns=task.columns) as runner:
        assert runner.score(["Once upon a time"], ["a dog, a dog"], {}).total == [2]


def test_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config=None, revision=None):
        asked.append((name, config, revision))
        if name == "openai/gsm8k":
            rows = [{"question": "2+3?", "answer": "It is 5.\n#### 1,005"}]
        elif "MATH" in name:
            rows = [{"problem": "2+3?", "level": "Level 1", "solution": r"It is $\boxed{5}$.", "type": "Algebra"}]
        elif "scitldr" in name:
            rows = [{"source": ["We add.", "It works."], "target": ["Adding works."]}]
        elif name == "somebody/sums":
            rows = ROWS
        else:
            raise ConnectionError("no network")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("gsm8k").splits["test"][0].columns["answer"] == "1005"
    assert load_task("math").splits["train"][0].columns["answer"] == "5"
    assert load_task("summarize").splits["train"][0].prompt.endswith("\n\nWe add. It works.\n\nTL;DR:")
    mine = load_task("somebody/sums", reward=["exact_match"], options={"config": "easy"})
    assert [example.columns["level"] for example in mine.splits["train"]] == list(range(10))
    assert asked == [
        ("openai/gsm8k", "main", None),
        ("DigitalLearningGmbH/MATH-lighteval", None, None),
        ("allenai/scitldr", "Abstract", "refs/convert/parquet"),
        ("somebody/sums", "easy", None),
    ]
    with pytest.raises(
        ValueError, match=r"data_path: the dataset 'no/where' could not be loaded .*no network.*give data_path"
    ):
        load_task("no/where", reward=["exact_match"])


# ---------------------------------------------------------------- made examples


def test_arithmetic_is_registered():
    task = load_task("arithmetic", seed=3, options={"train_size": 20, "test_size": 10, "longer_size": 5})
    assert {"train", "test", "longer"} == set(task.splits)
    assert score(task, "test", [example.columns["answer"] for example in task.splits["test"]]) == [1.0] * 10
    with pytest.raises(ValueError, match="data_path: task 'arithmetic' makes its own examples"):
        load_task("arithmetic", data_path="somewhere")


def test_reasoning_gym_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'bandit_rft\[reasoning-gym\]'"):
        load_task("reasoning-gym", options={"dataset": "leg_counting"})


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    options = {"dataset": "leg_counting", "train_size": 5, "test_size": 4, "config": {"max_animals": 4}}
    task = load_task("reasoning-gym", seed=3, options=options)
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 5, "test": 4}
    answers = [example.columns["answer"] for example in task.splits["train"]]
    assert score(task, "train", [f"Well. <answer>{answer}</answer>" for answer in answers]) == [1.0] * 5
    assert score(task, "train", answers) == [0.0] * 5
    assert task.splits == load_task("reasoning-gym", seed=3, options=options).splits
    with pytest.raises(ValueError, match="did you mean 'leg_counting'"):
        load_task("reasoning_gym", options={"dataset": "leg_countin"})


# ---------------------------------------------------------------- refused, with the reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gsm8"}, "unknown task 'gsm8'; did you mean 'gsm8k'"),
        (
            {"name": "gsm8k", "options": {"test_pth": "x"}},
            "unknown option of task gsm8k: 'test_pth'; did you mean 'test_path'",
        ),
        ({"name": "math", "options": {"verify": "mathverify"}}, "did you mean 'math_verify'"),
        ({"name": "summarize", "options": {"length_penalty": -1}}, "length_penalty .* at least 0, got -1"),
        ({"name": "gsm8k", "data_path": "nowhere"}, "data_path: there is no file or folder 'nowhere'"),
        ({"name": "dataset"}, "data_path: task 'dataset' needs a file"),
        ({"name": "a/b", "data_path": "c"}, "data_path: not taken where the task is itself"),
        ({"name": "gsm8k", "reward": ["exact"]}, "unknown reward 'exact'; did you mean 'exact_match'"),
        ({"name": "nowhere.jsonl", "reward": ["exact_match"]}, "data_path: there is no file"),
    ],
)
def test_refused(arguments, message):
    name = arguments.pop("name")
    with pytest.raises(ValueError, match=message):
        load_task(name, **arguments)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "a", "answer": "b"}],
            {},
            r"train row 0: no prompt; expected one of .*question.*got \['answer', 'text'\]$",
        ),
        ([{"promt": "a", "answer": "b"}], {}, "got .'answer', 'promt'.; did you mean 'promt', prompt_column=promt"),
        (ROWS, {"prompt_column": "promt"}, "unknown prompt_column 'promt'; did you mean 'prompt'"),
        (ROWS, {"answer_column": "gold"}, "unknown answer_column 'gold' .*there are: answer, level, prompt"),
        ([{"prompt": " ", "answer": "b"}], {}, "row 0, column prompt: expected a text, got an empty one"),
        ([{"prompt": 7, "answer": "b"}], {}, "expected a text or a list of chat messages, got a int"),
        ([{"prompt": [{"role": "user"}], "answer": "b"}], {}, 'expected messages like {"role": "user"'),
        ([*ROWS, {"prompt": "a"}], {}, "train row 10: no answer, though other rows have one"),
        ([*ROWS, {"prompt": "a", "answer": None}, *ROWS], {}, "train row 10: no answer, though other rows have one"),
        ([*ROWS, {"prompt": "a", "answer": math.nan}], {}, "train row 10: no answer, though other rows have one"),
        (  # another column is no substitute for what is missing
            [*({**row, "solution": "long"} for row in ROWS), {"prompt": "a", "answer": None, "solution": "long"}],
            {},
            "train row 10: no answer, though other rows have one in the column answer",
        ),
        (
            [*({**row, "question": "raw"} for row in ROWS), {"prompt": None, "answer": "1", "question": "raw"}],
            {},
            "train row 10, column prompt: expected a text or a list of chat messages, got a NoneType",
        ),
        ([{"prompt": [{"role": "assistant", "content": None}], "answer": "1"}], {}, "expected messages"),
        ([{"prompt": "a", "answer": "b", "completions": 1}], {}, r"the columns \['completions'\] have names"),
        (ROWS, {"test_size": 10}, "test_size: expected 1 to 9 of 10 rows, got 10"),
        (ROWS, {"test_path": "nowhere.jsonl"}, "test_path: there is no file 'nowhere.jsonl'"),
        ([], {}, "holds no rows"),
    ],
)
def test_bad_rows(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=write(tmp_path / "rows.jsonl", rows), reward=["exact_match"], options=options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt":\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object, got a list"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000 + "\n", "line 1: nested too deeply"),
        ("a.jsonl", '{"prompt": "a", "answer": "1", "answer": "2"}\n', "line 1: not JSON: 'answer' is given twice"),
        ("a.csv", "prompt,answer,answer\na,1,2\n", "the header names the column 'answer' twice"),
        ("a.json", '{"prompt": "a"}', "expected a list of objects, got a dict"),
        ("a.csv", "prompt,answer\na\n", "row 1: the number of fields differs"),
        ("a.parquet", "prompt", "is not a Parquet file"),
        ("a.txt", "prompt", "expected a file ending in .jsonl"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=str(tmp_path / name), reward=["exact_match"])


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', "a.jsonl, line 2: not UTF-8 .byte 0xe4"),
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "\xff"}\n', "a.jsonl, line 3: not UTF-8 .byte 0xff"),
        ("a.json", b'[\n{"prompt":\n"\xe4"}]', "a.json, line 3: not UTF-8"),
        ("a.csv", b"prompt,answer\n1,2\n\xe4,2\n", "a.csv, line 3: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "a.jsonl is UTF-16; expected UTF-8"),
        ("a.csv", b"prompt,answer\n1," + b"2" * 140_000 + b"\n", "a.csv, line 2: not CSV: field larger"),
    ],
)
def test_encodings(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=str(tmp_path / name), reward=["exact_match"])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_is_read(tmp_path, ending):
    texts = {
        "a.jsonl": '{"prompt": "a\u2028b", "answer": "é"}\n' * 2,
        "a.json": '[{"prompt": "a\u2028b", "answer": "é"},\n{"prompt": "a\u2028b", "answer": "é"}]',
        "a.csv": "prompt,answer\na\u2028b,é\na\u2028b,é\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ending).encode())
        task = load_task("dataset", data_path=str(tmp_path / name), reward=["exact_match"])
        assert task.splits["train"] == [Example("a\u2028b", {"answer": "é"})] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a\ud800b"}, r"dataset train row 1, column prompt: .* lone surrogate at character 1.*a\\ud800b"),
        ({"prompt": [{"role": "user", "content": "\udfff"}]}, "row 1, column prompt: .*lone surrogate at character 0"),
        ({"answer": "\ud800"}, "row 1, column answer: .*lone surrogate"),
        ({"extra": {"deep": ["a", "\udc00"]}}, "row 1, column extra: .*lone surrogate"),
    ],
)
def test_a_lone_surrogate_names_its_row(tmp_path, row, message):
    rows = [
        {"prompt": "🙂", "answer": "b", "extra": None}
    ] * 3  # a pair of surrogates, as JSON writes it, is a character
    path = write(tmp_path / "rows.jsonl", [rows[0], {**rows[1], **row}, rows[2]])
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=path, reward=["exact_match"])


def test_parquet_columns_that_no_reward_can_be_given_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime
    import decimal

    rows = {"prompt": ["a", "b"], "answer": ["1", "2"], "day": [datetime.date(2026, 1, 1), None]}
    for name, values, kind in (
        ("image", [None, b"raw"], "bytes"),
        ("price", [decimal.Decimal("1.50"), decimal.Decimal(2)], "Decimal"),
        ("parts", [[{"x": None}], [{"x": b"raw"}]], "bytes"),
    ):
        parquet.write_table(pyarrow.table({**rows, name: values}), tmp_path / "rows.parquet")
        with pytest.raises(
            ValueError, match=rf"dataset train row \d, column {name}: {kind} cannot be handed to a reward"
        ):
            load_task("dataset", data_path=str(tmp_path / "rows.parquet"), reward=["exact_match"])
    parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    task = load_task("dataset", data_path=str(tmp_path / "rows.parquet"), reward=["exact_match"])
    assert score(task, "train", ["1", "1"]) == [1, 0]


# ---------------------------------------------------------------- answers that nothing can earn


@pytest.mark.parametrize(
    ("reward", "answers", "message"),
    [
        (
            "gsm8k",
            [18, 20],
            "'gsm8k' pays none of the 2 answers: row 0 has the answer 18, .* of type int: store it as a",
        ),
        ("gsm8k", ["1,234", "5,678"], "pays none of .*'1,234', and '#### 1,234' earns nothing .*without commas"),
        ("gsm8k", ["#### $18", "#### $20"], "pays none .*whole solution"),
        ("gsm8k", ["So it is 5.\n#### 5", "6.\n#### 6"], 'pays none .*whole solution: use the task "gsm8k"'),
        ("math", [18, 20], "'math' pays none .* of type int"),
        ("math", ["", ""], "'math' pays none .*it is empty"),
        ("math_verify", ["", " "], "'math_verify' pays none .*it is empty"),
        ("exact_match", ["", " "], "'exact_match' pays none .*it is empty"),
        ("exact_match", [], ""),
        ("exact_match", [18, 20], ""),
        ("rouge_l", ["", "5"], ""),  # a reward of degrees is not checked
    ],
)
def test_answers_that_nothing_can_earn_are_refused_on_loading(tmp_path, reward, answers, message):
    rows = [{"prompt": "?", "answer": answer} for answer in answers or ["a"]]
    path = write(tmp_path / "rows.jsonl", rows)
    if not message:
        task = load_task("dataset", data_path=path, reward=[reward])
        assert task.reference_rates == ({f"train/{reward}": 1.0} if reward != "rouge_l" else {})
        return
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=path, reward=[reward])
    with pytest.raises(ValueError, match=message):  # among others, too
        load_task("dataset", data_path=path, reward=["rouge_l", reward])


def test_the_share_of_answers_that_can_be_earned_is_reported(tmp_path, caplog):
    rows = [{"prompt": "?", "answer": answer} for answer in ("1", "2,000", "3", "4")]
    task = load_task("dataset", data_path=write(tmp_path / "rows.jsonl", rows), reward=["gsm8k"])
    assert task.reference_rates == {"train/gsm8k": 0.75}
    assert "'gsm8k' can pay 3 of 4 answers (75.00%); the first it cannot: row 1 has the answer '2,000'" in caplog.text


def test_rates_of_the_real_data(data_dir):
    rates = {
        "gsm8k": {"train/gsm8k": 1.0, "test/gsm8k": 1.0},
        "math": {"train/math": 1 - 2 / 7500, "test/math": 1.0},
        "math500": {"test/math": 1.0},
        "summarization-scitldr": {},
    }
    for folder, rate in rates.items():
        name = {"math500": "math", "summarization-scitldr": "summarize"}.get(folder, folder)
        assert load_task(name, data_path=str(data_dir / folder)).reference_rates == rate
    with pytest.raises(ValueError, match=r"reward .gsm8k. pays none of the 7473 answers"):
        load_task("dataset", data_path=str(data_dir / "gsm8k" / "train.jsonl"), reward=["gsm8k"])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "answer": None}] * 3, {}, r"dataset train: the answers \(answer\) are null in every row"),
        ([{"prompt": "a", "gold": None}] * 3, {"answer_column": "gold"}, r"the answers \(gold\) are null"),
        ([{"prompt": "a", "reward_model": {"ground_truth": None}}] * 2, {}, r"the answers \(ground_truth\) are null"),
        (
            [{"prompt": "a", "completion": "b"}],
            {},
            r"the columns \['completion'\] have names .*answer_column=completion",
        ),
    ],
)
def test_answers_that_are_not_there(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_task("dataset", data_path=write(tmp_path / "a.jsonl", rows), reward=["exact_match"], options=options)


def test_a_test_split_without_answers_is_left_out(tmp_path, caplog):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [{"prompt": "a", "answer": None}] * 3)
    task = load_task("dataset", data_path=str(tmp_path), reward=["exact_match"])
    assert list(task.splits) == ["train"]
    assert "dataset test: the answers (answer) are null in every row: the split is left out" in caplog.text
    path = write(tmp_path / "mine.jsonl", [{"prompt": "a", "answer": None, "solution": "b"}])  # one of two is enough
    assert load_task("dataset", data_path=path, reward=["exact_match"]).splits["train"][0].columns["answer"] == "b"


def test_a_completion_column_is_an_answer_where_it_is_called_so(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    task = load_task("dataset", data_path=path, reward=["exact_match"], options={"answer_column": "completion"})
    assert task.splits["train"][0].columns == {"answer": "b"} and score(task, "train", ["b"]) == [1]


def test_a_folder_without_splits(tmp_path):
    write(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=r"expected train.jsonl, test.jsonl .*found other.jsonl"):
        load_task("dataset", data_path=str(tmp_path), reward=["exact_match"])


def test_no_reward(tmp_path):
    with pytest.raises(ValueError, match="reward: task 'dataset' brings none"):
        load_task("dataset", data_path=write(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "gsm8k",
            {"question": "2+3?", "answer": "5"},
            'gsm8k train row 0: expected a solution that ends in "#### number"',
        ),
        ("gsm8k", {"prompt": "2+3?"}, "gsm8k train row 0: expected texts in the columns question and answer"),
        ("math", {"problem": "2+3?", "solution": "5"}, r"math train row 0: expected .* solution with \\boxed"),
        ("summarize", {"source": "a", "target": []}, "summarize train row 0: expected texts in the columns source"),
    ],
)
def test_rows_of_another_dataset(tmp_path, task, row, message):
    with pytest.raises(ValueError, match=message):
        load_task(task, data_path=write(tmp_path / "train.jsonl", [row]))


def test_gold_answer():
    assert gold_answer("5 * 14,000 = 70,000\n#### 70,000") == "70000"
    assert gold_answer("#### 1\n#### -2 ") == "-2"


def test_a_task_checks_its_parts():
    for rows, given in (([1], "1"), ([Example("a", {}), {"prompt": "b"}], "{'prompt': 'b'}")):
        with pytest.raises(
            TypeError, match=f"^task 'mine' train row {len(rows) - 1}: expected an Example.* got {given}"
        ):
            Task("mine", {"train": rows}, ["exact_match"])
    with pytest.raises(ValueError, match=r"splits \['test'\] hold no examples"):
        Task("mine", {"train": [Example("a", {})], "test": []}, ["exact_match"])
    with pytest.raises(ValueError, match="reward_weights: expected 1"):
        Task("mine", {"train": [Example("a", {})]}, ["exact_match"], [1.0, 2.0])
    assert collate([Example("a", {"x": 1}), Example("b", {"y": 2})]) == {"x": [1, None], "y": [None, 2]}


def test_loading_a_task_imports_no_torch():
    """Nor the libraries that only other tasks need."""
    code = textwrap.dedent("""
        import sys, types
        package = sys.modules["bandit_rft"] = types.ModuleType("bandit_rft")
        package.__path__ = [sys.argv[1]]
        from bandit_rft.tasks import load_task
        load_task("arithmetic", options={"train_size": 2, "test_size": 2, "longer_size": 2})
        print([name for name in ("torch", "datasets", "pyarrow", "math_verify", "rouge_score") if name in sys.modules])
    """)
    package = str(ROOT / "bandit_rft")
    done = subprocess.run(
        [sys.executable, "-c", code, package], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
    assert {"arithmetic", "countdown", "gsm8k", "math", "summarize", "dataset", "reasoning_gym"} == set(TASKS)
