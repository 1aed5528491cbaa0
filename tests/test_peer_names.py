"""What TRL and verl call things: every name has a row, rows lead to our keys, and the command line says them."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from bandit_rft.arguments import UsageError, parse
from bandit_rft.config import FREE, ConfigError, build_config, keys
from bandit_rft.peer_names import GUIDES, TRL, VALUES, VERL, answer_to_name, markdown, row_of

NEEDED = {"model_name_or_path": "m", "task": "arithmetic", "preset": "minimal"}


def refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config({**NEEDED, **{name.replace("__", "."): value for name, value in values.items()}})
    return str(caught.value)


def test_rows_lead_to_keys_and_no_name_has_two() -> None:
    for table in (TRL, VERL):
        names = [name for row in table for name in row.names.split()]
        assert len(names) == len(set(names))
        for row in table:
            for ours in row.ours.split():
                key = ours.partition("=")[0]
                assert key in keys() or key.partition(".")[0] in FREE, (row.names, key)
                if "=" in ours and key not in FREE:  # the value is one that we have
                    value = ours.partition("=")[2]
                    more = {"objective.kl_coef": 0.1} if key in ("objective.kl", "kl.where") else {}
                    more |= {"objective.kl": "k3"} if key == "kl.where" else {}
                    more |= {"num_generations": 4} if key == "advantage" else {}
                    more |= {"objective.dual_clip": None} if key == "objective.kind" else {}
                    if key.startswith("rollout."):
                        more |= {"rollout.engine": "vllm", "rollout.urls": ["http://host:8000"]}
                    build_config({**NEEDED, **more, key: value})


def test_other_names_in_the_configuration_agree_with_the_table() -> None:
    for key in keys().values():
        for other in key.also:
            row = row_of(other)
            assert row is None or row.key == key.name, other


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("scale_rewards", "advantage"), ("delta", "objective.dual_clip"), ("use_peft", "lora.rank"),
        ("importance_sampling_level", "objective.kind"), ("gradient_accumulation_steps", "tokens_per_microbatch"),
        ("steps_per_generation", "update.minibatches"), ("rollout.n", "num_generations"), ("beta", "objective.kl_coef"),
        ("actor_rollout_ref.rollout.n", "num_generations"), ("rollout.val_kwargs.n", "evaluation.num_samples"),
        ("actor.clip_ratio_c", "objective.dual_clip"), ("algorithm.adv_estimator", "advantage"),
        ("data.train_batch_size", "batch_size"), ("ppo_mini_batch_size", "update.minibatches"),
        ("use_vllm", "rollout.engine"), ("vllm_mode", "rollout.urls"), ("vllm_server_base_url", "rollout.urls"),
        ("vllm_gpu_memory_utilization", "rollout.server_command"), ("fsdp", "distributed.shard"),
        ("vllm_importance_sampling_correction", "rollout.on_logprob_gap"), ("ddp_timeout", "distributed.timeout_s"),
        ("algorithm.rollout_correction.rollout_is", "rollout.on_logprob_gap"), ("peft_config", "lora.rank"),
        ("actor_rollout_ref.rollout.name", "rollout.engine"), ("actor.strategy", "distributed.shard"),
    ],
)  # fmt: skip
def test_a_peers_name_is_answered_with_its_row(typed: str, key: str) -> None:
    found = answer_to_name(typed)
    assert found is not None and found[0] == key
    text = refusal(**{typed: 1})
    assert text.startswith(f"unknown key {typed!r} (did you mean {key}?): ") and found[1] in text
    assert any(guide in text for guide in GUIDES.values())


def test_a_name_without_a_counterpart_is_said_to_have_none() -> None:
    for typed in (
        "local_rank",
        "use_bias_correction_kl",
        "push_to_hub",
        "actor_rollout_ref.actor.tau_pos",
        "trainer.nnodes",
    ):
        assert "there is no such key here" in refusal(**{typed: 1}) and "did you mean" not in refusal(**{typed: 1})


def test_a_configuration_of_verls_is_answered_name_by_name(tmp_path: Path) -> None:
    file = tmp_path / "verl.yaml"
    file.write_text("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {rollout: {n: 8}}\n")
    with pytest.raises(ConfigError) as caught:
        build_config(NEEDED, file)
    lines = str(caught.value).splitlines()
    for line, name, key in zip(
        lines, ("algorithm.adv_estimator", "actor_rollout_ref.rollout.n"), ("advantage", "num_generations"), strict=True
    ):
        assert line.startswith(f"unknown key {name!r} (did you mean {key}?): verl's")


def test_what_the_package_has_is_not_said_to_be_missing() -> None:
    """Several processes and vLLM servers are there: torchrun, distributed.*, rollout.engine=vllm."""
    assert not [row.names for row in (*TRL, *VERL) if "in one process" in row.note or "own engine" in row.note]
    for typed in ("trainer.nnodes", "trainer.n_gpus_per_node", "fsdp", "local_rank"):
        assert "torchrun" in refusal(**{typed: 1})


@pytest.mark.parametrize(
    ("argument", "instead"),
    [("args", "keywords of Trainer"), ("processing_class", "tokenizer="), ("callbacks", "listener="),
     ("peft_config", "lora.rank"), ("optimizers", "AdamW")],
)  # fmt: skip
def test_an_argument_of_trls_trainer_is_answered(argument: str, instead: str) -> None:
    from bandit_rft import Trainer

    with pytest.raises(ConfigError) as caught:
        Trainer(model="m", task="arithmetic", **{argument: object()})  # type: ignore[arg-type]
    assert f"unknown key {argument!r}" in str(caught.value)
    assert instead in str(caught.value) and "docs/guides/from-trl.md" in str(caught.value)


def test_our_own_names_come_first() -> None:
    for typed, key in (
        ("kl_coef", "objective.kl_coef"), ("horizon", "kl.horizon"), ("reward.timeout", "reward.timeout_s"),
        ("rollout.top_kk", "rollout.top_k"), ("learning_rat", "learning_rate"),
        ("objective.cliplow", "objective.clip_low"),
    ):  # fmt: skip
        assert refusal(**{typed: 1}) == f"unknown key {typed!r} (did you mean {key}?)"


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_a_peers_value_is_answered_with_what_it_is_here(key: str, value: str) -> None:
    text = refusal(**{key: value})
    assert f"got {value!r}: {VALUES[key, value]}" in text and "did you mean" not in text


def test_an_option_that_cannot_act_is_refused() -> None:
    plain = {"preset": None, "model_name_or_path": "m"}
    for key, value, kind in (
        ("objective.clip_high", 0.28, "reinforce"), ("objective.clip_low", 0.1, "importance"),
        ("objective.importance_cap", 1.5, "ppo"),
    ):  # fmt: skip
        assert f"{key}={value:g} cannot act with objective.kind={kind}" in refusal(
            **plain, **{key: value, "objective.kind": kind}
        )
    assert build_config({**NEEDED, **plain, "objective.clip_high": 0.2}).objective.kind == "reinforce"  # the default


# --- complete, and the guides have it ---------------------------------------------------------------------------------


def test_trl_has_no_name_without_a_row() -> None:
    trl = pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0")
    for config in (trl.GRPOConfig, trl.RLOOConfig, trl.ModelConfig, trl.ScriptArguments):
        for field in dataclasses.fields(config):
            assert any(row.fits(field.name) for row in TRL), f"{config.__name__}.{field.name}"
    own = {"self", "model"}  # Trainer has that too
    for name in inspect.signature(trl.GRPOTrainer.__init__).parameters.keys() - own:
        assert any(row.fits(name) for row in TRL), f"GRPOTrainer({name}=)"


def _flat(tree: dict[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return found


@pytest.mark.skipif(find_spec("verl") is None, reason="pip install verl==0.9.1")
def test_verl_has_no_name_without_a_row() -> None:
    spec = find_spec("verl")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    for name in _flat(yaml.safe_load(file.read_text())):
        assert name.endswith("_target_") or any(row.fits(name) for row in VERL), name


@pytest.mark.parametrize("peer", GUIDES)
def test_the_guides_have_the_table(peer: str) -> None:
    text = (ROOT / GUIDES[peer]).read_text(encoding="utf-8")
    assert markdown(peer) in text, "run tools/peer_tables.py"


def test_an_override_as_hydra_takes_it() -> None:
    with pytest.raises(UsageError, match=r"keys are written --key value: verl's, gae .* here advantage; grpo"):
        parse(["train", "--preset", "minimal", "+algorithm.adv_estimator=grpo"])
