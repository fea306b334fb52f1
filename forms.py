"""The forms in which a CPU and CUDA compute convolutions and norms fastest."""

import torch
from torch import nn

# A guess, until bench/gpu.py has measured it on a GPU.
CHANNELS_LAST_ON_CUDA = True  # memory format of U-Nets and MedNeXt; False: contiguous


def on_cpu(x):
    """Is x computed in the CPU's form? Tests say False here, to run on a CPU what CUDA runs."""
    return x.device.type == "cpu"


def quick_format(x):
    """x in the memory format in which its device convolves it fastest.

    A CPU: channels-last, but for the coarse levels, where the layout of the weights' gradient costs more than
    that gains. CUDA: as CHANNELS_LAST_ON_CUDA says."""
    channels_last = x[0, 0].numel() > 8 ** 3 if on_cpu(x) else CHANNELS_LAST_ON_CUDA
    if not channels_last:
        return x.contiguous()
    if x.shape[1] == 1:  # contiguous in both formats; what counts are the strides, which a copy sets
        return x.clone(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last_3d)


def instance_norm(x, weight=None, bias=None, slope=None, eps=1e-5):
    """Instance norm that keeps the memory format of x, (B, C, D, H, W), and a leaky ReLU of `slope` after it.

    torch's own does not know channels-last. It also returns a view, and the gradient of an operation in place
    on a view copies it three times: so the leaky ReLU is applied here, before there is a view."""
    if x.is_contiguous():
        # A channel of a sample is a channel of one long sample, on which batch norm is instance norm.
        batch = len(x)
        weights = (None, None) if weight is None else (weight.repeat(batch), bias.repeat(batch))
        y = nn.functional.batch_norm(x.flatten(0, 1)[None], None, None, *weights, True, eps=eps)
    elif on_cpu(x):
        samples = x.split(1) if len(x) > 1 else [x]
        parts = [nn.functional.batch_norm(one, None, None, weight, bias, True, eps=eps) for one in samples]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
    else:
        # Written out: compiled, it is one reduction and one pass that takes the leaky ReLU along.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (2, 3, 4), correction=0, keepdim=True)
        y = (wide - mean) * (variance + eps).rsqrt()
        if weight is not None:
            y = y * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
        y = y.to(x.dtype)
    if slope is not None:
        y = nn.functional.leaky_relu(y, slope, inplace=True)
    return y.view_as(x)
