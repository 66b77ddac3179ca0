"""Preparation: resampling is Fourier cropping, the background becomes N(0, 1), junk is found."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from cryo_svae.config import PreparationConfig
from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import write_stack
from cryo_svae.imaging import geometry
from cryo_svae.particles import preprocessing
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.preprocessing import (
    Preparation,
    plan_preparation,
    prepare,
    prepared_images,
    resampling_matrix,
    soft_circle,
    working_ctf,
)
from tests.conftest import image_names, optics_columns


def preparation(box: int, pixel_size: float, *, invert: bool = False) -> Preparation:
    return Preparation(
        box_px=box, pixel_size_angst=pixel_size, mask_diameter_angst=(box - 2) * pixel_size, invert=invert
    )


def test_the_same_grid_is_the_identity():
    torch.testing.assert_close(resampling_matrix(16, 2.0, 16, 2.0), torch.eye(16), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("box", "cropped"), [(32, 16), (32, 20), (40, 18)])
def test_a_coarser_grid_is_fourier_cropping(box, cropped):
    image = torch.randn(box, box)
    matrix = resampling_matrix(box, 1.0, cropped, box / cropped)
    ours = matrix @ image @ matrix.T
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(image)))
    half = cropped // 2
    kept = spectrum[box // 2 - half : box // 2 + half, box // 2 - half : box // 2 + half].clone()
    kept[0] = kept[:, 0] = 0.0  # the Nyquist row and column are shared out differently
    expected = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kept))).real * (cropped / box) ** 2
    difference = torch.fft.fft2(ours - expected)
    difference[half] = difference[:, half] = 0.0
    assert float(difference.abs().max()) < 1e-3


def test_the_centre_pixel_stays_the_centre():
    image = torch.zeros(32, 32)
    image[16, 16] = 1.0
    matrix = resampling_matrix(32, 1.5, 14, 2.0)
    resampled = matrix @ image @ matrix.T
    assert divmod(int(resampled.argmax()), 14) == (7, 7)


def test_the_background_becomes_standard_and_the_sign_is_changed_on_request():
    images = 1000.0 + 30.0 * torch.randn(6, 24, 24)
    images[:, 12, 12] += 3000.0
    for invert in (False, True):
        prepared, usable = prepare(images, 2.0, preparation(24, 2.0, invert=invert))
        outside = geometry.pixel_grid(24).norm(dim=-1) > 11
        assert usable.all()
        assert float(prepared[:, outside].mean(1).abs().max()) < 1e-4
        torch.testing.assert_close(prepared[:, outside].std(1), torch.ones(6), atol=1e-4, rtol=0)
        assert (prepared[:, 12, 12] < 0).all() == invert


def test_nan_infinite_and_constant_images_are_not_usable_and_are_zero():
    images = torch.randn(4, 16, 16)
    images[0, 3, 3] = torch.nan
    images[1, 0, 0] = torch.inf
    images[2] = 5.0
    prepared, usable = prepare(images, 1.0, preparation(16, 1.0))
    assert usable.tolist() == [False, False, False, True]
    assert not prepared[:3].any()
    assert torch.isfinite(prepared).all()


def test_the_soft_circle_is_one_inside_and_zero_outside():
    mask = soft_circle(32, 8.0, 4.0)
    assert mask[16, 16 + 8] == 1.0
    assert mask[16, 16 + 12] == 0.0
    assert 0.49 < mask[16, 16 + 10] < 0.51


def test_the_working_box_is_the_images_own_up_to_a_limit(make_dataset):
    particles = read_particles(make_dataset(box=16))
    assert plan_preparation(particles, PreparationConfig(), 64).box_px == 16
    limited = plan_preparation(particles, PreparationConfig(), 12)
    assert (limited.box_px, limited.pixel_size_angst) == (12, 2.5 * 16 / 12)
    with pytest.raises(InputError, match="--box"):
        plan_preparation(particles, PreparationConfig(box=32), 64)
    with pytest.raises(InputError, match="--mask-diameter"):
        plan_preparation(particles, PreparationConfig(mask_diameter=50.0), 64)


def test_optics_groups_of_other_pixel_sizes_and_boxes_come_to_one_grid(tmp_path, make_dataset):
    """The same blob, seen at 2 Å in 24 px and at 3 Å in 16 px, is the same image once prepared."""
    fine, coarse = 2.0, 3.0
    images = {}
    for name, box, size in (("fine", 24, fine), ("coarse", 16, coarse)):
        y, x = (np.mgrid[:box, :box] - box // 2) * size
        blob = np.exp(-((x - 4.0) ** 2 + (y + 6.0) ** 2) / (2 * 5.0**2))
        images[name] = (blob + 1e-3 * np.random.default_rng(0).standard_normal((1, box, box))).astype("f4")
    make_dataset(1, images=images["fine"], folder=tmp_path / "fine")
    make_dataset(1, images=images["coarse"], folder=tmp_path / "coarse")
    star = make_dataset(
        2,
        optics=optics_columns(2, rlnImagePixelSize=["2.0", "3.0"], rlnImageSize=["24", "16"]),
        particles={
            "rlnImageName": ["000001@coarse/stack.mrcs", "000001@fine/stack.mrcs"],
            "rlnOpticsGroup": ["2", "1"],
        },
    )
    particles = read_particles(star)
    plan = plan_preparation(particles, PreparationConfig(), 64)
    assert (plan.box_px, plan.pixel_size_angst) == (16, 3.0)
    [(_, prepared, _)] = prepared_images(ImageSource(particles), np.arange(2), plan)
    correlation = np.corrcoef(prepared[0].flatten(), prepared[1].flatten())[0, 1]
    assert correlation > 0.999


def test_chunks_come_in_order(make_dataset):
    particles = read_particles(make_dataset(7))
    source = ImageSource(particles)
    plan = plan_preparation(particles, PreparationConfig(), 64)
    index = np.array([6, 0, 3, 2, 5])
    parts = list(prepared_images(source, index, plan, chunk=2))
    assert np.concatenate([part for part, _, _ in parts]).tolist() == index.tolist()
    [(_, whole, _)] = prepared_images(source, index, plan)
    torch.testing.assert_close(torch.cat([images for _, images, _ in parts]), whole)


@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_whatever_type_a_stack_has_its_images_are_prepared_as_in_float32(make_dataset, mode, dtype):
    """A half of the particles is in a stack of another type, at numbers that both types hold."""
    counts = np.random.default_rng(1).integers(0, 100, (6, 16, 16))
    star = make_dataset(6, images=counts.astype("f4"))
    whole = cat_prepared(read_particles(star))
    names = image_names(3) + image_names(3, "other.mrcs")
    star = make_dataset(6, images=counts[:3].astype("f4"), particles={"rlnImageName": names})
    write_stack(star.parent / "other.mrcs", counts[3:].astype("f4"), pixel_size_angst=2.5)
    header = bytearray((star.parent / "other.mrcs").read_bytes()[:1024])
    struct.pack_into("<i", header, 12, mode)
    (star.parent / "other.mrcs").write_bytes(bytes(header) + counts[3:].astype(f"<{dtype}").tobytes())
    particles = read_particles(star)
    assert ImageSource(particles).read(np.arange(3, 6)).dtype == np.dtype(dtype)
    torch.testing.assert_close(cat_prepared(particles), whole, rtol=0, atol=1e-6)


def cat_prepared(particles) -> torch.Tensor:
    plan = plan_preparation(particles, PreparationConfig(), 64)
    [(_, prepared, usable)] = prepared_images(ImageSource(particles), np.arange(len(particles)), plan)
    assert usable.all()
    return prepared


def test_chunks_are_of_one_size_in_bytes(make_dataset, monkeypatch):
    particles = read_particles(make_dataset(7))
    monkeypatch.setattr(preprocessing, "CHUNK_BYTES", 3 * 4 * 16 * 16 + 5)
    plan = plan_preparation(particles, PreparationConfig(), 64)
    assert [len(part) for part, _, _ in prepared_images(ImageSource(particles), np.arange(7), plan)] == [
        3,
        3,
        1,
    ]


def test_several_readers_give_the_same_and_end_at_the_first_error(make_dataset, monkeypatch):
    particles = read_particles(make_dataset(40))
    plan = plan_preparation(particles, PreparationConfig(), 64)
    index = np.random.default_rng(0).permutation(40)
    whole = torch.cat([images for _, images, _ in prepared_images(ImageSource(particles), index, plan)])
    monkeypatch.setitem(preprocessing.READERS, "cpu", 4)
    reads = []
    source = ImageSource(particles, lambda: reads.append(len(reads)))
    parts = list(prepared_images(source, index, plan, chunk=3))
    assert np.concatenate([part for part, _, _ in parts]).tolist() == index.tolist()
    torch.testing.assert_close(torch.cat([images for _, images, _ in parts]), whole, rtol=0, atol=1e-5)
    assert len(reads) == 14

    def stop() -> None:
        if len(reads) > 17:
            raise KeyboardInterrupt
        reads.append(0)

    chunks = prepared_images(ImageSource(particles, stop), index, plan, chunk=3)
    with pytest.raises(KeyboardInterrupt):
        list(chunks)
    assert len(reads) == 18


def test_the_ctf_follows_the_working_pixel_size(make_dataset):
    defocus = {"rlnDefocusU": ["15000"] * 5, "rlnDefocusV": ["14000"] * 5, "rlnDefocusAngle": ["30"] * 5}
    particles = read_particles(make_dataset(particles=defocus))
    plan = plan_preparation(particles, PreparationConfig(box=10), 64)
    assert working_ctf(particles.ctf, plan).pixel_size_angst.tolist() == [4.0] * 5


def test_images_of_one_stack_named_twice_and_out_of_order(make_dataset):
    names = image_names(5)
    star = make_dataset(particles={"rlnImageName": [names[4], names[0], names[4], names[2], names[1]]})
    source = ImageSource(read_particles(star))
    images = source.read(np.arange(5))
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(source.read(np.array([3]))[0], images[3])
