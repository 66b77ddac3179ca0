"""A GPU that is not there: fake tensors that claim to be on one, for tests on a CPU build of torch.

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
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)
MEMORY = 80 * 2**30  # of the GPU, bytes
DEVICE_TYPES, CUDA, META = 32, 1, 14  # numbers of c10::DeviceType

Thing = TypeVar("Thing")


def _stand_in_for_cuda() -> None:
    """Has a CPU build of torch ask the meta device, which does nothing, what it would ask CUDA.

    Autograd's graph and Python's indexing look up the current device and stream of each tensor; without
    CUDA there is nobody to answer.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[CUDA]:
        guards[CUDA] = guards[META]


def _gradients(outputs: list[Tensor], gradients: list[Tensor]) -> dict[Tensor, Tensor]:
    """Gradient of each leaf that outputs depend on, by autograd's own formulas.

    Autograd's engine looks for a real GPU's streams as soon as a gradient is on one.
    """
    order: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        seen.add(node)
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                visit(other)
        order.append(node)

    pending: dict[Any, list[Tensor | None]] = {}

    def add(node: Any, place: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            of_node = pending.setdefault(node, [None] * max(1, len(node._input_metadata)))
            before = of_node[place]
            gradient = gradient.sum_to_size(node._input_metadata[place].shape)  # of what was broadcast
            of_node[place] = gradient if before is None else before + gradient

    for output, gradient in zip(outputs, gradients, strict=True):
        if output.grad_fn not in seen:
            visit(output.grad_fn)
        add(output.grad_fn, output.output_nr, gradient)
    leaves: dict[Tensor, Tensor] = {}
    for node in reversed(order):
        received = pending.pop(node, None)
        if received is None:
            continue
        if hasattr(node, "variable"):
            assert received[0] is not None
            leaves[node.variable] = received[0]
            continue
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        given = call(*received)
        given = given if isinstance(given, tuple) else (given,)
        if len(given) > len(
            node.next_functions
        ):  # a function of ours, some of whose arguments are no tensors
            given = tuple(each for each in given if each is not None)
        for (other, place), gradient in zip(node.next_functions, given, strict=True):
            add(other, place, gradient)
    return leaves


@torch.no_grad()
def _backward(output: Tensor) -> None:
    for leaf, gradient in _gradients([output], [torch.ones_like(output)]).items():
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


@torch.no_grad()
def _grad(output: Tensor, leaf: Tensor, gradient: Tensor) -> tuple[Tensor]:
    return (_gradients([output], [gradient])[leaf],)


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
    card = SimpleNamespace(total_memory=MEMORY)
    with (
        FakeTensorMode(),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
    ):
        yield FakeGpu()
