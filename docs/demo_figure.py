"""The pictures of `make demo`: what pretraining sees and reconstructs, and the segmentation of a new scan.

    python docs/demo_figure.py demo
"""

import dataclasses
import glob
import os
import sys

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import pretrain  # noqa: E402


def reconstructions(folder, count):
    """Held-out patches of the demo's pretraining: [(augmented, masked, reconstruction, target) middle
    slices]."""
    checkpoint = common.load_checkpoint(f"{folder}/runs/pretrain/last.pt")
    cfg = dataclasses.replace(pretrain.Config(), **checkpoint["config"])
    model = models.build_model(cfg.model, "pretrain", decoder=cfg.decoder, skips=cfg.skips).eval()
    models.load_weights(model, checkpoint, part="all")
    _, held_out, _ = pretrain.open_data(cfg)
    dataset = data.Crops(held_out, cfg.patch_size, 5, "all")
    panels = []
    for index in range(min(count, len(held_out))):
        batch = data.collate([dataset[0, index]])
        image, target, mask = pretrain.make_views(cfg, batch, torch.device("cpu"), torch.float32)
        unmasked, _, _ = pretrain.make_views(dataclasses.replace(cfg, mask_ratio=1e-9), batch,
                                             torch.device("cpu"), torch.float32)
        with torch.no_grad():
            output = model(image)
        middle = cfg.patch_size // 2
        panels.append([volume[0, 0, :, :, middle] for volume in (unmasked, image, output, target)])
    return panels


def segmentation(folder):
    """The new scan: (slice, truth, prediction) where the lesion is largest."""
    scan = glob.glob(f"{folder}/new/**/*FLAIR.nii.gz", recursive=True)[0]
    truth = nib.load(scan.replace("FLAIR", "lesion")).get_fdata() > 0
    found = nib.load(f"{folder}/segmentation.nii.gz").get_fdata() > 0
    volume = nib.load(scan).get_fdata()
    axis = int(np.argmin(volume.shape))
    at = int(np.argmax(truth.sum(tuple(a for a in range(3) if a != axis))))
    return [np.take(array, at, axis) for array in (volume, truth, found)]


def main(folder):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = reconstructions(folder, 3)
    volume, truth, found = segmentation(folder)
    figure, axes = plt.subplots(len(panels) + 1, 4, figsize=(9, 2.4 * (len(panels) + 1)))
    titles = ("augmented input", "masked input", "reconstruction", "target (clean, unmasked)")
    for row, images in zip(axes, panels, strict=False):
        for axis, image, title in zip(row, images, titles, strict=True):
            axis.imshow(image.T, cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_title(title, fontsize=9)
    for axis, overlay, title in zip(axes[-1], (None, truth, found), ("new scan", "truth", "prediction"),
                                    strict=False):
        axis.imshow(volume.T, cmap="gray", origin="lower")
        axis.set_title(title, fontsize=9)
        if overlay is not None and overlay.any():
            axis.contour(overlay.T, levels=[0.5], colors="tab:red", linewidths=1)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(f"{folder}/demo.png", dpi=110)
    print(f"wrote {folder}/demo.png")


if __name__ == "__main__":
    main(sys.argv[1])
