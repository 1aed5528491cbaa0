"""Every measurement, in order: what decides first, what may fault last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from . import operations, peers, training_round
from .machine import DRAWS, LOSSES
from .operations import Result, Setting

ROWS = ("policy", "logprob", "sample", "sample, top-p 0.9", "sample, top-k 50")
TESTS = {"tests/gpu": "not sanitizer", "compute-sanitizer": "sanitizer"}


class Measurement(NamedTuple):
    name: str
    section: str
    run: Callable[[Setting], Iterator[Result]] | None  # in a worker; None: pytest in a process of its own
    seconds: float = 60.0  # after which it counts as hung


def plan(small: bool, device_type: str) -> list[Measurement]:
    found: list[Measurement] = []

    def add(section: str, function: Callable[..., Iterator[Result]], *arguments: Any, seconds: float = 60.0) -> None:
        words = [str(a).removeprefix("torch.") for a in arguments]
        name = " ".join([function.__name__.replace("_", " "), *words])
        found.append(Measurement(name, section, lambda setting: function(setting, *arguments), seconds))

    losses = [(96, 64, 512)] if small else LOSSES
    add("limits", operations.limit_copy, (1 << 18) if small else (1 << 28))
    add("limits", operations.limit_product, *losses[0])
    for shape in losses:
        add("loss", operations.loss, *shape)
        add("loss", operations.sparse_loss, *shape)
        if device_type == "cuda":
            add("loss", operations.loss_memory, *shape)
    for dtype in (torch.float32, torch.bfloat16):
        add("loss", operations.errors, *((64, 48, 300) if small else (512, 896, 32000)), dtype)
    for shape in losses:
        for peer in peers.LOSS:
            add("loss", operations.loss_peer, peer, *shape, seconds=120)
    for shape in losses:
        add("log-probabilities", operations.logprobs, *shape)
    for shape in losses:
        for peer in peers.LOGPROBS:
            add("log-probabilities", operations.logprobs_peer, peer, *shape)
    for shape in [(1, 64, 512), (8, 64, 512)] if small else DRAWS:
        add("sampling", operations.sample, *shape)
    for kind in ROWS:
        add("rows", operations.row_kernel, kind, *((64, 512) if small else (2048, 151936)))
    add("whole round", training_round.training_round, seconds=240)
    if device_type == "cuda":
        found += [Measurement(name, "tests", None, 300) for name in TESTS]
    return found


def injected(measurement: Measurement, fault: str) -> Measurement:
    """For tests of gpu-check itself: this measurement with a fault in it."""
    return measurement._replace(run=partial(_faulty, fault))


def _faulty(fault: str, setting: Setting) -> Iterator[Result]:
    if fault == "abort":
        os.abort()
    if fault == "hang":
        time.sleep(3600)
    if fault == "raise":
        raise RuntimeError("injected")
    if fault == "missing":

        def absent(batch: operations.Batch) -> Any:
            raise OSError("injected: no such peer")

        yield from operations.versus_peer(setting, "a case", (8, 8, 8), "a peer", absent, lambda batch: None)
        return
    raise ValueError(f"--fault must be abort, hang, raise or missing; got {fault!r}")
