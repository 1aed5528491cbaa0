"""Measures the operations on a CUDA GPU next to what they are made of and what they compete with; needs no network.

    make gpu-check                                             build, test and measure on this machine's GPU
    python benchmarks/gpu_check.py --device cpu --small        the same code on small shapes: does it run?

Writes <gpu>-<date>.json and .md to --output (benchmarks/results). Everything compared is timed alternately in one run,
by device events, and shown as ratios of medians beside the bar. A GPU's cache is overwritten before every sample.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bandit_rft import (
    PolicyObjective,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    ops,
    sample_from_logits,
)
from bandit_rft.ops import backends, rows
from bandit_rft.ops.rows import Scaling, TokenInputs

FULL = {
    "loss": [(8192, 4096, 151936), (16384, 2048, 151936), (8192, 896, 151936), (8192, 4096, 128256)],
    "sample": [(b, h, 151936) for h in (896, 2048, 4096) for b in (1, 8, 32, 128, 256)],
    "rows": (2048, 151936),
    "copy": 1 << 30,
}
SMALL = {"loss": [(96, 64, 512)], "sample": [(1, 64, 512), (8, 64, 512)], "rows": (64, 512), "copy": 1 << 20}
SEQUENCE = 512  # tokens of a sequence
REFUSED = 2


@dataclass
class Result:
    """One comparison: ratio of medians ours / other; `bar` is the most it may be (least, where `at_least`)."""

    case: str
    shape: str
    against: str
    ours_ms: float
    other_ms: float
    ratio: float
    bar: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


class Clock:
    """Times callables alternately; medians in milliseconds."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.cache = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def once(self, work: Callable[[], Any]) -> float:
        if self.cache is None:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        self.cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def alternately(self, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median of each, after two warm-up runs; a work that raises is left out and named on stderr."""
        usable = {}
        for name, work in works.items():
            try:
                work(), work()
                usable[name] = work
            except Exception as error:  # a peer that cannot do this shape must not end the measurement
                if name == "ours":
                    raise
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
                if self.cache is not None:
                    torch.cuda.empty_cache()
        samples: dict[str, list[float]] = {name: [] for name in usable}
        deadline = time.perf_counter() + self.seconds
        while len(samples["ours"]) < 5 or (time.perf_counter() < deadline and len(samples["ours"]) < 50):
            for name, work in usable.items():
                samples[name].append(self.once(work))
        return {name: statistics.median(values) for name, values in samples.items()}


class Check:
    """All measurements of one machine."""

    def __init__(self, device: torch.device, small: bool):
        self.device = device
        self.shapes: dict[str, Any] = SMALL if small else FULL
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.clock = Clock(device, 0.05 if small else 1.5)
        self.results: list[Result] = []
        self.limits: dict[str, float] = {}
        self.errors: list[dict[str, Any]] = []
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn.mul_(scale)

    def add(self, case: str, shape: Any, times: dict[str, float], bars: dict[str, float | None]) -> None:
        for other, bar in bars.items():
            if other in times:
                bar = None if self.shapes is SMALL else bar  # bars are for the full shapes
                ratio = times["ours"] / times[other]
                self.results.append(Result(case, str(shape), other, times["ours"], times[other], ratio, bar))
                print(f"{case:<34}{shape!s:<24}/ {other:<34}{ratio:7.3f}" + (f"  bar {bar}" if bar else ""), flush=True)

    # --- the machine's own limits -------------------------------------------------------------------------------------

    def measure_limits(self) -> None:
        size = self.shapes["copy"] // 4
        source, target = torch.ones(size, device=self.device), torch.empty(size, device=self.device)
        ms = self.clock.alternately({"ours": lambda: target.copy_(source)})["ours"]
        self.limits["copy GB/s"] = 8 * size / ms / 1e6
        n, h, v = self.shapes["loss"][0]
        a, b = self.normal(n, h), self.normal(v, h)
        ms = self.clock.alternately({"ours": lambda: a @ b.T})["ours"]
        self.limits[f"{str(self.dtype).removeprefix('torch.')} product TFLOP/s"] = 2 * n * h * v / ms / 1e9

    # --- linear_policy_loss and linear_logprobs -----------------------------------------------------------------------

    def measure_loss(self, n: int, h: int, v: int) -> None:
        hidden, weight = self.normal(n, h).requires_grad_(), self.normal(v, h, scale=h**-0.5).requires_grad_()
        sequences = max(2, n // SEQUENCE)
        bounds = torch.linspace(0, n, sequences + 1).int().to(self.device)
        targets = torch.randint(v, (n,), generator=self.generator, device=self.device)
        advantages = torch.randn(sequences, generator=self.generator, device=self.device)
        sparse = advantages.clone()
        sparse[: round(0.7 * sequences)] = 0
        lengths = bounds.diff().long()
        of_token = advantages.repeat_interleave(lengths)

        def clear() -> None:
            hidden.grad = weight.grad = None

        def ours(chosen: torch.Tensor = advantages) -> None:
            clear()
            linear_policy_loss(hidden, weight, targets, chosen, bounds, objective=PolicyObjective()).loss.backward()  # type: ignore[no-untyped-call]

        def plain() -> None:
            clear()
            logits = (hidden @ weight.T).float()
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            (-(of_token * logprobs).mean()).backward()

        @torch.no_grad()
        def products() -> None:
            z = hidden @ weight.T
            z @ weight
            z.T @ hidden

        shape, case = (n, h, v), "linear_policy_loss, fwd + bwd"
        peers = dict(loss_peers(hidden, weight, targets, of_token, bounds, clear))
        times = self.clock.alternately({"ours": ours, "three bare products": products, "plain PyTorch": plain, **peers})
        self.add(case, shape, times, {"three bare products": 1.15, "plain PyTorch": 1.0, **dict.fromkeys(peers, 1.0)})
        times = self.clock.alternately({"ours": lambda: ours(sparse), "every advantage": ours})
        self.add("the same, 70% of rows at 0", shape, times, {"every advantage": 0.36})
        clear()
        ours()
        self.memory(shape, ours, hidden, weight)

        @torch.no_grad()
        def score() -> Any:
            return linear_logprobs(hidden, weight, targets)

        @torch.no_grad()
        def product() -> Any:
            return hidden @ weight.T

        peers = dict(logprob_peers(hidden, weight, targets))
        times = self.clock.alternately({"ours": score, "bare product": product, **peers})
        self.add("linear_logprobs, forward", shape, times, {"bare product": 1.15, **dict.fromkeys(peers, 1.0)})
        clear()

    def memory(self, shape: Any, work: Callable[[], Any], hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Peak beyond the inputs and their gradients, in GiB; the gradients are there before."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize()
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        gradients = sum(t.grad.numel() * t.grad.element_size() for t in (hidden, weight) if t.grad is not None)
        gib = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
        self.results.append(Result("memory beyond inputs and gradients, GiB", str(shape), "1 GiB", gib, 1.0, gib, 1.25))
        print(f"{'memory beyond inputs, gradients':<34}{shape!s:<24}{gib:7.3f} GiB  bar 1.25", flush=True)

    def measure_error(self, n: int = 512, h: int = 896, v: int = 32000) -> None:
        """The 2x rule: the gradient's distance from float64 against that of plain PyTorch in the same dtype."""
        if self.shapes is SMALL:
            n, h, v = 64, 48, 300
        for dtype in (torch.float32, torch.bfloat16):
            exact = [self.normal(n, h).double(), self.normal(v, h, scale=h**-0.5).double()]
            targets = torch.randint(v, (n,), generator=self.generator, device=self.device)
            bounds = torch.tensor([0, n // 3, n], dtype=torch.int32, device=self.device)
            advantages = torch.tensor([1.3, -0.7], device=self.device)
            of_token = advantages.repeat_interleave(bounds.diff().long())
            gradients = {}
            exact = [t.to(dtype).double() for t in exact]
            for name, kind in (("truth", torch.float64), ("plain", dtype), ("ours", dtype)):
                hidden, weight = (t.detach().clone().to(kind).requires_grad_() for t in exact)
                if name == "ours":
                    loss = linear_policy_loss(
                        hidden, weight, targets, advantages, bounds, objective=PolicyObjective()
                    ).loss
                else:
                    logits = hidden @ weight.T
                    logits = logits if kind == torch.float64 else logits.float()
                    loss = -(of_token * logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]).mean()
                loss.backward()
                assert hidden.grad is not None and weight.grad is not None
                gradients[name] = (hidden.grad.double(), weight.grad.double())
            for what, truth, plain, ours in zip(
                ("hidden", "weight"), *(gradients[k] for k in ("truth", "plain", "ours")), strict=True
            ):
                far = [float((g - truth).norm() / truth.norm()) for g in (ours, plain)]
                self.errors.append({
                    "dtype": str(dtype).removeprefix("torch."), "gradient": what, "ours": far[0], "plain": far[1],
                    "met": far[0] <= 2 * far[1] + 1e-7,
                })  # fmt: skip

    # --- linear_sample ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_sample(self, b: int, h: int, v: int) -> None:
        hidden, weight = self.normal(b, h), self.normal(v, h, scale=h**-0.5)
        stream = {"sequence_ids": torch.arange(b, device=self.device), "seed": 1}
        stream["positions"] = torch.zeros(b, dtype=torch.int64, device=self.device)

        def ours() -> Any:
            return linear_sample(hidden, weight, **stream)  # type: ignore[arg-type]

        def product() -> Any:
            return hidden @ weight.T

        def plain() -> Any:
            logprobs = (hidden @ weight.T).float().log_softmax(-1)
            token = torch.multinomial(logprobs.exp(), 1)
            return token, logprobs.gather(1, token)

        times = self.clock.alternately({"ours": ours, "bare product": product, "plain PyTorch": plain})
        self.add("linear_sample", (b, h, v), times, {"bare product": 1.10, "plain PyTorch": 1.0})

    # --- the row kernels against a copy of the same bytes -------------------------------------------------------------

    @torch.no_grad()
    def measure_rows(self) -> None:
        n, v = self.shapes["rows"]
        z = torch.randn(n, v, generator=self.generator, device=self.device)
        other = torch.empty_like(z)
        bandwidth = statistics.median(self.clock.once(lambda: other.copy_(z)) for _ in range(15))
        targets = torch.randint(v, (n,), generator=self.generator, device=self.device)
        backend = backends.select(self.device, torch.float32)
        advantages = torch.randn(n, generator=self.generator, device=self.device)
        inputs = TokenInputs(advantages, torch.full((n,), 1.0 / n, device=self.device), None, None)
        stream = {"sequence_ids": torch.arange(n, device=self.device), "seed": 1}
        stream["positions"] = torch.zeros(n, dtype=torch.int64, device=self.device)
        works = row_works(z, inputs, targets, stream)
        for name, (work, share) in works.items():
            ms = statistics.median(self.clock.once(work) for _ in range(15))
            ratio = bandwidth * share / ms
            self.results.append(
                Result(f"{name} ({backend})", str((n, v)), "copy bandwidth", ms, bandwidth, ratio, 0.85, True)
            )
            print(f"{name + ' rows':<34}{(n, v)!s:<24}{ratio:7.3f} of the copy bandwidth  bar 0.85", flush=True)

    def run(self) -> None:
        self.measure_limits()
        self.measure_error()
        self.measure_rows()
        for shape in self.shapes["sample"]:
            self.measure_sample(*shape)
        for shape in self.shapes["loss"]:
            self.measure_loss(*shape)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def row_works(
    z: torch.Tensor, inputs: TokenInputs, targets: torch.Tensor, stream: dict[str, Any]
) -> dict[str, tuple[Callable[[], Any], float]]:
    """The row kernels, each with the bytes it must move as a share of those of a copy."""
    scratch = z.clone()

    def differentiate() -> Any:
        return rows.policy_(scratch, targets, Scaling(), PolicyObjective(), inputs)

    return {
        "policy": (differentiate, 1.0),  # one read, one write
        "logprob": (lambda: logprobs_from_logits(z, targets), 0.5),  # one read
        "sample": (lambda: sample_from_logits(z, **stream), 0.5),
    }


# --- peers, where they are installed ----------------------------------------------------------------------------------


def loss_peers(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, of_token: torch.Tensor, bounds: torch.Tensor,
    clear: Callable[[], None],
) -> Iterator[tuple[str, Callable[[], Any]]]:  # fmt: skip
    """Losses that give the same gradients: -sum(A logp) / tokens."""
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

        sequences = len(bounds) - 1
        if len(targets) % sequences == 0:
            grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=True)
            mask = torch.ones(sequences, len(targets) // sequences, device=hidden.device, dtype=torch.int64)
            advantages = of_token.view(sequences, -1)[:, 0].contiguous()

            def liger() -> None:
                clear()
                loss, _ = grpo(
                    hidden.view(sequences, -1, hidden.shape[1]), weight, targets.view(sequences, -1), mask, advantages
                )
                loss.backward()

            yield "Liger chunked GRPO", liger
    except ImportError:
        pass
    if hidden.device.type != "cuda":
        return
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def scaled() -> None:
            clear()
            losses = LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, targets, None, None, -100, 0.0, 0.0, "none"
            )
            ((losses[0] if isinstance(losses, tuple) else losses) * of_token).mean().backward()

        yield "Liger fused cross-entropy, scaled", scaled
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cut() -> None:
            clear()
            (linear_cross_entropy(hidden, weight, targets, reduction="none") * of_token).mean().backward()

        yield "cut-cross-entropy", cut
    except ImportError:
        pass


def logprob_peers(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Any]]]:
    @torch.no_grad()
    def plain() -> Any:
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    yield "plain PyTorch", plain
    try:
        from trl.trainer.utils import selective_log_softmax

        @torch.no_grad()
        def trl() -> Any:
            parts = zip(hidden.split(1024), targets.split(1024), strict=True)
            return torch.cat([selective_log_softmax(h @ weight.T, t) for h, t in parts])

        yield "TRL selective_log_softmax, chunked", trl
    except ImportError:
        pass


# --- what is written --------------------------------------------------------------------------------------------------


def report(check: Check, tests: str) -> dict[str, Any]:
    packages = ("bandit_rft", "torch", "triton", "liger-kernel", "trl", "cut-cross-entropy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if check.device.type == "cuda" else platform.machine() + " CPU"
    return {
        "schema": 1, "device": name, "date": datetime.date.today().isoformat(), "dtype": str(check.dtype),
        "versions": versions, "backends": ops.describe().splitlines(), "tests": tests, "limits": check.limits,
        "errors": check.errors, "results": [{**asdict(r), "met": r.met} for r in check.results],
    }  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    lines = [f"# {data['device']}, {data['date']}", "", f"Tests: {data['tests']}. dtype {data['dtype']}. Versions: "]
    lines[-1] += ", ".join(f"{k} {v}" for k, v in data["versions"].items()) + "."
    lines += ["", "| limit | measured |", "|---|---|", *(f"| {k} | {v:,.1f} |" for k, v in data["limits"].items())]
    lines += [
        "",
        "| case | shape | against | ours ms | other ms | ratio | bar | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in data["results"]:
        sign = "" if r["bar"] is None else (">= " if r["at_least"] else "<= ") + f"{r['bar']:.2f}"
        verdict = {None: "", True: "met", False: "MISSED"}[r["met"]]
        lines.append(
            f"| {r['case']} | {r['shape']} | {r['against']} | {r['ours_ms']:.3f} | {r['other_ms']:.3f} "
            f"| {r['ratio']:.3f} | {sign} | {verdict} |"
        )
    lines += ["", "| gradient | dtype | relative error | plain PyTorch's | |", "|---|---|---|---|---|"]
    for e in data["errors"]:
        verdict = "met" if e["met"] else "MISSED"
        lines.append(f"| {e['gradient']} | {e['dtype']} | {e['ours']:.2e} | {e['plain']:.2e} | {verdict} |")
    return "\n".join(lines) + "\n"


def run_tests() -> str:
    """The last line of `pytest tests/gpu`; the measurements go on whatever it says."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    print(done.stdout[-4000:])
    return (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--skip_tests", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check needs a CUDA GPU; torch {torch.__version__} finds none here. Nothing was measured.",
            file=sys.stderr,
        )
        return REFUSED
    os.environ.pop("BANDIT_RFT_BACKEND", None)
    print(ops.describe())
    tests = "not run" if arguments.skip_tests or device.type != "cuda" else run_tests()
    check = Check(device, arguments.small)
    check.run()
    data = report(check, tests)
    slug = re.sub(r"[^a-z0-9]+", "-", data["device"].lower()).strip("-")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{slug}-{data['date']}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(data))
    print(markdown(data))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
