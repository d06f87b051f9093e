"""What tensors a computation makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MadeTensors(TorchDispatchMode):
    """Notes what each operation inside returns: shapes, and where the numbers are."""

    def __init__(self):
        super().__init__()
        self.shapes, self.storages = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.shapes.add(tuple(one.shape))
                if not one.is_meta:
                    self.storages.setdefault(one.numel(), set()).add(one.untyped_storage().data_ptr())
        return out

    @property
    def most(self):
        """Numbers in the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.shapes)

    def storages_of(self, least):
        """Where the tensors of so many numbers and more are."""
        return {place for size, places in self.storages.items() if size >= least for place in places}

    def has(self, *shape):
        """Whether a tensor has this shape, but for sizes of one."""
        return any(tuple(size for size in one if size != 1) == shape for one in self.shapes)
