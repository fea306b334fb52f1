"""finetune.py with an encoder that stays as it is: only the decoder learns.

    python study/frozen.py --ckpt study/work/pretrain-base/last.pt --task study/lesion.yaml

All options are those of finetune.py. What an encoder knows before the first labelled scan is seen
here: a pretrained one beside a random one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config  # noqa: E402
import finetune  # noqa: E402
import training  # noqa: E402


def of_the_decoder(optimizer):
    """training.adamw, for the weights of the decoder alone."""
    return lambda model, *settings: optimizer(model.pred_head, *settings)


if __name__ == "__main__":
    training.adamw = of_the_decoder(training.adamw)
    config.run(finetune.main, finetune.Config)
