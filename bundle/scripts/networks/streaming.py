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
BOUND = 64.0  # of what is taken at all: from about 70 on sums vanish, from about 80 on they may overflow
QUERIES, KEYS = 512, 1024  # of a block: two megabytes of products


def streamed_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Average values by softmax weights of the unscaled products of queries and keys, block by block.

    Args:
        queries: `(B, Q, F)`, float32 or float64.
        keys: `(B, K, F)`; the product of a query's length and a key's is at most 64.
        values: `(B, K, V)`.
        allowed: `(B, K)`, boolean, at least one true in each sample; other keys get no weight.

    Returns:
        `(B, Q, V)`. It can be differentiated once, by queries, keys and values.

    Raises:
        ValueError: if these lengths are larger.

    Example:
        >>> one_hot = torch.eye(3).unsqueeze(0)
        >>> allowed = torch.tensor([[True, False, False]])
        >>> streamed_attention(one_hot, one_hot, torch.arange(3.0).reshape(1, 3, 1) + 5.0, allowed).flatten().tolist()
        [5.0, 5.0, 5.0]
    """
    with torch.autocast(queries.device.type, enabled=False):
        longest = [float(vectors.detach().norm(dim=2).max()) for vectors in (queries, keys)]
        if longest[0] * longest[1] > BOUND:  # NaN passes, and is seen in the answer
            lengths = f"{longest[0]:g} and {longest[1]:g}"
            raise ValueError(f"lengths of queries and keys should have a product of at most {BOUND:g}, got {lengths}.")
        return _StreamedAttention.apply(queries, keys, values, allowed)[0]


def _blocks(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield exp(products - LARGEST) of blocks of `(Q, F)` and `(K, F)`, and which rows of each they are of."""
    for first in range(0, len(queries), QUERIES):
        rows = slice(first, first + QUERIES)
        for start in range(0, len(keys), KEYS):
            columns = slice(start, start + KEYS)
            yield rows, columns, (queries[rows] @ keys[columns].T).sub_(LARGEST).exp_()


def _with_ones(values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Put a 1 behind every value, whose sums are those of the softmax, and zeros for keys that are not allowed."""
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=2) * allowed.unsqueeze(2)


class _StreamedAttention(torch.autograd.Function):
    """What `streamed_attention` returns, and the sum of each query's weights."""

    @staticmethod
    def forward(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = _with_ones(values, allowed)
        sums = queries.new_zeros([*queries.shape[:2], values.shape[2]])
        for q, k, v, total in zip(queries, keys, values, sums):
            for rows, columns, weights in _blocks(q, k):
                total[rows].addmm_(weights, v[columns])
        return sums[..., :-1] / sums[..., -1:], sums[..., -1:].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        answer, total = output
        ctx.mark_non_differentiable(total)
        ctx.save_for_backward(*inputs, answer, total)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        # The way back may run inside of an autocast that the way there had left.
        with torch.autocast(gradient.device.type, enabled=False):
            d_queries, d_keys, d_values = _StreamedGradient.apply(*ctx.saved_tensors, gradient, ctx.needs_input_grad[2])
        return d_queries, d_keys, d_values, None


class _StreamedGradient(torch.autograd.Function):
    """The way back, a function of its own so that a second derivative is an error wherever the first one came from."""

    @staticmethod
    def forward(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        allowed: torch.Tensor,
        answer: torch.Tensor,
        total: torch.Tensor,
        gradient: torch.Tensor,
        by_values: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        values = _with_ones(values, allowed)
        # With p the weights, d answer / d product = p (value - answer): the part of the answer meets the 1s.
        gradient = gradient / total
        sides = torch.cat([gradient, -(gradient * answer).sum(dim=2, keepdim=True)], dim=2)
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        d_values = torch.zeros_like(values[..., :-1]) if by_values else None
        for sample, (q, k, v, side) in enumerate(zip(queries, keys, values, sides)):
            for rows, columns, weights in _blocks(q, k):
                if d_values is not None:
                    d_values[sample, columns].addmm_(weights.T, gradient[sample, rows])
                weights *= side[rows] @ v[columns].T
                d_queries[sample, rows].addmm_(weights, k[columns])
                d_keys[sample, columns].addmm_(weights.T, q[rows])
        return d_queries, d_keys, None if d_values is None else d_values * allowed.unsqueeze(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("streamed_attention can be differentiated only once.")
