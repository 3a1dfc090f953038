"""The network of the weights `brain`, and how it is put together of what was trained apart.

    python bundle/docs/results/brain_network.py attention.pt unet/model.pt model.pt

`brain_attention.py` trains the attention, `brain.json` a U-Net on pairs that are aligned already. Both U-Nets of the
network are that one: the second goes on where the first stopped.
"""

from __future__ import annotations

import fire

from equireg.networks import CARL
from equireg.weights import load_network, read_state, save_atomically


def brain_network(nesting: str) -> CARL:
    """Return the network, untrained, of a nesting: "attention" or "deck"."""
    return CARL(
        3,
        feature_channels=64,
        factor=6,
        nesting=nesting,
        refinement_channels=(16, 32, 64, 96, 96),
        padding=1,
        affine_rounds=5,
        affine_turns="grid",
    )


def main(attention: str, unet: str, output: str) -> None:
    """Write the weights of the whole network.

    Args:
        attention: weights that `brain_attention.py` wrote.
        unet: weights that a training with `brain.json` wrote.
        output: where the new weights go.
    """
    network = brain_network("deck")
    network.attention_stage().load_state_dict(load_network(attention).attention_stage().state_dict())
    learned = read_state(unet)
    for refinement in (network.steps.first.second, network.steps.second):
        refinement.load_state_dict(learned)
    save_atomically(network.state_dict(), output)


if __name__ == "__main__":
    fire.Fire(main)
