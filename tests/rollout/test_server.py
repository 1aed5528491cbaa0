"""Rollouts from a server: those of the pushed policy, whatever goes wrong, or a clear stop."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import SPOIL, FakeVllm
from tiny_models import character_tokenizer, save_tiny_llama, tiny_llama

from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutError, Sampling, ServerEngine, sequence_ids
from bandit_rft.rollout.client import GarbledError, RefusedError, Request, ServerError, VllmClient, read_answer
from bandit_rft.rollout.process import ServerProcess
from bandit_rft.rollout.push import MARKER, FolderPush
from bandit_rft.update import score_rollouts

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
IDS = sequence_ids(0, 1, list(range(8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "start")


@pytest.fixture
def server(folder: Path) -> Iterator[FakeVllm]:
    server = FakeVllm(folder)
    yield server
    server.stop()


@pytest.fixture
def policy() -> Policy:
    """Another model than the server was started with."""
    return Policy(tiny_llama(seed=3), character_tokenizer())


@pytest.fixture
def make(policy: Policy, tmp_path: Path) -> Iterator[Callable[..., ServerEngine]]:
    made = list[ServerEngine]()

    def engine(*servers: FakeVllm, timeout: float = 20.0, **options: Any) -> ServerEngine:
        clients = [VllmClient(server.url, timeout) for server in servers]
        values: dict[str, Any] = {"max_completion_length": 6, "retry_seconds": 20.0, "concurrency": 4, **options}
        made.append(ServerEngine(policy, clients, FolderPush(policy.save, tmp_path / "weights"), **values))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def gap(policy: Policy, batch: Any, temperature: float = 1.0) -> float:
    scored = score_rollouts(policy, batch, temperature=temperature, tokens_per_microbatch=10**6)
    return float((scored - batch.logprobs).abs().max())


def test_draws_are_those_of_the_pushed_policy(make: Any, server: FakeVllm, policy: Policy) -> None:
    engine = make(server, temperature=0.7)
    canaries = engine.push(4, PROMPTS[:2])
    assert canaries is not None and len(canaries) == 2 and gap(policy, canaries, 0.7) < 1e-5
    batch = engine.generate(PROMPTS, IDS, seed=1, sampling=Sampling(temperature=0.7), n=2)
    assert gap(policy, batch, 0.7) < 1e-5 and gap(policy, batch) > 1e-2
    assert batch.weight_version.tolist() == [4] * 8 and batch.query.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.attempt.tolist() == [0, 1] * 4 and batch.prompt_lists()[2] == PROMPTS[1]
    ends = [tokens[-1] in policy.stop_tokens for tokens in batch.token_lists()]
    assert batch.truncated.tolist() == [not end for end in ends] and batch.lengths.max() <= 6
    torch.testing.assert_close(batch.entropy, -batch.logprobs)
    again = engine.generate(PROMPTS[1:], IDS[2:], seed=1, sampling=Sampling(temperature=0.7), n=2)
    assert again.token_lists() == batch.token_lists()[2:], "a draw depends on its seed and id alone"
    other = engine.generate(PROMPTS, IDS, seed=2, sampling=Sampling(temperature=0.7), n=2)
    assert other.token_lists() != batch.token_lists()


def test_greedy_is_the_most_likely_token(make: Any, server: FakeVllm, policy: Policy) -> None:
    engine = make(server)
    engine.push(0)
    (tokens,) = engine.generate(PROMPTS[:1], IDS[:1], seed=0, sampling=Sampling.greedy()).token_lists()
    ids = list(PROMPTS[0])
    for token in tokens:
        assert token == int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    with pytest.raises(ValueError, match="top_k, top_p and min_p must be left out"):
        engine.generate(PROMPTS[:1], IDS[:1], seed=0, sampling=Sampling(top_p=0.9))


def test_tokens_that_must_not_be_drawn_are_not(make: Any, server: FakeVllm, policy: Policy) -> None:
    policy.mask_padding_tokens(range(3, 40))
    engine = make(server)
    engine.push(0)
    batch = engine.generate(PROMPTS, IDS, seed=0, n=2)
    assert not {t for tokens in batch.token_lists() for t in tokens} & set(range(3, 40))
    assert gap(policy, batch) < 1e-4


def test_prompts_are_spread_over_the_servers_and_keep_theirs(make: Any, folder: Path) -> None:
    servers = [FakeVllm(folder) for _ in range(3)]
    engine = make(*servers)
    canaries = engine.push(1, PROMPTS[:1])
    assert canaries.attempt.tolist() == [0, 1, 2], "every server is looked at"
    prompts = [[3 + i, 4] for i in range(30)]
    ids = sequence_ids(0, 1, list(range(30)))
    before = [len(s.seeds) for s in servers]
    engine.generate(prompts, ids, seed=0)
    of_each = [s.seeds[n:] for s, n in zip(servers, before, strict=True)]
    assert all(len(seeds) > 3 for seeds in of_each) and sum(map(len, of_each)) == 30
    engine.generate(prompts, ids, seed=0)
    for one, n, seeds in zip(servers, before, of_each, strict=True):
        assert sorted(one.seeds[n + len(seeds) :]) == sorted(seeds)
        one.stop()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def undisturbed(make: Any, server: FakeVllm) -> list[list[int]]:
    engine = make(server)
    engine.push(1)
    lists: list[list[int]] = engine.generate(PROMPTS, IDS, seed=1, n=2).token_lists()
    return lists


@pytest.mark.parametrize("fault", [*SPOIL, "500", "503", "429", "closes", "not JSON", "no choice"])
def test_a_passing_fault_changes_nothing(make: Any, server: FakeVllm, policy: Policy, fault: str) -> None:
    """Two requests meet it, are sent again, and draw the same."""
    expected = undisturbed(make, server)
    engine = make(server)
    engine.push(1)
    server.faults.extend([fault] * 2)
    batch = engine.generate(PROMPTS, IDS, seed=1, n=2)
    assert batch.token_lists() == expected and gap(policy, batch) < 1e-5
    metrics = engine.metrics()
    assert sum(metrics[f"rollout/{name}"] for name in ("retries", "garbled", "redrawn_stale")) == 2
    assert not any(value for name, value in engine.metrics().items() if name != "seconds/push"), "counted once"


@pytest.mark.parametrize("fault", [*sorted(set(SPOIL) - {"version of another run", "mixed versions"}), "not JSON"])
def test_garbage_without_end_stops(make: Any, server: FakeVllm, fault: str) -> None:
    engine = make(server)
    engine.push(1)
    server.faults.extend([fault] * 100)
    start = time.monotonic()
    with pytest.raises(RolloutError, match="gave up after 6 answers that are none"):
        engine.generate(PROMPTS[:1], IDS[:1], seed=1)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("fault", ["version of another run", "mixed versions"])
def test_other_weights_without_end_stop(make: Any, server: FakeVllm, fault: str) -> None:
    engine = make(server)
    engine.push(1)
    server.faults.extend([fault] * 100)
    with pytest.raises(RolloutError, match=r"goes on drawing with weights (another-3|older and )"):
        engine.generate(PROMPTS[:1], IDS[:1], seed=1)


def test_out_of_memory_without_end_stops_within_the_bound(make: Any, server: FakeVllm) -> None:
    engine = make(server, retry_seconds=2.0)
    engine.push(1)
    server.faults.extend(["500"] * 1000)
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"retry_s=2\): .*500.*CUDA out of memory"):
        engine.generate(PROMPTS, IDS, seed=1, n=2)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("fault", ["hangs", "drips"])
def test_a_slow_answer_is_asked_for_again(make: Any, server: FakeVllm, fault: str) -> None:
    """Within one call's limit, whether nothing comes or a byte now and then."""
    expected = undisturbed(make, server)
    engine = make(server, timeout=1.0)
    engine.push(1)
    server.faults.append(fault)
    start = time.monotonic()
    assert engine.generate(PROMPTS, IDS, seed=1, n=2).token_lists() == expected
    assert 1.0 < time.monotonic() - start < 12


def test_late_ones_are_waited_for(make: Any, server: FakeVllm) -> None:
    expected = undisturbed(make, server)
    server.delay = 0.3
    engine = make(server, concurrency=2)
    engine.push(1)
    assert engine.generate(PROMPTS, IDS, seed=1, n=2).token_lists() == expected
    assert engine.metrics()["rollout/retries"] == 0


def test_a_request_that_is_refused_stops_at_once(make: Any, server: FakeVllm) -> None:
    engine = make(server)
    engine.push(1)
    server.faults.append("400")
    with pytest.raises(RolloutError, match=r"a request was refused: .*400.*docs/scaling.md"):
        engine.generate(PROMPTS[:1], IDS[:1], seed=1)


def test_a_server_restarted_in_mid_round_gets_its_weights_again(
    make: Any, server: FakeVllm, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(make, server)
    engine = make(server)
    engine.push(1)
    server.delay = 0.1

    def restart() -> None:
        time.sleep(0.15)
        server.stop()
        time.sleep(0.5)
        server.start()  # with the weights it was started with, and the version "default"

    thread = threading.Thread(target=restart)
    thread.start()
    with caplog.at_level(logging.WARNING):
        batch = engine.generate(PROMPTS * 4, sequence_ids(0, 1, list(range(32))), seed=1, n=2)
    thread.join()
    assert batch.token_lists()[:8] == expected and gap(policy, batch) < 1e-5
    metrics = engine.metrics()
    assert metrics["rollout/retries"] and metrics["rollout/redrawn_stale"]
    assert sum("are sent again" in r.message for r in caplog.records) == 1, "one of the threads does it"


def test_a_server_that_is_gone_stops_the_run_within_the_bound(make: Any, server: FakeVllm) -> None:
    engine = make(server, retry_seconds=1.5)
    engine.push(1)
    server.stop()
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"gave up after \d s \(rollout.retry_s=1.5\): .*refused"):
        engine.generate(PROMPTS, IDS, seed=1, n=2)
    with pytest.raises(RolloutError, match="gave up after"):
        engine.push(2)
    assert time.monotonic() - start < 20
    server.start()


def test_a_push_that_is_not_taken_stops(make: Any, server: FakeVllm) -> None:
    """It says that it has other weights, whatever it was told."""
    server.deaf = True
    with pytest.raises(RolloutError, match=r"says that it has weights 'default'; '.*-1' were pushed"):
        make(server, retry_seconds=1.0).push(1)
    assert server.paused, "nothing is drawn with weights that nobody knows"


def test_a_server_that_does_not_see_the_folder_is_said_to_have_said_so(
    make: Any, server: FakeVllm, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM answers 500 and dies of it, so what comes last is only that nobody answers."""
    server.blind = True
    with pytest.raises(RolloutError, match=r"refused; before that: .*/collective_rpc answered 500 .*weights/step-1"):
        make(server, retry_seconds=1.5).push(1)
    (warned,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "the weights of round 1 were not taken" in warned and "weights/step-1" in warned
    server.start()


def test_completions_that_the_server_has_no_room_for(make: Any, server: FakeVllm) -> None:
    """vLLM ends a completion at --max-model-len, and calls that the limit that was asked for."""
    engine = make(server)
    engine.push(1)
    server.room = 6
    with pytest.raises(RolloutError, match=r"4 of the prompt and 6 of a completion must fit into .*--max-model-len"):
        engine.generate([PROMPTS[2]], IDS[:4], seed=1, n=4)


@pytest.mark.parametrize("fault", ["stale", "wrong"])
def test_canaries_see_what_versions_do_not(make: Any, server: FakeVllm, policy: Policy, fault: str) -> None:
    engine = make(server)
    setattr(server, fault, True)
    canaries = engine.push(1, PROMPTS)
    assert server.version.endswith("-1") and gap(policy, canaries) > 0.05


def test_closing_ends_what_waits(make: Any, server: FakeVllm) -> None:
    engine = make(server, timeout=25.0)
    engine.push(1)
    server.faults.extend(["hangs"] * 8)
    failed = list[BaseException]()

    def draw() -> None:
        try:
            engine.generate(PROMPTS, IDS, seed=1, n=2)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    time.sleep(0.5)
    start = time.monotonic()
    engine.close()
    thread.join(10)
    assert not thread.is_alive() and time.monotonic() - start < 5 and isinstance(failed[0], RolloutError)


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_a_folder_of_weights_is_whole_and_the_latest_two_stay(policy: Policy, server: FakeVllm, tmp_path: Path) -> None:
    root, client = tmp_path / "weights", VllmClient(server.url, 10.0)
    (root / "step-1.tmp").mkdir(parents=True)
    push = FolderPush(policy.save, root)
    for version in (1, 2, 3):
        push.prepare(version)
        push.send(client, f"run-{version}")
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-3"]
    assert (root / "step-3" / MARKER).exists() and client.version() == "run-3" and not server.paused
    assert server.calls["/reset_prefix_cache"] == 3, "a reload leaves the cached prefixes as they are"


def test_a_failed_write_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        FolderPush(save, tmp_path).prepare(1)
    assert not (tmp_path / "step-1").exists()


def test_adapters_get_a_new_name_each_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("peft")
    from bandit_rft.model.lora import add_adapter
    from bandit_rft.rollout.push import LoraPush

    base = save_tiny_llama(tmp_path / "base")
    policy = add_adapter(Policy.load(str(base), device="cpu"), rank=2, alpha=4.0, targets=["all-linear"], seed=0)
    server = FakeVllm(base)
    push = LoraPush(policy.save, tmp_path / "weights", base)
    engine = ServerEngine(
        policy,
        [VllmClient(server.url, 20.0)],
        push,
        max_completion_length=6,
        retry_seconds=20.0,
    )
    for version in (0, 1, 2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        assert gap(policy, engine.push(version, PROMPTS)) < 1e-4
    assert len(server.adapters) == 2 and {name[-2:] for name in server.adapters} == {"-1", "-2"}
    server.stop()
    server.start()  # it knows no adapter any more
    caplog.clear()
    assert gap(policy, engine.generate(PROMPTS, IDS, seed=1, n=2)) < 1e-4
    assert caplog.text.count("they are sent again") == 1  # by one thread for all that noticed
    engine.close()
    server.stop()


REQUEST = Request([1, 2], 0, 1.0, 3, [2], [0], 45, None)
ANSWER = {
    "choices": [
        {
            "token_ids": [5, 2],
            "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -0.5}]},
            "weight_versions": [{"version": "a", "start": 0, "end": 2}],
        }
    ]
}


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"choices": None}, {"choices": [3]}, {"choices": [{}]}])
def test_answers_that_are_none(value: Any) -> None:
    assert read_answer(ANSWER, REQUEST).tokens == [5, 2]
    with pytest.raises(GarbledError, match="/inference/v1/generate: "):
        read_answer(value, REQUEST)


def test_tokens_that_were_excluded_or_follow_a_stop_are_refused() -> None:
    for request in (REQUEST._replace(excluded=[5]), REQUEST._replace(stop_tokens=[5]), REQUEST._replace(vocabulary=4)):
        with pytest.raises(GarbledError):
            read_answer(ANSWER, request)


def test_a_server_of_the_runs_own_is_told_nothing_of_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """init_process_group in it would expect the run's launcher to serve its store."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    for name in ranks:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKED", "1")
    command = [sys.executable, "-c", "import os; print(*os.environ, sep=chr(10))"]
    process = ServerProcess(command, {"VLLM_SERVER_DEV_MODE": "1"}, tmp_path / "server.log")
    process.start(None)
    deadline = time.monotonic() + 30
    while process.running and time.monotonic() < deadline:
        time.sleep(0.01)
    told = (tmp_path / "server.log").read_text().splitlines()
    assert {"RANKED", "VLLM_SERVER_DEV_MODE"} <= set(told) and not set(told) & set(ranks)


def test_addresses() -> None:
    for url in ("localhost:8000", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="address must be http"):
            VllmClient(url, 1.0)
    with pytest.raises(ServerError, match="not ready within"):
        VllmClient("http://127.0.0.1:9", 1.0).wait_ready(0.2)
    assert issubclass(GarbledError, ServerError) and not issubclass(RefusedError, ServerError)
