"""The built-in task, its warm-start script and the base model that ships with the package."""

import argparse
import importlib.util
import random
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from bandit_rft.tasks import arithmetic, collate, countdown, load_task

STUDY_MODELS = ROOT / "studies" / "models"
BASE = ROOT / "bandit_rft" / "assets" / "arithmetic-base"
SMALL = {"train_size": 60, "test_size": 30, "longer_size": 20}


@pytest.mark.parametrize(
    ("question", "worked"),
    [
        ("47+85+36=", "(132+36)=168"),
        ("47+85-36=", "(132-36)=96"),
        ("12-85+36=", "(-73+36)=-37"),
        ("25-25-3=", "(0-3)=-3"),
        ("47*6-12=", "(240+42-12)=(282-12)=270"),
        ("40*6+5=", "(240+5)=245"),
        ("7*6=", "42"),
        ("47+85=", "132"),
    ],
)
def test_worked_answers(question: str, worked: str) -> None:
    assert arithmetic.work_out(question) == worked


@pytest.mark.parametrize("kind", arithmetic.KINDS)
@pytest.mark.parametrize("digits", [1, 2, 4])
def test_every_link_of_a_worked_answer_equals_the_question(kind: str, digits: int) -> None:
    rng = random.Random(0)
    for terms in range(2, 8):
        for _ in range(20):
            question = arithmetic.make_question(rng, kind, terms, digits)
            worked = arithmetic.work_out(question)
            assert set(question + worked) <= set(arithmetic.ALPHABET)
            right = eval(question.removesuffix("="))
            assert [eval(link) for link in worked.split("=")] == [right] * len(worked.split("="))
            assert arithmetic.final_answer(worked) == str(right)


@pytest.mark.parametrize("question", ["", "47+85", "47=", "4a+3=", "47*62=", "47+6*2=", "47+-3="])
def test_work_out_refuses_what_is_no_question(question: str) -> None:
    with pytest.raises(ValueError, match="question: expected"):
        arithmetic.work_out(question)


def test_splits_are_disjoint_and_sized_and_answers_right() -> None:
    task = arithmetic.load(0, {})
    assert {name: len(examples) for name, examples in task.splits.items()} == {
        "train": 2000,
        "test": 500,
        "longer": 200,
    }
    prompts = {name: {str(example.prompt) for example in examples} for name, examples in task.splits.items()}
    assert all(len(prompts[name]) == len(task.splits[name]) for name in prompts)
    assert not prompts["train"] & prompts["test"] and not prompts["test"] & prompts["longer"]
    for examples in task.splits.values():
        assert all(str(eval(str(e.prompt).removesuffix("="))) == e.columns["answer"] for e in examples)
        assert {e.columns["kind"] for e in examples} == set(arithmetic.KINDS)
    assert {e.columns["terms"] for e in task.splits["test"]} == {3}
    assert {e.columns["terms"] for e in task.splits["longer"]} == {4, 5}


def test_a_test_question_is_never_a_train_question_of_another_seed() -> None:
    tasks = [arithmetic.load(seed, {"digits": 1, **SMALL}) for seed in range(5)]
    train = {e.prompt for task in tasks for e in task.splits["train"]}
    test = {e.prompt for task in tasks for e in task.splits["test"]}
    assert len(train) > 60 and len(test) > 30 and not train & test


def test_the_seed_decides_the_questions() -> None:
    first, again, other = (arithmetic.load(seed, SMALL).splits for seed in (3, 3, 4))
    assert first == again
    assert first["train"] != other["train"] and first["test"] != other["test"]
    assert first["test"][:5] == arithmetic.load(3, {**SMALL, "test_size": 5}).splits["test"]


def test_the_dial() -> None:
    options = {"kinds": ["product"], "min_terms": 2, "max_terms": 2, "digits": 3, "extra_terms": 1, **SMALL}
    splits = arithmetic.load(0, options).splits
    assert all(re.fullmatch(r"\d{1,3}\*[2-9]=", str(e.prompt)) for e in splits["train"] + splits["test"])
    assert all(re.fullmatch(r"\d{1,3}\*[2-9][+-]\d{1,3}=", str(e.prompt)) for e in splits["longer"])
    assert all("-" in str(e.prompt) for e in arithmetic.load(0, {"kinds": ["mixed"], **SMALL}).splits["train"])
    assert not any(
        set("-*") & set(str(e.prompt)) for e in arithmetic.load(0, {"kinds": "sum", **SMALL}).splits["train"]
    )
    assert "longer" not in arithmetic.load(0, {**SMALL, "extra_terms": 0}).splits
    assert "longer" not in arithmetic.load(0, {**SMALL, "longer_size": 0}).splits


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"digit": 2}, ValueError, "unknown option of task arithmetic.*digits"),
        ({"digits": 0}, ValueError, "digits: expected 1 to 9, got 0"),
        ({"digits": "2"}, TypeError, "digits: expected a whole number, got '2'"),
        ({"digits": 2.0}, TypeError, "digits: expected a whole number"),
        ({"test_size": True}, TypeError, "test_size: expected a whole number"),
        ({"train_size": 0}, ValueError, "train_size: expected 1"),
        ({"min_terms": 1}, ValueError, "min_terms: expected 2"),
        ({"min_terms": 5, "max_terms": 4}, ValueError, "max_terms: expected 5 to 32, got 4"),
        ({"extra_terms": -1}, ValueError, "extra_terms: expected 0"),
        ({"kinds": []}, TypeError, "kinds: expected a list"),
        ({"kinds": ["sum", "root"]}, ValueError, r"kinds: unknown \['root'\]"),
        ({"kinds": ["sum", "sum"]}, ValueError, "kinds: expected each at most once"),
        (
            {"kinds": ["product"], "min_terms": 2, "max_terms": 2, "digits": 1},
            ValueError,
            "train_size: only 6[0-9] distinct questions",
        ),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        arithmetic.load(0, options)


def test_reward_reads_what_follows_the_last_equals_sign() -> None:
    completions = ["168", "(132+36)=168", " 168 ", "(132+36)=168=", "1168", "168+0", "=168", "", "(132+36)=16"]
    rewards = arithmetic.exact_answer(["47+85+36="] * 9, completions, answer=["168"] * 9, kind=["sum"] * 9)
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        arithmetic.exact_answer(["1+1="], ["2"], answer=[])


@pytest.fixture(scope="module")
def warm_start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("warm_start", ROOT / "examples" / "warm_start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_warm_start_learns_and_repeats_itself(
    architecture: str,
    warm_start: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    sizes = (
        "--hidden_size 32 --intermediate_size 48 --layers 1 --heads 2 --batch_size 16 --micro_batch_size 8 --threads 1"
    )
    steps = "--steps 30 --warm_up_steps 3 --log_steps 10 --max_new_tokens 4"
    shape = f"--architecture {architecture} --tasks arithmetic countdown"
    for run in ("a", "b"):
        argv = ["warm_start.py", "--output_dir", str(tmp_path / run), *shape.split(), *sizes.split(), *steps.split()]
        monkeypatch.setattr(sys, "argv", argv)
        warm_start.main()
    torch.set_num_threads(threads)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 6 and losses[:3] == losses[3:] and losses[2] < losses[0]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "a").config
    assert config.model_type == architecture and config.num_hidden_layers == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.unk_token_id not in tokenizer.encode("47*6-12=(240+42-12)17?3,5,4:(3+4)/5")


@pytest.mark.parametrize("worked_steps", [0, 5])
def test_demonstrations_keep_to_the_train_side_and_mix_the_habits(worked_steps: int, warm_start: ModuleType) -> None:
    args = argparse.Namespace(
        seed=0, at_once=0.7, guess_error=5, worked_steps=worked_steps, batch_size=100,
        tasks=["arithmetic", "countdown"], kinds=["sum", "mixed"], terms=[3, 4], digits=2, max_number=20
    )  # fmt: skip
    habits: dict[str, list[bool]] = {"arithmetic": [], "countdown": []}
    for question, completion in islice(warm_start.demonstrations(args), 100 * worked_steps + 3000):
        if "?" not in question:
            assert not arithmetic.is_held_out(question)
            worked = arithmetic.work_out(question)
            habits["arithmetic"].append(completion != worked)
            assert completion == worked or abs(int(completion) - int(arithmetic.final_answer(worked))) <= 5
            continue
        target, _, given = question.removesuffix(":").partition("?")
        numbers = [int(number) for number in given.split(",")]
        assert not countdown.is_held_out(numbers, int(target))
        # A guess uses the numbers but mostly misses the target, a worked answer reaches it.
        habits["countdown"].append("," not in completion)
        reached = eval(completion) if habits["countdown"][-1] else int(target)
        assert countdown.is_solution(completion, numbers, reached)
    for at_once in habits.values():
        first = 40 * worked_steps  # not all of either task
        assert not any(at_once[:first])
        at_once = at_once[60 * worked_steps :]
        for part in (at_once[:600], at_once[600:]):
            assert 0.63 < sum(part) / len(part) < 0.77


def test_shipped_tokenizer_is_one_token_a_character() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "47*6-12=(240+42-12)=(282-12)=270"
    assert tokenizer.tokenize(text) == list(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("1?") == [tokenizer.convert_tokens_to_ids("1"), tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_shipped_model_is_small_and_has_mixed_habits(warm_start: ModuleType) -> None:
    assert (BASE / "model.safetensors").stat().st_size <= 3_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    examples = arithmetic.load(0, {}).splits["test"][:300]
    torch.manual_seed(0)
    completions = warm_start.complete(model, tokenizer, examples, 60, sample=True)
    right = arithmetic.exact_answer([], completions, answer=[e.columns["answer"] for e in examples])
    worked = ["(" in text for text in completions]
    assert sum(right) / 300 <= 0.45
    assert 0.15 < sum(worked) / 300 < 0.45
    # Measured on all 500 questions: 0.95 of the worked answers are right, 0.01 of the others.
    assert sum(r for r, w in zip(right, worked, strict=True) if w) >= 0.85 * sum(worked)
    assert sum(r for r, w in zip(right, worked, strict=True) if not w) <= 0.1 * (300 - sum(worked))


@pytest.mark.parametrize("folder", sorted(p.name for p in STUDY_MODELS.iterdir() if p.is_dir()))
def test_models_of_the_studies_have_mixed_habits_on_both_tasks(folder: str, warm_start: ModuleType) -> None:
    path = STUDY_MODELS / folder
    assert (path / "model.safetensors").stat().st_size <= 1_700_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config.model_type == folder.partition("-")[0] and model.dtype == torch.float32
    for name, options in (("arithmetic", {"kinds": ["sum", "mixed"]}), ("countdown", {})):
        task = load_task(name, options=options)
        examples = task.splits["test"][:250]
        completions = warm_start.complete(model, tokenizer, examples, 24, sample=True)
        scores = task.rewards[0].load()([], completions, **collate(examples))
        worked = [warm_start.WORKED[name] in text for text in completions]
        assert 0.2 < sum(worked) / 250 < 0.6
        rates = [sum(s for s, w in zip(scores, worked, strict=True) if w is habit) for habit in (True, False)]
        # Both habits are there, neither of them perfect, and the worked one pays: that is what there is to learn.
        assert 0.05 < sum(scores) / 250 < 0.6
        assert rates[0] / sum(worked) > 1.5 * rates[1] / (250 - sum(worked))
