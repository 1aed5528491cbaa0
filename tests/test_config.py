"""Presets, files and overrides; errors that name the key and what would do."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from bandit_rft.advantages import ADVANTAGES, compute_advantages, register
from bandit_rft.audit import design_audit
from bandit_rft.config import (
    MAY_CHANGE,
    NOT_DESIGN,
    PRESETS,
    ConfigError,
    advantage_options,
    build_config,
    check_config,
    key_help,
    keys,
    to_yaml,
)
from bandit_rft.options import choices
from bandit_rft.presets import merge
from bandit_rft.sections import ObjectiveConfig

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
            "task": "arithmetic",
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
        ("objective", 1, "objective: expected a mapping of keys"),
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


def test_every_key_has_a_help_and_allows_its_own_default() -> None:
    assert [name for name, *_ in key_help()] == list(keys())
    for key in keys().values():
        assert key.help and key.kind
        default = NEEDED.get(key.name, key.default)
        config = build_config({**NEEDED, "output_dir": "runs/x", key.name: default})
        assert attrgetter(key.name)(config) == (default if key.name != "output_dir" else "runs/gsm8k")


def test_choices_are_those_of_the_objective_and_of_replay() -> None:
    from typing import get_args

    from bandit_rft.ops import objective
    from bandit_rft.replay import SELECTIONS

    of = {key.name: set(choices(key.kind)) for key in keys().values()}
    assert of["objective.kind"] == set(get_args(objective.Kind))
    assert of["objective.aggregation"] == set(get_args(objective.Aggregation))
    assert of["objective.kl"] == set(get_args(objective.KLEstimator))
    assert of["replay.sampling"] == set(SELECTIONS)


VALUES: dict[str, list[Any]] = {
    "kind": ["reinforce", "importance", "importance_mask", "ppo", "cispo", "gspo"],
    "aggregation": ["token-mean", "seq-mean-token-sum-norm"],
    "clip_low": [-0.1, 0.0, 0.3, 1.0, 1.1], "clip_high": [-0.1, 0.0, 5.0], "dual_clip": [None, 0.5, 1.0, 3.0],
    "importance_floor": [-0.1, 0.0, 0.9, 1.1], "importance_cap": [-1.0, 0.0, 0.5, 2.0],
    "kl": ["none", "k1", "k2", "k3"], "kl_coef": [-0.1, 0.0, 0.1],
    "entropy_coef": [-0.1, 0.0, 0.1, math.nan], "norm_length": [None, 0, 100],
}  # fmt: skip


def test_the_configuration_allows_exactly_the_objectives_that_the_operations_take() -> None:
    """Every pair of values: the rules of sections.ObjectiveConfig (no torch) are those of ops.PolicyObjective."""
    from bandit_rft.ops import PolicyObjective

    for (a, of_a), (b, of_b) in itertools.combinations(VALUES.items(), 2):
        for values in ({a: x, b: y} for x in of_a for y in of_b):
            allowed = []
            for make in (PolicyObjective, ObjectiveConfig):
                try:
                    make(**values)
                    allowed.append(True)
                except ValueError:
                    allowed.append(False)
            assert allowed[0] == allowed[1], values


def test_presets_keep_what_they_do_not_name() -> None:
    """`demo` changes some of `minimal`, which changes some of `paper`; no section is lost on the way."""

    def flat(tree: dict[str, Any], prefix: str = "") -> set[str]:
        parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}"} for k, v in tree.items()]
        return set().union(*parts)

    assert flat(PRESETS["paper"]) == flat(PRESETS["minimal"]) < flat(PRESETS["demo"])
    assert PRESETS["demo"]["evaluation"] == {"num_samples": 1, "greedy": True, "max_queries": 500}
    assert PRESETS["minimal"]["objective"]["dual_clip"] == PRESETS["demo"]["objective"]["dual_clip"] == 3.0
    below = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(below, {"a": {"c": {"f": 4}}, "e": {"g": 5}}) == {"a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": {"g": 5}}
    assert below == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_what_may_change_is_a_key_and_evaluation_is_no_other_run() -> None:
    assert keys().keys() > MAY_CHANGE | NOT_DESIGN
    assert {"max_rounds", "evaluation.greedy", "evaluation.splits", "reward.workers"} < MAY_CHANGE
    assert not {"learning_rate", "seed", "objective.kind", "batch_size", "advantage"} & MAY_CHANGE
    assert {"batch_size", "num_generations", "device"} < NOT_DESIGN and "learning_rate" not in NOT_DESIGN


def test_every_other_name_leads_to_its_key() -> None:
    also = [(other, key.name) for key in keys().values() for other in key.also]
    assert len(also) == len({other for other, _ in also}) > 25 and not {other for other, _ in also} & set(keys())
    for other, name in also:
        with pytest.raises(ConfigError, match=re.escape(f"unknown key {other!r} (did you mean {name}?)")):
            build_config({**NEEDED, other: 1})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**NEEDED, "batch_size": 0, "rollout.top_p": 0, "kl.target": "low", "reward.weights": "1,x"})
    assert str(caught.value).splitlines() == [
        "batch_size must be >= 1; got 0",
        "kl.target must be a finite number; got 'low'",
        "rollout.top_p must be > 0 and <= 1; got 0.0",
        "reward.weights[1] must be a finite number; got 'x'",
    ]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"advantage": "spo", "advantage_options.half_life": -1}, "advantage_options.half_life must be > 0; got -1"),
        ({"advantage": "spo", "advantage_options.half_life": "long"}, "half_life must be a finite number; got 'long'"),
        ({"advantage": "spo", "advantage_options.half_lfe": 1}, "(did you mean half_life?)"),
        ({"advantage": "spo", "advantage_options.decay_min": 0.97}, "advantage=spo: half_life must be > 0 and 0 <="),
        ({"advantage": "weighted", "advantage_options.positive_weight": -1}, "positive_weight must be >= 0; got -1"),
        ({"advantage_options": 3}, "advantage_options must be a mapping of names to values; got 3"),
        ({"task": "arithmetic", "task_options.digits": 0}, "task_options.digits must be >= 1 and <= 9; got 0"),
        ({"task": "arithmetic", "task_options.digits": "two"}, "task_options.digits must be a whole number; got 'two'"),
        ({"task": "arithmetic", "task_options.digit": 2}, "no option of task=arithmetic (it has: kinds, min_terms"),
        ({"task": "arithmetic", "task_options.kinds": ["root"]}, "task_options.kinds: unknown ['root'], expected some"),
        ({"task": "countdown", "task_options.operators": "+^"}, "task_options.operators: expected some of '+-*/'"),
        ({"task": "math", "task_options.verify": "strin"}, "must be one of string, math_verify; got 'strin' (did you"),
        ({"task": "reasoning-gym"}, "task_options.dataset must be given: one of the library's, such as leg_counting"),
        ({"task": "rows.jsonl", "task_options.test_sise": 3}, "(did you mean test_size?)"),
        (
            {"objective.kind": "reinforce", "objective.dual_clip": 4},
            "dual_clip=4 cannot act with objective.kind=reinforce: it belongs to ppo, gspo",
        ),
        (
            {"preset": "demo", "objective.kind": "reinforce"},
            "ppo, gspo (of preset paper, minimal, demo; objective.dual_clip=null takes it away)",
        ),
        (
            {"preset": "single-rollout", "objective.kind": "ppo"},
            "(of preset single-rollout; objective.importance_floor=0.5 takes it away)",
        ),
        ({"objective": {"kind": "ppo", "clip_low": 2}}, "objective.clip_low must be >= 0 and <= 1; got 2"),
        ({"objective.kind.x": 1}, "unknown key 'objective.kind.x'"),
        ({"kl": 0.1}, "kl: expected a mapping of keys, such as kl.where; got 0.1"),
        ({"objective": "ppo"}, "objective: expected a mapping of keys, such as objective.kind; got 'ppo'"),
        ({"evaluation": None}, "evaluation: expected a mapping of keys, such as evaluation.splits; got None"),
        (
            {"chat_template_kwargs": "{date_string: 2024-07-26}"},
            "chat_template_kwargs.date_string must be of text, numbers, true or false, null, lists and mappings; got "
            "datetime.date(2024, 7, 26), a date",
        ),
    ],
)  # fmt: skip
def test_errors_of_options_name_them(choices: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**NEEDED, **choices})
    assert message in str(caught.value)


def test_texts_are_read_as_the_option_wants_them() -> None:
    spo = build_config({**NEEDED, "advantage": "spo", "advantage_options.half_life": "1e-2"})
    assert spo.advantage_options == {"half_life": 0.01} and advantage_options(spo) == {"half_life": 0.01}
    of_data = {"task_options.suffix": "5", "task_options.test_size": "5", "task_options.config": "null"}
    assert build_config({**NEEDED, "task": "dataset", **of_data}).task_options == {
        "suffix": "5", "test_size": 5, "config": None,
    }  # fmt: skip
    sums = build_config({**NEEDED, "task": "arithmetic", "task_options.kinds": "sum, mixed"})
    assert sums.task_options == {"kinds": ["sum", "mixed"]}  # a list, as a checkpoint's JSON would have it
    nested = {"task_options.dataset": "leg_counting", "task_options.config.max_animals": "4"}
    assert build_config({**NEEDED, "task": "reasoning_gym", **nested}).task_options["config"] == {"max_animals": 4}
    mine = build_config({**NEEDED, "task": "my own", "task_options.rate": "1e-3", "task_options": "{size: 2}"})
    assert mine.task_options == {"rate": 0.001, "size": 2}
    assert build_config({**NEEDED, "kl.target": "none", "max_rounds": "1e3"}).max_rounds == 1000
    read = build_config({**NEEDED, "chat_template_kwargs.enable_thinking": "false", "chat_template_kwargs.n": {"a": 1}})
    assert read.chat_template_kwargs == {"enable_thinking": False, "n": {"a": 1}}


def test_an_option_of_a_file_and_one_of_the_command_line_are_both_taken(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "task: arithmetic\ntask_options: {digits: 3, kinds: [sum]}\nobjective: {kind: ppo, clip_low: 0.1}\n"
    )
    config = build_config({"model_name_or_path": "m", "task_options.digits": "1"}, file)
    assert config.task_options == {"digits": 1, "kinds": ["sum"]} and config.objective.clip_low == 0.1


def test_an_advantage_of_ones_own_has_options_with_rules() -> None:
    @register("powered")
    def powered(  # type: ignore[no-untyped-def]
        rewards: Any,
        groups: Any,
        *,
        power: Annotated[int, Field(ge=1, le=3)] = 2,
        pair: tuple[int, ...] = (),
        free=None,
    ) -> Any:
        return rewards**power

    try:
        given = {**NEEDED, "advantage": "powered"}
        config = build_config({**given, "advantage_options.power": "3", "advantage_options.free": "[1, 2]"})
        assert advantage_options(config) == {"power": 3, "free": [1, 2]}
        config = build_config({**given, "advantage_options.pair": "1,2"})
        assert advantage_options(config) == {"pair": [1, 2]}
        assert compute_advantages("powered", [3.0], [0], options=advantage_options(config)) == [9.0]
        for value, message in ((4, "advantage_options.power must be >= 1 and <= 3; got 4"), (1.5, "a whole number")):
            with pytest.raises(ConfigError, match=message):
                build_config({**given, "advantage_options.power": value})
        with pytest.raises(ConfigError, match=re.escape("(it has: power, pair, free) (did you mean power?)")):
            build_config({**given, "advantage_options.powr": 2})
        with pytest.raises(ValueError, match="advantage powered: option power must be >= 1 and <= 3; got 0"):
            compute_advantages("powered", [1.0], [0], options={"power": 0})
    finally:
        del ADVANTAGES["powered"]


def test_a_value_assigned_later_is_checked_before_training() -> None:
    config = build_config(NEEDED)
    config.objective.kind = "ppoo"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="did you mean ppo"):
        check_config(config)
    with pytest.raises(ValueError, match="learning_rate"):
        replace(build_config(NEEDED), learning_rate=-1)
    assert replace(build_config(NEEDED), learning_rate=1).learning_rate == 1.0


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


BOMB = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}" for i in range(1, 60))])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BOMB}\nobjective: *a59", "more than 100,000 values"),
        ("report_to: " + "[" * 5000, "nested too deeply"),
        ("objective: &a {kl: *a}", "contains itself"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("objective: {kl: k1}\nobjective.kl: k3", "objective.kl is given twice"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("seed: 2024-13-45", "month must be in 1..12"),
        ("max_grad_norm: 1" + "0" * 400, "max_grad_norm must be a finite number"),
        ("learning_rate: .nan", "learning_rate must be a finite number; got nan"),
        ("objectve: {}", "unknown key 'objectve'"),
        ("Seed: 1", "did you mean seed"),
        ("s\u0435ed: 1", "unknown key"),
    ],
)
def test_a_hostile_file_is_one_short_error(text: str, message: str, tmp_path: Path) -> None:
    """Never a traceback, a hang, or a value silently left out."""
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        build_config(NEEDED, file)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(("key", "value"), [("seed", "9" * 5000), ("seed", "0x" + "f" * 5000), ("dtype", "x" * 10**6),
                                            ("seed", "2024-13-45"), ("max_grad_norm", "[" * 5000)])  # fmt: skip
def test_a_hostile_value_is_one_short_error(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        build_config({**NEEDED, key: value})
    assert len(str(error.value)) < 2000


def test_aliases_and_merge_keys_are_served(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("objective: &o {kl: k1}\nkl: {}\nevaluation: {splits: &s [test]}\nreport_to: []")
    assert build_config(NEEDED, tmp_path / "c.yaml").objective.kl == "k1"
