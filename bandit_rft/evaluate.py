"""Pass@1, pass@k and greedy accuracy of the current policy on whole splits, from a random stream of their own.

The stream depends on the seed, the split, the question and the sample, not on the round: evaluations of one run share
their noise, so their differences are the policy's, and a saved checkpoint evaluated later gives the same numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bandit_rft.data import PromptSet, completion_texts, prompt_text, score
from bandit_rft.metrics import Metrics
from bandit_rft.rewards import RewardRunner
from bandit_rft.rollout import RolloutEngine, Sampling, ServerEngine, sequence_ids
from bandit_rft.rollout_batch import RolloutBatch

EVALUATION_STREAM = 1  # training rollouts are drawn from stream 0


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split, and every completion behind them as columns for Parquet."""

    metrics: Metrics
    columns: dict[str, tuple[str, list[Any]]]


def evaluate(
    engine: RolloutEngine | ServerEngine,
    runner: RewardRunner,
    prompts: PromptSet,
    *,
    seed: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    greedy: bool = True,
) -> Evaluation:
    """Draw completions of every question, score them, and average.

    Args:
        engine: draws them.
        runner: scores them.
        prompts: the split.
        seed: of the run.
        num_samples: completions a question; 0: none.
        temperature: they are drawn at.
        greedy: decode once more without noise.

    Returns:
        Metrics under eval/<split>/: pass@1 (mean reward of the first sample, the paper's Pass@1), pass@k for
        k = 2, 4, ... and num_samples, greedy, mean_length, entropy (nats a token), truncated_fraction, unscored; and
        the completions, of which the greedy ones are sample -1.
    """
    questions = len(prompts)
    metrics: Metrics = {}
    columns: dict[str, tuple[str, list[Any]]] = {
        "query": ("int64", []), "sample": ("int32", []), "prompt": ("string", []), "completion": ("string", []),
        "answer": ("string", []), "reward": ("float64", []), "truncated": ("bool", []),
    }  # fmt: skip

    def draw(sampling: Sampling, count: int, first_sample: int) -> tuple[RolloutBatch, list[list[float]]]:
        split = zlib.crc32(prompts.name.encode())
        queries = np.repeat(np.asarray(prompts.indices), count)
        samples = np.tile(np.arange(count), questions)
        ids = sequence_ids(EVALUATION_STREAM, split, queries, samples)
        rollouts = engine.generate(prompts.tokens, ids, seed=seed, sampling=sampling, n=count)
        texts = completion_texts(rollouts.token_lists(), _tokenizer(engine), engine.policy.stop_tokens)
        examples = [example for example in prompts.examples for _ in range(count)]
        rewards = score(runner, examples, texts).total
        rows: dict[str, Sequence[Any]] = {
            "query": queries.tolist(), "sample": (samples + first_sample).tolist(), "completion": texts,
            "prompt": [prompt_text(example.prompt) for example in examples], "reward": rewards,
            "answer": [answer_text(example) for example in examples], "truncated": rollouts.truncated.tolist(),
        }  # fmt: skip
        for name, values in rows.items():
            columns[name][1].extend(values)
        # A completion that could not be scored has earned nothing: leaving it out would flatter the policy.
        by_question = np.array([reward or 0.0 for reward in rewards]).reshape(questions, count).tolist()
        metrics["unscored"] = (metrics.get("unscored") or 0) + sum(reward is None for reward in rewards)
        return rollouts, by_question

    if num_samples and questions:
        rollouts, rewards = draw(Sampling(temperature=temperature), num_samples, 0)
        metrics["pass@1"] = float(np.mean([of_question[0] for of_question in rewards]))
        for k in [k for k in (2**i for i in range(1, 31)) if k < num_samples] + [num_samples] * (num_samples > 1):
            metrics[f"pass@{k}"] = float(np.mean([best_of_k(of_question, k) for of_question in rewards]))
        metrics["mean_length"] = float(rollouts.lengths.numpy().mean())
        metrics["entropy"] = float(rollouts.entropy.mean())
        metrics["truncated_fraction"] = float(rollouts.truncated.numpy().mean())
    if greedy and questions:
        _, rewards = draw(Sampling.greedy(), 1, -1)  # sample -1 in the table
        metrics["greedy"] = float(np.mean(rewards))
    return Evaluation({f"eval/{prompts.name}/{key}": value for key, value in metrics.items()}, columns)


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Unbiased estimate of the expected best reward of k draws, from n >= k draws.

    The i-th smallest of n is the best of a random k-subset with probability C(i - 1, k - 1) / C(n, k). For rewards 0
    and 1 this is the pass@k estimator of arXiv 2107.03374, 1 - C(n - c, k) / C(n, k).
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, {n}], the number of rewards; got {k}")
    return sum(math.comb(i, k - 1) / math.comb(n, k) * r for i, r in enumerate(sorted(rewards)))


def answer_text(example: Any) -> str | None:
    """The example's right answer for a table, if it has one."""
    answer = example.columns.get("answer")
    return None if answer is None else str(answer)


def _tokenizer(engine: RolloutEngine | ServerEngine) -> Any:
    if engine.policy.tokenizer is None:
        raise ValueError("the policy has no tokenizer: evaluation needs one to turn completions into text")
    return engine.policy.tokenizer
