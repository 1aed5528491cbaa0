"""Options and their rules, declared in one place: a name, a type, a default and pydantic constraints.

The configuration, the advantages and the tasks all declare theirs this way, as fields of a class or as keyword
arguments with `Annotated` types. Here is what they share: reading a text of the command line as a value of a field, and
errors that name the option, what was given and what would do. No torch here.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.fields import FieldInfo

from bandit_rft.peer_names import answer_to_value
from bandit_rft.text import LIMIT

#: Nothing is converted silently, and no number is infinite or NaN.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=())
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
    dict: "a mapping of names to values",
}  # fmt: skip
BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


class OptionError(ValueError, TypeError):
    """An option that is unknown, or whose value is of the wrong type or out of range; the message names it."""


class OptionModel(BaseModel):
    """Base of the classes that declare a task's options: strict and frozen, unknown names are refused."""

    model_config = ConfigDict(**STRICT, frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        return tuple(value) if isinstance(value, list) and typing.get_origin(kind) is tuple else value


class Problem(NamedTuple):
    """What is wrong with one value. Without a name `message` stands alone; without `message`, `wanted` would do."""

    name: str
    given: Any
    wanted: str  # as in "must be ..."
    plainly: str  # as in "expected ..."
    message: str

    def __str__(self) -> str:
        if self.message:
            predicate = self.message.startswith(("must ", "knows ", "cannot "))
            return self.name + (" " if predicate else ": ") + self.message if self.name else self.message
        if self.given is None:
            return f"{self.name} must be given; got null"
        theirs = answer_to_value(self.name, self.given)
        hint = f": {theirs}" if theirs else nearest(self.given, self._names())
        return f"{self.name} must be {self.wanted}; got {shown(self.given)}{hint}"

    def expectation(self) -> str:
        """The same in the words of an error about an argument: "expected 1 to 9, got 0"."""
        one_sided = self.plainly.startswith(("at ", "more ", "less "))
        plainly = f"a {self.name} of {self.plainly}" if one_sided else self.plainly
        near = closest(self.given, self._names())
        hint = f"; did you mean {near!r}?" if near else ""
        return self.message or f"expected {plainly}, got {shown(self.given)}{hint}"

    def _names(self) -> list[str]:
        return self.wanted.removeprefix("one of ").split(", ") if self.wanted.startswith("one of ") else []


def shown(value: object) -> str:
    """A value as an error shows it, on part of a line whatever its size."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than sys.get_int_max_str_digits() digits
        text = f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= LIMIT else f"{text[:LIMIT]} ... ({len(text) - LIMIT} more characters)"


def nearest(name: object, names: Iterable[str]) -> str:
    """A hint with the most similar of the names, to be put behind an error's text; "" if none is similar."""
    near = closest(name, names)
    return f" (did you mean {near}?)" if near else ""


def closest(name: object, names: Iterable[str]) -> str | None:
    """The most similar of the names, if any is similar."""
    text = shown(name) if not isinstance(name, str) else name
    return next(iter(difflib.get_close_matches(text[:LIMIT], list(names), n=1, cutoff=0.5)), None)


# --- texts as values --------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as of version 1.2 where numbers are concerned: 1e-6 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


#: Values in a text of YAML, each alias counted as what it stands for: a few lines can stand for terabytes.
MAX_VALUES = 100_000


def read_yaml(text: str) -> Any:
    """Plain YAML values, nothing executed. Raises yaml.YAMLError, also for a key given twice."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("the values are nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for. Raises yaml.YAMLError for too many, and for what no mapping can hold."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="a value that contains itself", problem_mark=node.start_mark)
    if id(node) not in known:
        inner = list[yaml.Node]()
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            names = set[tuple[str, str]]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in names:
                        problem = f"the key {key.value!r} is given twice"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                    names.add((key.tag, key.value))
                inner += [key, value]
        known[id(node)] = 1 + sum(_count_values(part, known, above | {id(node)}) for part in inner)
        if known[id(node)] > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} values", problem_mark=node.start_mark)
    return known[id(node)]


def read_value(kind: Any, value: Any) -> Any:
    """`value` as the type of a field where that loses nothing; anything else comes back as it is, to be refused.

    Texts, which is all that a command line has, are read as YAML scalars unless text is wanted. A list may be written
    with commas.
    """
    optional = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    if optional:
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if value in ("null", "none", ""):
            return None
    of, plain = typing.get_origin(kind) or kind, not isinstance(value, bool)
    textual = kind is str or of is typing.Literal
    if isinstance(value, str) and not textual:
        try:
            value = read_yaml(value)
        except yaml.YAMLError:
            return value
    if of in (list, tuple):
        if value is None:
            return None
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        values = value if isinstance(value, list | tuple) else [value]
        item = (typing.get_args(kind) or (Any,))[0]
        return [read_value(item, entry) for entry in values]  # for a tuple, too: it is to be written as YAML and JSON
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and plain:
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind is str and isinstance(value, int | float) and plain:
        return str(value)
    return value


# --- options of a signature -------------------------------------------------------------------------------------------


def options_of(*sources: Callable[..., Any]) -> type[OptionModel]:
    """The arguments that have a default, of functions and classes, with the rules of their `Annotated` types."""
    fields: dict[str, Any] = {}
    for source in sources:
        try:
            function = inspect.getattr_static(source, "__init__") if isinstance(source, type) else source
            hints = typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError, AttributeError):  # names for type checkers alone, or no function: no rules
            hints = {}
        for p in inspect.signature(source).parameters.values():
            if p.default is not p.empty:
                fields[p.name] = (hints.get(p.name, Any), p.default)
    return create_model("Options", __base__=OptionModel, **fields)


def read_given(model: type[OptionModel] | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values read as their options' types; as YAML where there is no such option, or nobody knows which there are."""
    fields = fields_of(model)
    return {k: read_value(fields[k].annotation if k in fields else Any, v) for k, v in values.items()}


def fields_of(model: Any) -> Mapping[str, FieldInfo]:
    """The fields of a model or a pydantic dataclass; none of anything else."""
    return getattr(model, "__pydantic_fields__", {}) if isinstance(model, type) else {}


def option_problems(model: type[OptionModel], values: Mapping[str, Any], prefix: str = "") -> list[Problem]:
    """What is wrong with values whose names are known; [] where nothing is."""
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        return list(problems(error, model, prefix))
    return []


# --- what is wrong, in words ------------------------------------------------------------------------------------------


def problems(error: ValidationError, model: type, prefix: str = "") -> Iterator[Problem]:
    """pydantic's errors about a value of `model` (a model or a dataclass) in our words."""
    for e in error.errors(include_url=False):
        field, name, given = _field_at(model, e["loc"]), prefix + _dotted(e["loc"]), e["input"]
        message = str(e["ctx"]["error"]) if e["type"] == "value_error" else ""
        if field is None or message:
            yield Problem(name if e["loc"] else "", given, "", "", message or e["msg"])
        elif e["type"] == "missing":
            yield Problem(name, None, "", "", f"must be given: {field.description}")
        elif e["type"] in BOUNDS:
            yield Problem(name, given, bounds(field), bounds(field, plainly=True), "")
        elif wanted := type_name(field.annotation, item=isinstance(e["loc"][-1], int)):
            yield Problem(name, given, wanted, wanted, "")
        else:
            yield Problem(name, given, "", "", f"cannot be {shown(given)}: {e['msg']}")


def type_name(kind: Any, item: bool = False) -> str:
    """What a value of an annotation looks like; "" for one that has no short description."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    of = typing.get_origin(kind) or kind
    if of in (list, tuple):
        inner = type_name(typing.get_args(kind)[0])
        return inner if item else f"a list ({inner} each)"
    return "one of " + ", ".join(choices(kind)) if choices(kind) else TYPE_NAMES.get(of, "")


def choices(kind: Any) -> tuple[str, ...]:
    """The values that a Literal allows, of itself or within an optional or a list; () for other types."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    return next((found for inner in typing.get_args(kind) if (found := choices(inner))), ())


def bounds(field: FieldInfo, plainly: bool = False) -> str:
    """The range of a number: "> 0 and <= 1"; plainly "1 to 9" or "at least 0"."""
    signs: dict[str, float] = {}
    for rule in field.metadata:
        for sign, kind, attribute in (
            (">", annotated_types.Gt, "gt"), (">=", annotated_types.Ge, "ge"),
            ("<", annotated_types.Lt, "lt"), ("<=", annotated_types.Le, "le"),
        ):  # fmt: skip
            if isinstance(rule, kind):
                signs[sign] = getattr(rule, attribute)
    if plainly and signs.keys() == {">=", "<="}:
        return f"{_number(signs['>='])} to {_number(signs['<='])}"
    words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"} if plainly else {}
    return " and ".join(f"{words.get(sign, sign)} {_number(value)}" for sign, value in signs.items())


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) and abs(value) < 10**9 else f"{value:g}"


def _field_at(model: type, loc: tuple[int | str, ...]) -> FieldInfo | None:
    """The field that an error is about; None where it is about several."""
    return fields_of(model).get(str(loc[0])) if loc else None


def _dotted(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def check_options(
    key: str, owner: str, model: type[OptionModel], options: Mapping[str, Any], hints: Mapping[str, str]
) -> None:
    """Raise ValueError where one is unknown or its value cannot be.

    Args:
        key: "task_options" or "advantage_options".
        owner: whose options they are, for the message.
        model: which there are.
        options: by name.
        hints: what to say about an option that is given elsewhere, by its name.
    """
    own = [name for name in model.model_fields if name not in hints]
    for name in sorted(options.keys() - set(own)):
        hint = hints[name] if name in hints and name in model.model_fields else nearest(name, own)
        raise ValueError(f"{key}.{name} is no option of {owner} (it has: {', '.join(own) or 'none'}){hint}")
    if found := option_problems(model, options, f"{key}."):
        raise ValueError("\n".join(map(str, found)))


def check_json(key: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for what a checkpoint could not keep, such as a date, as which YAML reads 2024-07-26."""
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{key}.{name} must be of text, numbers, true or false, null, lists and mappings; got {value!r}, a "
                f"{type(value).__name__} (a text in quotes?)"
            ) from None
