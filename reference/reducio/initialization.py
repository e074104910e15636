"""First values of new networks' weights and tables; on the meta device, where a network has shapes alone, none.

torch 2.14 computes arange, random numbers and products of the meta device in Python, for which it imports sympy and
torch._dynamo: 0.8 s of a process that builds the networks only to load weights into them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_meta() -> bool:
    """Whether new tensors are on the meta device: inside `with torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def normal(*shape: int, scale: float) -> Tensor:
    """Gaussian values with standard deviation `scale`."""
    return torch.empty(shape) if on_meta() else torch.randn(shape) * scale
