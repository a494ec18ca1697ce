"""What an op has of variants: its in-place, out and functional forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch

from opkit._compiled import Compiled
from opkit.spec.schema import Schema
from opkit.transforms import overwrite, variants
from opkit.transforms.autocast import Autocast
from opkit.transforms.overwrite import Overwriting

P = ParamSpec("P")
R = TypeVar("R")


class HasVariants(Generic[P, R]):
    """An op, as what gives its arguments away or has its results written where they are wanted."""

    schema: Schema
    _special: bool
    _autocast: Autocast
    _compiled: Compiled
    _may_overwrite: bool
    _overwriting: Overwriting

    if TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def maybe_inplace(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the op, and let its kernel overwrite the arguments that it was registered with `inplace=` for.

        The results are those of a plain call; what is in these arguments afterwards is undefined, and a result may
        be one of them. Where autograd may need an argument again, under torch.func, and where no kernel overwrites
        any, it is the plain call.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::negative", shapes="*b -> *b")
            ... def negative(x: torch.Tensor) -> torch.Tensor:
            ...     return -x
            >>> _ = negative.register_kernel("cpu", lambda x: x.neg_(), backend="fast", inplace=["x"])
            >>> x = torch.ones(2)
            >>> negative(x) is x, negative.maybe_inplace(x) is x
            (False, True)
        """
        carried, named = self.schema.carry(args, kwargs) if self._special else (args, kwargs)
        values = self.schema.fill(carried, named)
        name = self._overwritten_by(values)
        if not name:
            return self(*args, **kwargs)
        return self.schema.pack(self._overwriting.call(name, values))  # type: ignore[no-any-return]

    def into(self, out: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the op, and have the results in the tensors of `out`: the out form, or in-place form, of the op.

        Args:
            out: a tensor, or a tuple of one for each result, with the shape, dtype and device of that. One may be an
                argument; it is then overwritten without a copy by a kernel that was registered with `inplace=`.
                Otherwise each result is copied once.
            *args: the op's.
            **kwargs: the op's.

        Raises:
            OutputError: a tensor of `out` does not fit its result, or shares memory with another one.
            GradientError: an argument requires grad, as in torch's own out forms.

        Example:
            >>> import opkit, torch
            >>> from opkit_kernels import vector_add
            >>> x = torch.ones(2)
            >>> vector_add.into(x, x, x) is x, x
            (True, tensor([2., 2.]))
        """
        outs = variants.outputs_of(self.schema, out)
        carried, named = self.schema.carry(args, kwargs) if self._special else (args, kwargs)
        values = self.schema.fill(carried, named)
        variants.refuse_gradients(self.schema, values, outs)
        name = self._overwritten_by(values)
        if name and self._overwriting.leaves_in(name, values, outs):
            self._overwriting.call(name, values)
            return self.schema.pack(self.schema.raw(outs))  # type: ignore[no-any-return]
        results = self.schema.flatten(self(*args, **kwargs))
        return variants.into(self.schema, results, outs)  # type: ignore[no-any-return]

    def functional(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Any, ...]:
        """Call an op that mutates arguments on copies of these: its functional form.

        Returns:
            The op's results, and after them, in order, what the arguments would be that it mutates.

        Raises:
            RegistrationError: the op mutates nothing.

        Example:
            >>> import opkit, torch
            >>> @opkit.op("doc::fill_one_", shapes="n ->", mutates_args=["x"])
            ... def fill_one_(x: torch.Tensor) -> None:
            ...     x.fill_(1)
            >>> x = torch.zeros(2)
            >>> fill_one_.functional(x), x
            ((tensor([1., 1.]),), tensor([0., 0.]))
        """
        return variants.functional(self.schema, self, args, kwargs)  # type: ignore[no-any-return]

    def _overwritten_by(self, values: tuple[Any, ...]) -> str:
        """Return the name of the overload that overwrites arguments which are given away, or nothing."""
        if overwrite.may_be_needed(values) or not self._may_overwrite or self._autocast.in_force():
            return ""
        if torch.compiler.is_dynamo_compiling():
            name = self._compiled.foreseen_inplace(values)
            return name if name and self._overwriting.can_hold(name, values) else ""
        return self._overwriting.find(values)
