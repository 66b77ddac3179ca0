"""A GPU that is not there: fake tensors that claim to be on one, by which a CPU build of torch tells mistakes.

A fake tensor has a shape, a type and a device, and no numbers. Operations on fake tensors of ``cuda`` are
refused where they mix devices, and where they would make the processor wait for the GPU: ``.item()``,
``bool(tensor)``, ``nonzero``, an index by a mask. What runs under ``fake_gpu`` does neither.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)
DEVICE_TYPES, CUDA, META = 32, 1, 14  # numbers of c10::DeviceType

Thing = TypeVar("Thing")


def _stand_in_for_cuda() -> None:
    """Has a CPU build of torch ask the meta device, which does nothing, what it would ask CUDA.

    Autograd and Python's indexing look up the current device and stream of each tensor; without CUDA
    there is nobody to answer.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[CUDA]:
        guards[CUDA] = guards[META]


class FakeGpu:
    """Makes fake things of real ones, within ``fake_gpu``."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fake tensor on the GPU."""
        return torch.empty(shape, dtype=dtype, device=GPU)

    def of(self, thing: Thing) -> Thing:
        """A fake one like a tensor, a module (changed in place) or a dataclass of them."""
        made: Any = thing
        if isinstance(thing, nn.Parameter):
            made = nn.Parameter(self.tensor(*thing.shape, dtype=thing.dtype), thing.requires_grad)
        elif isinstance(thing, Tensor):
            made = self.tensor(*thing.shape, dtype=thing.dtype)
        elif isinstance(thing, nn.Module):
            for part in thing.modules():
                for named in (part._parameters, part._buffers):
                    named.update({name: self.of(value) for name, value in named.items()})
        elif is_dataclass(thing) and not isinstance(thing, type):
            made = replace(thing, **{f.name: self.of(getattr(thing, f.name)) for f in fields(thing)})
        return made


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """While this lasts every new tensor is fake, and ``cuda`` is a device to put it on."""
    _stand_in_for_cuda()
    with FakeTensorMode():
        yield FakeGpu()
