"""Which library computes a matrix product: a choice of speed alone, the mathematics stand in `model.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL = 1 << 20  # multiply-adds below which oneDNN's call costs more than it gains
LONG, LARGE = 1 << 10, 1 << 22  # rows, and weights, from which on two bfloat16 rows take less time than one


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for (..., in) and weights (out, in).

    On CPUs torch gives float32 products to BLAS and bfloat16 ones to oneDNN. oneDNN's float32 products are a fifth
    faster than MKL's where this was measured (Zen 4: prompts and single tokens alike), so they go there too; it knows
    no gradients, so only where none are recorded. A single bfloat16 row meets a kernel of its own there, which reads
    large weights a tenth slower than the kernel for several rows does: it is sent along twice.
    """
    eager = ONEDNN and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not eager or x.device.type != "cpu":
        return F.linear(x, weight)
    if x.dtype is torch.float32 and x.numel() * weight.shape[0] >= SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    single_long_row = x.numel() == x.shape[-1] >= LONG
    if x.dtype is torch.bfloat16 and single_long_row and weight.numel() >= LARGE:
        twice = F.linear(x.reshape(1, -1).expand(2, -1).contiguous(), weight)
        return twice[:1].view(*x.shape[:-1], -1)
    return F.linear(x, weight)
