"""Put what was learned at half resolution into the network for images of 2 mm.

    python bundle/docs/results/brain_start.py output/brain/coarse/model.pt output/brain/start.pt
    python bundle/docs/results/brain_start.py output/brain/attention.pt output/brain/model.pt --nesting attention

`brain_coarse.json` trains the attention and the first U-Net on images of 4 mm. In `CARL` with `nesting="right"` both
do the same on images of 2 mm, which it averages for them; its second U-Net is new and answers zero. With
`nesting="attention"`, which has no U-Nets, the attention is taken alone.
"""

from __future__ import annotations

import fire

from equireg.networks import CARL, PairNetwork
from equireg.weights import read_state, save_atomically

PLACES = {
    "right": {"first.": "net.steps.first.", "second.": "net.steps.second.first.net."},
    "attention": {"first.": "net.steps."},
}


def main(coarse: str, output: str, nesting: str = "right") -> None:
    """Write weights of `CARL` that do what those of `brain_coarse.json` do.

    Args:
        coarse: weights that a training with `brain_coarse.json` wrote, or `brain_attention.py`.
        output: where the new weights go.
        nesting: "right", what `brain.json` trains, or "attention".
    """
    network = CARL(
        3,
        feature_channels=64,
        factor=6,
        nesting=nesting,
        refinement_channels=(16, 32, 64, 96, 96),
        padding=1,
        affine_rounds=5,
    )
    state = PairNetwork(network).state_dict()
    learned = {name: value for name, value in read_state(coarse).items() if nesting == "right" or name[:6] == "first."}
    for name, value in learned.items():
        begin = next((begin for begin in PLACES[nesting] if name.startswith(begin)), None)
        if begin is None:
            raise ValueError(f"{coarse} holds weights of another network: it has '{name}'.")
        state[name.replace(begin, PLACES[nesting][begin], 1)] = value
    if not learned:
        raise ValueError(f"{coarse} holds no weights of the first stage, whose names begin with 'first.'.")
    PairNetwork(network).load_state_dict(state)
    save_atomically(state, output)


if __name__ == "__main__":
    fire.Fire(main)
