"""Whether the Triton kernels of this package can be run on a device."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch


@cache
def kernels_run(device: torch.device) -> bool:
    """Whether a kernel can be built and launched there; tried once, by launching one.

    Triton comes with torch for CUDA, and needs a C compiler and Python's headers besides. Where it
    cannot be used on a CUDA device, a warning says why, and plain operators do the same work.

    Args:
        device: Any device; False for one that is not CUDA's.

    Example:
        >>> kernels_run(torch.device("cpu"))
        False
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from torch_worm_optim.truncation_kernel import scale_removed_

        gradient, strength = torch.ones(2, device=device).unbind()
        newest = torch.zeros(1, dtype=torch.uint8, device=device)
        scale_removed_(gradient.view(1), newest, strength)
    except Exception as error:  # whatever Triton, a compiler or a driver has to say
        warnings.warn(
            f"Triton cannot run kernels on {device}, so masks are drawn and gradients truncated by "
            f"plain operators, which is slower. It said: {error}",
            stacklevel=2,
        )
        return False
    return True
