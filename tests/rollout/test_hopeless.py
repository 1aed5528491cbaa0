"""Rollouts that are ended once their reward can only be 0: the same tokens until there, the same expected gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_rewards
import torch
from architectures import CONFIGS
from tiny_models import character_tokenizer, sums, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config

from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.distributed.drawing import SplitEngine
from bandit_rft.hopeless import Hopeless, hopeless_count
from bandit_rft.metrics import read_metrics
from bandit_rft.model import Policy
from bandit_rft.rewards import RewardError, RewardFunction
from bandit_rft.rollout import RolloutEngine, Watch, sequence_ids
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import Task, load_task
from bandit_rft.trainer import Trainer

PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22]]
STOP = 2


# --- what the engine does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["native", "gpt2", "static"])
def test_an_ended_completion_is_the_beginning_of_the_whole_one(kind: str, every: int) -> None:
    """Ended where it has a token of its prompt's own parity, as the looks at every so many tokens find it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]) if kind == "gpt2" else tiny_llama()
    policy = Policy(model)
    policy.stop_tokens = [STOP]
    engine = RolloutEngine(policy, max_completion_length=16, batch_size=5, static_cache=kind == "static")
    ids = sequence_ids(0, 1, [q for q in range(4) for _ in range(6)], list(range(6)) * 4)
    whole = engine.generate(PROMPTS, ids, seed=3, n=6)
    asked = list[tuple[int, tuple[int, ...]]]()

    def hopeless(row: int, tokens: list[int]) -> bool:
        return any(token % 7 == row // 6 for token in tokens)

    def told(rows: list[int], tokens: list[list[int]]) -> list[bool]:
        asked.extend(zip(rows, map(tuple, tokens), strict=True))
        return [hopeless(row, so_far) for row, so_far in zip(rows, tokens, strict=True)]

    cut = engine.generate(PROMPTS, ids, seed=3, n=6, watch=Watch(every, told))
    ended = 0
    for row, (tokens, full) in enumerate(zip(cut.token_lists(), whole.token_lists(), strict=True)):
        looks = [length for length in range(every, min(len(full), 16), every) if full[length - 1] != STOP]
        end = next((length for length in looks if hopeless(row, full[:length])), None)
        assert tokens == full[:end], row
        assert [so_far for of, so_far in asked if of == row] == [
            tuple(full[:length]) for length in looks if end is None or length <= end
        ]
        assert bool(cut.truncated[row]) == (end is None and bool(whole.truncated[row]))
        torch.testing.assert_close(
            cut.split(cut.logprobs)[row], whole.split(whole.logprobs)[row][:end], atol=1e-5, rtol=1e-5
        )
        ended += end is not None
    assert hopeless_count(cut, [STOP]) == ended and 6 < ended < 24 and hopeless_count(whole, [STOP]) == 0


def test_a_rank_asks_for_the_rows_of_the_whole_call() -> None:
    policy = Policy(tiny_llama())
    policy.stop_tokens = []  # so that every completion goes on
    engine = RolloutEngine(policy, max_completion_length=4)
    ids = sequence_ids(0, 1, [0, 0, 1, 1, 2, 2], [0, 1] * 3)
    asked = set[int]()

    class Second:
        rank, world = 1, 2

        def gather_batch(self, part: RolloutBatch) -> RolloutBatch:
            return RolloutBatch.cat([part, part, part])  # in place of what other ranks drew

    def told(rows: list[int], tokens: list[list[int]]) -> list[bool]:
        asked.update(rows)
        return [row == 5 for row in rows]

    split = SplitEngine(engine, Second())  # type: ignore[arg-type]
    cut = split.generate(PROMPTS[:3], ids, seed=3, n=2, watch=Watch(1, told))
    assert asked == {4, 5}  # the third prompt is this rank's
    assert cut.lengths.tolist()[:2] == [4, 1]


# --- what it means for the gradient -----------------------------------------------------------------------------------


def test_the_expected_gradient_is_the_same_and_its_variance_smaller() -> None:
    """All completions of three tokens over a vocabulary of 4, in float64: sum of P A grad log P, whole and ended."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval().double()
    parameters = list(model.parameters())

    def reward(of: tuple[int, ...]) -> float:
        return float(of[0] == 1 and of[1] != 0 and sum(of) % 2 == 0)

    def length_when_known(of: tuple[int, ...]) -> int:
        return 1 if of[0] != 1 else 2 if of[1] == 0 else 3

    mean, second = ({kind: torch.zeros((), dtype=torch.float64) for kind in ("whole", "ended")} for _ in range(2))
    shortened = 0.0
    for of in itertools.product(range(4), repeat=3):
        logits = model(input_ids=torch.tensor([[1, *of]])).logits[0, :3]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(of)[:, None])
        chance, known = float(logp.detach().sum().exp()), length_when_known(of)
        ends = itertools.product(range(4), repeat=3 - known)
        assert known == 3 or not any(reward((*of[:known], *rest)) for rest in ends)
        for kind, length in (("whole", 3), ("ended", known)):
            gradients = torch.autograd.grad(logp[:length].sum(), parameters, retain_graph=True)
            gradient = (reward(of) - 0.3) * torch.cat([g.flatten() for g in gradients])
            mean[kind] = mean[kind] + chance * gradient
            second[kind] = second[kind] + chance * gradient.square().sum()
        shortened += chance * (3 - known)
    scale = mean["whole"].abs().max()
    torch.testing.assert_close(mean["ended"] / scale, mean["whole"] / scale, atol=1e-12, rtol=0)
    assert second["ended"] < 0.9 * second["whole"] and shortened > 0.5


# --- through the trainer ----------------------------------------------------------------------------------------------


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(folder: str = "run", **overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 12,
            "output_dir": str(tmp_path / folder), "max_rounds": 4, "learning_rate": 3e-3, "max_prompt_length": 12,
            "max_completion_length": 8, "save_steps": 0, "eval_steps": 0, "evaluation.max_queries": 2, "device": "cpu",
            "rollout.stop_hopeless": 1, **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config, reward: Any = tiny_rewards.starts_with_vowel) -> Trainer:
    task = sums()
    trainer = Trainer(config, task=Task(task.name, task.splits, [reward]))
    trainer.run()
    return trainer


def test_where_the_normalizer_counts_rollouts_a_run_is_the_same_for_fewer_tokens(
    configure: Callable[..., Config],
) -> None:
    """With the raw reward, those ended have no gradient; no sum and no draw depends on their length."""
    by_sequence = {"objective.aggregation": "seq-mean-token-sum"}
    ended, whole = run(configure(**by_sequence)), run(configure("whole", **by_sequence, **{"rollout.stop_hopeless": 0}))
    for a, b in zip(ended.policy.model.parameters(), whole.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    of_rounds = zip(read_metrics(ended.folder)[1:], read_metrics(whole.folder)[1:], strict=True)
    for number, (line, other) in enumerate(of_rounds, start=1):
        rows, full = (
            pq.read_table(of.folder / "rollouts" / f"round-{number:06d}.parquet").to_pylist() for of in (ended, whole)
        )
        shorter = 0
        for row, long in zip(rows, full, strict=True):
            length = len(row["token_ids"])
            assert row["token_ids"] == long["token_ids"][:length] and row["reward"] == long["reward"]
            assert length == len(long["token_ids"]) or not row["reward"]
            shorter += length < len(long["token_ids"])
        assert line["rollout/hopeless"] == shorter
        assert line["tokens/generated"] < 0.7 * other["tokens/generated"] and "rollout/hopeless" not in other
        assert line["tokens/trained"] == other["tokens/trained"] and line["grad_norm"] == other["grad_norm"]
    assert sum(line["reward"] for line in read_metrics(ended.folder)[1:]) > 0


def test_rewards_that_do_not_tell_are_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="everything has no function in HOPELESS of its module"):
        run(configure(), tiny_rewards.everything)
    two = [tiny_rewards.starts_with_vowel, tiny_rewards.everything]
    with pytest.raises(ConfigError, match="needs a task with one reward; sums has starts_with_vowel, everything"):
        Trainer(configure(), task=Task("sums", sums().splits, two))
    with pytest.raises(ValueError, match="exact_answer has no function in HOPELESS"):
        Hopeless(load_task("arithmetic", options={"train_size": 4, "test_size": 4, "longer_size": 0}), 1)


def test_the_countdown_tells_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("countdown", options={"train_size": 4, "test_size": 4, "harder_size": 0})
    examples = task.splits["train"]

    class Texts:
        def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
            return [*texts]

    watch = Hopeless(task, 2).watch(examples, Texts())  # type: ignore[arg-type]
    texts = ["x", "", str(examples[2].columns["answer"]), f"{examples[3].columns['numbers'][0]}\ufffd"]
    assert watch.every == 2 and watch.told([0, 1, 2, 3], [[0]] * 4) == [True, False, False, False]

    def fails(completion: str) -> bool:
        raise LookupError("no such number")

    monkeypatch.setitem(tiny_rewards.HOPELESS, "starts_with_vowel", fails)
    reward = RewardFunction("tiny_rewards:starts_with_vowel", function=tiny_rewards.starts_with_vowel)
    task = Task("sums", sums().splits, [reward])
    watch = Hopeless(task, 1).watch(task.splits["train"], character_tokenizer())
    with pytest.raises(RewardError, match=r"HOPELESS of starts_with_vowel.*no such number"):
        watch.told([0], [[5]])
