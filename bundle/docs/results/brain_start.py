"""Make weights to start the last stage of the training of `brain` from: what was learned at half resolution.

    python bundle/docs/results/brain_start.py output/brain/coarse/model.pt output/brain/start.pt

`brain_coarse.json` trains the attention and the first U-Net on images of 4 mm. In `CARL` with `nesting="right"` both
do the same on images of 2 mm, which it averages for them; its second U-Net is new and answers zero.
"""

from __future__ import annotations

import fire

from equireg.networks import CARL, PairNetwork
from equireg.weights import read_state, save_atomically

PLACES = {"first.": "net.steps.first.", "second.": "net.steps.second.first.net."}


def main(coarse: str, output: str) -> None:
    """Write the weights of `brain.json` that answer as those of `brain_coarse.json` do.

    Args:
        coarse: weights that a training with `brain_coarse.json` wrote.
        output: where the new weights go.
    """
    network = CARL(
        3, feature_channels=64, factor=6, nesting="right", refinement_channels=(16, 32, 64, 96, 96), padding=1
    )
    state = PairNetwork(network).state_dict()
    for name, value in read_state(coarse).items():
        stage = next(prefix for prefix in PLACES if name.startswith(prefix))
        state[name.replace(stage, PLACES[stage], 1)] = value
    PairNetwork(network).load_state_dict(state)
    save_atomically(state, output)


if __name__ == "__main__":
    fire.Fire(main)
