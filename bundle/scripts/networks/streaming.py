"""Softmax attention in blocks that fit a processor's cache, for products that are known to be small.

A fused kernel carries a running maximum, and torch's for CPUs wants values as wide as the keys. Here neither is needed:
features of length 4 have products between -16 and 16, so that one constant keeps every exponential in range, and values
are coordinates. Blocks of products are made, used and forgotten, forward and again backward: memory is linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["streamed_attention"]

LARGEST = 16.0  # of the products, from features of length 4; exact sums do not depend on it
QUERIES, KEYS = 512, 1024  # of a block: two megabytes of products


def streamed_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Average values by softmax weights of the unscaled products of queries and keys, block by block.

    Args:
        queries: `(B, Q, F)`, float32 or float64.
        keys: `(B, K, F)`; products with queries lie between -40 and 40.
        values: `(B, K, V)`.
        allowed: `(B, K)`, boolean, at least one true in each sample; other keys get no weight.

    Returns:
        `(B, Q, V)`. It can be differentiated once, by queries, keys and values.

    Example:
        >>> one_hot = torch.eye(3).unsqueeze(0)
        >>> allowed = torch.tensor([[True, False, False]])
        >>> streamed_attention(one_hot, one_hot, torch.arange(3.0).reshape(1, 3, 1) + 5.0, allowed).flatten().tolist()
        [5.0, 5.0, 5.0]
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _StreamedAttention.apply(queries, keys, values, allowed)


def _blocks(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield exp(products - LARGEST) of blocks of `(Q, F)` and `(K, F)`, and which rows of each they are of."""
    for first in range(0, len(queries), QUERIES):
        rows = slice(first, first + QUERIES)
        for start in range(0, len(keys), KEYS):
            columns = slice(start, start + KEYS)
            yield rows, columns, (queries[rows] @ keys[columns].T).sub_(LARGEST).exp_()


class _StreamedAttention(torch.autograd.Function):
    """The sums of the softmax are one more value: every value gets a 1 behind it, and keys not allowed zeros only."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=2) * allowed.unsqueeze(2)
        sums = queries.new_zeros([*queries.shape[:2], values.shape[2]])
        for q, k, v, total in zip(queries, keys, values, sums):
            for rows, columns, weights in _blocks(q, k):
                total[rows].addmm_(weights, v[columns])
        answer = sums[..., :-1] / sums[..., -1:]
        ctx.save_for_backward(queries, keys, values, allowed, sums[..., -1:], answer)
        return answer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The way back may run inside of an autocast that the way there had left.
        with torch.autocast(gradient.device.type, enabled=False):
            return _StreamedAttention._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, allowed, total, answer = ctx.saved_tensors
        # With p the weights, d answer / d product = p (value - answer): the part of the answer meets the 1s.
        gradient = gradient / total
        sides = torch.cat([gradient, -(gradient * answer).sum(dim=2, keepdim=True)], dim=2)
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        d_values = torch.zeros_like(values[..., :-1]) if ctx.needs_input_grad[2] else None
        for sample, (q, k, v, side) in enumerate(zip(queries, keys, values, sides)):
            for rows, columns, weights in _blocks(q, k):
                if d_values is not None:
                    d_values[sample, columns].addmm_(weights.T, gradient[sample, rows])
                weights *= side[rows] @ v[columns].T
                d_queries[sample, rows].addmm_(weights, k[columns])
                d_keys[sample, columns].addmm_(weights.T, q[rows])
        return d_queries, d_keys, None if d_values is None else d_values * allowed.unsqueeze(2), None
