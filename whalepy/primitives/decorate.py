"""A primitive as a decorator of functions, methods and nn.Module classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from whalepy.errors import AnnotationError
from whalepy.primitives.recording import under_dynamo

if TYPE_CHECKING:
    from whalepy.primitives.scope import Primitive

T = TypeVar("T")


def decorated(primitive: Primitive, target: T) -> T:
    """`target` whose calls run inside `primitive`. An nn.Module class is changed in place: its `forward` is.

    Raises AnnotationError for anything whose body does not run during the call, and for modules already made.
    """
    if isinstance(target, (staticmethod, classmethod)):
        wrapper = cast(Callable[[Any], Any], type(target))
        return wrapper(decorated(primitive, cast(Any, target).__func__))
    if inspect.isclass(target):
        return cast(T, _decorated_class(primitive, target))
    _check_function(primitive, target)
    return cast(T, _scoped(primitive, cast(Callable[..., Any], target)))


def _scoped(primitive: Primitive, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if under_dynamo():  # it cannot enter a context made outside the code it reads
            return function(*args, **kwargs)
        with primitive:
            return function(*args, **kwargs)

    return scoped


def _decorated_class(primitive: Primitive, target: type[Any]) -> type[Any]:
    from torch import nn

    if not issubclass(target, nn.Module):
        raise _target_error(primitive, f"the class {target.__name__}", "decorate an nn.Module class or a function")
    if target.forward is nn.Module.forward:
        raise _target_error(primitive, f"{target.__name__}: it has no forward", "decorate a class that defines forward")
    cast(Any, target).forward = _scoped(primitive, target.forward)
    return target


def _check_function(primitive: Primitive, target: object) -> None:
    if hasattr(target, "named_modules"):
        name = type(target).__name__
        fix = f'write whalepy.annotate(model, {{"": {primitive!r}}})'
        raise _target_error(primitive, f"a {name} that is already made", fix)
    if not callable(target):
        raise _target_error(primitive, repr(target), "decorate a function, a method or an nn.Module class")
    if inspect.isgeneratorfunction(target) or inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        name = getattr(target, "__name__", repr(target))
        raise _target_error(primitive, f"{name}: its body runs after the call", f"open {primitive!r} inside {name}")


def _target_error(primitive: Primitive, target: str, fix: str) -> AnnotationError:
    return AnnotationError(f"{primitive.kind} cannot decorate {target}", at=primitive.at, fix=fix)
