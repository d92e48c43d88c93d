"""Which library computes a matrix product: a choice of speed alone, the mathematics stand in `model.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL = 1 << 20  # multiply-adds below which oneDNN's call costs more than it gains


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for (..., in) and weights (out, in).

    On CPUs torch gives float32 products to BLAS and bfloat16 ones to oneDNN. oneDNN's float32 products are a fifth
    faster than MKL's where this was measured (Zen 4: prompts and single tokens alike), so they go there too; it knows
    no gradients, so only where none are recorded.
    """
    eager = ONEDNN and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    float32 = x.dtype is torch.float32 and x.device.type == "cpu"
    if eager and float32 and x.numel() * weight.shape[0] >= SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)
