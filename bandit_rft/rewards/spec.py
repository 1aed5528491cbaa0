"""Reward functions: where they live, how they are called, and what counts as a score.

The ecosystem's convention is `reward(prompts, completions, **columns) -> list[float | None]`, sync or async: columns
are lists with one entry a completion, None means not scored. Functions written for one completion at a time, for verl
and for OpenRLHF are called through the same class.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from bandit_rft.text import LIMIT, printable, shown_error

Kind = Literal["batch", "sample", "verl", "openrlhf"]
Entry = float | None | str  # the score of one completion, None where not scored, or a text that says what went wrong

#: What a configuration calls a function that a program gave begins so: "session:sample:right_answer".
SESSION = "session:"
OUT_OF_MEMORY = 77  # the exit status by which a worker process says so
_DEFAULT_NAMES: dict[str, str] = {"verl": "compute_score", "openrlhf": "reward_func"}
_VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


class RewardError(RuntimeError):
    """A reward function could not be loaded, or failed on a completion; the message names it and what happened."""


@dataclass(frozen=True)
class RewardFunction:
    """A function to score completions with, named so that a worker process can import it.

    Attributes:
        target: "package.module:function" or "path/to/file.py:function".
        kind: how it is called; any of them may be async, and only the columns in its signature are passed, all of them
            if it takes **columns.
            "batch": f(prompts=, completions=, **columns) -> one score a completion; the ecosystem's convention.
            "sample": f(completion, **columns) -> the score of one completion, a text; `prompt` is there by name too.
            "verl": f(data_source=, solution_str=, ground_truth=, extra_info=) -> a number, or a dict with "score".
            "openrlhf": f(queries, prompts, labels) -> scores, or a dict with "rewards"; a query is prompt + completion.
        options: keyword arguments added to every call; what JSON can hold.
        timeout_s: seconds a call may take, where the runner's own limit does not fit.
        killed_score: what a completion earns whose call had to be killed, or died, over it (time, memory); None means
            that this is an error. For verifiers that can be driven into a hang by what a model writes.
        reference: a completion that must earn the reward, with {answer} for the right answer; None where there is no
            such form. A task scores the answers of its data in this form when it is loaded, and refuses data that
            cannot earn anything.
        name: what metrics call it; the function's name unless given.
        function: the callable itself, for what cannot be imported by name (a lambda, a closure, a notebook's cell);
            needs isolation="fork" or "none".
    """

    target: str
    kind: Kind = "batch"
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    killed_score: float | None = None
    reference: str | None = None
    name: str = ""
    function: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("batch", *_DEFAULT_NAMES, "sample"):
            raise ValueError(unknown_name("reward kind", self.kind, ["batch", "sample", *_DEFAULT_NAMES]))
        module, _, function = self.target.rpartition(":")
        if not module or not function:
            raise ValueError(f"reward target: expected module:function or file.py:function, got {self.target!r}")
        if not self.name:
            object.__setattr__(self, "name", function.rpartition(".")[2])

    @classmethod
    def parse(cls, spec: str) -> "RewardFunction":
        """Read "file.py:function" or "module:function", maybe after "sample:", "verl:" or "openrlhf:", or a built-in.

        Raises:
            ValueError: for anything else, for a file that is not there, and for an unknown built-in name.
        """
        if spec.startswith(SESSION):
            raise ValueError(f"reward: {given_in_python([spec])}")
        head, colon, rest = spec.partition(":")
        kind: Any = head if colon and head in ("batch", "sample", *_DEFAULT_NAMES) else "batch"
        location = rest if colon and kind == head else spec
        module, colon, function = location.rpartition(":")
        if not colon and kind in _DEFAULT_NAMES:
            module, function = location, _DEFAULT_NAMES[kind]
        elif not colon and not location.endswith(".py"):
            return builtin(location)
        if not module or not function:
            raise ValueError(f"reward: expected file.py:function or module:function, got {spec!r}")
        if module.endswith(".py"):
            path = Path(module).expanduser().resolve()
            if not path.is_file():
                raise ValueError(f"reward: {spec!r} names a file that does not exist: {path}")
            module = str(path)
        return cls(target=f"{module}:{function}", kind=kind)

    @classmethod
    def of(cls, reward: "RewardFunction | Callable[..., Any] | str") -> "RewardFunction":
        """Take a RewardFunction as it is, a text by parse(), and a callable as what its signature says.

        One that takes a `completion` (and no `completions`) is of kind "sample", any other of kind "batch".
        """
        if isinstance(reward, RewardFunction):
            return reward
        if isinstance(reward, str):
            return cls.parse(reward)
        if not callable(reward):
            raise TypeError(f"reward: expected a function, a RewardFunction or a text, got {reward!r}")
        name = getattr(reward, "__name__", type(reward).__name__)
        taken = _keywords(reward, 0)
        kind: Kind = "sample" if "completion" in taken and "completions" not in taken else "batch"
        qualified = getattr(reward, "__qualname__", "")
        module = sys.modules.get(getattr(reward, "__module__", None) or "")
        file = getattr(module, "__file__", None)
        if not inspect.isfunction(reward) or "<" in qualified or module is None or not file:
            return cls(f"{getattr(module, '__name__', 'unknown')}:{name}", kind, name=name, function=reward)
        # A script or a loose file is found by its path: its module name means nothing in another process.
        spec = module.__spec__
        return cls(f"{spec.name if spec and spec.parent else Path(file).resolve()}:{qualified}", kind, name=name)

    @classmethod
    def of_session(cls, reward: "RewardFunction | Callable[..., Any] | str") -> "RewardFunction":
        """As `of`, for functions of the session at hand: what `__main__` defines is kept, not imported again.

        Importing a script once more would run all of it, and a notebook has no file to import.
        """
        made = cls.of(reward)
        if made.function is None and callable(reward) and getattr(reward, "__module__", None) == "__main__":
            return replace(made, target=f"__main__:{made.name}", function=reward)
        return made

    @property
    def per_sample(self) -> bool:
        """Whether a call scores one completion, so that a batch may be divided among workers."""
        return self.kind in ("sample", "verl")

    def load(self, prepare: bool = True) -> Callable[..., Any]:
        """Import the function.

        Its module may hold PREPARE, a mapping from a function's name to one without arguments that is called here,
        unless `prepare` is off: what takes long, or may be missing, is then found out at the start, outside the time
        limit of a first call.

        Raises:
            RewardError: naming the function and the reason.
        """
        if self.function is not None:
            return self.function
        module_name, _, path = self.target.rpartition(":")
        try:
            module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"reward {self.name!r}: {module_name} could not be imported: {_describe(error)}"
            ) from error
        found: Any = module
        for part in path.split("."):
            if not hasattr(found, part):
                names = [name for name, value in vars(found).items() if inspect.isfunction(value)]
                raise RewardError(f"{unknown_name('reward function', part, names)} in {module_name}")
            found = getattr(found, part)
        if not callable(found):
            raise RewardError(f"reward {self.name!r}: {self.target} is a {type(found).__name__}, not a function")
        try:
            if prepare:
                getattr(module, "PREPARE", {}).get(path, lambda: None)()
        except Exception as error:
            raise RewardError(f"reward {self.name!r}: {printable(str(error), LIMIT)}") from error
        return found  # type: ignore[no-any-return]

    def check_columns(self, function: Callable[..., Any], columns: Collection[str]) -> None:
        """Refuse a function that needs a column the data do not have.

        Raises:
            RewardError: naming the column.
        """
        if self.kind in _DEFAULT_NAMES:
            needed = ["answer"]
        else:
            needed = [
                name
                for name, parameter in _keywords(function, 0 if self.kind == "batch" else 1).items()
                if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            ]
        have = {*columns, *self.options, *(["prompt"] if self.kind == "sample" else ["prompts", "completions"])}
        if missing := [name for name in needed if name not in have]:
            if self.kind == "batch" and "completion" in missing:
                file, _, path = self.target.rpartition(":")
                own = f"sample:{Path(file).name}:{path}"
                raise RewardError(f"reward {self.name!r} takes 'completion', one at a time: write {own}")
            alike = {name: found[0] for name in missing if (found := difflib.get_close_matches(name, columns, 1, 0.5))}
            near = [f"{own!r}" + f", answer_column={own}" * (name == "answer") for name, own in alike.items()]
            raise RewardError(
                f"reward {self.name!r} takes {missing}, but the data have only the columns {sorted(columns)}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
            )

    def calls(
        self,
        function: Callable[..., Any],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> Iterator[list[Entry]]:
        """Call the loaded function as often as its kind asks for; yield the entries of each call, in order.

        What the function raises becomes the entry of every completion of that call; MemoryError alone passes through.
        """
        if not completions:
            return
        if not self.per_sample:
            yield _entries(lambda: self._call_batch(function, prompts, completions, columns), len(completions))
            return
        names = _wanted(function, _VERL_ARGUMENTS if self.kind == "verl" else ["prompt", *columns])
        if self.kind == "sample":  # the completion is the first argument; a column of that name is not meant
            names = [name for name in names if name != _first_parameter(function)]
        for row, completion in enumerate(completions):
            values = {name: column[row] for name, column in columns.items()}
            call = functools.partial(self._call_one, function, names, prompts[row], completion, values)
            yield _entries(call, 1)

    def _call_one(
        self, function: Callable[..., Any], names: list[str], prompt: Any, completion: Any, values: dict[str, Any]
    ) -> list[Any]:
        if self.kind == "sample":
            arguments = {"prompt": text_of(prompt), **values}
            result = function(text_of(completion), **{name: arguments[name] for name in names} | dict(self.options))
        else:
            arguments = {
                "data_source": values.get("data_source", ""),
                "solution_str": text_of(completion),
                "ground_truth": values["answer"],
                "extra_info": values if values.get("extra_info") is None else values["extra_info"],
            }
            result = function(**{name: arguments[name] for name in names} | dict(self.options))
        return [_finish(result)]

    def _call_batch(
        self,
        function: Callable[..., Any],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> Any:
        if self.kind == "batch":
            arguments = {**columns, "prompts": prompts, "completions": completions}
            passed = {name: list(arguments[name]) for name in _wanted(function, arguments)}
            return _finish(function(**{**passed, **self.options}))
        asked = [text_of(prompt, whole=True) for prompt in prompts]
        queries = [prompt + text_of(completion) for prompt, completion in zip(asked, completions, strict=True)]
        scores = _finish(function(queries, asked, list(columns["answer"]), **self.options))
        return scores["rewards"] if isinstance(scores, Mapping) else scores


def builtin(name: str) -> RewardFunction:
    """Return a reward that comes with the package, by name.

    Raises:
        ValueError: with the nearest name.
    """
    if name not in BUILTINS:
        raise ValueError(unknown_name("reward", name, list(BUILTINS)) + "; your own is given as file.py:function")
    return BUILTINS[name]


#: The rewards that come with the package, by the names that configurations give. Those of a task live in its module.
BUILTINS: dict[str, RewardFunction] = {
    "exact_match": RewardFunction("bandit_rft.rewards.builtin:exact_match", "sample", reference="{answer}"),
    "gsm8k": RewardFunction("bandit_rft.tasks.gsm8k:gsm8k", "sample", reference="#### {answer}"),
    "math": RewardFunction("bandit_rft.tasks.math_problems:math", "sample", reference=r"\boxed{{answer}}"),
    # Some answers send a computer algebra system off for hours: such an answer is simply not verified.
    "math_verify": RewardFunction(
        "bandit_rft.tasks.math_problems:math_verify",
        "sample",
        timeout_s=5.0,
        killed_score=0.0,
        reference=r"\boxed{{answer}}",
    ),
    "rouge_l": RewardFunction("bandit_rft.tasks.summarize:rouge_l", "sample"),
    "rouge_l_length_penalized": RewardFunction(
        "bandit_rft.tasks.summarize:rouge_l",
        "sample",
        options={"length_penalty": 1.0},
        name="rouge_l_length_penalized",
    ),
}


def refuse_foreign_code(functions: Iterable[str], *, source: str, allowed: bool = False) -> None:
    """Refuse rewards that are somebody's code, where they were named by a file that may be somebody's, too.

    Args:
        functions: rewards as a configuration names them.
        source: the file that names them, for the message.
        allowed: whether the user said that such code may be run.

    Raises:
        ValueError: naming the functions that do not come with this package.
    """
    foreign = [name for name in functions if name.removeprefix("sample:") not in BUILTINS]
    if foreign and not allowed:
        named = printable(", ".join(map(repr, foreign)), LIMIT, one_line=True)
        raise ValueError(
            f"reward.functions: {printable(source)} names code that scoring would run: {named}. If you trust it, "
            "say so with --allow_code, or name rewards of your own with --reward.functions"
        )


def given_in_python(functions: Iterable[str]) -> str:
    """That rewards were functions of a program, as a configuration calls them, and how to name them now."""
    texts = [text.removeprefix(SESSION) for text in functions if text.startswith(SESSION)]
    names = ", ".join(text.rpartition(":")[2] for text in texts)
    flags = ",".join(f"{kind}{colon}FILE.py:{name}" for kind, colon, name in (text.rpartition(":") for text in texts))
    return (
        f"{printable(names, LIMIT, one_line=True)}: the rewards were functions given in Python, which the run folder "
        f"does not hold. Put them in a file and name them: --reward.functions {printable(flags, LIMIT, one_line=True)}"
    )


def unknown_name(what: str, name: object, known: Collection[str]) -> str:
    """Say that a name is unknown, which one is nearest and which there are."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown {what} {name!r}{hint} (there are: {printable(', '.join(map(str, known)), one_line=True) or 'none'})"
    )


def text_of(content: Any, whole: bool = False) -> str:
    """Return a prompt or completion as text: of a message list the last content, or all of them, one a line."""
    if isinstance(content, str):
        return content
    contents = [str(message.get("content") or "") for message in content]
    return "\n".join(contents if whole else contents[-1:])


def _entries(call: Callable[[], Any], count: int) -> list[Entry]:
    """Make a call and check what comes back: one entry for each of `count` completions."""
    try:
        scores = call()
        if hasattr(scores, "tolist"):  # numpy and torch, without importing either
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            return [f"returned {_short(scores)} where a list of {count} numbers is expected"] * count
        if len(scores) != count:
            return [f"returned {len(scores)} scores for {count} completions"] * count
        return [_entry(score) for score in scores]
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        return [f"raised {_describe(error)}"] * count


def _entry(score: Any) -> Entry:
    """Check one score."""
    if isinstance(score, Mapping) and "score" in score:
        score = score["score"]
    if score is None:
        return None
    try:
        number = math.nan if isinstance(score, str | bytes) else float(score)
    except Exception:
        number = math.nan
    return number if math.isfinite(number) else f"returned {_short(score)} where a finite number or None is expected"


def _finish(result: Any) -> Any:
    """Wait for the result of an async function; pass any other through."""
    if not inspect.isawaitable(result):
        return result

    import asyncio  # half of a worker's start-up time, and few rewards need it

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    try:
        return asyncio.run(wait(result))
    except asyncio.CancelledError as error:  # no Exception, and no reason to end the worker
        raise RuntimeError("the async reward was cancelled") from error


def _keywords(function: Callable[..., Any], positional: int) -> dict[str, inspect.Parameter]:
    """Return the parameters after the first `positional` ones that can be passed by name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}
    positional_only = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    return {parameter.name: parameter for parameter in parameters[positional:] if parameter.kind not in positional_only}


def _first_parameter(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's first parameter, where it can be known and takes one value."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):
        return None
    return None if first is None or first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD) else first.name


def _wanted(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Return which of the names the function's signature asks for: all of them if it takes **columns."""
    known = _keywords(function, 0)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return [name for name in names if takes_any or name in known]


@functools.cache
def _load_file(path: str) -> ModuleType:
    """Import a file once, as a module of its own; its folder goes to the end of the import path, for its helpers."""
    name = f"_bandit_rft_reward_{Path(path).stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _short(value: Any) -> str:
    """Show a value and its type on part of a line, whatever it is."""
    try:
        text = repr(value)
    except Exception:
        text = "a value that cannot be shown"
    return f"{printable(text, 80, one_line=True)} ({type(value).__name__})"


def _describe(error: BaseException) -> str:
    """Say what was raised and where, with the traceback from the reward function on; printable, whatever it quotes."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    trace = printable("".join(traceback.format_list(frames))[-2000:]).rstrip()
    return shown_error(error) + printable(where, one_line=True) + (f"\n{trace}" if trace else "")
