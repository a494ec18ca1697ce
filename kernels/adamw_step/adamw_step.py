"""opkit::adamw_step: one step of AdamW for a list of parameters, in place.

For each parameter p with gradient g, in this order:

    p = p (1 - lr weight_decay)
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101; torch.optim.AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


@opkit.op(
    "opkit::adamw_step",
    shapes="[*s], [*s]:params, [*s], [*s]:exp_avgs ->",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs"),
)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update params, and the averages of their gradients and squared gradients, with the weight decay decoupled.

    step counts from 1, as torch.optim.AdamW's state does after its increment. The lists have one tensor for each
    parameter; parameters may differ in shape and dtype, and a gradient has those of its parameter. The averages have
    the dtype of their parameter or that in which it is computed: float32, or float64 for float64. Everything that is
    written is rounded once. Any strides.

    There is no gradient through a step: call it under torch.no_grad, as optimizers run. lr, betas, eps, weight_decay
    and step are numbers of the host: a captured CUDA graph repeats the step that it has seen, and torch.compile makes
    another graph for another lr, as for every float.

    Raises:
        ShapeError: the lists have different lengths, or the tensors of one parameter different shapes.
        DtypeError: the dtypes are not as above.
        RuntimeError: step is less than 1.

    Example:
        >>> import torch, opkit_kernels
        >>> p, g, m, v = torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1)
        >>> opkit_kernels.adamw_step([p], [g], [m], [v], 0.1, (0.9, 0.999), 1e-8, 0.01, 1)
        >>> p, m, v
        (tensor([0.8990]), tensor([0.1000]), tensor([0.0010]))
    """
    check(step, params, exp_avgs)
    beta1, beta2 = betas
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        wide = torch.promote_types(param.dtype, torch.float32)
        g = grad.to(wide)
        m = torch.lerp(exp_avg.to(wide), g, 1 - beta1)
        v = exp_avg_sq.to(wide) * beta2 + (1 - beta2) * g * g
        decayed = param.to(wide) * (1 - lr * weight_decay)
        param.copy_(decayed - step_size * m / (v.sqrt() / root + eps))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def check(step: int, params: list[Tensor], exp_avgs: list[Tensor]) -> None:
    """Raise before anything is written."""
    if step < 1:
        raise RuntimeError(
            f"calling opkit::adamw_step: step is {step}, expected 1 or more. Count the step before the call."
        )
    for index, (param, exp_avg) in enumerate(zip(params, exp_avgs, strict=True)):
        require_floating("opkit::adamw_step", params=param)
        wide = torch.promote_types(param.dtype, torch.float32)
        if exp_avg.dtype not in (param.dtype, wide):
            raise opkit.DtypeError(
                f"calling opkit::adamw_step: exp_avgs[{index}] is {exp_avg.dtype} and its parameter {param.dtype}, "
                f"expected that or {wide}. Convert it: exp_avgs[{index}].to({wide}).",
                op="opkit::adamw_step",
            )


register_files(adamw_step)
