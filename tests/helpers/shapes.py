"""How the tests check the shapes that annotations state."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

F = TypeVar("F", bound=Callable[..., Any])

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes for a float


def checked(function: F) -> F:
    """The function with its annotations checked on every call.

    Constructors are left alone: JAX rebuilds pytrees with anything in them. See `assert_fields` for those.
    """
    return function if function.__name__ == "__init__" else check_types(function)


def assert_fields(*structs: Any) -> None:
    """Assert that the arrays of dataclasses have the shapes and dtypes of their annotations.

    An axis has one length wherever its name stands.
    """
    fields = [
        (f"{type(struct).__name__}.{name}", getattr(struct, name), arrays_of(hint))
        for struct in structs
        for name, hint in typing.get_type_hints(type(struct)).items()
    ]
    # A sum such as seqs+1 can only be checked once seqs is known.
    fields.sort(key=lambda field: any("+" in hint.dim_str for hint in field[2]))

    @jaxtyped(typechecker=None)
    def check() -> None:
        for name, value, hints in fields:
            if hints and value is not None:
                assert isinstance(value, hints), f"{name} is {value.dtype}{value.shape}, expected {hints[0]}"

    check()


def arrays_of(hint: Any) -> tuple[Any, ...]:
    """The kinds of arrays that an annotation of jaxtyping allows; none for any other annotation."""
    return tuple(kind for kind in typing.get_args(hint) or (hint,) if hasattr(kind, "dim_str"))
