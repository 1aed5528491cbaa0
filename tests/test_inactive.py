"""Keys that cannot act are said, each where it cannot, and never where it acts or was not asked for."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bandit_rft import Example, Task, Trainer
from bandit_rft.audit import design_audit
from bandit_rft.config import ConfigError, build_config
from bandit_rft.inactive import RULES, inactive_keys
from bandit_rft.presets import PRESETS
from bandit_rft.progress import ConsoleListener

NEEDED = {"model_name_or_path": "m", "task": "arithmetic", "preset": "minimal"}
REPLAYS = {"replay.capacity": 64}
SERVER = {"rollout.engine": "vllm", "rollout.urls": ["http://host:8000"]}
#: (a value to ask for, what it needs, what goes with it in any case); None: the environment of torchrun.
CASES: dict[str, tuple[Any, dict[str, Any] | None, dict[str, Any]]] = {
    "objective.kl": ("k3", {"objective.kl_coef": 0.1}, {}),
    "kl.horizon": (500, {"kl.target": 0.1}, {"objective.kl": "k1", "objective.kl_coef": 0.1}),
    "queries.floor": (0.1, {"queries.order": "learnable"}, {}),
    "queries.half_life": (2.0, {"queries.order": "learnable"}, {}),
    "replay.window": (4, {"advantage": "history_norm"}, {}),
    "replay.ratio": (0.5, REPLAYS, {}),
    "replay.sampling": ("recent", REPLAYS, {}),
    "replay.max_staleness": (4, REPLAYS, {}),
    "replay.correction": ("sequence", REPLAYS, {}),
    "replay.importance_cap": (3.0, REPLAYS, {}),
    "lora.alpha": (32.0, {"lora.rank": 8}, {}),
    "lora.targets": (["q_proj"], {"lora.rank": 8}, {}),
    "rollout.on_logprob_gap": ("correct", {"rollout.max_logprob_gap": 0.1}, {**SERVER, "rollout.max_logprob_gap": 0}),
    "evaluation.temperature": (
        0.5, {"evaluation.num_samples": 4}, {"evaluation.num_samples": 0, "evaluation.greedy": True}
    ),
    "max_verify_error": (0.01, {"verify_steps": 10}, {"verify_steps": 0}),
    "distributed.shard": ("ddp", None, {}),
    "distributed.timeout_s": (60.0, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_a_key_that_cannot_act_is_said(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value, switch, with_it = CASES[rule.key]
    config = build_config({**NEEDED, **with_it, rule.key: value})
    (said,) = inactive_keys(config)
    assert said.startswith(f"{rule.key}=") and said.endswith(f"cannot act: it needs {rule.needs}")
    assert ("note", said) in list(design_audit(config))
    if switch is None:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert not list(inactive_keys(build_config({**NEEDED, **with_it, **(switch or {}), rule.key: value})))


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.key for rule in RULES]
    config = build_config({**NEEDED, **REPLAYS, "replay.correction": "none", "replay.importance_cap": 3.0})
    assert len(list(inactive_keys(config))) == 1  # nothing is weighed


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_what_nobody_asked_for_is_not_said(preset: str | None) -> None:
    assert not list(inactive_keys(build_config({**NEEDED, "preset": preset})))
    if preset == "paper":  # its estimator stays when its coefficient is taken away
        assert not list(inactive_keys(build_config({**NEEDED, "preset": preset, "objective.kl_coef": 0})))


def test_a_run_says_it_at_its_start() -> None:
    class Run:
        scorer, round, folder = None, 0, "runs/x"
        task = type("Task", (), {"name": "t"})
        data = type("Data", (), {"train": [], "rounds": 1})

    out = io.StringIO()
    config = build_config({**NEEDED, "lora.alpha": 32})
    ConsoleListener(config, Console(file=out, width=200)).started(Run())  # type: ignore[arg-type]
    assert "note: lora.alpha=32 cannot act: it needs lora.rank > 0" in out.getvalue()


def test_a_script_is_told_which_keys_only_commands_act_on() -> None:
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(4)]
    wanted = {"model": "nowhere", "train_dataset": rows, "reward_funcs": ["exact_match"], "batch_size": 2}
    with pytest.raises(ConfigError, match=r"evaluation\.files.*cannot act here.*eval_dataset=\{name: rows\}"):
        Trainer(**wanted, evaluation={"files": ["more=rows.jsonl"]})
    task = Task("mine", {"train": [Example("1+1=", {"answer": "2"})] * 4}, ["exact_match"])
    with pytest.raises(ConfigError, match="splits of the Task"):
        Trainer(model="nowhere", task=task, batch_size=2, evaluation={"files": ["more=rows.jsonl"]})
    with pytest.warns(UserWarning, match="thread_wait=passive acts on bandit-rft's commands alone") as caught:
        Trainer(**wanted, thread_wait="passive", progress=False)
    assert caught[0].filename == __file__
