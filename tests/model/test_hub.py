"""Models, adapters and datasets by hub name: the real client code against a server on this machine that answers as a
hub does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bandit_rft.model import Policy
from bandit_rft.model.lora import add_adapter, base_policy

pytestmark = pytest.mark.slow  # whole runs in processes of their own

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: other
  data_files: other/*
---
"""


@dataclass
class Hub:
    """Repositories {"models/someone/name": folder}; every branch is `main`, at COMMIT."""

    repositories: dict[str, Path]
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) of a request, as the hub answers it."""
        self.requests.append(f"{method} {path}")
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.repositories.get(f"{kind}/{name}")
        if folder is None:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        if not api and rest[:1] == ["resolve"]:
            return self._file(folder, "/".join(rest[2:]))
        if api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": f} for f in files]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []}
            return 200, {}, json.dumps(info).encode()
        if api and rest[0] == "tree":
            below = "/".join(rest[2:])
            recursive = parse_qs(urlsplit(path).query).get("recursive", ["False"])[0].lower() in ("true", "1")
            return self._listing(folder, below, recursive)
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _file(self, folder: Path, name: str) -> tuple[int, dict[str, str], bytes]:
        file, commit = folder / name, {"X-Repo-Commit": COMMIT}
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", **commit}, b""
        content = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit}, content

    def _listing(self, folder: Path, below: str, recursive: bool) -> tuple[int, dict[str, str], bytes]:
        if not (folder / below).is_dir():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        paths = (folder / below).rglob("*") if recursive else (folder / below).iterdir()
        return 200, {}, json.dumps([_entry(folder, path) for path in sorted(paths)]).encode()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"type": "directory", "path": str(path.relative_to(folder)), "oid": COMMIT, "size": 0}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "oid": oid, "size": path.stat().st_size}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _serve(self) -> None:
        status, headers, content = self.hub.answer(self.command, self.path)
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = _serve

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(data_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    """The stories model, an adapter's place, and the first rows of GSM8K laid out as on the hub."""
    gsm8k = tmp_path / "hub" / "gsm8k"
    for split, count in (("train", 40), ("test", 12)):
        with (data_dir / "gsm8k" / f"{split}.jsonl").open() as lines:
            rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
        file = gsm8k / "main" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
    (gsm8k / "README.md").write_text(GSM8K_CARD)
    model = tmp_path / "hub" / "model"
    shutil.copytree(data_dir / "model-stories260K" / "hf", model)
    repositories = {"models/someone/stories260K": model, "datasets/openai/gsm8k": gsm8k}
    served = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub: Hub, tmp_path: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose hub is ours: the address is read when the client is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_"))}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        env.pop(name, None), env.pop(name.upper(), None)
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280
    )


TRAIN = [
    "-m", "bandit_rft", "train", "--model_name_or_path=someone/stories260K", "--task=gsm8k", "--output_dir=run",
    "--batch_size=8", "--max_prompt_length=256", "--max_completion_length=8", "--eval_steps=0", "--save_steps=1",
    "--objective.kl=k3", "--objective.kl_coef=0.001", "--evaluation.splits=[test]", "--device=cpu",
]  # fmt: skip


def test_training_by_hub_names_and_continuing_without_a_hub(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, tmp_path, *TRAIN, "--max_rounds=1")
    assert result.returncode == 0, result.stderr
    asked = "\n".join(hub.requests)
    assert "GET /datasets/openai/gsm8k/resolve" in asked and "GET /someone/stories260K/resolve" in asked
    assert "4 of 40 prompts are longer" in result.stderr and "2 of 12 prompts are longer" in result.stderr
    examples = pq.read_table(tmp_path / "run" / "evaluations" / "round-000000-test.parquet").to_pylist()
    assert len(examples) >= 10 and any("Janet" in row["prompt"] and row["answer"] == "18" for row in examples)

    hub.requests.clear()
    result = run(hub, tmp_path, *TRAIN, "--max_rounds=2", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2] and hub.requests == []


ADAPTER = """
import json, sys, torch
from bandit_rft.model.lora import base_policy
from bandit_rft.model import Policy
policy = Policy.load("someone/adapter")
ids = torch.arange(3, 40)
with torch.no_grad():
    sums = [p.hidden_states(ids, [20, 17]).double().sum().item() for p in (policy, base_policy(policy))]
policy.save("saved")
base = json.load(open("saved/adapter_config.json"))["base_model_name_or_path"]
print(json.dumps([sums, base, len(policy.parameters()), policy.tokenizer.encode("Once upon")]))
"""


def test_an_adapter_by_hub_name_comes_with_its_base_model(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    local = add_adapter(Policy.load(str(hub.repositories["models/someone/stories260K"])), rank=4)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.normal_(0, 0.1)
    folder = hub.repositories["models/someone/adapter"] = tmp_path / "hub" / "adapter"
    local.model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/stories260K"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(b"a pickle that nobody may fetch")

    result = run(hub, tmp_path, "-c", ADAPTER)
    assert result.returncode == 0, result.stderr
    sums, base, parameters, ids = json.loads(result.stdout.splitlines()[-1])
    with torch.no_grad():
        states = [p.hidden_states(torch.arange(3, 40), [20, 17]) for p in (local, base_policy(local))]
    assert sums == pytest.approx([float(h.double().sum()) for h in states], abs=1e-2)
    assert abs(sums[0] - sums[1]) > 1
    assert base == "someone/stories260K" and parameters == len(local.parameters())
    assert local.tokenizer is not None and ids == local.tokenizer.encode("Once upon")
    assert not [request for request in hub.requests if ".bin" in request]


UNKNOWN = """
import json, sys
import bandit_rft.cli
from bandit_rft.model import Policy
from bandit_rft.tasks import load_task
out, options = {}, {"config": "main", "test_size": 0}
task = load_task("dataset", data_path="openai/gsm8k", seed=0, options=options, reward=["exact_match"])
out["sizes"] = {name: len(examples) for name, examples in task.splits.items()}
out["columns"] = sorted(task.splits["train"][0].columns)
for name, call in {
    "dataset": lambda: load_task("dataset", data_path="someone/nothing", seed=0, reward=["gsm8k"]),
    "config": lambda: load_task(
        "dataset", data_path="openai/gsm8k", seed=0, options={"config": "absent"}, reward=["gsm8k"]
    ),
    "model": lambda: Policy.load("someone/nothing"),
    "revision": lambda: Policy.load("someone/stories260K", revision="v9"),
}.items():
    try:
        call()
    except Exception as error:
        out[name] = [type(error).__name__, str(error)]
arguments = [argument.replace("stories260K", "nothing") for argument in sys.argv[1:]]
out["command"] = bandit_rft.cli.main(arguments)
print(json.dumps(out))
"""


def test_names_and_revisions_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, tmp_path, "-c", UNKNOWN, *TRAIN[2:], "--max_rounds=1")
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout.splitlines()[-1])
    assert out["sizes"] == {"train": 40, "test": 12} and out["columns"] == ["answer"]
    for name, kind, words in [
        ("dataset", "ValueError", "data_path: the dataset 'someone/nothing' could not be loaded"),
        ("config", "ValueError", "data_path: the dataset 'openai/gsm8k' could not be loaded"),
        ("model", "OSError", "someone/nothing is not a local folder"),
        ("revision", "OSError", "v9 is not a valid git identifier"),
    ]:
        assert out[name][0] == kind and words in out[name][1]
    assert out["command"] != 0 and "Traceback" not in result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("bandit-rft: ")]
    assert said.startswith("bandit-rft: model_name_or_path='someone/nothing' could not be loaded")
    assert "someone/nothing is not a local folder" in said
