"""Adapters through peft: what is trained, the reference beneath them, folders that others can read, and refusals."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, own_logprobs
from safetensors.torch import load_file
from some_rollouts import some_batch
from tiny_models import character_tokenizer, save_tiny_llama, sums, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bandit_rft import ops
from bandit_rft.checkpoint import list_checkpoints
from bandit_rft.config import Config
from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.model.lora import add_adapter, base_policy, find_adapter
from bandit_rft.ops import backends
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout import RolloutEngine
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.trainer import Trainer
from bandit_rft.update import PolicyUpdater

peft = pytest.importorskip("peft", reason="needs the extra lora")

LENGTHS = [9, 17, 2]


def trained(policy: Policy, scale: float = 0.2) -> Policy:
    """As after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def tokens(seed: int = 3, vocabulary: int = 40) -> Tensor:
    return torch.randint(0, vocabulary, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def hidden(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.hidden_states(tokens(), LENGTHS)


def by_modules(policy: Policy) -> Policy:
    """A plain model as an adapted one is computed, so that both can be compared bit for bit."""
    policy._in_core = None
    return policy


def weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def draw(policy: Policy, length: int = 12) -> RolloutBatch:
    engine = RolloutEngine(policy, max_completion_length=length)
    return engine.generate([[1, 5, 6], [1, 9]], torch.arange(6), seed=4, n=3)


def small_config(folder: Path, model: Path, rounds: int) -> Config:
    config = Config(
        model_name_or_path=str(model), output_dir=str(folder), max_rounds=rounds, batch_size=6, num_generations=2,
        learning_rate=1e-2, max_prompt_length=16, max_completion_length=8, save_steps=1, eval_steps=0, device="cpu",
    )  # fmt: skip
    config.advantage = "batch_mean"
    config.reward.workers = 1
    return config


# --- what is trained --------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_but_what_is_trained() -> None:
    policy = by_modules(Policy(tiny_llama()))
    before, state = hidden(policy), torch.random.get_rng_state()
    adapted = add_adapter(policy, rank=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(hidden(adapted), before)
    assert all(".lora_" in name for name, _ in adapted.named_parameters())
    assert len(adapted.parameters()) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert not adapted.weight.requires_grad and adapted.weight.shape == policy.weight.shape
    assert not any(p.requires_grad for n, p in adapted.model.named_parameters() if ".lora_" not in n)


def test_the_seed_decides_the_first_weights() -> None:
    first, again, other = (weights(add_adapter(Policy(tiny_llama()), rank=4, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_targets_choose_the_matrices() -> None:
    adapted = add_adapter(Policy(tiny_llama()), rank=2, alpha=6, targets=["q_proj", "self_attn.v_proj"])
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters()}
    assert names == {"q_proj", "v_proj"}
    assert adapted.model.get_base_model().model.layers[0].self_attn.q_proj.scaling == {"default": 3.0}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "cohere", "bloom"])
def test_log_probabilities_and_gradients_are_the_adapted_models_own(name: str) -> None:
    torch.manual_seed(1)
    policy = trained(add_adapter(Policy(AutoModelForCausalLM.from_config(CONFIGS[name])), rank=3))
    sequences = [torch.randint(0, 97, (n,)) for n in LENGTHS]
    targets = torch.cat([s[1:] for s in sequences])
    packed = policy.hidden_states(torch.cat([s[:-1] for s in sequences]), [len(s) - 1 for s in sequences])
    fused: Any = ops.linear_logprobs(packed, policy.weight, targets, **policy.head_options)
    own = torch.cat([own_logprobs(policy.model, s) for s in sequences])
    torch.testing.assert_close(fused.double(), own, atol=5e-5, rtol=1e-5)
    factors = torch.linspace(-1, 1, len(own))
    ours = torch.autograd.grad((fused * factors).sum(), policy.parameters())
    theirs = torch.autograd.grad((own * factors).sum(), policy.parameters())
    largest = max(float(g.abs().max()) for g in theirs)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got / largest, expected / largest, atol=2e-5, rtol=0)


def test_a_frozen_head_costs_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = trained(add_adapter(Policy(tiny_llama()), rank=2))
    products: list[str] = []
    for name in ("add_hidden_gradient", "add_weight_gradient"):
        backend = backends.serving(torch.device("cpu"), torch.float32)
        original: Callable[..., None] = getattr(backend, name)

        def counted(*args: Any, name: str = name, original: Callable[..., None] = original, **kwargs: Any) -> None:
            products.append(name)
            original(*args, **kwargs)

        monkeypatch.setattr(backend, name, counted)
    states = policy.hidden_states(tokens(), LENGTHS)
    result = ops.linear_policy_loss(
        states, policy.weight, tokens(5), torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0, 9, 26, 28]).int(),
        objective=ops.PolicyObjective(), **policy.head_options,
    )  # fmt: skip
    result.loss.backward()
    assert products and set(products) == {"add_hidden_gradient"}
    assert policy.weight.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_bfloat16_models_get_float32_adapters_that_move() -> None:
    policy = add_adapter(Policy(tiny_llama().to(torch.bfloat16)), rank=4)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert hidden(policy).dtype == policy.weight.dtype == torch.bfloat16
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-6, weight_decay=0.0)
    assert all(master is parameter for master, parameter in zip(optimizer.masters, optimizer.parameters, strict=True))
    before = weights(policy)
    policy.hidden_states(tokens(), LENGTHS).float().pow(2).mean().backward()
    optimizer.step()
    moved = [float((a - b).abs().max()) for a, b in zip(before, weights(policy), strict=True)]
    assert max(moved) > 5e-7  # 1e-6: far below the spacing of bfloat16 numbers


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_decoding_follows_the_adapters() -> None:
    policy = trained(add_adapter(Policy(tiny_llama()), rank=4))
    policy.stop_tokens = []
    engine = RolloutEngine(policy, max_completion_length=24)
    assert engine._native is None  # the core would leave the adapters out
    arguments: tuple[Any, ...] = ([[1, 5, 6], [1, 9]], torch.arange(2))
    drawn = [engine.generate(*arguments, seed=4)]
    for scale in (0.4, 0.1):  # trained on between rollouts
        trained(policy, scale)
        drawn.append(engine.generate(*arguments, seed=4))
    assert len({tuple(d.logprobs.tolist()) for d in drawn}) == 3


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_base_policy_is_the_model_that_was_adapted() -> None:
    original = by_modules(Policy(tiny_llama()))
    expected, drawn = hidden(original), draw(original)
    policy = trained(add_adapter(original, rank=4))
    reference = base_policy(policy)
    adapted = hidden(policy)
    assert (adapted - expected).abs().max() > 0.1
    assert torch.equal(hidden(reference), expected)
    assert torch.equal(hidden(policy), adapted)  # on again
    assert reference.weight is policy.weight and reference.head_options == policy.head_options
    assert reference.parameters() == [] and reference.named_parameters() == []
    assert torch.equal(draw(reference).tokens, drawn.tokens)
    assert not torch.equal(draw(policy).tokens, drawn.tokens)


def test_adapters_are_on_again_after_an_error() -> None:
    policy = trained(add_adapter(Policy(tiny_llama()), rank=4))
    before = hidden(policy)
    with pytest.raises(IndexError):
        base_policy(policy).hidden_states(torch.tensor([10**6]), [1])
    assert torch.equal(hidden(policy), before)


def test_scoring_the_reference_between_forward_and_backward_changes_no_gradient() -> None:
    policy = trained(add_adapter(Policy(tiny_llama()), rank=4))
    gradients = []
    for score in (False, True):
        states = policy.hidden_states(tokens(), LENGTHS)
        if score:
            hidden(base_policy(policy))
        gradients.append(torch.autograd.grad(states.pow(2).sum(), policy.parameters()))
        assert all(p.requires_grad for p in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_reference_without_a_second_model_gives_the_same_update() -> None:
    """Two updates with a KL term: the adapters turned off, and a frozen copy of the initial model."""
    results = []
    for shared in (True, False):
        policy = add_adapter(Policy(tiny_llama(), character_tokenizer()), rank=4, seed=1)
        reference = base_policy(policy) if shared else by_modules(Policy(tiny_llama()))
        optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.05)
        objective = ops.PolicyObjective(kind="ppo", kl="k3", kl_coef=0.5)
        updater = PolicyUpdater(policy, optimizer, objective, reference=reference, tokens_per_microbatch=30)
        updates = [updater(some_batch(policy), number) for number in (1, 2)]
        assert updates[0].kl == pytest.approx(0, abs=1e-6) and updates[1].kl > 1e-3
        results.append((weights(policy), [update.kl for update in updates]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_no_reference_where_turning_off_is_not_undoing(options: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        base_policy(Policy(peft.get_peft_model(tiny_llama(), config)))


def test_a_plain_policy_has_no_base_policy() -> None:
    with pytest.raises(ValueError, match="peft adapter; got a LlamaForCausalLM"):
        base_policy(Policy(tiny_llama()))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_loads_here_and_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    policy = trained(add_adapter(Policy.load("base"), rank=4, alpha=3))
    policy.save(tmp_path / "adapter")
    monkeypatch.chdir("/")  # the base model is found from anywhere
    found = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= found
    assert not {"model.safetensors", "config.json"} & found
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pkl"))]
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(policy.parameters())

    again = Policy.load(str(tmp_path / "adapter"))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in policy.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(policy), strict=True))
    assert torch.equal(hidden(again), hidden(policy)) and not again.weight.requires_grad
    assert again.stop_tokens == policy.stop_tokens and again.tokenizer is not None
    assert again.tokenizer.encode("12+3") == policy.tokenizer.encode("12+3")  # type: ignore[union-attr]

    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    ids = tokens()[None]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(tmp_path: Path) -> None:
    policy = add_adapter(Policy.load(str(save_tiny_llama(tmp_path / "base"))), rank=2)
    policy.model.save_pretrained(tmp_path / "adapter")
    assert Policy.load(str(tmp_path / "adapter")).tokenizer.encode("7") == policy.tokenizer.encode("7")  # type: ignore[union-attr]


def test_a_base_model_that_has_moved(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    policy = trained(add_adapter(Policy.load(str(base)), rank=2))
    policy.save(tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="give it as `base`"):
        Policy.load(str(tmp_path / "adapter"))
    again = Policy.load(str(tmp_path / "adapter"), base=str(tmp_path / "elsewhere"))
    assert torch.equal(hidden(again), hidden(policy))
    with pytest.raises(ValueError, match="is a whole model"):
        Policy.load(str(tmp_path / "elsewhere"), base="another")


def test_a_peft_model_is_a_policy_and_its_dropout_stays_off(caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, use_dora=True, task_type="CAUSAL_LM")
    with caplog.at_level(logging.WARNING):
        policy = trained(Policy(peft.get_peft_model(tiny_llama(), config)))
    assert "lora_dropout=0.5 stays off" in caplog.text
    assert torch.equal(hidden(policy), hidden(policy))
    assert torch.equal(hidden(base_policy(policy)), hidden(by_modules(Policy(tiny_llama()))))


def test_training_continues_bit_for_bit(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "base")

    def run(name: str, rounds: int) -> Trainer:
        config = small_config(tmp_path / name, model, rounds)
        config.lora.rank, config.objective.kl, config.objective.kl_coef = 4, "k3", 0.1
        trainer = Trainer(config, task=sums())
        lines = trainer.run()
        assert lines[1]["kl"] == pytest.approx(0, abs=1e-6) and (rounds == 2 or lines[-1]["kl"] > 1e-6)
        return trainer

    start = weights(add_adapter(Policy.load(str(model)), rank=4))
    whole = weights(run("whole", 4).policy)
    run("parts", 2)
    parts = run("parts", 4)
    assert parts.round == 4 and type(parts.policy.model).__name__ == "PeftModelForCausalLM"
    assert all(torch.equal(a, b) for a, b in zip(whole, weights(parts.policy), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, whole, strict=True))
    saved = list_checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    assert torch.equal(hidden(Policy.load(str(saved))), hidden(parts.policy))
    assert not [path for path in saved.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_saved_adapter_is_trained_on_and_is_the_initial_model(tmp_path: Path) -> None:
    trained(add_adapter(Policy.load(str(save_tiny_llama(tmp_path / "base"))), rank=4)).save(tmp_path / "adapter")

    def config(rounds: int, rank: int = 0) -> Config:
        made = small_config(tmp_path / f"rank-{rank}", tmp_path / "adapter", rounds)
        made.lora.rank, made.objective.kl, made.objective.kl_coef = rank, "k3", 0.1
        return made

    for rounds in (1, 2):  # the second continues the first
        trainer = Trainer(config(rounds), task=sums())
        lines = trainer.run()
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-6) and lines[2]["kl"] > 1e-6
    assert [n for n, _ in trainer.policy.named_parameters() if ".lora_" not in n] == []
    with pytest.raises(UnsupportedModelError, match=r"lora.rank=0 trains that one on"):
        Trainer(config(1, rank=4), task=sums()).run()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora.rank and lora.alpha must be > 0; got 0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha"),
        ({"rank": 2, "dropout": 0.1}, r"lora.dropout must be 0; got 0.1"),
        ({"rank": 2, "targets": ["q_proj", "lm_head"]}, r"lora.targets: 'lm_head' is the head"),
        ({"rank": 2, "targets": ["q_proj", "v_porj"]}, r"no linear module is named 'v_porj'; there are .*v_proj"),
        ({"rank": 2, "targets": "q_proj"}, "lora.targets must be a list"),
        ({"rank": 2, "targets": []}, "lora.targets must be a list"),
    ],
)
def test_impossible_adapters_are_refused_before_the_model_is_touched(options: dict[str, Any], message: str) -> None:
    policy = Policy(tiny_llama())
    with pytest.raises(ValueError, match=message):
        add_adapter(policy, **options)
    assert not any("lora_" in name for name, _ in policy.model.named_parameters())


def test_a_second_adapter_is_refused() -> None:
    policy = add_adapter(Policy(tiny_llama()), rank=2)
    with pytest.raises(UnsupportedModelError, match=r"lora.rank=0 trains that one on"):
        add_adapter(policy, rank=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_refused_with_the_way_out(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"target_modules": ["q_proj"], **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    adapted.save_pretrained(tmp_path / "adapter")
    for make in (lambda: Policy(adapted), lambda: Policy.load(str(tmp_path / "adapter"))):
        with pytest.raises(UnsupportedModelError, match=r"the head carries an adapter.*merge_and_unload"):
            make()
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens()[None]).logits
        merged = Policy(adapted.merge_and_unload())
        torch.testing.assert_close(merged.model(input_ids=tokens()[None]).logits, expected)


def test_what_is_no_adapter_of_weights_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="adds tokens to every prompt"):
        Policy(peft.get_peft_model(tiny_llama(), config))
    several = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    several.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="expected one adapter"):
        Policy(several)


def test_pickled_adapters_are_not_read(tmp_path: Path) -> None:
    policy = add_adapter(Policy.load(str(save_tiny_llama(tmp_path / "base"))), rank=2)
    policy.model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    with pytest.raises(UnsupportedModelError, match="pickles are not read"):
        Policy.load(str(tmp_path / "adapter"))


def test_an_adapter_that_names_no_base_model(tmp_path: Path) -> None:
    add_adapter(Policy(tiny_llama()), rank=2).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] in (None, "")
    with pytest.raises(FileNotFoundError, match="give it as `base`"):
        Policy.load(str(tmp_path))


def test_without_peft_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_llama(tmp_path / "base")
    add_adapter(Policy.load(str(base)), rank=2).save(tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'bandit_rft\[lora\]'"):
        Policy.load(str(tmp_path / "adapter"))
    policy = Policy.load(str(base))
    with pytest.raises(ImportError, match=r"pip install 'bandit_rft\[lora\]'"):
        add_adapter(policy, rank=2)
    assert find_adapter(str(base)) is None


def test_stories_model_trains_an_adapter_that_peft_can_merge(data_dir: Path, tmp_path: Path) -> None:
    model = data_dir / "model-stories260K" / "hf"
    config = small_config(tmp_path / "run", model, 3)
    config.max_prompt_length, config.num_generations, config.lora.rank = 32, 4, 8
    trainer = Trainer(config, task=sums())
    trainer.run()
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(saved)).merge_and_unload()
    assert isinstance(theirs, nn.Module)
    ids = tokens()[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(input_ids=ids).logits, trainer.policy.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
