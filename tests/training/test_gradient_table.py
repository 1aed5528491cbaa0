"""advantage x objective x aggregation: gradients against formulas written out again here, in float64.

The formulas are those of docs/objectives.md and docs/design-choices.md, one sequence after another on logits that all
exist, differentiated by autograd; nothing of bandit_rft takes part in them. First the loss itself, then a trainer: what
reaches its optimizer, before clipping, from its own rollouts, rewards, memory, micro-batches and skipping.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from tiny_models import sums
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.config import build_config
from bandit_rft.ops import PolicyObjective, linear_policy_loss
from bandit_rft.ops.objective import Aggregation, Kind
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer
from bandit_rft.update import Update

BOUNDS: dict[str, dict[str, Any]] = {
    "importance": {"importance_cap": 1.15},
    "importance_mask": {"importance_floor": 0.9, "importance_cap": 1.15},
    "ppo": {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.3},
    "cispo": {"clip_low": 0.1, "clip_high": 0.15},
    "gspo": {"clip_low": 0.03, "clip_high": 0.02},
}


def objectives(**options: Any) -> dict[str, PolicyObjective]:
    """Every kind with every aggregation."""
    table = {}
    for kind, aggregation in product(get_args(Kind), get_args(Aggregation)):
        norm = {"norm_length": 11} if aggregation.endswith("norm") else {}
        table[f"{kind}, {aggregation}"] = PolicyObjective(
            kind, aggregation, **BOUNDS.get(kind, {}), **norm, **options
        )  # fmt: skip
    return table


# --- the formulas -----------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """One completion: what each of its tokens had for log-probability and entropy, and its advantage."""

    logp: Tensor
    entropy: Tensor
    advantage: float
    old: Tensor | None = None
    ref: Tensor | None = None


def formula_loss(o: PolicyObjective, sequences: Sequence[Scored], divisor: float | None = None) -> Tensor:
    """The loss of docs/objectives.md; divisor: D where it is not that of these sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        a = s.advantage
        difference = s.logp - (s.logp.detach() if s.old is None else s.old)
        r = difference.mean().exp().expand(len(s.logp)) if o.kind == "gspo" else difference.exp()
        if o.kind == "reinforce":
            tokens = -a * s.logp
        elif o.kind == "importance":
            tokens = -a * torch.clamp(r, max=o.importance_cap).detach() * s.logp
        elif o.kind == "importance_mask":
            tokens = -a * (r * (r >= o.importance_floor) * (r <= o.importance_cap)).detach() * s.logp
        elif o.kind == "cispo":
            tokens = -a * torch.clamp(r, 1 - o.clip_low, 1 + o.clip_high).detach() * s.logp
        else:
            surrogate = torch.minimum(r * a, torch.clamp(r, 1 - o.clip_low, 1 + o.clip_high) * a)
            if o.dual_clip is not None and a < 0:
                surrogate = torch.clamp(surrogate, min=o.dual_clip * a)
            tokens = -surrogate
        if o.kl != "none":
            assert s.ref is not None
            d = s.logp - s.ref
            tokens = tokens + o.kl_coef * {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1}[o.kl]
        tokens = tokens - o.entropy_coef * s.entropy
        if o.aggregation == "seq-mean-token-mean":
            total = total + tokens.mean()
        elif o.aggregation == "seq-mean-token-sum-norm":
            assert o.norm_length is not None
            total = total + tokens.sum() / o.norm_length
        else:
            total = total + tokens.sum()
    own = sum(len(s.logp) for s in sequences) if o.aggregation == "token-mean" else len(sequences)
    return total / (divisor or own)


def logp_and_entropy(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits z [N, V] that the temperature has divided."""
    every = torch.log_softmax(z, -1)
    return every[torch.arange(len(targets)), targets], -(every.exp() * every).sum(-1)


# --- the loss ---------------------------------------------------------------------------------------------------------

LENGTHS = [3, 1, 6, 4, 2]
TERMS: dict[str, dict[str, Any]] = {
    "": {},
    "k1": {"kl": "k1", "kl_coef": 0.2},
    "k2 and entropy": {"kl": "k2", "kl_coef": 0.2, "entropy_coef": 0.1},
    "k3": {"kl": "k3", "kl_coef": 0.2},
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("terms", TERMS)
def test_loss(terms: str, on_policy: bool) -> None:
    """linear_policy_loss in float64, all objectives, with bias, softcap and a temperature a token."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, h, v = sum(LENGTHS), 7, 23
    hidden, weight, bias = (x.requires_grad_() for x in (normal(n, h), normal(v, h), normal(v)))
    targets, temperature = torch.randint(v, (n,), generator=generator), torch.rand(n, generator=generator) + 0.5
    advantages = torch.tensor([1.5, -0.5, 0.0, -1.25, 0.75])
    z = 4 * torch.tanh((hidden @ weight.T + bias) / 4) / temperature.double()[:, None]
    logp, entropy = logp_and_entropy(z, targets)
    old, ref = ((logp + 0.2 * normal(n)).detach().float() for _ in range(2))
    sequences = [
        Scored(lp, e, float(a), None if on_policy else o.double(), r.double())
        for lp, e, a, o, r in zip(*(x.split(LENGTHS) for x in (logp, entropy)), advantages, old.split(LENGTHS),
                                  ref.split(LENGTHS), strict=True)
    ]  # fmt: skip
    for name, objective in objectives(**TERMS[terms]).items():
        for divisor in (None, 9.0):
            result = linear_policy_loss(
                hidden, weight, targets, advantages, torch.tensor([0, *LENGTHS]).cumsum(0).int(), objective=objective,
                behavior_logprobs=None if on_policy else old, reference_logprobs=ref, bias=bias,
                temperature=temperature, softcap=4.0, normalizer=divisor,
            )  # fmt: skip
            truth = formula_loss(objective, sequences, divisor)
            close(name, [result.loss.detach()], [truth.detach()], 1e-6)
            got = torch.autograd.grad(result.loss, [hidden, weight, bias])
            wanted = torch.autograd.grad(truth, [hidden, weight, bias], retain_graph=True)
            close(name, got, wanted, 1e-6)


def close(name: str, got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest entry of the truth."""
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        error, size = float((a.double() - b).abs().max()), float(b.abs().max())
        assert error <= tolerance * max(size, 1e-3), f"{name}, tensor {i}: off by {error:.2e} of {size:.2e}"


# --- advantages -------------------------------------------------------------------------------------------------------

WINDOW = 4


@dataclass
class Past:
    """What `history_*` and `spo` remember of each query."""

    rewards: dict[int, list[float]] = field(default_factory=dict)
    beta: dict[int, tuple[float, float]] = field(default_factory=dict)


def formula_advantages(
    name: str, rewards: list[float], queries: list[int], past: Past, movement: dict[int, float]
) -> list[float]:
    """The table of docs/design-choices.md, one rollout after another; today's rewards are added to the past.

    movement: k3 estimate of the KL to the policy that last answered each query that was answered before.
    """
    of_query = {q: [r for r, other in zip(rewards, queries, strict=True) if other == q] for q in queries}

    def centered(r: float, among: list[float]) -> float:
        return 0.0 if len(set(among)) == 1 else r - fmean(among)

    def scaled(a: float, among: list[float]) -> float:
        return 0.0 if len(set(among)) == 1 else a / (stdev(among) + 1e-6)

    def window(query: int) -> list[float]:
        return (past.rewards.get(query, []) + of_query[query])[-WINDOW:]

    def of(r: float, q: int) -> float:
        group, n = of_query[q], len(of_query[q])
        match name:
            case "reward" | "psr":
                return r
            case "nsr":
                return r - 1
            case "weighted":
                return 0.1 * r + (r - 1)
            case "batch_mean":
                return centered(r, rewards)
            case "batch_norm":
                return scaled(centered(r, rewards), rewards)
            case "group_mean":
                return centered(r, group)
            case "group_norm" | "extra_rollouts":
                return scaled(centered(r, group), group)
            case "group_mean_batch_std":
                return scaled(centered(r, group), rewards)
            case "rloo":
                return 0.0 if len(set(group)) == 1 else r - (sum(group) - r) / (n - 1)
            case "history_mean":
                return r if len(window(q)) == 1 else centered(r, window(q))
            case "history_norm":
                return r if len(window(q)) == 1 else scaled(centered(r, window(q)), window(q))
            case "spo":
                a, b = past.beta.get(q, (4.0, 4.0))
                return r - a / (a + b)
        raise AssertionError(f"no formula here for the advantage {name}")

    advantages = [of(r, q) for r, q in zip(rewards, queries, strict=True)]
    if name == "spo":
        advantages = [scaled(centered(x, advantages), advantages) for x in advantages]
    for q, group in of_query.items():
        past.rewards[q] = window(q)
        a, b = past.beta.get(q, (4.0, 4.0))
        rho = min(max(2 ** (-movement.get(q, 0.0) / 0.06), 0.875), 0.96)
        past.beta[q] = (rho * a + sum(group), rho * b + sum(1 - r for r in group))
    return advantages


# --- the trainer ------------------------------------------------------------------------------------------------------

TEMPERATURE = 0.8
GRADED = '''
def graded(prompts, completions, **columns):
    """0, 0.5 or 1 by what the text adds up to."""
    return [min(sum(map(ord, text)) % 4, 2) / 2 for text in completions]
'''


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """A reward function in a light file of its own: worker processes import it."""
    path = tmp_path_factory.mktemp("rewards") / "graded_reward.py"
    path.write_text(GRADED)
    spec = importlib.util.spec_from_file_location("graded_reward", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["graded_reward"] = module
    spec.loader.exec_module(module)
    function: Callable[..., list[float]] = module.graded
    return function


class Recorder:
    """In an optimizer's place: keeps what reaches it and moves nothing."""

    asynchronous = False

    def __init__(self, optimizer: Any):
        self.optimizer, self.gradients = optimizer, list[list[Tensor]]()
        self.grad_buffer = optimizer.grad_buffer

    def step(self) -> Tensor:
        grads = [p.grad for p in self.optimizer.masters]
        self.gradients.append([g.clone() for g in grads])
        torch._foreach_zero_(grads)
        return torch.zeros(())

    def refused(self) -> Tensor:
        return torch.zeros(())


class TableTrainer(Trainer):
    """A trainer that computes the gradient of every objective in its third and fourth rounds, besides training.

    In the third on-policy (one update a round), in the fourth after its weights moved (two passes over the rollouts).
    """

    def __init__(self, *args: Any, table: dict[str, PolicyObjective], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.table, self.past, self.seen = table, Past(), set[str]()
        # Of each query: the prompt, its latest answer, and the log-probabilities this was drawn with.
        self.last: dict[int, tuple[list[int], list[int], Tensor]] = {}

    def draw(self, *args: Any) -> Any:
        self.drawn, self.texts, rewards = super().draw(*args)
        return self.drawn, self.texts, rewards

    def train_round(self) -> None:
        if self.round == 0:
            self.original = self.updater
            self.at_start = copy.deepcopy(self.policy.model).double()
            self.updater = self.compare_gradients  # type: ignore[assignment]
        super().train_round()

    def compare_gradients(self, batch: RolloutBatch, number: int, off_policy: bool = False) -> Update:
        assert not off_policy
        advantages, counted = self.formula_batch()
        if number < 3:
            return self.original(batch, number)
        before, moved = [p.detach().clone() for p in self.policy.model.parameters()], number == 4
        self.signs = {math.copysign(1, a) for a, c in zip(advantages, counted, strict=True) if c and a}
        if moved:
            generator = torch.Generator().manual_seed(number)
            for p in self.policy.model.parameters():
                p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
        scored = self.scored(batch)
        updater, usual = self.original, (self.original.objective, self.original.optimizer, self.original.epochs)
        for name, objective in self.table.items():
            recorder = Recorder(self.optimizer)
            updater.objective, updater.optimizer, updater.epochs = objective, recorder, 1 + moved  # type: ignore[assignment]
            update = updater(batch, number)
            real_ratio = moved or objective.kind in ("importance", "importance_mask")
            rows = [i for i, c in enumerate(counted) if c]
            sequences = [
                replace(scored[i], advantage=advantages[i], old=scored[i].old if real_ratio else None) for i in rows
            ]
            truth = torch.autograd.grad(formula_loss(objective, sequences), self.truth_parameters, retain_graph=True)
            assert len(recorder.gradients) == 1 + moved
            for got in recorder.gradients:
                close(f"{self.config.advantage}, {name}, round {number}", got, truth, 5e-5)
            self.seen |= {bound for bound in ("low", "high", "dual") if update.statistics.get(f"clip_fraction_{bound}")}
        updater.objective, updater.optimizer, updater.epochs = usual
        for p, old in zip(self.policy.model.parameters(), before, strict=True):
            p.data.copy_(old)
        return updater(batch, number)

    def formula_batch(self) -> tuple[list[float], list[bool]]:
        """Advantages by formula, and which rollouts count, of what was drawn."""
        draw, name = self.drawn, self.config.advantage
        rewards = [min(sum(map(ord, text)) % 4, 2) / 2 for text in self.texts]
        queries, lists = draw.query.tolist(), draw.token_lists()
        model = copy.deepcopy(self.policy.model).double()
        movement = {}
        for q in set(queries) & set(self.last):
            prompt, answer, old = self.last[q]
            d = old - score(model, [prompt], [answer])[0][0].detach()
            movement[q] = float((torch.exp(-d) + d - 1).mean())
        for i, (q, attempt) in enumerate(zip(queries, draw.attempt.tolist(), strict=True)):
            if attempt == 0:
                logprobs = draw.split(draw.logprobs)[i].double()
                self.last[q] = (draw.prompt_lists()[i], lists[i], logprobs)
        advantages = formula_advantages(name, rewards, queries, self.past, movement)
        first_only = name == "extra_rollouts"
        return advantages, [not first_only or attempt == 0 for attempt in draw.attempt.tolist()]

    def scored(self, batch: RolloutBatch) -> list[Scored]:
        """The batch's rollouts under a float64 copy of today's policy, whose parameters' gradients are the truth's."""
        prompts, drawn_at = batch.prompt_lists(), batch.split(batch.logprobs)
        model = copy.deepcopy(self.policy.model).double()
        self.truth_parameters = list(model.parameters())
        lists = batch.token_lists()
        now = score(model, prompts, lists)
        with torch.no_grad():
            initial = score(self.at_start, prompts, lists)
        return [
            Scored(logp, entropy, math.nan, drawn_at[i].double(), initial[i][0])
            for i, (logp, entropy) in enumerate(now)
        ]


def score(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """(log-probability, entropy) of each answer's tokens, from all logits of a padded batch."""
    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    z = model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask).logits / TEMPERATURE
    return [
        logp_and_entropy(row[len(p) - 1 : len(p) + len(a) - 1], torch.tensor(a))
        for row, p, a in zip(z, prompts, answers, strict=True)
    ]


def train(folder: Path, output: Path, graded: Any, table: dict[str, PolicyObjective], **overrides: Any) -> TableTrainer:
    values = {
        "preset": "minimal", "model_name_or_path": str(folder), "task": "arithmetic", "output_dir": str(output),
        "batch_size": 4, "num_generations": 3, "max_rounds": 4, "learning_rate": 3e-3, "temperature": TEMPERATURE,
        "max_prompt_length": 12, "max_completion_length": 6, "tokens_per_microbatch": 70, "save_steps": 0,
        "eval_steps": 0, "evaluation.max_queries": 1, "evaluation.splits": ["test"], "device": "cpu",
        "replay.window": WINDOW, "log_rollouts_steps": 0, "rollout.max_logprob_gap": 0, **overrides,
    }  # fmt: skip
    task = sums(4)  # every round is an epoch: what a query is remembered for acts from the second on
    task = Task(task.name, task.splits, [graded])
    trainer = TableTrainer(build_config(values), task=task, table=table)
    trainer.run()
    return trainer


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_trainer(model_folder: Path, tmp_path: Path, graded: Any, advantage: str) -> None:
    trainer = train(model_folder, tmp_path / "run", graded, objectives(), advantage=advantage)
    assert trainer.round == 4
    assert trainer.seen == {"low", "high"} | ({"dual"} if -1 in trainer.signs else set()), "a bound that never acted"
    assert max(len(rewards) for rewards in trainer.past.rewards.values()) == WINDOW


@pytest.mark.parametrize("terms", [name for name in TERMS if name])
def test_trainer_with_kl_and_entropy(model_folder: Path, tmp_path: Path, graded: Any, terms: str) -> None:
    options = {f"objective.{key}": value for key, value in TERMS[terms].items()}
    train(model_folder, tmp_path / "run", graded, objectives(**TERMS[terms]), advantage="group_norm", **options)
