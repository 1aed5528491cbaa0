"""One rank of two that train a small Llama as docs/scaling.md says, and count: counted_rank.py MESH PASSES TOKENS.

The layers and what is around them are fully_shard'ed, the head is gathered once a step and its gradient summed once,
and the whole policy is gathered once a round. Prints what was counted as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from counted_bytes import CollectiveBytes, SavedBytes
from tiny_models import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}


def train(mesh: str, passes: int, tokens: int) -> dict[str, object]:
    model = tiny_llama(**SIZES)
    base, head, whole = model.model, model.lm_head.weight.detach(), list(model.parameters())
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.train()
    rows = torch.randint(3, 64, (passes, 1, tokens))
    if mesh == "ddp":
        saved, counted = SavedBytes(tokens), CollectiveBytes(2)
        with counted:
            for row in rows:
                model(input_ids=row).logits.logsumexp(-1).sum().backward()
            for parameter in whole:
                dist.all_reduce(parameter.grad)
        kept = [p.grad for p in whole]
    else:
        ranks = init_device_mesh("cpu", (2,))
        for layer in base.layers:
            fully_shard(layer, mesh=ranks)
        fully_shard(base, mesh=ranks, reshard_after_forward=True)
        share = distribute_tensor(head, ranks, (Shard(0),))
        saved, counted = SavedBytes(tokens), CollectiveBytes(2)
        with counted:
            gathered = share.full_tensor().requires_grad_()
            for number, row in enumerate(rows):
                with saved if number == 0 else nullcontext():
                    hidden = base(input_ids=row).last_hidden_state
                (hidden @ gathered.T).logsumexp(-1).sum().backward()
            summed = DTensor.from_local(gathered.grad, ranks, (Partial(),)).redistribute(placements=(Shard(0),))
            for parameter in base.parameters():
                parameter.full_tensor()
            share.full_tensor()
        kept = [*(p.grad.to_local() for p in base.parameters()), summed.to_local()]
    return {**counted.sent, "kept": sum(t.numel() for t in kept), "saved": sum(saved.kept.values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    dist.destroy_process_group()
