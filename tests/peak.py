"""
The peak memory of a real iteration, without its data: the oracle for memory.py.

Runs the model, the loss, backward and the optimizer on fake tensors, which have shapes and lifetimes but no
bytes, and counts the bytes of the storages that are alive.
"""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

class Peak(TorchDispatchMode):
    """ counts the bytes of the storages that operations have made and that are still alive """

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.seen, self.watches = 0, 0, set(), True

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        if key in self.seen:
            self.seen.discard(key)
            self.alive -= size

    def leave_out(self, tensors):
        """ from now on, count these no more """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self.seen:
                self.remove(storage._cdata, storage.nbytes())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out) if self.watches else ():
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out
