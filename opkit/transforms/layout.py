"""The layout that an op's kernels want their tensors in, in eager and in compiled code alike.

Responsible for the word that a declaration says about it: which tag tells Inductor, what is done to arguments
before a kernel, and which strides derived results have. It must not know kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opkit.dispatch.meta import Meta
from opkit.errors import SchemaError, did_you_mean
from opkit.spec.schema import Schema

Format = torch.memory_format

_TAGS = {
    "exact": torch.Tag.needs_exact_strides,
    "order": torch.Tag.needs_fixed_stride_order,
    "contiguous": torch.Tag.needs_contiguous_strides,
    "flexible": torch.Tag.flexible_layout,
}
_RANKS = {torch.channels_last: 4, torch.channels_last_3d: 5}


@dataclass(frozen=True)
class Layout:
    """One such word, read: a tag for torch, and the format that arguments are brought to, if any."""

    tag: torch.Tag
    format: Format | None = None

    @classmethod
    def of(cls, word: str | Format | None, name: str, tags: Sequence[torch.Tag]) -> Layout | None:
        """Return what `layout=` of the op `name` says; None where it says nothing.

        Raises:
            SchemaError: the word is unknown, or a tag says another one.
        """
        if word is None:
            return None
        if isinstance(word, str) and word in _TAGS:
            found = cls(_TAGS[word], torch.contiguous_format if word == "contiguous" else None)
        elif word is torch.contiguous_format:
            found = cls(_TAGS["contiguous"], torch.contiguous_format)
        elif isinstance(word, Format) and word in _RANKS:
            found = cls(_TAGS["exact"], word)
        else:
            hint = did_you_mean(word, _TAGS) if isinstance(word, str) else ""
            raise SchemaError(
                f"declaring {name}: found layout={word!r}; expected {', '.join(map(repr, _TAGS))}, torch.channels_last "
                f"or torch.channels_last_3d.{hint} Name one of these.",
                op=name,
            )
        other = [tag for tag in tags if tag in _TAGS.values() and tag is not found.tag]
        if other:
            raise SchemaError(
                f"declaring {name}: found layout={word!r}, which means {found.tag}, and tags with {other[0]}; expected "
                "one word on the layout. Leave the tag out.",
                op=name,
            )
        return found

    def arranging(self, schema: Schema, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `run` for arguments of any strides: it gets copies where theirs do not fit."""
        if self.format is None:
            return run
        mutated = {p.name: i for i, p in enumerate(schema.params) if p.mutated}

        def arranged(*args: Any, **kwargs: Any) -> Any:
            own = [self._arrange(a) for a in args]
            by_name = {name: self._arrange(a) for name, a in kwargs.items()}
            returned = run(*own, **by_name)
            for name, index in mutated.items():
                if name in kwargs:
                    _copy_back(kwargs[name], by_name[name])
                elif index < len(args):
                    _copy_back(args[index], own[index])
            return returned

        return arranged

    def _arrange(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return (
                value
                if value.layout is not torch.strided
                else value.contiguous(memory_format=self._of(value))
            )
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return [self._arrange(v) for v in value]
        return value

    def _of(self, tensor: Tensor) -> Format:
        """Return the format of one tensor: that of the op where it has the rank for it."""
        assert self.format is not None
        return (
            self.format if tensor.dim() == _RANKS.get(self.format, tensor.dim()) else torch.contiguous_format
        )

    def results(self, meta: Meta) -> Callable[..., Any] | None:
        """Return a meta function for what the shape line says, in this format; None where nothing changes."""
        if self.format not in _RANKS or meta.plan is None:
            return None
        schema, derived = meta.schema, Meta(meta.schema, meta.plan)

        def function(*args: Any, **kwargs: Any) -> Any:
            outputs = schema.flatten(derived.trace(schema.fill(args, kwargs)))
            return schema.pack(schema.raw([self._arrange(o) for o in outputs]))

        return function


def _copy_back(value: Any, own: Any) -> None:
    """Write what an op did to the copy of an argument into the argument."""
    if isinstance(value, (list, tuple)):
        for one, other in zip(value, own, strict=True):
            _copy_back(one, other)
    elif isinstance(value, Tensor) and own is not value:
        value.copy_(own)
