"""What tests ask of the operations of torch that ran."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """How many operations ran, and the size in bytes of the largest tensor that one of them returned."""

    def __init__(self):
        super().__init__()
        self.num_operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num_operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out
