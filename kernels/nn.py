"""torch.nn's modules over opkit's ops: the same arguments, parameters, buffers and results.

    from opkit_kernels import nn

    norm = nn.RMSNorm(1024)
    norm.load_state_dict(torch.nn.RMSNorm(1024).state_dict())

Each is the torch.nn module of its name in all but `forward`, so it can stand wherever that one does. Where an op does
not cover what a module was made for, its docstring says what runs instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

import opkit_kernels as ops


def _flat(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return x with the dimensions that are normalised together, its last ones, as one."""
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalising over the last dimensions {shape}: found x of shape {tuple(x.shape)}; expected one that ends "
            "in these. Pass such an x, or make the module for its shape."
        )
    return x.flatten(x.dim() - len(shape)) if len(shape) > 1 else x


def _or_ones(weight: Tensor | None, x: Tensor) -> Tensor:
    return x.new_ones(x.shape[-1]) if weight is None else weight.flatten()


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over opkit::rms_norm.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.RMSNorm(2)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]], grad_fn=...)
    """

    def forward(self, x: Tensor) -> Tensor:
        flat = _flat(x, tuple(self.normalized_shape))
        # As torch: that of the dtype in which it is computed.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return ops.rms_norm(flat, _or_ones(self.weight, flat), eps).y.view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over opkit::layer_norm.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.LayerNorm(2, elementwise_affine=False)(torch.tensor([[1.0, 5.0]]))
        tensor([[-1.0000,  1.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        flat = _flat(x, tuple(self.normalized_shape))
        return ops.layer_norm(flat, weight, bias, self.eps).y.view(x.shape)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm over opkit::group_norm.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.GroupNorm(1, 2, affine=False)(torch.tensor([[1.0, 5.0]]))
        tensor([[-1.0000,  1.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).y


def _batch_norm(
    module: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d, x: Tensor
) -> Tensor:
    """Return what a module of batch norm in training returns, and update what it tracks."""
    momentum = 0.0 if module.momentum is None else module.momentum
    mean, var = module.running_mean, module.running_var
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(module.num_batches_tracked)
    if mean is None or var is None:
        mean, var = (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"normalising a batch: found x of shape {tuple(x.shape)}, one value per channel; expected more, as one has "
            "no variance. Pass a larger batch, or call .eval() first."
        )
    return ops.batch_norm(x, module.weight, module.bias, mean, var, momentum, module.eps).y


def _require_dims(x: Tensor, *dims: int) -> None:
    if x.dim() not in dims:
        expected = " or ".join(map(str, dims))
        raise ValueError(
            f"normalising channels: found x of shape {tuple(x.shape)}; expected {expected} dimensions. Use the module "
            "whose name says how many dimensions follow the channels."
        )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d over opkit::batch_norm; in evaluation torch's own.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.BatchNorm1d(1, affine=False)(torch.tensor([[1.0], [5.0]]))
        tensor([[-1.0000],
                [ 1.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 2, 3)
        return _batch_norm(self, x) if self.training else super().forward(x)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d over opkit::batch_norm; in evaluation torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 4)
        return _batch_norm(self, x) if self.training else super().forward(x)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d over opkit::batch_norm; in evaluation torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 5)
        return _batch_norm(self, x) if self.training else super().forward(x)


def _instance_norm(
    module: torch.nn.InstanceNorm1d | torch.nn.InstanceNorm2d | torch.nn.InstanceNorm3d,
    x: Tensor,
    batched: bool,
) -> Tensor:
    batch = x if batched else x.unsqueeze(0)
    return ops.group_norm(batch, batch.shape[1], module.weight, module.bias, module.eps).y.view(x.shape)


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d over opkit::group_norm; where it tracks running statistics torch's own.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.InstanceNorm1d(1)(torch.tensor([[1.0, 5.0]]))
        tensor([[-1.0000,  1.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 2, 3)
        return super().forward(x) if self.track_running_stats else _instance_norm(self, x, x.dim() == 3)


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d over opkit::group_norm; where it tracks running statistics torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 3, 4)
        return super().forward(x) if self.track_running_stats else _instance_norm(self, x, x.dim() == 4)


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d over opkit::group_norm; where it tracks running statistics torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        _require_dims(x, 4, 5)
        return super().forward(x) if self.track_running_stats else _instance_norm(self, x, x.dim() == 5)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss over opkit::cross_entropy; torch's own for class weights, and targets of probabilities.

    Example:
        >>> import torch
        >>> from opkit_kernels import nn
        >>> nn.CrossEntropyLoss()(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
        tensor(0.6931)
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if self.weight is not None or target.dtype != torch.int64:
            return super().forward(x, target)
        logits = x if x.dim() == 1 else x.movedim(1, -1)
        loss = ops.cross_entropy(logits, target, self.label_smoothing, self.ignore_index).loss
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / (target != self.ignore_index).sum()
