"""The JSON of one machine, written whole after every result, and the Markdown made of it."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from . import machine

SCHEMA = 2
DONE, FAILED, CRASHED, TIMED_OUT, SKIPPED = "done", "failed", "crashed", "timed out", "skipped"


def record_path(folder: Path, device: str, day: str) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{day}.json"


class Record:
    """{"machine": ..., "limits": ..., "measurements": {name: {"status", "text", "seconds", "results"}}}."""

    def __init__(self, folder: Path, about: dict[str, Any], resumed: Path | None = None):
        today = datetime.date.today().isoformat()
        self.data: dict[str, Any] = {"schema": SCHEMA, "date": today, "machine": about, "measurements": {}}
        folder.mkdir(parents=True, exist_ok=True)
        self.path = record_path(folder, about["device"], today)
        if resumed is not None:
            earlier = json.loads(resumed.read_text())
            if earlier.get("schema") != SCHEMA or earlier["machine"]["device"] != about["device"]:
                raise ValueError(f"--resume: {resumed} is of another format or device than this {about['device']}")
            if (was := earlier["machine"].get("commit")) != about.get("commit"):
                raise ValueError(
                    f"--resume: {resumed} is of commit {was}, and this is {about.get('commit')}: measure anew, into "
                    "another folder (OUT=) to keep both"
                )
            self.data = {**earlier, "machine": about}
            self.path = folder / resumed.name
        self.write()

    @property
    def limits(self) -> dict[str, float]:
        return {
            name: value
            for one in self.data["measurements"].values()
            for result in one["results"]
            for name, value in result.get("limits", {}).items()
        }

    def is_done(self, name: str) -> bool:
        return bool(self.data["measurements"].get(name, {}).get("status") == DONE)

    def begin(self, name: str, section: str) -> None:
        """From here until `end` the measurement counts as crashed: so it stands if this very process dies."""
        text = "this process ended before the measurement did"
        self.data["measurements"][name] = {
            "section": section, "status": CRASHED, "text": text, "seconds": 0.0, "results": []
        }  # fmt: skip
        self.write()

    def add(self, name: str, result: dict[str, Any]) -> None:
        model = machine.machine_of(self.data["machine"]["device"], self.limits)
        if model is not None and result.get("predict") is not None:
            function, *arguments = result["predict"]
            result["predicted"] = getattr(machine, function)(model, *arguments)
        result.pop("predict", None)
        self.data["measurements"][name]["results"].append(result)
        self.write()

    def end(self, name: str, status: str, text: str, seconds: float) -> None:
        self.data["measurements"][name].update(status=status, text=text, seconds=round(seconds, 2))
        self.write()

    def write(self) -> None:
        for path, text in (
            (self.path, json.dumps(self.data, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(self.data)),
        ):
            temporary = path.with_name(path.name + ".new")
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)


def met(result: dict[str, Any]) -> bool | None:
    if result.get("bar") is None or result.get("ratio") is None:
        return None
    return bool(result["ratio"] >= result["bar"] if result.get("at_least") else result["ratio"] <= result["bar"])


def markdown(data: dict[str, Any]) -> str:
    about = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    at = f" Commit {about['commit']}." if "commit" in about else ""
    lines = [f"# {about['device']}, {data['date']}", "", f"dtype {about['dtype']}. Versions: {versions}.{at}", ""]
    measurements = data["measurements"]
    results = [result for one in measurements.values() for result in one["results"]]
    lines += ["| limit | measured |", "|---|---|"]
    lines += [f"| {k} | {v:,.1f} |" for r in results for k, v in r.get("limits", {}).items()]
    lines += ["", "Ratios are measured; `predicted` is what a model of the machine expects, no measurement.", ""]
    lines += ["| case | shape | against | ours ms | host ms | other ms | predicted | measured | bar | |"]
    lines += ["|---" * 10 + "|"]
    for r in results:
        if "case" not in r:
            continue
        start = f"| {r['case']} | {r['shape']} | {r['against']} | "
        if "missing" in r:
            lines.append(start + f"| | | | missing: {_cell(r['missing'])} | | |")
            continue
        sign = "" if r.get("bar") is None else (">= " if r.get("at_least") else "<= ") + f"{r['bar']:.2f}"
        verdict = {None: "", True: "met", False: "MISSED"}[met(r)]
        host = f"{r['host_ms']:.3f}" if "host_ms" in r else ""
        predicted = f"{r['predicted']:.2f}" if "predicted" in r else ""
        lines.append(
            start + f"{r['ours_ms']:.3f} | {host} | {r['other_ms']:.3f} | {predicted} | {r['ratio']:.3f} "
            f"| {sign} | {verdict} |"
        )
    lines += ["", "| gradient | dtype | relative error | plain PyTorch's | |", "|---|---|---|---|---|"]
    for r in results:
        if "gradient" in r:
            verdict = "met" if r["met"] else "MISSED"
            lines.append(f"| {r['gradient']} | {r['dtype']} | {r['ours']:.2e} | {r['plain']:.2e} | {verdict} |")
    lines += ["", "| phase of a training round | median seconds |", "|---|---|"]
    lines += [f"| {phase} | {seconds:.4f} |" for r in results for phase, seconds in r.get("round", {}).items()]
    lines += ["", "| measurement | status | seconds | |", "|---|---|---|---|"]
    for name, one in measurements.items():
        lines.append(f"| {name} | {one['status']} | {one['seconds']:.1f} | {_cell(one['text'])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[-300:]
