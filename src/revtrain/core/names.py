"""Former names of keyword arguments, so that programs written with them go on working."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def former_names(**new_of: str) -> Callable[[Function], Function]:
    """A decorator: the function takes keyword arguments by their former names, too.

    >>> @former_names(readout="head")
    ... def chain(head): ...
    >>> chain(readout=module)  # chain(head=module)

    Raises `TypeError` on a call with both names of one argument.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for former in new_of.keys() & kwargs.keys():
                if new_of[former] in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new_of[former]} and its former name {former}")
                kwargs[new_of[former]] = kwargs.pop(former)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate
