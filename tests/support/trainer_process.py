"""A process that has imported everything once and forks a trainer for every line it reads: trainers that may be killed.

stdin: one JSON configuration a line ({} of overrides); stdout: the child's process id, then, when it has ended, its
exit status as os.waitpid gives it. A child that fails prints its error to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

import torch
from tiny_models import sums
from tiny_rewards import starts_with_vowel

from bandit_rft import checkpoint, evaluate, model, rollout, trainer  # noqa: F401  (loaded before the fork)
from bandit_rft.config import build_config
from bandit_rft.tasks import Task


def train(overrides: dict[str, object]) -> None:
    limit = overrides.pop("file_size_limit", None)
    if limit is not None:  # as a full disk does: writing fails in the middle of a file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(str(limit)), resource.RLIM_INFINITY))
    task = sums()
    trainer.Trainer(build_config(overrides), task=Task(task.name, task.splits, [starts_with_vowel])).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                train(json.loads(line))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
