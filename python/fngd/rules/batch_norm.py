"""nn.BatchNorm1d-3d: the affine rule, on torch's own fused passes over the images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fngd_kernels.ops.nodes import UseHandler

from .affine import AffineRule, sample_parameters


class BatchNormRule(AffineRule):
    """Batch normalisation couples samples; a sample contributes what its own rows give, as in K-FAC."""

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.ndim > 1

    def forward(
        self, module: Any, x: Tensor, coefficients: Tensor | None, on_use: UseHandler | None
    ) -> Tensor:
        weight, bias = sample_parameters(module, x.shape[0], coefficients, on_use)
        assert bias is not None  # batch normalisation has both or neither
        if not module.training and module.running_mean is not None:
            x_hat = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
            shape = (*weight.shape, *(1,) * (x.ndim - 2))
            return (x_hat * weight.view(shape) + bias.expand_as(weight).view(shape)).to(x_hat.dtype)
        momentum = module.momentum or 0.0
        if module.track_running_stats:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:  # torch's cumulative average
                momentum = 1.0 / float(module.num_batches_tracked)
        statistics = (module.running_mean, module.running_var, momentum, module.eps)
        return _BatchNorm.apply(x, weight, bias.expand_as(weight), *statistics)


class _BatchNorm(Function):
    """Batch normalisation with a weight and a bias (N, C) whose N rows are equal."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inverse_std = torch.native_batch_norm(
            x, weight[0], bias[0], running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, e):
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            shape = (*weight.shape, *(1,) * (x.ndim - 2))
            x_hat = F.batch_norm(x, None, None, None, None, True, 0.0, ctx.eps)
            y = x_hat * weight.view(shape) + bias.view(shape)
            return *torch.autograd.grad(y, (x, weight, bias), e, create_graph=True), None, None, None, None
        backward, samples = torch.ops.aten.native_batch_norm_backward, x.shape[0]
        dx = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            dx = backward(e, x, weight[0], None, None, mean, inverse_std, True, ctx.eps, mask)[0]
        # A channel of the pass that sums over images is here the channel of one sample.
        statistics = (mean.repeat(samples), inverse_std.repeat(samples))
        rows = [t.reshape(1, -1, *t.shape[2:]) for t in (e, x)]
        mask = [False, True, True]
        # Torch's CUDA kernels take the dtype of the results from the weight, and fail without one.
        _, dw, db = backward(*rows, weight.flatten(), None, None, *statistics, True, ctx.eps, mask)
        return dx, dw.view_as(weight), db.view_as(bias), None, None, None, None
