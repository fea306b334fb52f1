"""finetune.py with a pretrained encoder whose weights are scaled to the size of new ones.

    python study/scaled.py --ckpt study/work/pretrain-base/last.pt --task study/lesion.yaml

All options are those of finetune.py. Weights grow in pretraining. Behind each convolution of a
U-Net stands an instance norm, so their size does not change the output. Yet a step of AdamW has the
size of its rate, so that it turns large weights less. Here a pretrained encoder moves as fast as a
new one.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config  # noqa: E402
import finetune  # noqa: E402
import models  # noqa: E402
import validation  # noqa: E402


@torch.no_grad()
def scale(encoder):
    """Each convolution times one number, so that its weights have the size of new ones."""
    for block in encoder.modules():
        if isinstance(block, models.ConvNormAct):
            growth = validation.growth_of(block.conv.weight)
            block.conv.weight /= growth
            block.conv.bias /= growth


def then_scaled(new_network):
    """finetune.new_network, for an encoder that is scaled."""
    def build(*settings):
        model, report = new_network(*settings)
        scale(model.encoder)
        return model, report
    return build


if __name__ == "__main__":
    finetune.new_network = then_scaled(finetune.new_network)
    config.run(finetune.main, finetune.Config)
