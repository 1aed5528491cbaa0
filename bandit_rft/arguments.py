"""The command line's grammar: commands, their flags, and every key of the configuration as `--key value`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

DESCRIPTION = "Reinforcement fine-tuning of language models as batched contextual bandit learning."
EXAMPLES = """
  bandit-rft train --preset demo
  bandit-rft train --preset minimal --task gsm8k --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --seed 1
  bandit-rft train --help      lists every key
  bandit-rft train --preset demo --dry_run    checks what would fail, and says what it amounts to
  bandit-rft eval runs/gsm8k   evaluates the newest checkpoint of a run
  bandit-rft study run studies/tiny.yaml --dry_run
  eval "$(bandit-rft completion bash)"
"""
#: Commands that take keys of the configuration.
WITH_KEYS = ("train", "eval")
SHELLS = ("bash", "zsh", "tcsh")


class UsageError(Exception):
    """A command line that cannot be run; its text is for the user."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours, and that takes no abbreviation of an option for it."""

    missing = ""  # what is said when the positional argument is

    def __init__(self, **options: Any):
        super().__init__(
            **options, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40),
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: "):
            raise UsageError(f"{self.prog} {message.rpartition(' ')[2]}: {self.missing}")
        raise UsageError(re.sub(r"^argument ([^:]*/)?(\S+): ", r"\2 ", message))


class _Once(argparse.Action):
    """Takes one value; the option twice is an error."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if self.dest in namespace:
            raise UsageError(f"--{self.dest} is given twice")
        setattr(namespace, self.dest, values)


def make_parser(keys: bool = True) -> Parser:
    """The whole grammar; without `keys`, which the configuration is imported for, in no time."""
    parser = Parser(prog="bandit-rft", description=DESCRIPTION, epilog=f"examples:{EXAMPLES}")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, help: str, usage: str, into: Any = commands) -> Parser:
        sub: Parser = into.add_parser(name, help=help, description=help, usage=f"bandit-rft {usage}")
        return sub

    def loudness(sub: Parser, more: str) -> None:
        group = sub.add_mutually_exclusive_group()
        group.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
        group.add_argument("-v", "--verbose", action="store_true", help=f"print {more}")

    train = command(
        "train", "train a policy",
        "train [--preset NAME] [--config FILE.yaml] [--KEY VALUE ...] [--dry_run [probe]] [--quiet | -v]",
    )  # fmt: skip
    train.add_argument(
        "--dry_run", metavar="probe", nargs="?", const="", type=_probe,
        help="print the configuration and what it amounts to, and check what would fail; probe: time two rounds, too",
    )  # fmt: skip
    loudness(train, "what the parts decide, the libraries' messages, and where an error comes from")
    evaluate = command(
        "eval", "evaluate a run, a checkpoint with its run's settings, or any model",
        "eval [RUN | CHECKPOINT] [--best] [--config FILE.yaml] [--KEY VALUE ...] [--json] [--allow_code] "
        "[--quiet | -v]",
    )  # fmt: skip
    evaluate.add_argument(
        "target",
        metavar="RUN|CHECKPOINT",
        nargs="?",
        help="a run's folder: its newest checkpoint; or checkpoint-<round>",
    )
    evaluate.add_argument(
        "--best", action="store_true", help="of a run, the checkpoint of highest Pass@1 on test, not the newest"
    )
    evaluate.add_argument("--json", action="store_true", help="print a JSON object a split instead of a table")
    evaluate.add_argument("--allow_code", action="store_true", help="run rewards that the checkpoint's own run names")
    loudness(evaluate, "what the parts decide, the libraries' messages, and where an error comes from")
    for sub in (train, evaluate):
        sub.add_argument("--config", metavar="FILE.yaml", action=_Once, help="keys and values, nested or dotted")
        if keys:
            _add_keys(sub)
    report = command("report", "write the HTML report of a run", "report RUN_FOLDER")
    report.add_argument("folder", metavar="RUN_FOLDER", help="the run's output_dir")
    report.missing = "which run?"
    command("env", "print what a bug report should contain", "env")
    completion = command("completion", "print what makes a shell complete these commands", "completion SHELL")
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=" | ".join(SHELLS))
    completion.missing = f"which shell? {' | '.join(SHELLS)}"

    study = command("study", "plan, run, watch or report a study (docs/study.md)", "study ACTION STUDY.yaml ...")
    actions = study.add_subparsers(dest="action", metavar="ACTION", title="actions", prog="bandit-rft study")
    plan = command("plan", "print the cells of a study and their price", "study plan STUDY.yaml", actions)
    plan.add_argument("--dry_run", action="store_true", help="what plan does in any case: nothing is run")
    run = command(
        "run", "run the cells of a study, or continue",
        "study run STUDY.yaml [--output_dir OUT] [--jobs N] [--threads N] [--retry N] [--gpus 0,1,...] [--shard I/N] "
        "[--accept_failed] [--max_seconds S] [--launcher NAME --workers N --launcher_option KEY=VALUE ...] [--dry_run] "
        "[--quiet | -v]",
        actions,
    )  # fmt: skip
    run.add_argument("--jobs", metavar="N", type=_at_least(1), action=_Once, help="cells at a time [one a GPU, or 1]")
    run.add_argument("--threads", metavar="N", type=_at_least(1), action=_Once, help="CPU threads of a cell [1]")
    run.add_argument("--retry", metavar="N", type=_at_least(0), action=_Once, help="further attempts at a cell [0]")
    run.add_argument("--gpus", metavar="0,1,...", type=_names, action=_Once, help="GPUs to deal the cells out to")
    run.add_argument(
        "--shard", metavar="I/N", type=_shard, action=_Once, help="work on the I-th of N shares of the cells alone"
    )
    run.add_argument(
        "--accept_failed", action="store_true", help="of a study with tune: runs that failed count as 0 in the choice"
    )
    run.add_argument(
        "--max_seconds", metavar="S", type=_positive, action=_Once,
        help="end within S seconds, cells saved; begin none that would not end in time [SLURM's limit, in a job of it]",
    )  # fmt: skip
    run.add_argument(
        "--launcher", choices=("slurm", "ray", "local"), action=_Once,
        help="start workers that run this command: on SLURM, on a Ray cluster, or through submitit on this machine",
    )  # fmt: skip
    run.add_argument("--workers", metavar="N", type=_at_least(1), action=_Once, help="how many of them [1]")
    run.add_argument(
        "--launcher_option", metavar="KEY=VALUE", action="append",
        help="of submitit's SlurmExecutor (time=MINUTES, partition=...) or a Ray task (num_gpus=...); more than once",
    )  # fmt: skip
    run.add_argument(
        "--dry_run", action="store_true",
        help="print the cells and their price, or with --launcher slurm the sbatch script; run nothing",
    )  # fmt: skip
    loudness(run, "a line as a cell starts, and where an error comes from")
    status = command("status", "print how far a study is", "study status STUDY.yaml [--output_dir OUT]", actions)
    of = command("report", "analyse what a study has so far", "study report STUDY.yaml [--output_dir OUT]", actions)
    for sub in (plan, run, status, of):
        folder = sub in (status, of)
        sub.add_argument("study", metavar="STUDY.yaml", help="a study file" + (" or a study's folder" * folder))
        sub.missing = "which study?"
        if sub is not plan:
            sub.add_argument("--output_dir", metavar="OUT", action=_Once, help="its folder [runs/<name of the file>]")
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """The parsers of a parser's commands, by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, at least one, by name: `command` is which one to run, `overrides` the keys given, all as texts.

    Raises:
        UsageError: with what is wrong and what would do.
        SystemExit: after `--help` was printed.
    """
    rest = list(arguments)
    if rest[0] == "help":  # help study run: study run --help
        rest = [*rest[1:], "--help"]
    parser = make_parser(keys=rest[0] in WITH_KEYS)
    leaf, words = parser, list[str]()
    while (known := subcommands(leaf)) and rest and rest[0] not in ("-h", "--help"):
        if rest[0] not in known:
            from bandit_rft.options import nearest

            name = "command" if leaf is parser else f"action of {' '.join(words)}"
            hint = nearest(rest[0], known) or f"; known: {', '.join(known)}"
            raise UsageError(f"unknown {name} {rest[0]!r}{hint}; try bandit-rft {' '.join([*words, '--help'])}")
        words.append(rest.pop(0))
        leaf = known[words[-1]]
    if subcommands(leaf) and not rest:
        raise UsageError(f"bandit-rft {' '.join(words)} {' | '.join(known)}: expected one of these; try --help")
    values, unexpected = parser.parse_known_args(words + _in_order(leaf, rest))
    if unexpected:
        hint = "; keys are written --key value" if words[0] in WITH_KEYS else ""
        if hint and "=" in unexpected[0]:  # as Hydra takes them
            from bandit_rft.peer_names import answer_to_name

            answer = answer_to_name(unexpected[0].lstrip("+").partition("=")[0])
            hint += "" if answer is None else f": {answer[1]}"
        raise UsageError(f"unexpected argument {unexpected[0]!r}{hint}")
    own = {action.dest for action in leaf._actions if not isinstance(action, _Key)}
    values.overrides = {k: v for k, v in vars(values).items() if k not in own | {"command", "action"}}
    return values


class _Key(_Once):
    """A key of the configuration."""


def _add_keys(parser: Parser) -> None:
    from bandit_rft.config import Config, keys
    from bandit_rft.options import fields_of

    groups = {"": parser.add_argument_group("keys", "in a YAML file or as --key value; default in brackets")}
    for name, field in fields_of(Config).items():
        if fields_of(field.annotation):
            groups[name] = parser.add_argument_group(name, (field.annotation.__doc__ or "").splitlines()[0])
    for key in keys().values():
        shown = "" if key.default in (None, "", [], {}) else f" [{key.default}]".replace("True", "true")
        text = (key.help + shown.replace("False", "false")).replace("%", "%%")
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if key.switch else {}
        section = key.name.rpartition(".")[0]
        metavar = {int: "N", float: "X", bool: "true|false"}.get(key.kind, "VALUE")
        groups[section].add_argument(f"--{key.name}", action=_Key, metavar=metavar, help=text, **switch)


def _in_order(parser: Parser, arguments: Iterable[str]) -> list[str]:
    """Positional arguments first, then options as `--name=value`, dashes in names as underscores.

    argparse would otherwise take -1e-3 for an option, and an argument behind an option for none. Options of a task or
    an advantage, which nobody can list, are added to the parser as they come.
    """
    options = {option: action for action in parser._actions for option in action.option_strings}
    with_keys = any(isinstance(action, _Key) for action in parser._actions)
    positional, ordered, rest = list[str](), list[str](), list(arguments)
    while rest:
        item = rest.pop(0)
        if item in ("-h", "--help"):
            return ["--help"]
        item = "--verbose" if item == "-v" else item
        if not item.startswith("--"):
            positional.append(item)
            continue
        name, has_value, value = item.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name not in options:
            if with_keys:
                from bandit_rft.config import FREE, unknown_key

                if not name[2:].startswith(tuple(f"{key}." for key in FREE)):
                    raise UsageError(unknown_key(name[2:]))
                options[name] = parser.add_argument(name, action=_Key)
            else:
                from bandit_rft.options import nearest

                raise UsageError(f"unknown option {item!r}{nearest(name, options)}")
        if not has_value and options[name].nargs != 0:
            if rest and not rest[0].startswith("--"):
                has_value, value = "=", rest.pop(0)
            elif options[name].nargs != "?":
                raise UsageError(f"{name} needs a value")
        ordered.append(name + has_value + value)
    return positional + ordered


def _probe(text: str) -> str:
    if text not in ("", "probe"):
        raise argparse.ArgumentTypeError(f"ignored explicit argument {text!r}: it stands alone, or takes probe")
    return text


def _at_least(least: int) -> Any:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}; got {text!r}")
        return int(text)

    return read


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0; got {text!r}")
    return number


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N; got {text!r}")
    return int(found[1]), int(found[2])


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
