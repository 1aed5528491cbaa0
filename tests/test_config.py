"""Presets, files and overrides; errors that name the key and what would do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from bandit_rft.audit import design_audit
from bandit_rft.config import CHOICES, PRESETS, RANGES, ConfigError, build_config, key_help, to_yaml

NEEDED = {"model_name_or_path": "some/model", "task": "gsm8k"}


def test_paper_preset_is_the_papers_table() -> None:
    c = build_config({**NEEDED, "preset": "paper"})
    assert (c.batch_size, c.num_generations, c.advantage, c.temperature) == (32, 1, "reward", 1.0)
    assert (c.max_prompt_length, c.max_completion_length, c.eval_steps) == (512, 1024, 100)
    assert (c.learning_rate, c.adam_beta1, c.adam_beta2, c.weight_decay, c.max_grad_norm) == (
        1e-6,
        0.9,
        0.999,
        0.01,
        1.0,
    )
    o = c.objective
    assert (o.kind, o.clip_low, o.clip_high, o.dual_clip, o.aggregation) == ("ppo", 0.2, 0.2, 3.0, "token-mean")
    assert (o.kl, o.kl_coef, o.entropy_coef) == ("k3", 0.001, 0.0)
    assert (c.rollout.top_k, c.rollout.top_p, c.evaluation.max_queries) == (0, 1.0, None)


def test_minimal_is_paper_without_kl() -> None:
    paper, minimal = (asdict(build_config({**NEEDED, "preset": name})) for name in ("paper", "minimal"))
    assert minimal["objective"].pop("kl") == "none" and paper["objective"].pop("kl") == "k3"
    assert minimal["objective"].pop("kl_coef") == 0.0 and paper["objective"].pop("kl_coef") == 0.001
    assert minimal.pop("preset") == "minimal" and paper.pop("preset") == "paper"
    assert minimal == paper


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_checks(preset: str) -> None:
    assert build_config({**NEEDED, "preset": preset}).preset == preset


def test_order_is_preset_file_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "preset: paper\nlearning_rate: 3e-6\nbatch_size: 16\nobjective:\n  clip_low: 0.1\n  clip_high: 0.3\n"
    )
    c = build_config({**NEEDED, "objective.clip_low": "0.4", "batch_size": 8}, file)
    assert (c.learning_rate, c.batch_size, c.objective.clip_low, c.objective.clip_high) == (3e-6, 8, 0.4, 0.3)
    assert c.objective.kl_coef == 0.001


def test_resolved_yaml_reads_back_to_the_same(tmp_path: Path) -> None:
    c = build_config(
        {
            **NEEDED,
            "preset": "minimal",
            "task_options.digits": "2",
            "reward.functions": "a.py:f, b.py:g",
            "data_path": "x y",
        }
    )
    assert c.reward.functions == ["a.py:f", "b.py:g"] and c.task_options == {"digits": 2}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(c))
    assert build_config(file=file) == c


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective.cliplow", 0.3, "did you mean objective.clip_low?"),
        ("clip_low", 0.3, "did you mean objective.clip_low?"),
        ("beta", 0.1, "did you mean objective.kl_coef?"),
        ("learning_rat", 1, "did you mean learning_rate?"),
        ("max_new_tokens", 1, "did you mean max_completion_length?"),
        ("objective", 1, "unknown key 'objective'"),
        ("objective.kind", "ppoo", "did you mean ppo?"),
        ("advantage", "group_nrm", "did you mean group_norm?"),
        ("preset", "papper", "did you mean paper?"),
        ("temperature", 0, "temperature must be > 0"),
        ("temperature", "nan", "temperature must be"),
        ("temperature", "hot", "temperature must be a finite number"),
        ("rollout.top_p", 1.5, "rollout.top_p must be > 0 and <= 1"),
        ("batch_size", 0, "batch_size must be >= 1"),
        ("batch_size", 2.5, "batch_size must be a whole number"),
        ("batch_size", "true", "batch_size must be a whole number"),
        ("batch_size", ".inf", "batch_size must be a whole number"),
        ("batch_size", "null", "batch_size must be given"),
        ("evaluation.greedy", "maybe", "evaluation.greedy must be true or false"),
        ("objective.kl_coef", 0.1, "no effect with objective.kl=none"),
        ("objective.dual_clip", 1.0, "dual_clip must be > 1"),
        ("objective.norm_length", 100, "norm_length belongs to"),
        ("objective.aggregation", "seq-mean-token-sum-norm", "norm_length belongs to"),
        ("advantage", "group_norm", "num_generations must be >= 2"),
        ("reward.on_error", "ignore", "reward.on_error must be one of raise, none"),
        ("report_to", "tensorbord", "report_to knows tensorboard"),
        ("dtype", "float16", "dtype must be one of"),
        ("model_name_or_path", "", "--model_name_or_path is missing"),
    ],
)
def test_errors_name_the_key_and_what_would_do(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**NEEDED, key: value})
    assert message in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    for text, message in (
        ("- a\n", "expected keys and values"),
        ("a: [", "--config"),
        ("a:\n  b: 1\n", "unknown key 'a.b'"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            build_config(NEEDED, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        build_config(NEEDED, tmp_path / "none.yaml")


def test_tables_of_choices_and_ranges_are_about_existing_keys() -> None:
    keys = {name for name, *_ in key_help()}
    assert set(CHOICES) <= keys and set(RANGES) <= keys
    assert all(help for *_, help in key_help())


def test_choices_are_those_of_the_objective() -> None:
    from typing import get_args

    from bandit_rft.ops import objective

    assert set(CHOICES["objective.kind"]) == set(get_args(objective.Kind))
    assert set(CHOICES["objective.aggregation"]) == set(get_args(objective.Aggregation))
    assert set(CHOICES["objective.kl"]) == set(get_args(objective.KLEstimator))


def test_audit_says_what_the_configuration_amounts_to() -> None:
    c = build_config(
        {**NEEDED, "preset": "paper", "num_generations": 4, "rollout.top_p": 0.9, "chat_template": "never"}
    )
    text = "\n".join(f"{what}: {value}" for what, value in design_audit(c))
    assert "32 queries x 4 rollouts = 128 rollouts" in text
    assert "131,072 generated" in text and "skipping: off" in text and "reference model" in text
    assert "gradient is biased" in text and "never ends" not in text and "rarely ends" in text
    assert "memory: unknown" in text


def test_audit_counts_the_parameters_of_a_local_model(tmp_path: Path) -> None:
    from tiny_models import save_tiny_llama, tiny_llama

    folder = save_tiny_llama(tmp_path / "m")
    count = sum(p.numel() for p in tiny_llama().parameters())
    memory = dict(design_audit(build_config({**NEEDED, "preset": "minimal", "model_name_or_path": str(folder)})))[
        "memory"
    ]
    assert memory.startswith(f"{count / 1e6:,.1f}M parameters: {count * 16 / 1e3:.3g} KB for weights")


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from bandit_rft.config import build_config; print(build_config({'preset': 'demo'}).task)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "arithmetic", result.stderr


def test_yaml_of_defaults_is_plain_yaml() -> None:
    tree = yaml.safe_load(to_yaml(build_config(NEEDED)))
    assert tree["objective"]["kind"] == "reinforce" and tree["learning_rate"] == 1e-6
