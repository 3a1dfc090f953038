"""Train `CARL` in the loop of MONAI's registration tutorials, in place of their network, on synthetic anatomy.

    python bundle/docs/hosts/tutorial_loop.py

Everything around the network is MONAI's: data loader, `Warp`, similarity, bending energy; and the optimizer is Adam.
"""

from __future__ import annotations

import fire
import torch
from monai.data import DataLoader
from monai.losses import BendingEnergyLoss, LocalNormalizedCrossCorrelationLoss
from monai.networks.blocks import Warp
from monai.utils import set_determinism
from torch import nn

from equireg.data import SyntheticPairDataset
from equireg.networks import CARL


def train(network: nn.Module, loader: DataLoader, spatial_dims: int, epochs: int, lr: float = 1e-3) -> list[float]:
    """Train a network without labels, as the tutorials do.

    Args:
        network: called `network(moving, fixed)`, returns a ddf `(B, D, *fixed shape)` in voxels.
        loader: of batches with `moving` and `fixed`, `(B, 1, *shape)` on one grid.
        spatial_dims: 2 or 3.
        epochs: passes over the data.
        lr: learning rate of Adam.

    Returns:
        Mean loss of each epoch.
    """
    warp_layer = Warp(mode="bilinear", padding_mode="border")
    image_loss = LocalNormalizedCrossCorrelationLoss(spatial_dims, kernel_size=7, kernel_type="gaussian")
    regularization = BendingEnergyLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    history = []
    for epoch in range(epochs):
        network.train()
        total = 0.0
        for batch in loader:
            moving, fixed = batch["moving"], batch["fixed"]
            optimizer.zero_grad()
            ddf = network(moving, fixed)  # the tutorials: model(torch.cat((moving, fixed), dim=1))
            moved = warp_layer(moving, ddf)
            loss = image_loss(moved, fixed) + 0.5 * regularization(ddf)
            loss.backward()
            optimizer.step()
            total += loss.item()
        history.append(total / len(loader))
        print(f"epoch {epoch + 1}/{epochs}, average loss: {history[-1]:.4f}")
    return history


def pairs(spatial_dims: int, count: int = 8) -> DataLoader:
    """Return batches of synthetic pairs, deformed and shifted apart, the same in every epoch."""
    size = {2: 48, 3: 32}[spatial_dims]
    return DataLoader(SyntheticPairDataset(spatial_dims, size, length=count), batch_size=2)


def main(spatial_dims: int = 2, epochs: int = 8) -> list[float]:
    """Train a small network and print the loss of each epoch.

    Args:
        spatial_dims: 2 or 3.
        epochs: passes over the data.

    Returns:
        Mean loss of each epoch.
    """
    set_determinism(seed=0)
    network = CARL(spatial_dims, feature_channels=16, refinement_channels=(8, 16))
    return train(network, pairs(spatial_dims), spatial_dims, epochs)


if __name__ == "__main__":
    fire.Fire(main, serialize=lambda _: None)
