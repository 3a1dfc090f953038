"""Batch statistics of one process, of all processes of a training, or frozen: one switch for all norms of a network.

Where several processes share a batch, each sees its part of it. Sums over all of them give the statistics of the whole
batch, and the gradient of such a sum is the sum of all gradients, so that training goes as in one process that has the
whole batch. `torch.nn.SyncBatchNorm` does this for GPUs; it refuses CPU tensors and knows no active voxels.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..fields import full_precision

__all__ = ["BATCH_STATISTICS", "BatchNorm", "over_ranks", "set_batch_statistics"]

BATCH_STATISTICS = ("local", "synchronized", "frozen")


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, on every rank; its gradient is the sum of what flows back into it on all of them."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.apply(gradient)


@torch.jit.unused
def _sum_over_ranks(local: torch.Tensor) -> torch.Tensor:
    return _SumOverRanks.apply(local) if dist.is_available() and dist.is_initialized() else local


def over_ranks(local: torch.Tensor, batch_statistics: str) -> torch.Tensor:
    """Sum what a norm has counted over all that its statistics are taken over.

    Args:
        local: sums of this process; of one shape on all processes.
        batch_statistics: of the norm.

    Returns:
        With "synchronized" the sum over all processes of the default process group, the same on each and
        differentiable; else, and where there is no process group, `local`.

    Example:
        >>> over_ranks(torch.tensor([1.0, 2.0]), "synchronized")
        tensor([1., 2.])
    """
    return _sum_over_ranks(local) if batch_statistics == "synchronized" else local


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.BatchNorm2d` and `BatchNorm3d` in one, with a choice of statistics, see `set_batch_statistics`.

    Args:
        channels: number of channels.

    Example:
        >>> BatchNorm(4)(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 4, 5, 6])
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float
    batch_statistics: str

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.batch_statistics = "local"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize each channel of `(B, C, *shape)`."""
        if self.training and self.batch_statistics == "synchronized":
            return self._over_whole_batch(input)
        learn = self.training and self.batch_statistics == "local"
        if learn:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, learn, self.momentum, self.eps
        )

    @torch.jit.unused
    def _over_whole_batch(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize by the statistics of all processes, and let the running ones follow, as torch does for one."""
        axes = [0, *range(2, input.dim())]
        view = [1, -1] + [1] * (input.dim() - 2)
        values = full_precision(input)  # half precision cannot count voxels
        count = over_ranks(values.new_tensor(values.numel() // values.shape[1]), self.batch_statistics)
        mean = over_ranks(values.sum(dim=axes), self.batch_statistics) / count
        centered = values - mean.reshape(view)
        var = over_ranks(centered.square().sum(dim=axes), self.batch_statistics) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1.0).clamp(min=1.0), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centered * scale.reshape(view) + self.bias.reshape(view)).to(input.dtype)


def set_batch_statistics(network: nn.Module, batch_statistics: str) -> nn.Module:
    """Say whose statistics the norms of a network use in training; in eval mode they use the running ones.

    Args:
        network: any network of this package, or one that holds some.
        batch_statistics: "local", those of this process's batch; "synchronized", those of the batches of all processes
            together; or "frozen", the running statistics, which then stay as they are.

    Returns:
        The same network, changed.

    Raises:
        ValueError: for another word; and where several processes are to agree, for batch normalization that is not of
            this package and would go its own way.

    Example:
        >>> from equireg.networks import DisplacementUNet
        >>> net = set_batch_statistics(DisplacementUNet(2, 1, channels=(4, 8)), "frozen").train()
        >>> before = net.ups[0].norm.running_var.clone()
        >>> _ = net(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
        >>> torch.equal(net.ups[0].norm.running_var, before)
        True
    """
    if batch_statistics not in BATCH_STATISTICS:
        raise ValueError(f"batch_statistics is one of {', '.join(BATCH_STATISTICS)}, got '{batch_statistics}'.")
    if batch_statistics != "local":
        for name, module in network.named_modules():
            foreign = isinstance(module, nn.modules.batchnorm._NormBase) and not hasattr(module, "batch_statistics")
            if foreign and module.track_running_stats:
                raise ValueError(
                    f"'{name}' is torch's {type(module).__name__}, whose statistics cannot be {batch_statistics}: "
                    "expected equireg.networks.statistics.BatchNorm."
                )
    for _, module in network.named_modules():
        if hasattr(module, "batch_statistics"):
            module.batch_statistics = batch_statistics
    return network
