"""What a model needs past one GPU: memory by part, bytes over the network, tokens a second. Nothing here is measured.

`python tools/scaling_plan.py --write` puts the tables into docs/scaling.md. tests/test_scaling_plan.py compares the
arithmetic of memory and network with bytes counted in training on two ranks; the rates of the machine are assumptions.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GB = 1e9
INFINITE = float("inf")
#: Tokens of a micro-batch; the first that fits is taken.
MICROBATCHES = (16384, 4096)


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder of Llama's or Qwen's build. Lengths in numbers, not bytes."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    biased: bool = False  # on queries, keys and values
    tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        attention = self.hidden * qkv + qkv * self.biased + self.heads * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of the head."""
        return self.vocabulary * self.hidden

    @property
    def base(self) -> int:
        """Parameters below the head."""
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def parameters(self) -> int:
        return self.base + self.embedding * (not self.tied)

    @property
    def kv(self) -> int:
        """Numbers of the key-value cache a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear layer but the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides


QWEN_7B = Model("7B", 28, 3584, 18944, 28, 4, 128, 152064, biased=True)  # Qwen2.5-7B: 7.6e9
LLAMA_70B = Model("70B", 80, 8192, 28672, 64, 8, 128, 128256)  # Llama 3.3 70B: 70.6e9


@dataclass(frozen=True)
class Machine:
    """Assumptions: an H100 node of eight GPUs (data sheets), and the share of each rate that is reached."""

    memory: float = 80 * GB
    node: int = 8
    flops: float = 989e12 * 0.4  # bfloat16, dense
    reading: float = 3.35e12 * 0.6  # bytes a second of a GPU's own memory
    nvlink: float = 450 * GB * 0.7  # bytes a second out of a GPU, within a node
    network: float = 50 * GB * 0.7  # and between nodes: one 400 Gbit/s port a GPU
    hop: float = 10e-6  # seconds of one step of a ring
    disk: float = 5 * GB  # written by one process to a shared folder
    disks: float = 20 * GB  # read by all servers together
    step: float = 3e-3  # a decoding step beside the reading of weights and cache
    workspace: float = 1.25 * 2**30  # of the fused loss


@dataclass(frozen=True)
class Round:
    """A round: queries times rollouts, and their lengths in tokens. All are trained on, which is an upper estimate."""

    rollouts: int = 4096
    prompt: int = 256
    completion: int = 1024
    longest: int = 8192
    microbatch: int = MICROBATCHES[0]  # tokens of one forward pass
    steps: int = 1

    @property
    def tokens(self) -> int:
        return self.rollouts * (self.prompt + self.completion)


class Bytes(NamedTuple):
    """Bytes an element: as computed with, as summed over ranks, and as the optimizer keeps a trained parameter."""

    computed: int = 2
    summed: int = 4
    kept: int = 16  # master weight, gradient, two moments, float32 each


BF16 = Bytes()


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def sent_a_round(model: Model, ranks: int, passes: int, steps: int, mesh: str, size: Bytes = BF16) -> dict[str, float]:
    """Bytes that a rank sends in a round, by part; rings, so (ranks - 1) / ranks of everything that is exchanged.

    `passes`: micro-batches of a rank in the round. mesh ddp: gradients are summed once a step (a sum is a scatter and a
    gather: twice). fsdp: what is below the head is gathered for each forward and again for each backward pass, and its
    gradient summed in each; the head is gathered and summed once a step; the whole policy is gathered once a round, to
    be drawn with, pushed and saved.
    """
    ring = (ranks - 1) / ranks
    if mesh == "ddp":
        return {"gradients": ring * 2 * model.parameters * size.summed * steps}
    return {
        "forward": ring * model.base * size.computed * passes,
        "backward": ring * model.base * size.computed * passes,
        "gradients": ring * model.base * size.summed * passes,
        "head": ring * model.embedding * (size.computed + size.summed) * steps * (not model.tied),
        "whole": ring * model.parameters * size.computed,
    }


def memory_of_a_rank(model: Model, shards: int, tokens: int, machine: Machine, size: Bytes = BF16) -> dict[str, float]:
    """Bytes in a rank's memory at the peak of training, by part; `shards` 1: DDP.

    With gradient checkpointing: of every layer its input, of one layer everything (about 34 numbers of H a token beside
    the MLP's), and packed sequences without padding.
    """
    whole = shards == 1
    return {
        "optimizer": model.parameters * size.kept / shards + (model.parameters * size.computed if whole else 0),
        "gathered layers": 0 if whole else model.layer * (2 * size.computed + size.summed),
        "embedding and head": 0 if whole else model.embedding * (2 * size.computed + size.summed),
        "activations": tokens
        * size.computed
        * (model.layers * model.hidden + 17 * model.hidden + 5 * model.intermediate),
        "workspace": machine.workspace,
    }


# --- the simulator ----------------------------------------------------------------------------------------------------


class Mesh(NamedTuple):
    """Parameters are split over `shards` neighbouring ranks, and the same on `copies` groups of them."""

    kind: str
    shards: int
    copies: int

    @property
    def ranks(self) -> int:
        return self.shards * self.copies


def train_seconds(model: Model, mesh: Mesh, work: Round, machine: Machine, size: Bytes = BF16) -> float:
    """Seconds of the training of a round, by two streams: one computes, one sends, layer by layer.

    A layer is computed when it is gathered, and the next one is gathered meanwhile; its gradient is summed while
    earlier layers are computed. A step ends when both streams have.
    """
    passes = -(-work.tokens // (work.microbatch * mesh.ranks))
    tokens = work.tokens / mesh.ranks / passes
    attention = 2 * tokens * (work.prompt + work.completion) * model.heads * model.head_dim
    forward = (2 * model.layer * tokens + attention) / machine.flops
    inside = machine.nvlink if mesh.shards <= machine.node else machine.network

    def collective(amount: float, ranks: int, rate: float) -> float:
        return 0.0 if ranks == 1 else amount * (ranks - 1) / ranks / rate + machine.hop * (ranks - 1)

    gather = collective(model.layer * size.computed, mesh.shards, inside)
    scatter = collective(model.layer * size.summed, mesh.shards, inside)
    across = 2 * collective(model.layer * size.summed / mesh.shards, mesh.copies, machine.network)
    compute = send = 0.0
    for number in range(passes):
        send = max(send, 0.0)
        for _ in range(model.layers):
            send += gather
            compute = max(compute, send) + forward
        compute += 6 * model.embedding * tokens / machine.flops  # the head, fused with the loss: scores and gradients
        last = number == passes - 1
        for _ in range(model.layers):
            send += gather
            compute = max(compute, send) + 3 * forward  # computed again, then both gradients
            send = max(send, compute) + scatter + across * last
    edges = collective(2 * model.embedding * (size.computed + size.summed), mesh.shards, inside)
    return work.steps * (max(compute, send) + edges)


def draw_seconds(model: Model, gpus: int, work: Round, machine: Machine) -> tuple[float, int]:
    """Seconds until the last rollout of a round is drawn on so many GPUs, and GPUs a replica; inf: it does not fit."""
    context = work.prompt + work.completion / 2
    for across in (1, 2, 4, 8):
        room = across * machine.memory * 0.9 - 2 * model.parameters - 2 * GB * across
        if across <= gpus and room >= 32 * 2 * model.kv * work.longest:
            break
    else:
        return INFINITE, 0
    each = -(-work.rollouts // (gpus // across))
    batch = min(each, 256, int(room / (2 * model.kv * (work.prompt + work.completion))))

    def step(sequences: int) -> float:
        read = (2 * model.parameters + sequences * context * 2 * model.kv) / (across * machine.reading)
        return machine.step + max(read, 2 * model.parameters * sequences / (across * machine.flops))

    return max(each / batch * work.completion * step(batch), work.longest * step(max(1, batch // 8))), across


def push_seconds(model: Model, way: str, gpus: int, machine: Machine) -> float:
    """Seconds until all servers, of so many GPUs, have the weights."""
    whole = 2 * model.parameters
    if way == "folder":
        return whole / machine.network + whole / machine.disk + whole * max(1, gpus // machine.node) / machine.disks
    if way == "nccl":
        return 2 * whole / machine.network  # gathered, and sent on as one broadcast
    adapters = 2 * model.adapters(32)
    return adapters / machine.disk + adapters * max(1, gpus // machine.node) / machine.disks + 1.0


class Plan(NamedTuple):
    """GPUs that draw and GPUs that train; bytes and seconds of a round."""

    work: Round
    serving: int
    mesh: Mesh
    memory: float
    draw: float
    train: float
    alone: float  # train, if sending took no time
    push: float
    sent: float

    @property
    def seconds(self) -> float:
        """The next round is drawn while one is trained on (rollout.ahead=1); a push waits for both."""
        return max(self.draw, self.train) + self.push

    @property
    def limit(self) -> str:
        """What the round waits for."""
        if self.train > self.draw:
            return "network" if self.train > 1.25 * self.alone else "training"
        return "drawing"


def plans(model: Model, gpus: int, work: Round, machine: Machine) -> Iterator[Plan]:
    """Every way to divide so many GPUs that fits in their memory."""
    for serving in sorted({gpus // 4, gpus // 2, gpus * 3 // 4}):
        ranks = gpus - serving
        draw, across = draw_seconds(model, serving, work, machine)
        meshes = [Mesh("ddp", 1, ranks), Mesh("fsdp", ranks, 1)]
        meshes += [Mesh("hsdp", n, ranks // n) for n in (8, 16, 32, 64) if ranks > n and ranks % n == 0]
        for mesh in meshes if across else []:
            for tokens in MICROBATCHES:
                memory = sum(memory_of_a_rank(model, mesh.shards, tokens, machine).values())
                if memory <= 0.95 * machine.memory:
                    break
            else:
                continue
            work = replace(work, microbatch=tokens)
            passes = -(-work.tokens // (tokens * ranks))
            of = ("ddp", ranks) if mesh.kind == "ddp" else ("fsdp", mesh.shards)
            sent = sum(sent_a_round(model, of[1], passes, work.steps, of[0]).values())
            if mesh.kind == "hsdp":  # the sums of the copies, once a step
                sent += 8 * model.parameters / mesh.shards * (mesh.copies - 1) / mesh.copies * work.steps
            train = train_seconds(model, mesh, work, machine)
            alone = train_seconds(model, mesh, work, replace(machine, nvlink=INFINITE, network=INFINITE, hop=0.0))
            yield Plan(
                work, serving, mesh, memory, draw, train, alone, push_seconds(model, "nccl", serving, machine), sent
            )


# --- the page ---------------------------------------------------------------------------------------------------------

MODELS = (QWEN_7B, LLAMA_70B)
GPUS = (8, 16, 32, 64, 128, 256, 512)


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines) + "\n"


def memory_table(machine: Machine, work: Round) -> str:
    rows = []
    for model in MODELS:
        for ranks in (1, 4, 8, 16, 32, 64, 128, 256):
            parts = memory_of_a_rank(model, ranks, work.microbatch, machine)
            total, whole = sum(parts.values()), parts["optimizer"] + (2 * model.parameters if ranks > 1 else 0)
            fits = [value if value <= 0.95 * machine.memory else -value for value in (total, whole)]
            shown = [f"{value / GB:.1f}" for value in parts.values()]
            rows.append([f"{model.name}, {ranks} {'(DDP)' if ranks == 1 else ''}", *shown,
                         *(f"{v / GB:.0f}" if v > 0 else f"**{-v / GB:.0f}**" for v in fits)])  # fmt: skip
    parts_of = "optimizer | gathered layers | embedding, head | activations | workspace"
    return table(f"model, ranks | {parts_of} | training | gathered whole", rows)


def rounds_table(machine: Machine, per_gpu: int | None) -> str:
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            work = Round() if per_gpu is None else replace(Round(), rollouts=per_gpu * gpus)
            every = list(plans(model, gpus, work, machine))
            if not every:
                rows.append([f"{model.name}, {gpus}", "does not fit", *[""] * 9])
                continue
            for kinds in (("ddp", "fsdp"), ("hsdp",)):
                found = [plan for plan in every if plan.mesh.kind in kinds]
                if not found:
                    continue
                p = min(found, key=lambda plan: plan.seconds)
                if kinds == ("hsdp",) and p.seconds > 0.98 * min(q.seconds for q in every if q.mesh.kind != "hsdp"):
                    continue
                drawn = work.rollouts * work.completion / p.seconds
                mesh = f"{p.mesh.kind} {p.mesh.shards}" + (f" x {p.mesh.copies}" if p.mesh.kind == "hsdp" else "")
                rows.append([
                    f"{model.name}, {gpus}", f"{p.serving} + {p.mesh.ranks}", mesh, f"{p.work.microbatch:,}",
                    f"{p.memory / GB:.0f}", f"{p.draw:.0f}", f"{p.train:.0f} ({p.alone:.0f})", f"{p.push:.0f}",
                    f"{drawn:,.0f}", f"{p.sent / GB:,.0f}", p.limit,
                ])  # fmt: skip
    parts = "draw + train | mesh | micro-batch | GB | draw s | train s | push s | tokens/s | sent GB | waits for"
    return table(f"model, GPUs | {parts}", rows)


def mesh_table(machine: Machine) -> str:
    rows = []
    for model in MODELS:
        for ranks in (16, 64, 256):
            work, cells = replace(Round(), rollouts=128 * ranks), []
            for mesh in (
                Mesh("ddp", 1, ranks),
                Mesh("fsdp", ranks, 1),
                Mesh("hsdp", machine.node, ranks // machine.node),
            ):
                memory = sum(memory_of_a_rank(model, mesh.shards, MICROBATCHES[-1], machine).values())
                fits = memory <= 0.95 * machine.memory
                cells.append(f"{train_seconds(model, mesh, work, machine):.0f}" if fits else f"{memory / GB:,.0f} GB")
            rows.append([f"{model.name}, {ranks}", *cells])
    return table("model, ranks that train | DDP | FSDP over all | FSDP within a node, copies across (not built)", rows)


def push_table(machine: Machine) -> str:
    rows = []
    for model in MODELS:
        sizes = [2 * model.parameters, 2 * model.parameters, 2 * model.adapters(32)]
        for way, size in zip(("folder", "nccl", "lora"), sizes, strict=True):
            seconds = [f"{push_seconds(model, way, gpus, machine):.0f}" for gpus in (4, 16, 64, 256)]
            rows.append([f"{model.name}, {way}", f"{size / GB:.2f}", *seconds])
    return table("model, push | GB | 4 GPUs that draw | 16 | 64 | 256", rows)


def section() -> str:
    """What stands between the marks of the page."""
    machine, work = Machine(), Round()
    return (
        f"Memory of a rank in GB, predicted ({work.microbatch:,} tokens a micro-batch; bold: more than a GPU has):\n\n"
        + memory_table(machine, work)
        + f"\nA round of {work.rollouts:,} rollouts whatever the number of GPUs, predicted:\n\n"
        + rounds_table(machine, None)
        + "\nA round of 128 rollouts a GPU, predicted:\n\n"
        + rounds_table(machine, 128)
        + "\nSeconds to train on 128 rollouts a rank by mesh, predicted; where it does not fit, the memory:\n\n"
        + mesh_table(machine)
        + "\nSeconds of a push, predicted:\n\n"
        + push_table(machine)
    )


def with_section(text: str) -> str:
    """The page with the tables as they are now."""
    return re.sub(
        r"(<!-- plan -->\n).*?(<!-- /plan -->)", lambda m: f"{m[1]}\n{section()}\n{m[2]}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}; without it they are printed")
    if parser.parse_args().write:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(section())
