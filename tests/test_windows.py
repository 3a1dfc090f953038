"""The Gaussian window, against SciPy's filter."""

from __future__ import annotations

import pytest
import torch
from scipy import ndimage

from equireg.windows import gaussian_blur


@pytest.mark.parametrize("shape", [(11,), (9, 14), (7, 12, 5)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_blur_is_the_gaussian_cut_at_two_sigma(shape: tuple[int, ...], sigma: float) -> None:
    maps = torch.rand(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = max(1, round(2 * sigma))
    expected = [
        [ndimage.gaussian_filter(one.numpy(), sigma, mode="constant", radius=radius) for one in sample]
        for sample in maps
    ]
    assert abs(gaussian_blur(maps, sigma).numpy() - expected).max() < 1e-14
    assert torch.equal(torch.jit.script(gaussian_blur)(maps, sigma), gaussian_blur(maps, sigma))
