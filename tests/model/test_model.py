"""A Hugging Face model as hidden states and head: the same log-probabilities, or a refusal that says why."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, own_logprobs
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_llama, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from bandit_rft import ops
from bandit_rft.model import Policy, UnsupportedModelError

EXPECTED = {  # softcap, logit scale, has a bias
    "gemma2": (3.0, 1.0, False), "gemma3": (5.0, 1.0, False), "cohere": (None, 0.0625, False),
    "cohere2": (None, 0.0625, False), "granite": (None, 0.125, False), "phi": (None, 1.0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_log_probabilities_are_the_models_own(name: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():  # biases and the like start at zero, where a mistake would not show
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if (parameter == 1).all() else 0.0, 0.3)
    policy = Policy(model)
    softcap, scale, bias = EXPECTED.get(name, (None, 1.0, False))
    assert (policy.softcap, policy.logit_scale, policy.bias is not None) == (softcap, scale, bias)
    sequences = [torch.randint(0, 97, (n,)) for n in (9, 17, 2, 17)]
    packed = torch.cat([s[:-1] for s in sequences])
    hidden = policy.hidden_states(packed, [len(s) - 1 for s in sequences])
    targets = torch.cat([s[1:] for s in sequences])
    fused = ops.linear_logprobs(hidden, policy.weight, targets, **policy.head_options)
    own = torch.cat([own_logprobs(model, s) for s in sequences])
    torch.testing.assert_close(fused.double(), own, atol=2e-5, rtol=1e-5)

    # and the gradients, tied embeddings getting both of theirs
    weights = torch.linspace(-1, 1, len(own))
    (fused * weights).sum().backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (torch.cat([own_logprobs(model, s) for s in sequences]) * weights).sum().backward()
    truth = copy.deepcopy(model).double()
    truth.zero_grad()
    (torch.cat([own_logprobs(truth, s) for s in sequences]) * weights).sum().backward()
    scale_of = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for (key, parameter), exact in zip(model.named_parameters(), truth.parameters(), strict=True):
        if parameter.grad is not None and exact.grad is not None:
            # Granite multiplies its embeddings by 12: on some processors the model's own float32 is further than the
            # usual bound from float64, and then twice its error is what is allowed, as everywhere.
            plain_error = float((parameter.grad - exact.grad).abs().max()) / scale_of
            atol = max(1e-5, 2 * plain_error)
            torch.testing.assert_close(got[key] / scale_of, parameter.grad / scale_of, atol=atol, rtol=0, msg=key)


def test_architectures_with_an_attention_interface_are_packed_without_padding() -> None:
    assert Policy(AutoModelForCausalLM.from_config(CONFIGS["llama"])).packing == "varlen"
    # Eager: transformers 5.17 lets sdpa serve Gemma 2, without its softcap, and the probe keeps to what the model does.
    gemma = AutoModelForCausalLM.from_config(CONFIGS["gemma2"], attn_implementation="eager")
    assert Policy(gemma).packing == "varlen"
    assert Policy(AutoModelForCausalLM.from_config(CONFIGS["bloom"])).packing == "padded"


def test_attention_implementation_is_put_back_even_after_an_error() -> None:
    policy = Policy(tiny_llama())
    before = policy.model.config._attn_implementation
    with pytest.raises(IndexError):
        policy.hidden_states(torch.tensor([10**6, 1]), [2])
    assert policy.model.config._attn_implementation == before
    assert policy.hidden_states(torch.tensor([5, 1]), [2]).shape == (2, 32)


def test_unknown_scaling_of_the_logits_is_refused_with_its_size() -> None:
    model = tiny_llama()
    forward = model.forward

    def scaled(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled
    with pytest.raises(UnsupportedModelError, match=r"differ from the model's own logits by 0\.\d+"):
        Policy(model)


def test_softcap_missing_from_the_config_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"])
    forward, config = model.forward, model.config

    def with_softcap(*args, **kwargs):  # type: ignore[no-untyped-def]
        config.final_logit_softcapping = 3.0
        try:
            return forward(*args, **kwargs)
        finally:
            config.final_logit_softcapping = None

    config.final_logit_softcapping, model.forward = None, with_softcap
    with pytest.raises(UnsupportedModelError, match="softcap None"):
        Policy(model)
    config.final_logit_softcapping = 3.0


def test_adapted_head_is_refused() -> None:
    class LoraLinear(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)

        @property
        def weight(self) -> torch.Tensor:
            return self.base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    model = tiny_llama()
    model.set_output_embeddings(LoraLinear(model.get_output_embeddings()))
    with pytest.raises(UnsupportedModelError, match="adapter"):
        Policy(model)


def test_hooked_head_is_refused() -> None:
    model = tiny_llama()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        Policy(model)


def test_bfloat16_model_is_accepted_and_compares_in_its_own_rounding() -> None:
    policy = Policy(tiny_llama().to(torch.bfloat16))
    assert policy.weight.dtype == torch.bfloat16


def test_stop_tokens_come_from_the_generation_config() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 3]
    assert Policy(model).stop_tokens == [3, 7]
    model.generation_config.eos_token_id = None
    assert Policy(model).stop_tokens == [2]


def test_wrong_length_names_the_argument() -> None:
    with pytest.raises(ValueError, match="input_ids"):
        Policy(tiny_llama()).hidden_states(torch.zeros(5, dtype=torch.int64), [2, 2])


def test_missing_folder_is_a_clear_error() -> None:
    with pytest.raises(FileNotFoundError, match="model_name_or_path"):
        Policy.load("/nowhere/at/all")


def test_weights_of_a_mapped_file_are_moved_to_addresses_that_do_not_depend_on_its_header(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, seen = load_file(file), set()
    for length in range(16):  # the header's length moves everything that comes after it, by eight bytes at a time
        save_file({k: v.clone() for k, v in weights.items()}, file, {"format": "pt", "note": "-" * 8 * length})
        seen |= {t.data_ptr() % 64 for t in load_file(file).values()}
        policy = Policy.load(str(tmp_path), device="cpu")
        assert {p.data_ptr() % 64 for p in policy.model.parameters()} == {0}
        assert torch.equal(policy.weight, weights["lm_head.weight"])
    assert len(seen) > 1, "the files were mapped at even addresses: this would not have failed before"
