"""What is wrong with given options, in one line: which key, what it holds, and what would be right."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmcompress import catalog
from llmcompress.backends.choice import Backend
from llmcompress.errors import InputError, one_line

S = TypeVar("S", bound=BaseModel)


def parse_section(section: type[S], data: dict[str, Any], source: str) -> S:
    """A section given as a mapping. InputError: one line, as for a whole recipe."""
    check_options(source, section, data, ())
    return section(**data)


def check_choice(at: str, kind: str, name: str) -> None:
    try:
        catalog.get(kind, name)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None


def check_backend(at: str, given: Any, port: str | None, method: str | None = None) -> None:
    """InputError unless `given` (None, a name or a mapping) is a backend with options that it has.

    port: where it has to plug in; None: it has to offer an analysis, wherever it does. method: what it has to offer
    beyond its port.
    """
    if given is None:
        return
    choice = Backend.model_validate(given)
    try:
        backend = catalog.get("backend", choice.name, port).load()
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    if port is None and not hasattr(backend, "analyze"):
        raise InputError(f"{at}: the backend '{choice.name}' has no analysis")
    if method is not None and not hasattr(backend, method):
        raise InputError(f"{at}: the backend '{choice.name}' recovers no {method}")
    check_options(at, backend.Options, choice.options, tuple(type(choice).model_fields))


def check_options(at: str, options: type[BaseModel], given: dict[str, Any], also: tuple[str, ...]) -> None:
    try:
        options(**given)
    except ValidationError as error:
        raise InputError(f"{at}.{first_error(error, options, also)}") from None


def first_error(error: ValidationError, model: type[BaseModel], also: tuple[str, ...] = ()) -> str:
    """`key.path: what is wrong`, one line, with the nearest key for an unknown one."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = one_line(".".join(path))
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1]) + list(also)
        return f"{where}: unknown key{catalog.nearest(path[-1], known)}"
    if first["type"] == "missing":
        unknown = [str(key) for key in first["input"] if key not in _fields_at(model, path[:-1])]
        meant = difflib.get_close_matches(path[-1], unknown, n=1)
        if meant:
            where = one_line(".".join([*path[:-1], meant[0]]))
            return f"{where}: unknown key; did you mean '{path[-1]}'?"
        return f"{where}: is required"
    shown = one_line(repr(first["input"]))
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}; got {shown}"


def _fields_at(model: Any, path: list[str]) -> list[str]:
    for part in path:
        if not part.isdigit() and isinstance(model, type) and issubclass(model, BaseModel):
            model = _inner_model(model.model_fields[part].annotation) if part in model.model_fields else None
    return list(model.model_fields) if model is not None else []


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType | types.GenericAlias) or typing.get_args(annotation):
        return next((m for a in typing.get_args(annotation) if (m := _inner_model(a))), None)
    return None
