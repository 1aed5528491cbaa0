"""A server with the routes of vLLM that a trainer uses, over a real model; it can go wrong in the ways that servers do.

Its log-probabilities are the model's own, token by token. `faults` are names of what happens to the next requests for
completions, one each (see `Handler.generate`); `stale`, `wrong`, `deaf`, `blind` and `room` last.
As a program it stands for the command that starts a server: `python fake_vllm.py --model FOLDER --port PORT`.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM

Json = dict[str, Any]


class FakeVllm:
    """One server on a port of this machine, in threads of this process."""

    def __init__(self, folder: Path, port: int = 0, host: str = "127.0.0.1"):
        self.folder, self.port, self.host = Path(folder), port, host
        self.stale = self.wrong = self.deaf = False  # keeps its weights; spoils one tensor; keeps its version's name
        self.blind = False  # does not see the folder of the weights: as vLLM, it says so and is gone
        self.room = 10**6  # tokens of a prompt and its completion, where vLLM ends a completion
        self.faults, self.calls, self.lock = deque[str](), Counter[str](), threading.RLock()
        self.delay = 0.0  # seconds that every completion takes
        self.seeds = list[int]()
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Begin with the weights in `folder`, as a server that was started anew does."""
        self.version, self.paused, self.adapters = "default", False, dict[str, Any]()
        self.model = self.load(self.folder)
        handler = type("BoundHandler", (Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer((self.host, self.port), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def load_adapter(self, name: str, folder: Path) -> None:
        from peft import PeftModel

        self.adapters[name] = PeftModel.from_pretrained(self.load(self.folder), folder).eval()

    def reload(self, folder: Path) -> None:
        if not self.stale:
            self.model = self.load(folder)
        if self.wrong:
            with torch.no_grad():
                self.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)

    @torch.inference_mode()
    def complete(self, body: Json) -> Json:
        """A completion drawn token by token, as the route answers it."""
        sampling, model = body["sampling_params"], self.adapters[body["model"]] if "model" in body else self.model
        generator = torch.Generator().manual_seed(sampling["seed"])
        self.seeds.append(sampling["seed"])
        tokens, logprobs, ids = list[int](), list[float](), list(body["token_ids"])
        while len(tokens) < sampling["max_tokens"] and len(ids) < self.room:
            z = model(input_ids=torch.tensor([ids])).logits[0, -1].float() / (sampling["temperature"] or 1.0)
            for token, bias in sampling.get("logit_bias", {}).items():
                z[int(token)] += bias
            every = z.log_softmax(-1)
            greedy = sampling["temperature"] == 0
            token = int(every.argmax() if greedy else torch.multinomial(every.exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append(float(every[token]))
            ids.append(token)
            if token in sampling["stop_token_ids"]:
                break
        content = [{"token_id": t, "logprob": x} for t, x in zip(tokens, logprobs, strict=True)]
        versions = [{"version": self.version, "start": 0, "end": len(tokens)}]
        return {"choices": [{"token_ids": tokens, "logprobs": {"content": content}, "weight_versions": versions}]}


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    server_of: FakeVllm

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route({})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.route(json.loads(text) if text else {})

    def route(self, body: Json) -> None:
        server, path = self.server_of, urlsplit(self.path).path
        with server.lock:
            server.calls[path] += 1
        if path == "/inference/v1/generate":
            self.generate(body)
            return
        with server.lock:
            answer: Any = {}
            if path == "/collective_rpc" and server.blind:
                self.answer(500, {"error": {"message": f"Repo id must use ...: '{body['kwargs']['weights_path']}'"}})
                threading.Thread(target=server.stop).start()
                return
            if path == "/collective_rpc":
                server.reload(Path(body["kwargs"]["weights_path"]))
            elif path == "/update_weight_version" and not server.deaf:
                server.version = body["new_version"]
            elif path == "/weight_info":
                answer = {"weight_version": server.version}
            elif path in ("/pause", "/resume"):
                server.paused = path == "/pause"
            elif path == "/v1/load_lora_adapter":
                server.load_adapter(body["lora_name"], Path(body["lora_path"]))
                answer = "Success: LoRA adapter added"
            elif path == "/v1/unload_lora_adapter":
                if server.adapters.pop(body["lora_name"], None) is None:
                    self.answer(404, {"error": "no such adapter"})
                    return
                answer = "Success: LoRA adapter removed"
        self.answer(200, answer)

    def generate(self, body: Json) -> None:
        server = self.server_of
        with server.lock:
            fault = server.faults.popleft() if server.faults else ""
        time.sleep(30.0 if fault == "hangs" else server.delay)
        if fault.isdigit():
            self.answer(int(fault), {"error": {"message": "CUDA out of memory"}})
            return
        if fault == "closes":
            self.connection.close()
            return
        if "model" in body and body["model"] not in server.adapters:
            self.answer(404, {"error": "no such adapter"})
            return
        with server.lock:
            answer = server.complete(body)
        choice = answer["choices"][0]
        tokens, content, spans = choice["token_ids"], choice["logprobs"]["content"], choice["weight_versions"]
        if fault == "not JSON":
            self.answer(200, "<html>")
            return
        if fault == "drips":
            self.answer(200, answer, drip=0.2)
            return
        if fault in SPOIL:
            SPOIL[fault](choice, tokens, content, spans)
        self.answer(200, {"choices": []} if fault == "no choice" else answer)

    def answer(self, status: int, body: Any, drip: float = 0.0) -> None:
        text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        try:
            for part in [text[i : i + 8] for i in range(0, len(text), 8)] if drip else [text]:
                self.wfile.write(part)
                time.sleep(drip)
        except OSError:
            self.close_connection = True  # nobody waits for it any more


def _mixed(choice: Json, tokens: list[int], content: list[Json], spans: list[Json]) -> None:
    spans[:] = [{"version": "older", "start": 0, "end": 1}, {**spans[0], "start": 1}]


#: What is done to an answer that would have been right: to its choice, tokens, log-probabilities and versions.
SPOIL: dict[str, Any] = {
    "tokens are text": lambda c, t, p, s: c.update(token_ids=["a"] * len(t)),
    "token out of range": lambda c, t, p, s: t.__setitem__(0, 10**6),
    "token below zero": lambda c, t, p, s: t.__setitem__(0, -1),
    "no log-probabilities": lambda c, t, p, s: c.update(logprobs=None),
    "too few log-probabilities": lambda c, t, p, s: p.pop(),
    "log-probability NaN": lambda c, t, p, s: p[0].update(logprob=float("nan")),
    "log-probability infinite": lambda c, t, p, s: p[0].update(logprob=float("-inf")),
    "log-probability above zero": lambda c, t, p, s: p[0].update(logprob=0.5),
    "log-probability of digits without end": lambda c, t, p, s: p[0].update(logprob=10**400),
    "log-probability of another token": lambda c, t, p, s: p[0].update(token_id=t[0] + 1),
    "nothing drawn": lambda c, t, p, s: c.update(token_ids=[], logprobs={"content": []}),
    "ends without a reason": lambda c, t, p, s: c.update(token_ids=[5], logprobs={"content": [{"logprob": -1.0}]},
                                                         weight_versions=[{**s[0], "end": 1}]),
    "no versions": lambda c, t, p, s: c.update(weight_versions=None),
    "versions with a gap": lambda c, t, p, s: s[0].update(start=1),
    "version of another run": lambda c, t, p, s: s[0].update(version="another-3"),
    "mixed versions": _mixed,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FakeVllm(given.model, given.port, given.host)
    threading.Event().wait()
