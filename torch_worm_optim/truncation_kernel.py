"""A Triton kernel that scales the gradients of removed entries in one pass, on a CUDA device.

Plain torch needs a multiplier as large as the gradient, which is read as well; this reads the byte
of an entry from the window. It is imported only where there is such a device.
"""

# Annotations are objects here, not strings: Triton looks for `tl.constexpr` among them.

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _scale_removed(gradient, newest, strength, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply by ``strength`` where bit 0 of ``newest`` is 0; half precision in single."""
    entries = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = entries < n
    kept = (tl.load(newest + entries, inside, other=1) & 1) != 0
    before = tl.load(gradient + entries, inside)
    # torch rounds a number that a half-precision tensor is multiplied by to half precision, too.
    factor = tl.load(strength).to(before.dtype).to(tl.float32)
    after = (before.to(tl.float32) * factor).to(before.dtype)
    tl.store(gradient + entries, tl.where(kept, before, after), inside)


def scale_removed_(gradient: Tensor, newest: Tensor, strength: Tensor) -> None:
    """Scale the removed entries of a gradient, in place, without waiting for the device.

    Args:
        gradient: Contiguous tensor of float32, float16 or bfloat16 on a CUDA device.
        newest: uint8 tensor of as many entries, contiguous; an entry is kept where bit 0 is 1.
        strength: float32 scalar on the device: what removed entries are multiplied by.
    """
    n = gradient.numel()
    grid = (triton.cdiv(n, _BLOCK),)
    with torch.cuda.device(gradient.device):
        _scale_removed[grid](gradient, newest, strength, n, block=_BLOCK)
