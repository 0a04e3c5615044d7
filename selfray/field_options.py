"""The fields of a run's config as options of the command line: `--steps`, `--crops.global-size`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from selfray.config import Pair, RunConfig, validate
from selfray.errors import nearest
from selfray.recipes import RECIPES, recipe
from selfray.report_config import RECIPES as REPORT_RECIPES
from selfray.report_config import ReportConfig, report_recipe, validate_report_config


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """What argparse calls to read a word of a closed set; the nearest is suggested otherwise."""
    allowed = tuple(allowed)

    def read(word: str) -> str:
        if word not in allowed:
            raise argparse.ArgumentTypeError(f"{word!r} is not known. {nearest(word, allowed)}")
        return word

    return read


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from _fields(types[field.name], f"{prefix}{field.name}.")
        elif field.name != "recipe":
            yield prefix + field.name, types[field.name], field.metadata["help"]


def _value(config: RunConfig | ReportConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(_shown(number) for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown_values(name: str, recipes: Mapping[str, RunConfig | ReportConfig]) -> str:
    """The value of each recipe that has the field; one alone where all have the same."""
    of_value: dict[str, list[str]] = {}
    for key, config in recipes.items():
        if name in {known for known, _, _ in _fields(type(config))}:
            of_value.setdefault(_shown(_value(config, name)), []).append(key)
    if len(of_value) == 1 and len(next(iter(of_value.values()))) == len(recipes):
        return next(iter(of_value))
    return "; ".join(f"{', '.join(keys)}: {value}" for value, keys in of_value.items())


def _true_or_false(word: str) -> bool:
    return one_of(("true", "false"))(word) == "true"


_METAVARS = {"data": "DIR", "init": "ENCODER", "guard": "MARGIN", "text.model": "DIR"}


def _reading(name: str, kind: Any) -> dict[str, Any]:
    """How argparse reads a field of a type."""
    if kind == Pair:
        return {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
    if kind == tuple[str, ...]:
        # Given twice, both count.
        metavar = _METAVARS.get(name, "NAME")
        nargs = "+" if name == "data" else "*"
        return {"action": "extend", "nargs": nargs, "metavar": metavar, "required": name == "data"}
    if kind is bool:
        return {"type": _true_or_false, "metavar": "true|false"}
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        return {"type": one_of(allowed), "metavar": "|".join(allowed)}
    return {"type": kind, "metavar": _METAVARS.get(name, kind.__name__.upper())}


def add_fields(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add every field, with its help and the recipe's value.

    Args:
        parser: To which the options are added, in one group a group of the config.
        words: The command line. The values of the recipe that it names are shown; all recipes'
            when it names none.
    """
    named = [word for word in words if word in RECIPES][:1] or list(RECIPES)
    recipes = {name: RECIPES[name]() for name in named}
    groups: dict[str, Any] = {}
    for name, (kind, text, config) in _fields_of(recipes.values()).items():
        group = name.rpartition(".")[0]
        if group not in groups:
            doc = typing.get_type_hints(config)[group].__doc__ if group else None
            title = f"{group}: {doc.strip().rstrip('.')}" if doc else "the run"
            groups[group] = parser.add_argument_group(title)
        values = _shown_values(name, recipes)
        groups[group].add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=(f"{text} ({values})" if values else text).replace("%", "%%"),
            **_reading(name, kind),
        )


def _fields_of(recipes: Iterable[RunConfig]) -> dict[str, tuple[Any, str, type[RunConfig]]]:
    """Type, help and kind of config of every field that a recipe has, group by group."""
    found: dict[str, tuple[Any, str, type[RunConfig]]] = {}
    for config in dict.fromkeys(map(type, recipes)):
        found |= {
            name: (kind, text, config) for name, kind, text in _fields(config) if name not in found
        }
    return found


def configured(arguments: argparse.Namespace) -> RunConfig:
    """The recipe with the fields that the command line overrides.

    Raises:
        InputError: No such recipe, or a field out of its range.
    """
    config = recipe(arguments.recipe)
    for name, _, _ in _fields(type(config)):
        if name in vars(arguments):
            config = _replaced(config, name, vars(arguments)[name])
    validate(config)
    return config


def add_report_fields(parser: argparse.ArgumentParser) -> None:
    """Add `--report-recipe` and every field of a report model, as `--report.FIELD`."""
    recipes = {name: of() for name, of in REPORT_RECIPES.items()}
    group = parser.add_argument_group("reports: how a report model is made, and how it writes")
    group.add_argument(
        "--report-recipe",
        type=one_of(recipes),
        metavar="NAME",
        help=f"{', '.join(recipes)} ({next(iter(recipes))})",
    )
    for name, kind, text in _fields(ReportConfig):
        values = _shown_values(name, recipes)
        group.add_argument(
            f"--report.{name.replace('_', '-')}",
            dest=f"report.{name}",
            default=argparse.SUPPRESS,
            help=(f"{text} ({values})" if values else text).replace("%", "%%"),
            **_reading(name, kind),
        )


def report_config(arguments: argparse.Namespace) -> ReportConfig | None:
    """The recipe of report models with what the command line overrides; None without either.

    Raises:
        InputError: No such recipe, or a field out of its range.
    """
    given = {
        name: vars(arguments)[f"report.{name}"]
        for name, _, _ in _fields(ReportConfig)
        if f"report.{name}" in vars(arguments)
    }
    if not given and arguments.report_recipe is None:
        return None
    config = report_recipe(arguments.report_recipe or next(iter(REPORT_RECIPES)))
    for name, value in given.items():
        config = _replaced(config, name, value)
    validate_report_config(config)
    return config


_Config = TypeVar("_Config", RunConfig, ReportConfig)


def _replaced(config: _Config, name: str, value: Any) -> _Config:
    value = tuple(value) if isinstance(value, list) else value
    group, _, field = name.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{field: value})
    part = dataclasses.replace(getattr(config, group), **{field: value})
    return dataclasses.replace(config, **{group: part})
