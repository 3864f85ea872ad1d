"""Whether the Triton kernels of this package can be run on a device."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch


def kernels_run(device: torch.device) -> bool:
    """Whether kernels can be built and launched there; tried once, by launching each.

    Triton comes with torch for CUDA, and needs a C compiler and Python's headers besides. Where it
    cannot be used on a CUDA device, a warning says why, and plain operators do the same work.

    Args:
        device: Any device; False for one that is not CUDA's, and while a graph is recorded on one
            that was not asked for before.

    Example:
        >>> kernels_run(torch.device("cpu"))
        False
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    if device not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False
        _known[device] = _try(device)
    return _known[device]


_known: dict[torch.device, bool] = {}


@torch.no_grad()
def _try(device: torch.device) -> bool:
    try:
        from torch_worm_optim.mask_kernel import draw_mask_
        from torch_worm_optim.truncation_kernel import scale_removed_

        with torch.inference_mode(False):
            for dtype in (torch.float32, torch.bfloat16):
                entries = torch.arange(64, device=device).to(dtype)
                window = torch.zeros(1, 64, dtype=torch.uint8, device=device)
                draw_mask_([entries], window, 32, [0], 4)
                scale_removed_(entries, window[0], torch.ones((), device=device))
    except Exception as error:  # whatever Triton, a compiler or a driver has to say
        warnings.warn(
            f"Triton cannot run kernels on {device}, so masks are drawn and gradients truncated by "
            f"plain operators, which is slower. It said: {error}",
            stacklevel=3,
        )
        return False
    return True
