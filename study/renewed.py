"""finetune.py with a pretrained encoder whose first level is new.

    python study/renewed.py --ckpt study/work/pretrain-base-noskips/last.pt --task study/lesion.yaml

All options are those of finetune.py. Without skips, what the first level finds comes to the decoder
through four poolings, so pretraining asks it for nothing fine. In segmentation its skip is all that
the decoder has of single voxels. Here the deep levels are pretrained, and the first one is not.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config  # noqa: E402
import finetune  # noqa: E402


def then_renewed(new_network):
    """finetune.new_network, with a first level that is not the checkpoint's."""
    def build(make, pretrained, seed):
        # What the encoder of this fold has from scratch.
        torch.manual_seed(seed)
        fresh = make().encoder.in_conv

        model, report = new_network(make, pretrained, seed)
        model.encoder.in_conv = fresh
        return model, f"{report}\nits first level, in_conv, is new"
    return build


if __name__ == "__main__":
    finetune.new_network = then_renewed(finetune.new_network)
    config.run(finetune.main, finetune.Config)
