"""Train a Hugging Face model with `linear_policy_loss` in your own loop: one rollout a prompt, reward, one update.

python examples/custom_loop.py PATH_OR_NAME_OF_A_CAUSAL_LM
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bandit_rft import PolicyObjective, linear_policy_loss

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids.expand(16, -1)
start = prompt.shape[1]

for round in range(5):
    with torch.no_grad():
        ids = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=24, min_new_tokens=24, pad_token_id=0)
    rewards = torch.tensor([float("little" in text) for text in tokenizer.batch_decode(ids[:, start:])])
    hidden = model.base_model(ids).last_hidden_state[:, start - 1 : -1]  # the states that predict the completion
    cu_seqlens = torch.arange(17, dtype=torch.int32) * hidden.shape[1]
    loss, stats, _ = linear_policy_loss(
        hidden.flatten(0, 1), model.get_output_embeddings().weight, ids[:, start:].flatten(),
        advantages=rewards, cu_seqlens=cu_seqlens, objective=PolicyObjective(),
    )  # fmt: skip
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"round {round}: reward {rewards.mean():.2f}, {int(stats['tokens_skipped'])} tokens skipped")
