"""docs/performance.md, made of what was measured: no number in it is typed.

    python benchmarks/performance.py            write the page and the curves           (make performance)
    python benchmarks/performance.py --check    exit status 1 if the page is another

The text is benchmarks/performance.md.j2; the numbers are those of benchmarks/results/cpu.json (a run of `make bench`),
instructions.json, and the predictions of gpu_measurements/machine.py. What a case did not reach is said by the rows
themselves: a bar is met or missed by its median. A section whose case was not measured says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import instructions
from comparison import record
from comparison.record import OURS
from gpu_measurements import record as gpu_record
from gpu_measurements.record import DONE
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
RUN, PAGE, FIGURES = RESULTS / "cpu.json", ROOT / "docs" / "performance.md", ROOT / "docs" / "figures"


def significant(value: float, digits: int = 3) -> str:
    """For people: so many significant digits, thousands separated, no exponent."""
    if not value:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - int(f"{rounded:e}".split("e")[1]))
    return f"{rounded:,.{decimals}f}"


def duration(seconds: float) -> str:
    """Seconds, milliseconds or microseconds."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds * 1e6)} us"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


class Page:
    """What the template asks for: cases of a group, and the rows of their tables."""

    def __init__(self, data: dict[str, Any], counts: dict[str, Any] | None) -> None:
        self.data, self.counts = data, counts
        self.cases: dict[str, dict[str, Any]] = data["cases"]

    def group(self, name: str) -> dict[str, dict[str, Any]]:
        """{name: case}, in the order of measuring."""
        return {title: case for title, case in self.cases.items() if case["group"] == name}

    def sides(self, case: dict[str, Any]) -> list[list[str]]:
        """A row a side: name, time, ours / it, error, peak; then those that are missing."""
        rows = []
        order = {"ours": 0, "peer": 1, "reference": 2, "limit": 3}
        for name, side in sorted(case["sides"].items(), key=lambda item: order[item[1]["role"]]):
            seconds = side.get("seconds")
            time = duration(record.spread(seconds).median) if seconds else ""
            timed = bool(seconds) and bool(case["sides"].get(OURS, {}).get("seconds"))
            over = self.ratio(record.ratio(case, OURS, name)) if timed and name != OURS else ""
            peak = f"{side['peak_mib']:,.0f}" if "peak_mib" in side else ""
            rows.append([f"**{name}**" if name == OURS else name, time, over, scientific(side.get("error")), peak])
        return rows + [[name, f"missing: {why}", "", "", ""] for name, why in case.get("missing", {}).items()]

    @staticmethod
    def ratio(value: record.Spread) -> str:
        """Median and quartiles."""
        return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"

    def bars(self, *groups: str) -> list[list[str]]:
        """A row a bar: case, against what, the ratio, the bar, whether it is met."""
        rows = []
        for group in groups:
            for title, case in self.group(group).items():
                for bar in case.get("bars", []):
                    under = self._under(case, bar)
                    if under is None:
                        among = ", ".join(bar.get("among", [])) or bar["under"]
                        rows.append([title, among, "not measured", f"{bar['at_most']:.2f}", ""])
                        continue
                    found = record.ratio(case, bar["over"], under)
                    verdict = "met" if found.median <= bar["at_most"] else "**missed**"
                    rows.append([title, under, self.ratio(found), f"{bar['at_most']:.2f}", verdict])
        return rows

    def _under(self, case: dict[str, Any], bar: dict[str, Any]) -> str | None:
        if bar["under"] == "fastest peer":
            return record.fastest(case, bar.get("among"))
        return bar["under"] if case["sides"].get(bar["under"], {}).get("seconds") else None

    def fractions(self, *groups: str) -> list[list[str]]:
        """A row a case that has a limit: case, limit, its time, ours, the fraction of it that is reached."""
        rows = []
        for group in groups:
            for title, case in self.group(group).items():
                name = record.limit(case)
                if name is None or not case["sides"].get(OURS, {}).get("seconds"):
                    continue
                zero = case.get("zero", 0.0)
                middle = [statistics.median(case["sides"][side]["seconds"]) for side in (name, OURS)]
                share = 1 / record.ratio(case, OURS, name).median
                if zero:  # the products of the rows that count are all there is to do
                    share *= 1 - zero
                    middle[0] *= 1 - zero
                    name = f"{name}, of the rows that count"
                rows.append([title, name, duration(middle[0]), duration(middle[1]), f"{share:.2f}"])
        return rows + self._of_rates(groups)

    def _of_rates(self, groups: Sequence[str]) -> list[list[str]]:
        """Rounds and decoding: beside what multiply-adds take at this machine's rate, or reading the weights took."""
        rows = []
        for group in groups:
            for title, case in self.group(group).items():
                if (limit := self._least(case)) is not None:
                    which, least = limit
                    ours = statistics.median(case["sides"][OURS]["seconds"])
                    rows.append([title, which, duration(least), duration(ours), f"{least / ours:.2f}"])
        return rows

    def _least(self, case: dict[str, Any]) -> tuple[str, float] | None:
        """What limits a case whose operations and bytes are known, and the seconds it takes at least."""
        product = self.limit_of("float32 multiply-adds", "GFLOP a second")
        if "flop" not in case or product is None:
            return None
        of_product, reading = case["flop"] / product / 1e9, case["sides"].get(record.READING)
        of_reading = statistics.median(reading["seconds"]) if reading else 0.0
        return (record.READING, of_reading) if of_reading > of_product else ("multiply-adds", of_product)

    def asked(self, *groups: str) -> list[list[str]]:
        """A row for each bar that is missed and has a limit: the seconds it asks for, the limit, their quotient."""
        rows = []
        for group in groups:
            for title, case in self.group(group).items():
                for bar in case.get("bars", []):
                    most, under, limit = bar["at_most"], self._under(case, bar), self._least(case)
                    if under is None or limit is None or record.ratio(case, bar["over"], under).median <= most:
                        continue
                    seconds = most * statistics.median(case["sides"][under]["seconds"])
                    share = f"{limit[1] / seconds:.2f}"
                    rows.append([title, under, duration(seconds), limit[0], duration(limit[1]), share])
        return rows

    def a_logit(self, kernel: str) -> str:
        """Instructions a logit of a kernel on rows of logits."""
        assert self.counts is not None
        return f"{instructions.a_token(self.counts['kernels'][kernel]) / 4096:.0f}"

    def limit_of(self, name: str, figure: str) -> float | None:
        """A measured limit of the machine."""
        case = self.group("limits").get(name)
        return None if case is None else float(case["sides"]["torch"]["figures"][figure])

    def waits(self) -> list[list[str]]:
        """A row a `thread_wait`: the seconds of a round of every case."""
        rows: dict[str, list[str]] = {}
        for case in self.group("thread wait").values():
            for policy, side in case["sides"].items():
                middle, low, high = (significant(seconds) for seconds in record.spread(side["seconds"]))
                rows.setdefault(policy, [policy]).append(f"{middle} ({low}-{high})")
        return list(rows.values())

    def limits(self) -> list[list[str]]:
        """A row a limit."""
        rows = []
        for title, case in self.group("limits").items():
            ((figure, value),) = case["sides"]["torch"]["figures"].items()
            low, high = (record.spread(case["sides"]["torch"]["seconds"])[i] for i in (1, 2))
            middle = record.spread(case["sides"]["torch"]["seconds"]).median
            rows.append([title, f"{significant(value)} ({significant(value * middle / high)}-"
                                f"{significant(value * middle / low)})", figure])  # fmt: skip
        return rows

    def beside(self, group: str) -> list[list[str]]:
        """A row a side of every case: case, then as `sides` has it."""
        return [[title, *row] for title, case in self.group(group).items() for row in self.sides(case)]

    def versus(self, *groups: str) -> list[list[str]]:
        """A row a case of two sides: case, against, the ratio."""
        rows = []
        for group in groups:
            for title, case in self.group(group).items():
                for name, side in case["sides"].items():
                    if name != OURS and side.get("seconds"):
                        rows.append([title, name, self.ratio(record.ratio(case, OURS, name))])
        return rows

    def phases(self, case: dict[str, Any]) -> list[list[str]]:
        """A row a side: rollout, reward, update, what is left, the whole."""
        rows = []
        for name, side in case["sides"].items():
            whole, phases = statistics.median(side["seconds"]), side["phases"]
            named = [phases.get(phase) for phase in ("rollout", "reward", "update")]
            cells = ["" if value is None else duration(value) for value in named]
            over = self.ratio(record.ratio(case, OURS, name)) if side["role"] == "peer" else ""
            rows.append([f"**{name}**" if name == OURS else name, *cells, duration(whole), over])
        return rows

    def profile(self) -> list[list[str]]:
        """A row a kind of work: its milliseconds of a round, and their share."""
        return [
            [kind, f"{ms:.1f} ms", f"{ms / sum(found.values()):.2f}"]
            for case in self.group("profile").values()
            for found in [case["sides"][OURS]["figures"]]
            for kind, ms in found.items()
        ]

    def distances(self) -> list[list[str]]:
        """A row a model: how far its policy is from that of its weights in bfloat16."""
        return [
            [title, *(significant(value, 2) for value in case["sides"][OURS]["figures"].values())]
            for title, case in self.group("bfloat16 distance").items()
        ]

    def left_of_a_round(self) -> dict[str, str]:
        """Where a bar of the round is missed: the seconds it asks for, and what products and rollouts leave of them."""
        for case in self.group("round").values():
            products, ours = case["sides"].get(record.UPDATE_PRODUCTS), case["sides"][OURS]
            for bar in case.get("bars", []):
                under = self._under(case, bar)
                if not products or not under or record.ratio(case, bar["over"], under).median <= bar["at_most"]:
                    continue
                asked, fixed = bar["at_most"] * _median(case, under), _median(case, record.UPDATE_PRODUCTS)
                rollout, rate = ours["phases"]["rollout"], self.limit_of("float32 multiply-adds", "GFLOP a second")
                drawn = case["flop"] / 4 / rate / 1e9 if rate else 0.0  # learning takes three times as many
                seconds = {
                    "asked": asked, "products": fixed, "drawn": drawn, "rollout": rollout,
                    "left": max(0.0, asked - fixed - rollout), "rest": _median(case, OURS) - fixed - rollout,
                }  # fmt: skip
                share = significant((fixed + drawn) / asked, 2)
                return {"under": under, "share": share} | {name: duration(value) for name, value in seconds.items()}
        return {}

    def decoding(self, model: str) -> tuple[list[str], list[list[str]]]:
        """(sides, a row a number of sequences: tokens a second of each)."""
        cases = [case for case in self.group("decoding").values() if case["model"] == model]
        names = [n for n in dict.fromkeys(name for case in cases for name in case["sides"]) if n != record.READING]
        rows = []
        for case in cases:
            speeds = [case["sides"].get(name, {}).get("figures", {}).get("tokens a second") for name in names]
            rows.append([str(case["shape"][0]), *("" if one is None else significant(one) for one in speeds)])
        return names, rows

    def decoders(self) -> list[str]:
        """What the other sides are, by version, and which of them draw other greedy tokens than ours does."""
        versions, differ = dict[str, str](), dict[str, None]()
        for case in self.group("decoding").values():
            for name, side in case["sides"].items():
                if name != OURS and "version" in side:
                    versions[name] = f"{name} {side['version']}"
                if not side.get("figures", {}).get("same greedy tokens", True):
                    differ[name] = None
        told = [f"Measured: {', '.join(versions.values())}."] if versions else []
        if differ:
            return [
                *told,
                f"Other greedy tokens than ours: {', '.join(differ)}. Their figures are of another computation.",
            ]
        return ["All sides draw the same greedy tokens, so it is the same model that they run.", *told]

    def missing(self, *groups: str) -> dict[str, str]:
        """Peers that no case of these groups has, and why."""
        found: dict[str, str] = {}
        for group in groups:
            for case in self.group(group).values():
                found.update(case.get("missing", {}))
        return found

    def figure(self, case: str, name: str, side: str = OURS) -> str:
        """One number of one case."""
        return significant(float(self.cases[case]["sides"][side]["figures"][name]))

    def seconds(self, case: str, side: str = OURS) -> str:
        """The median time of one side of one case."""
        return duration(statistics.median(self.cases[case]["sides"][side]["seconds"]))

    def demo(self) -> list[list[str]]:
        """A row a seed."""
        rows = []
        for case in self.group("demo").values():
            side = case["sides"][OURS]
            shown = [
                f"{side['figures'][name][0]:.3f} -> {side['figures'][name][1]:.3f}" if name in side["figures"] else ""
                for name in ("test/pass@1", "train/pass@1", "test/greedy", "longer/pass@1")
            ]
            times = side["seconds"][0], side["figures"]["cpu seconds"]
            rows.append([str(case["seed"]), *shown, *(f"{value:.0f} s" for value in times)])
        return rows

    def curves(self) -> dict[str, str]:
        """{curve: its picture, from the page}."""
        from comparison import curves

        return {name: f"figures/{curves.file_of(name)}" for name in curves.curves_of(self.data)}

    def counted(self) -> list[list[str]]:
        """A row a kernel: instructions a token."""
        if self.counts is None:
            return []
        return [[name, f"{instructions.a_token(one):,.0f}"] for name, one in self.counts["kernels"].items()]


def _median(case: dict[str, Any], side: str) -> float:
    return statistics.median(case["sides"][side]["seconds"])


def table(rows: Sequence[Sequence[str]], *header: str) -> str:
    """Markdown; a table without rows says so."""
    if not rows:
        return "Not measured yet."
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def gpu_tables() -> str:
    """Every GPU's newest `make gpu-check`, and what only an older one of the same GPU has; "" where it never ran."""
    newest_first = sorted(RESULTS.glob("nvidia-*.json"), key=lambda path: path.stem[-10:], reverse=True)
    by_device: dict[str, list[dict[str, Any]]] = {}
    for path in newest_first:
        data = json.loads(path.read_text(encoding="utf-8"))
        by_device.setdefault(data["machine"]["device"], []).append(data)
    shown = []
    for device in sorted(by_device, reverse=True):
        seen: set[str] = set()
        done = {n for data in by_device[device] for n, one in data["measurements"].items() if one["status"] == DONE}
        for data in by_device[device]:
            shown += gpu_parts(data, seen, done)
    return "\n\n".join(shown)


def gpu_parts(data: dict[str, Any], seen: set[str], done: set[str]) -> list[str]:
    """The tables of one run, without results that were `seen` (which grows), and what has no result in any run."""
    kept = {}
    for name, one in data["measurements"].items():
        results = [result for result in one["results"] if gpu_key(result) not in seen]
        kept[name] = {**one, "results": results}
    again = bool(seen)
    seen |= {gpu_key(result) for one in data["measurements"].values() for result in one["results"]}
    title, versions, *rest = gpu_record.markdown({**data, "measurements": kept}).strip().split("\n\n")
    parts = [part for part in rest if not part.startswith("| measurement") and part.count("\n") != 1]
    parts = [part for part in parts if part.startswith("|") or not again]
    ends = [f"{name}: {one['status']}" for name, one in data["measurements"].items() if name not in done]
    parts += [f"Without a result: {'; '.join(ends)}."] if ends else []
    said = f"**{title.removeprefix('# ')}**" + (", what was not measured since" if again else "")
    return [said, versions, *parts]


def gpu_key(result: dict[str, Any]) -> str:
    """What a result is of: the same of two runs."""
    return " ".join(str(result.get(key, "")) for key in ("case", "shape", "against", "gradient", "dtype")) + " ".join(
        [*result.get("limits", {}), *result.get("round", {})]
    )


def render(run: Path = RUN) -> str:
    """The page."""
    data = record.load(run)
    counts = json.loads(instructions.COMMITTED.read_text()) if instructions.COMMITTED.exists() else None
    environment = Environment(
        loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    template = environment.get_template("performance.md.j2")
    page = Page(data, counts)
    return template.render(
        page=page, machine=data["machine"], table=table, gpu_tables=gpu_tables(), counts=counts,
        duration=duration, significant=significant,
        dates=sorted({case["date"] for case in data["cases"].values()}),
        commits=sorted({case["commit"] for case in data["cases"].values()}),
        peaks=sorted({case["peaks_commit"] for case in data["cases"].values() if "peaks_commit" in case}),
        loads=sorted(
            case["load"] for case in data["cases"].values()
            if case.get("load") is not None and case["group"] != "thread wait"  # which is busy on purpose
        ),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    text = render()
    if given.check:
        same = PAGE.read_text(encoding="utf-8") == text
        print("docs/performance.md is what the results make" if same else "docs/performance.md is not up to date")
        return 0 if same else 1
    from comparison import curves

    PAGE.write_text(text, encoding="utf-8")
    for path in curves.draw_all(record.load(RUN), FIGURES):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
