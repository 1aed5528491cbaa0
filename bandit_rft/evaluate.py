"""Pass@1, pass@k and greedy accuracy of the current policy on whole splits, from a random stream of their own.

The stream depends on the seed, the split, the question and the sample, not on the round: evaluations of one run share
their noise, so their differences are the policy's, and a saved checkpoint evaluated later gives the same numbers.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bandit_rft.assemble import configured_task, embedded_engine, load_policy, make_scorer
from bandit_rft.budget import evaluation_rollouts
from bandit_rft.config import Config, ConfigError
from bandit_rft.data import PromptSet, Scorer, completion_texts, prompt_text, score
from bandit_rft.intervals import Interval, earned, reward_interval
from bandit_rft.metrics import Metrics
from bandit_rft.rollout import Engine, Sampling, sequence_ids
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.run_data import check_evaluated

EVALUATION_STREAM = 1  # training rollouts are drawn from stream 0


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split.

    Attributes:
        metrics: under eval/<split>/.
        intervals: the 95% interval of each mean reward among them, by the name behind that; over questions.
        binary: whether every reward was 0 or 1, so that a mean reward is a Pass@1.
        columns: every completion behind them, as columns for Parquet.
    """

    metrics: Metrics
    intervals: dict[str, Interval]
    binary: bool
    columns: dict[str, tuple[str, list[Any]]]


def evaluate(
    engine: Engine,
    runner: Scorer,
    prompts: PromptSet,
    *,
    seed: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    greedy: bool = True,
    drawn: Callable[[int], None] = lambda count: None,
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
        drawn: told how many more completions were drawn and scored, a batch of the engine at a time.

    Returns:
        Metrics under eval/<split>/: pass@1 (mean reward of the first sample, the paper's Pass@1), pass@k for
        k = 2, 4, ... and num_samples, greedy, mean_length, entropy (nats a token), truncated_fraction, unscored; and
        the completions, of which the greedy ones are sample -1.
    """
    questions = len(prompts)
    metrics: Metrics = {}
    intervals: dict[str, Interval] = {}
    columns: dict[str, tuple[str, list[Any]]] = {
        "query": ("int64", []), "sample": ("int32", []), "prompt": ("string", []), "completion": ("string", []),
        "answer": ("string", []), "reward": ("float64", []), "truncated": ("bool", []),
    }  # fmt: skip

    def draw(sampling: Sampling, count: int, first_sample: int) -> tuple[RolloutBatch, list[list[float]]]:
        rollouts, rewards, texts = _draw(engine, runner, prompts, seed, sampling, count, drawn)
        examples = [example for example in prompts.examples for _ in range(count)]
        rows: dict[str, Sequence[Any]] = {
            "query": np.repeat(np.asarray(prompts.indices), count).tolist(), "completion": texts, "reward": rewards,
            "sample": (np.tile(np.arange(count), questions) + first_sample).tolist(),
            "prompt": [prompt_text(example.prompt) for example in examples],
            "answer": [answer_text(example) for example in examples], "truncated": rollouts.truncated.tolist(),
        }  # fmt: skip
        for name, values in rows.items():
            columns[name][1].extend(values)
        by_question = np.array(earned(rewards)).reshape(questions, count).tolist()
        metrics["unscored"] = (metrics.get("unscored") or 0) + sum(reward is None for reward in rewards)
        return rollouts, by_question

    def average(name: str, rewards: Sequence[float]) -> None:
        metrics[name] = float(np.mean(rewards))
        if (interval := reward_interval(rewards)) is not None:
            intervals[name] = interval

    if num_samples and questions:
        rollouts, rewards = draw(Sampling(temperature=temperature), num_samples, 0)
        average("pass@1", [of_question[0] for of_question in rewards])
        for k in [k for k in (2**i for i in range(1, 31)) if k < num_samples] + [num_samples] * (num_samples > 1):
            average(f"pass@{k}", [best_of_k(of_question, k) for of_question in rewards])
        metrics["mean_length"] = float(rollouts.lengths.numpy().mean())
        metrics["entropy"] = float(rollouts.entropy.mean())
        metrics["truncated_fraction"] = float(rollouts.truncated.numpy().mean())
    if greedy and questions:
        _, rewards = draw(Sampling.greedy(), 1, -1)  # sample -1 in the table
        average("greedy", [of_question[0] for of_question in rewards])
    binary = all(reward in (0.0, 1.0, None) for reward in columns["reward"][1])
    return Evaluation({f"eval/{prompts.name}/{key}": x for key, x in metrics.items()}, intervals, binary, columns)


def _draw(
    engine: Engine,
    runner: Scorer,
    prompts: PromptSet,
    seed: int,
    sampling: Sampling,
    count: int,
    drawn: Callable[[int], None],
) -> tuple[RolloutBatch, list[float | None], list[str]]:
    """`count` completions of every question, in order, with their rewards and texts.

    They are drawn and scored a batch of the engine at a time, prompts of similar length together: what a completion is
    does not depend on that, a reward that fails does so at once, and `drawn` hears how far it is.
    """
    split, questions = zlib.crc32(prompts.name.encode()), len(prompts)
    size = max(1, getattr(engine, "batch_size", questions * count) // count)
    order = np.arange(questions)
    if questions > size:
        order = np.argsort([len(tokens) for tokens in prompts.tokens], kind="stable")
    batches, rewards, texts = list[RolloutBatch](), list[float | None](), list[str]()
    for first in range(0, questions, size):
        rows = order[first : first + size].tolist()
        queries = np.repeat([prompts.indices[row] for row in rows], count)
        ids = sequence_ids(EVALUATION_STREAM, split, queries, np.tile(np.arange(count), len(rows)))
        batch = engine.generate([prompts.tokens[row] for row in rows], ids, seed=seed, sampling=sampling, n=count)
        completions = completion_texts(batch.token_lists(), _tokenizer(engine), engine.policy.stop_tokens)
        examples = [prompts.examples[row] for row in rows for _ in range(count)]
        rewards += score(runner, examples, completions).total
        texts += completions
        batches.append(batch)
        drawn(len(completions))
    back = (np.argsort(order)[:, None] * count + np.arange(count)).reshape(-1)  # in the order of the questions
    joined = RolloutBatch.cat(batches).select(back)
    return joined, [rewards[i] for i in back], [texts[i] for i in back]


@dataclass(frozen=True)
class EvaluatedSplit:
    """One split of `evaluate_splits`: its name, how many questions, how many were left out as too long, seconds."""

    name: str
    questions: int
    filtered: int
    seconds: float
    evaluation: Evaluation


def evaluate_splits(
    config: Config,
    drawn: Callable[..., None] = lambda count, total: None,
    *,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
    asked: Collection[str] = (),
) -> Iterator[EvaluatedSplit]:
    """Evaluate the model that a configuration names, on its splits, one after another.

    Args:
        config: checked.
        drawn: drawn(count, total=total), told how many more completions were drawn and scored, of how many in all.
        base: the model that the run began with, where what is evaluated is an adapter of it.
        state: of the run's checkpoint, whose data and rewards these must be, unless others are `asked` for.
        asked: dotted keys that were given beside the run's configuration.

    Raises:
        ConfigError: for a split that the task does not have, and for other data or rewards than the run's.
    """
    task = configured_task(config)
    if state is not None:
        check_evaluated(task, config, state, asked)
    policy = load_policy(config.model_name_or_path, config, base=base)
    if policy.tokenizer is None:
        raise ConfigError(f"model_name_or_path={config.model_name_or_path} has no tokenizer")
    e, engine = config.evaluation, embedded_engine(policy, config)
    names = e.splits or list(task.splits)
    if missing := [name for name in names if name not in task.splits]:
        raise ConfigError(f"evaluation.splits: {missing[0]!r} is none of {', '.join(task.splits)}")
    splits = [
        PromptSet(
            name, task.splits[name], policy.tokenizer, chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs, max_prompt_length=config.max_prompt_length,
            limit=e.max_queries,
        )
        for name in names
    ]  # fmt: skip
    total = evaluation_rollouts(config, map(len, splits))
    drawn(0, total=total)  # the clock starts here
    with make_scorer(task, config) as scorer:
        for prompts in splits:
            start = time.perf_counter()
            result = evaluate(
                engine, scorer, prompts, seed=config.seed, num_samples=e.num_samples, temperature=e.temperature,
                greedy=e.greedy, drawn=partial(drawn, total=total),
            )  # fmt: skip
            seconds = time.perf_counter() - start
            yield EvaluatedSplit(prompts.name, len(prompts), prompts.filtered, round(seconds, 3), result)


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


def _tokenizer(engine: Engine) -> Any:
    if engine.policy.tokenizer is None:
        raise ValueError("the policy has no tokenizer: evaluation needs one to turn completions into text")
    return engine.policy.tokenizer
