"""What comes before and after training keeps to its device and waits for nothing: fake tensors on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cryo_svae.particles import preprocessing
from cryo_svae.particles.known_poses import turned_ctf
from cryo_svae.particles.preprocessing import Preparation, prepare, working_ctf
from cryo_svae.results.class_averages import HalfPlane, Members, Sums
from tests.on_device import GPU, FakeGpu, fake_gpu
from tests.test_on_device import table

BOX, N = 16, 12
TYPES = (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int16, torch.uint16)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """Its tensors are not left in what is kept from call to call."""
    preprocessing._grid.cache_clear()
    with fake_gpu() as fake:
        yield fake
    preprocessing._grid.cache_clear()


def preparation(box_px: int) -> Preparation:
    return Preparation(box_px=box_px, pixel_size_angst=3.0, mask_diameter_angst=40.0, invert=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("box", [BOX, 24])
def test_preparation(gpu, box, dtype):
    images, usable = prepare(gpu.tensor(N, box, box, dtype=dtype), 3.0 * BOX / box, preparation(BOX))
    assert (images.device, images.shape, images.dtype) == (GPU, (N, BOX, BOX), torch.float32)
    assert (usable.device, usable.dtype) == (GPU, torch.bool)


@pytest.mark.parametrize("ctf", [False, True])
def test_a_batch_of_averages(ctf):
    """The half plane is made once, and may be waited for."""
    plane = HalfPlane(BOX, torch.device("cpu"))
    with fake_gpu() as gpu:
        vars(plane).update({name: gpu.of(value) for name, value in vars(plane).items()})
        psi = gpu.tensor(N)
        turned = turned_ctf(gpu.of(working_ctf(table(N), preparation(BOX))), psi) if ctf else None
        sums = Sums(6, plane)
        members = Members(gpu.tensor(N, dtype=torch.long), psi, gpu.tensor(N, 2), turned)
        sums.add(gpu.tensor(5, BOX, BOX), gpu.tensor(5, dtype=torch.bool), members[3:8])
        halves = plane.image(sums.signal / sums.power)
        assert (halves.device, halves.shape) == (GPU, (6, BOX, BOX))
        assert plane.ring_mean(sums.power).device == GPU
