"""An op that does something beside what it returns: compiled and exported programs keep each of its calls."""

from __future__ import annotations

import torch

from opkit import _torch_library
from opkit.errors import RegistrationError
from opkit.spec.schema import Schema


def check_effects(schema: Schema) -> None:
    """Raise for an op that also mutates an argument: torch drops or moves its calls."""
    mutated = [p.name for p in schema.params if p.mutated]
    if mutated:
        raise RegistrationError(
            f"declaring {schema.name}: found effects=True for an op that mutates {', '.join(mutated)}; expected one of "
            "the two, since torch drops or moves the calls of an op that has both. Return a new tensor, or make two "
            "ops of it.",
            op=schema.name,
        )


def keep_calls(library: torch.library.Library, name: str) -> None:
    """Have every call of an overload kept, in order."""
    _torch_library.register_effect(library, name)
