"""What makes a run the run that it is: its settings and its model, when it is taken up again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import character_tokenizer, save_tiny_llama, sums, tiny_llama
from tiny_rewards import longer
from torch import Tensor

from bandit_rft import Config, Policy, Task, Trainer
from bandit_rft.checkpoint import CheckpointError
from bandit_rft.config import ConfigError, build_config
from bandit_rft.initial import weights_digest
from bandit_rft.model.lora import add_adapter
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.report import ReportWriter
from bandit_rft.run_folder import RunFolder

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(24)]
KEYS = {
    "preset": "minimal", "batch_size": 4, "max_prompt_length": 12, "max_completion_length": 6, "learning_rate": 1e-2,
    "eval_steps": 0, "verify_steps": 0, "device": "cpu", "max_rounds": 1,
    "evaluation": {"max_queries": 1, "greedy": False},
}  # fmt: skip


def length(completion: str) -> float:
    return len(completion) / 6


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReportWriter, "finished", lambda *_: None)  # nothing here reads it
    save_tiny_llama(Path("model"))


def trainer(**given: Any) -> Trainer:
    """A trainer in the folder "run", of the model in the folder "model" unless another is given."""
    keys = {**KEYS, "output_dir": "run", "model": "model", "train_dataset": ROWS, "reward_funcs": [length]}
    return Trainer(progress=False, **{**keys, **given})


def configured(**given: Any) -> Config:
    return build_config({**KEYS, "output_dir": "run", "model_name_or_path": "model", "task": "sums", **given})


# --- settings ---------------------------------------------------------------------------------------------------------


def test_an_option_that_is_added_makes_another_run() -> None:
    def found(**given: Any) -> Any:
        made = trainer(max_rounds=2, **given)
        return made.run_folder.find_checkpoint("auto", asdict(made.config), made.rewards)

    trainer(advantage="spo").run()
    assert found(advantage="spo")
    assert found(advantage="spo", advantage_options={"decay_max": 0.96})  # as it was, only said
    with pytest.raises(ConfigError, match=r"advantage_options\.decay_max: 0\.96 -> 0\.9[^6]"):
        found(advantage="spo", advantage_options={"decay_max": 0.9})
    with pytest.raises(ConfigError, match=r"task_options\.prompt_column: None -> 'prompt'"):
        found(advantage="spo", task_options={"prompt_column": "prompt"})


def test_a_key_that_a_checkpoint_does_not_say_had_its_default() -> None:
    folder, tree = RunFolder("run"), asdict(configured())
    checkpoint = Path("run/checkpoints/checkpoint-1")
    checkpoint.mkdir(parents=True)
    state = {
        "round": 1, "position": 4, "generated_tokens": 1, "seconds": 1.0, "kl_coef": 0.0, "sha256": {}, "layout": 2,
        "config": {key: value for key, value in tree.items() if key != "weight_decay"},
    }  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert folder.find_checkpoint("auto", {**tree, "weight_decay": 0.01})
    with pytest.raises(ConfigError, match=r"weight_decay: 0\.01 -> 0\.5"):
        folder.find_checkpoint("auto", {**tree, "weight_decay": 0.5})


# --- a configuration with a task of a program -------------------------------------------------------------------------


def test_rewards_of_a_configuration_go_before_those_of_a_task() -> None:
    task = sums()
    made = Trainer(configured(**{"reward.functions": "tiny_rewards:longer"}), task=task)
    assert [reward.name for reward in made.task.rewards] == ["longer"]
    assert [reward["name"] for reward in made.rewards] == ["longer"]
    assert [reward.name for reward in task.rewards] == ["starts_with_vowel"]
    assert Trainer(configured(), task=Task("sums", task.splits, [longer])).task.rewards[0].name == "longer"


def test_files_of_evaluation_are_refused_beside_a_task() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.files=.* cannot act here.*splits of the Task"):
        Trainer(configured(**{"evaluation.files": "extra=rows.jsonl"}), task=sums())


# --- the model, by name -----------------------------------------------------------------------------------------------


def test_another_model_does_not_continue_a_run() -> None:
    trainer(max_rounds=2).run()
    save_tiny_llama(Path("other"), num_hidden_layers=1)
    save_tiny_llama(Path("alike"), seed=1)
    for other, rounds in (("other", 2), ("alike", 3)):
        with pytest.raises(ConfigError, match=rf"model_name_or_path: '.*/model' -> '{other}'"):
            trainer(model=other, max_rounds=rounds).run()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model_name_or_path"] == "../model"
    shutil.copytree("model", "copy")  # other places, the same weights
    assert trainer(model="copy", max_rounds=3).run()[-1]["round"] == 3
    memory = {"model": tiny_llama(), "tokenizer": character_tokenizer()}
    assert trainer(**memory, max_rounds=4).run()[-1]["round"] == 4
    with pytest.raises(ConfigError, match="began with another model"):
        trainer(**{**memory, "model": tiny_llama(seed=1)}, max_rounds=5).run()


def test_an_adapter_of_ones_own_is_drawn_anew_and_the_run_goes_on() -> None:
    """One matrix of a new adapter is random, and nothing while the other is 0."""
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    keys = {"tokenizer": character_tokenizer()}
    trainer(model=adapted(0), **keys).run()
    assert trainer(model=adapted(1), **keys, max_rounds=2).run()[-1]["round"] == 2
    plain = tiny_llama()
    trainer(model=plain, **keys, output_dir="one", lora={"rank": 2}).run()
    with pytest.raises(ConfigError, match="model: it holds the adapter of an earlier run: load it anew"):
        trainer(model=plain, **keys, output_dir="other").run()


def test_a_run_that_was_asked_to_stop_goes_on_when_it_is_called_again() -> None:
    stopped = trainer(max_rounds=3)
    stopped.stop_requested = True
    assert stopped.run()[-1]["round"] == 0
    assert stopped.run()[-1]["round"] == 3


@pytest.mark.parametrize("choice", [{"lora": {"rank": 2}}, {"objective": {"kl_coef": 0.1, "kl": "k3"}}], ids=str)
def test_a_model_that_changed_in_its_place_does_not_continue_a_run(choice: dict[str, Any]) -> None:
    trainer(**choice).run()
    assert trainer(**choice, max_rounds=2).run()[-1]["round"] == 2
    save_tiny_llama(Path("model"), seed=1)
    with pytest.raises(ConfigError, match="began with another model"):
        trainer(**choice, max_rounds=3).run()


def test_every_weight_is_in_a_digest() -> None:
    def digest(model: Any, **options: Any) -> str:
        return weights_digest(Policy(model, character_tokenizer()), **options)

    assert digest(tiny_llama()) == digest(tiny_llama()) != digest(tiny_llama().to(torch.bfloat16))
    for name in dict(tiny_llama().named_parameters()):
        model = tiny_llama()
        model.get_parameter(name).data.view(-1)[-1] += 1e-3
        assert digest(model) != digest(tiny_llama()), name
    adapted = add_adapter(Policy(tiny_llama(), character_tokenizer()), rank=2)
    assert weights_digest(adapted) == digest(tiny_llama())  # it does nothing yet
    for name, parameter in adapted.named_parameters():
        parameter.data += float("lora_B" in name)
    assert weights_digest(adapted, beneath=True) == digest(tiny_llama()) != weights_digest(adapted)


# --- a model in memory ------------------------------------------------------------------------------------------------


def in_memory(policy: Policy | None = None, **given: Any) -> Trainer:
    return trainer(model=policy or given_policy(), **given)


def given_policy(dtype: torch.dtype = torch.float32) -> Policy:
    """As a program may give it: in part frozen, with stop tokens and a mask of its own."""
    policy = Policy(tiny_llama().to(dtype), character_tokenizer())
    policy.model.get_input_embeddings().requires_grad_(False)
    policy.stop_tokens = [2, 9]
    policy.mask_padding_tokens([0, 30])
    return policy


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("kind", ["bfloat16", "lora", "config"])
def test_a_given_model_goes_on_as_it_was(kind: str) -> None:
    """Two rounds and two more are four, in place, with what is frozen, stops and is masked."""
    dtype = torch.bfloat16  # so that there are master weights

    def run(folder: str, rounds: int) -> Trainer:
        keys = {"max_rounds": rounds, "output_dir": folder}
        policy = given_policy(dtype)
        if kind == "config":
            task = Task("sums", sums().splits, [longer])
            made = Trainer(configured(**keys), model=policy, task=task)
            assert made.config.dtype == "bfloat16"
        else:
            made = in_memory(policy, **keys, **({"lora": {"rank": 2}} if kind == "lora" else {}))
        result = made.run()
        assert result.policy.stop_tokens == [2, 9] and result.policy.padding_token_ids == [0, 30]
        if kind == "lora":
            assert result.model.get_base_model() is policy.model
            names = [name for name, p in result.model.named_parameters() if p.requires_grad]
            assert names and all(".lora_" in name for name in names)
        else:
            assert result.policy is policy and not policy.model.get_input_embeddings().weight.requires_grad
        return made

    whole = weights(run("whole", 4).policy)
    run("parts", 2)
    parts = run("parts", 4)
    assert parts.round == 4 and parts.policy.weight.dtype == dtype
    assert all(torch.equal(whole[name], p) for name, p in weights(parts.policy).items())
    assert any(not torch.equal(p, weights(given_policy(dtype)).get(name, p * 0)) for name, p in whole.items())


def test_a_given_model_that_is_not_as_it_was_is_refused() -> None:
    in_memory(max_rounds=1).run()
    thawed = given_policy()
    thawed.model.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"lacks parameters that are trained now: .*embed_tokens"):
        in_memory(thawed, max_rounds=2).run()
    frozen = given_policy()
    frozen.model.get_output_embeddings().requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"parameters this policy does not have: .*lm_head"):
        in_memory(frozen, max_rounds=2).run()
    stops = given_policy()
    stops.stop_tokens = [2]
    with pytest.raises(ConfigError, match=r"other stop tokens \(\[2, 9\] -> \[2\]\)"):
        in_memory(stops, max_rounds=2).run()
    with pytest.raises(ConfigError, match="other stop tokens"):
        trainer(max_rounds=2).run()  # by its name, which brings the tokens of its own
    masks = given_policy()
    masks.mask_padding_tokens([0])
    with pytest.raises(ConfigError, match=r"other masked entries of the head \(\[0, 30\] -> \[0\]\)"):
        in_memory(masks, max_rounds=2).run()
    other = Policy(tiny_llama(seed=1), character_tokenizer())
    before = weights(other)
    with pytest.raises(ConfigError, match="began with another model"):
        in_memory(other, max_rounds=2).run()
    assert all(torch.equal(before[name], p) for name, p in weights(other).items())
    assert in_memory(max_rounds=2).run()[-1]["round"] == 2


@pytest.mark.parametrize("low", [False, True])
def test_an_optimizer_state_of_another_precision_is_refused(low: bool) -> None:
    kinds = [torch.float32, torch.bfloat16][:: -1 if low else 1]
    saved, other = (
        PolicyOptimizer([("w", torch.nn.Parameter(torch.ones(3, dtype=kind)))], learning_rate=0.1) for kind in kinds
    )
    saved.step()
    with pytest.raises(ValueError, match=f"optimizer state w: it was trained .*, and is {other.parameters[0].dtype}"):
        other.load_state_tensors(saved.state_tensors())


@pytest.mark.parametrize("choice", [{}, {"lora": {"rank": 2}}], ids=str)
def test_a_trainer_and_its_model_go_on_in_one_process(choice: dict[str, Any]) -> None:
    """A cell of a notebook that is run again, with more rounds: from the checkpoint, as another process would."""
    policy = given_policy()
    in_memory(policy, max_rounds=2, **choice).run()
    again = in_memory(policy, max_rounds=4, **choice)
    assert again.run()[-1]["round"] == 4
    assert again.run()[-1]["round"] == 4  # nothing is left to do
    whole = in_memory(output_dir="whole", max_rounds=4, **choice).run().policy
    assert all(torch.equal(weights(whole)[name], p) for name, p in weights(again.policy).items())
    other = given_policy()  # of a later session
    for rounds in (5, 6):
        assert in_memory(other, max_rounds=rounds, **choice).run()[-1]["round"] == rounds


def test_a_model_has_no_kl_to_itself_with_a_mask_of_its_own() -> None:
    for where in ("loss", "reward"):
        keys = {"objective": {"kl_coef": 0.1, "kl": "k3"}, "kl": {"where": where}, "learning_rate": 0.0}
        assert in_memory(output_dir=where, **keys).run()[-1]["kl"] == pytest.approx(0, abs=1e-9)


def test_a_trained_model_is_not_taken_for_the_initial_one_by_its_head() -> None:
    policy, keys = given_policy(), {"objective": {"kl_coef": 0.1, "kl": "k3"}}
    policy.model.get_output_embeddings().requires_grad_(False)
    in_memory(policy, **keys).run()
    with pytest.raises(ConfigError, match="has other weights: has it been trained since"):
        in_memory(policy, max_rounds=2, **keys).run()


# --- run() again, before there is a checkpoint ------------------------------------------------------------------------


def interrupted(made: Trainer, number: int) -> None:
    """Run until a round's update is to begin, and fail there."""
    begun = made.shape_rewards

    def fails(batch: Any) -> Any:
        if made.round + 1 == number:
            raise LookupError("no such answer")
        return begun(batch)

    made.shape_rewards = fails  # type: ignore[method-assign]
    with pytest.raises(LookupError):
        made.run()
    made.shape_rewards = begun  # type: ignore[method-assign]


REMEMBERING = {
    "advantage": "history_mean", "replay": {"capacity": 16}, "objective": {"kl_coef": 0.1, "kl": "k3"},
    "kl": {"target": 0.01, "horizon": 10}, "max_rounds": 4,
}  # fmt: skip


def comparable(lines: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def test_a_run_that_begins_anew_is_as_if_it_had_not_begun() -> None:
    whole = trainer(**REMEMBERING, output_dir="whole").run()
    made = trainer(**REMEMBERING)
    interrupted(made, 3)
    again = made.run()
    assert comparable(again) == comparable(whole) and again.finished
    assert all(torch.equal(weights(whole.policy)[name], p) for name, p in weights(again.policy).items())


def test_a_given_model_that_was_trained_does_not_begin_anew() -> None:
    whole = comparable(in_memory(max_rounds=3, output_dir="whole").run())
    policy = given_policy()
    made = in_memory(policy, max_rounds=3)
    interrupted(made, 1)
    assert made.round == 0
    interrupted(made, 3)  # in the first round nothing was trained: it begins anew
    for again in (made, in_memory(policy, max_rounds=3)):
        with pytest.raises(ConfigError, match="model: it was trained by a run in run that left no checkpoint"):
            again.run()
    assert comparable(in_memory(max_rounds=3).run()) == whole


def test_an_adapter_of_a_given_model_begins_anew() -> None:
    choice = {"lora": {"rank": 2}, "max_rounds": 3}
    whole = comparable(in_memory(output_dir="whole", **choice).run())
    made = in_memory(**choice)
    interrupted(made, 3)
    assert comparable(made.run()) == whole
