"""MRC stacks: one-pixel answers for every mode, and refusals that cost no memory."""

from __future__ import annotations

import bz2
import gzip
import resource
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.mrc import read_images, read_pixels, read_stack_info, write_stack
from cryo_svae.formats.star import write_tables

CODES = {0: "b", 1: "h", 2: "f", 6: "H", 12: "e"}
N, HEIGHT, WIDTH = 5, 3, 4
ALL = np.arange(N)


def mrc_bytes(
    mode: int = 2,
    order: str = "<",
    value: float = 7,
    extended: bytes = b"",
    stamp: bytes | None = None,
    imod_flags: int | None = None,
) -> bytes:
    """A stack of 5 images of 4 x 3 px, zero but for ``value`` in image 3, row 1, column 2."""
    header = bytearray(1024)
    struct.pack_into(order + "10i", header, 0, WIDTH, HEIGHT, N, mode, 0, 0, 0, WIDTH, HEIGHT, 1)
    struct.pack_into(order + "3f", header, 40, 1.5 * WIDTH, 1.5 * HEIGHT, 1.5)
    struct.pack_into(order + "2i", header, 88, 0, len(extended))
    if imod_flags is not None:
        struct.pack_into(order + "2i", header, 152, 1146047817, imod_flags)
    header[208:212] = b"MAP "
    header[212:216] = stamp if stamp is not None else {"<": b"DD\0\0", ">": b"\x11\x11\0\0"}[order]
    pixels = [0] * (N * HEIGHT * WIDTH)
    pixels[3 * HEIGHT * WIDTH + 1 * WIDTH + 2] = value
    return bytes(header) + extended + struct.pack(f"{order}{len(pixels)}{CODES.get(mode, 'f')}", *pixels)


def planted(value: float) -> np.ndarray:
    images = np.zeros((N, HEIGHT, WIDTH), np.float32)
    images[3, 1, 2] = value
    return images


def stack_at(folder: Path, content: bytes, name: str = "stack.mrcs") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "value"), [(0, -128), (1, -32768), (2, 1.25e-9), (6, 65535), (12, -0.5)])
@pytest.mark.parametrize("extended", [b"", b"\1\2\3" * 7])
def test_the_planted_pixel_is_found(
    tmp_path: Path, order: str, mode: int, value: float, extended: bytes
) -> None:
    path = stack_at(tmp_path, mrc_bytes(mode, order, value, extended))
    info = read_stack_info(path)
    assert (info.n_images, info.height_px, info.width_px, info.mode) == (N, HEIGHT, WIDTH, mode)
    assert info.voxel_size_angst == 1.5
    images = read_images(path, ALL)
    assert images.dtype == np.float32
    assert images.dtype.isnative
    np.testing.assert_array_equal(images, planted(np.float32(value)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", CODES)
def test_pixels_keep_their_type_in_the_machine_s_byte_order(tmp_path: Path, order: str, mode: int) -> None:
    path = stack_at(tmp_path, mrc_bytes(mode, order, 3))
    pixels = read_pixels(path, np.array([3, 4, 0, 1, 3]))
    assert pixels.dtype == np.dtype({0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}[mode])
    assert pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, planted(3)[[3, 4, 0, 1, 3]])


@pytest.mark.parametrize("stamp", [b"\0\0\0\0", b"\x11\x11\0\0", b"DA\0\0", b"\xff\xff\xff\xff"])
def test_a_wrong_machine_stamp_changes_nothing(tmp_path: Path, stamp: bytes) -> None:
    np.testing.assert_array_equal(read_images(stack_at(tmp_path, mrc_bytes(stamp=stamp)), ALL), planted(7))


def test_bytes_of_imod_are_unsigned_unless_flagged(tmp_path: Path) -> None:
    unsigned = stack_at(tmp_path, mrc_bytes(0, value=-1, imod_flags=0))
    assert read_images(unsigned, ALL)[3, 1, 2] == 255
    signed = stack_at(tmp_path, mrc_bytes(0, value=-1, imod_flags=1))
    assert read_images(signed, ALL)[3, 1, 2] == -1


@pytest.mark.parametrize("name", ["stack.mrcs", "stack.mrcs.gz", "stack.mrcs.bz2"])
def test_order_and_repeats_are_honoured(tmp_path: Path, name: str) -> None:
    images = np.arange(N * HEIGHT * WIDTH, dtype=np.float32).reshape(N, HEIGHT, WIDTH)
    write_stack(tmp_path / "stack.mrcs", images, pixel_size_angst=1.5)
    plain = (tmp_path / "stack.mrcs").read_bytes()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    path = stack_at(tmp_path, pack(plain), name)
    assert read_stack_info(path).n_images == N
    for indices in ([4, 0, 0, 2], [3], [], [1, 2, 3, 3, 4, 0, 1, 2]):
        np.testing.assert_array_equal(read_images(path, np.array(indices, int)), images[indices])


def test_a_single_image_is_a_stack_of_one(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "one.mrc") as mrc:
        mrc.set_data(np.eye(4, dtype=np.float32))
    assert read_stack_info(tmp_path / "one.mrc").n_images == 1
    assert read_stack_info(tmp_path / "one.mrc").voxel_size_angst == 0.0
    np.testing.assert_array_equal(read_images(tmp_path / "one.mrc", np.array([0])), np.eye(4)[None])


def test_a_compressed_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = stack_at(tmp_path, gzip.compress(mrc_bytes(value=7)), "a.mrcs.gz")
    assert read_images(path, ALL)[3, 1, 2] == 7
    stack_at(tmp_path, gzip.compress(mrc_bytes(value=123456)) + b"\0", "a.mrcs.gz")
    assert read_images(path, ALL)[3, 1, 2] == 123456


def test_a_big_stack_costs_only_the_images_asked_for(tmp_path: Path) -> None:
    path = stack_at(tmp_path, mrc_bytes(), "sparse.mrcs")
    n = 100_000
    with path.open("rb+") as file:
        file.seek(0)
        file.write(struct.pack("<3i", 256, 256, n))
        file.seek(1024 + 4 * 256 * 256 * (n - 1))
        file.write(np.full(256 * 256, 9, "<f4").tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = read_images(path, np.array([n - 1, 7]))
    assert images[:, 255, 255].tolist() == [9, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def with_shape(n_x: int, n_y: int, n_z: int) -> bytes:
    return struct.pack("<3i", n_x, n_y, n_z) + mrc_bytes()[12:]


@pytest.mark.parametrize(
    ("content", "found", "expected"),
    [
        (b"", "a file of 0 bytes", "whose header alone has 1024"),
        (mrc_bytes()[:700], "a file of 700 bytes", "whose header alone has 1024"),
        (mrc_bytes()[:-1], "1263 bytes", "1264 bytes, as 5 images of 4 x 3 px in mode 2 take"),
        (mrc_bytes() + b"\0", "1265 bytes", "1264, as 5 images of 4 x 3 px in mode 2 take"),
        (bytes(range(256)) * 8, "bytes that are no MRC header", "an MRC file"),
        (bytes(2048), "bytes that are no MRC header", "an MRC file"),
        (with_shape(10**9, 10**9, 1), "1264 bytes", "1000000000 x 1000000000 px"),
        (with_shape(2**31 - 1, 2**31 - 1, 2**31 - 1), "1264 bytes", "2147483647 x 2147483647 px"),
        (with_shape(4, 0, 5), "a header of 4 x 0 x 5 pixels and mode 2", "an MRC file"),
        (with_shape(4, 3, -5), "a header of 4 x 3 x -5 pixels and mode 2", "an MRC file"),
        (mrc_bytes(3), "mode 3 (complex 16-bit integers)", "mode 0, 1, 2, 6 or 12"),
        (mrc_bytes(4), "mode 4 (complex numbers)", "mode 0, 1, 2, 6 or 12"),
        (mrc_bytes(101), "mode 101 (4-bit integers)", "mode 0, 1, 2, 6 or 12"),
        (mrc_bytes(77), "a header of", "an MRC file"),
        (b"\x1f\x8b" + mrc_bytes(), "unknown compression method", "an MRC file"),
        (gzip.compress(mrc_bytes())[:-30], "broken compression", "a whole file"),
        (bz2.compress(mrc_bytes())[:-30], "broken compression", "a whole file"),
        (gzip.compress(mrc_bytes()[:-1]), "1263 bytes", "1264 bytes"),
        (bz2.compress(mrc_bytes() + b"\0"), "1265 bytes", "1264, as"),
        (gzip.compress(with_shape(10**9, 10**9, 10**9)), "1264 bytes", "1000000000 images"),
    ],
)
def test_what_is_no_whole_stack_is_refused(
    tmp_path: Path, content: bytes, found: str, expected: str
) -> None:
    path = stack_at(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_images(path, np.array([0]))
    message = str(caught.value)
    assert message.startswith(f"{path}: found {found}")
    assert expected in message
    assert "\n  To mend: " in message


@pytest.mark.parametrize("index", [-1, N, 10**12])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_image_beyond_the_stack_is_told(tmp_path: Path, index: int, pack: type) -> None:
    with pytest.raises(InputError, match=rf"found image {index + 1} asked for, expected 1 to 5"):
        read_images(stack_at(tmp_path, pack(mrc_bytes())), np.array([0, index]))


def test_a_missing_stack_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.mrcs: found no such file or directory"):
        read_stack_info(tmp_path / "absent.mrcs")
    with pytest.raises(InputError, match="a folder"):
        read_stack_info(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 1023) | st.integers(0, 15), st.integers(0, 255)), min_size=1, max_size=6
    ),
    st.sampled_from([bytes, gzip.compress]),
)
def test_a_damaged_header_is_refused_or_harmless(
    tmp_path: Path, damage: list[tuple[int, int]], pack: type
) -> None:
    content = bytearray(mrc_bytes(order="<"))
    for place, value in damage:
        content[place] = value
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        images = read_images(stack_at(tmp_path, pack(bytes(content))), np.array([0]))
    except InputError:
        pass
    else:  # the bytes of the first image, under another shape or mode of the same size
        assert images.shape[0] == 1
        assert images.nbytes <= 4 * len(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# --- writing ---------------------------------------------------------------------------------------


def test_what_was_written_is_valid_and_read_back(tmp_path: Path) -> None:
    images = np.random.default_rng(1).normal(3, 5, (9, 6, 10)).astype(np.float32)
    path = tmp_path / "stack.mrcs"
    for given_images in (images, iter([images[:4], images[4:5], images[5:]]), images.astype(np.float64)):
        write_stack(path, given_images, pixel_size_angst=2.5, n_images=9)
        assert mrcfile.validate(path)
        np.testing.assert_array_equal(read_images(path, np.arange(9)), images)
        assert read_stack_info(path).voxel_size_angst == 2.5
        with mrcfile.open(path) as mrc:
            assert mrc.is_image_stack()
            assert mrc.voxel_size.tolist() == (2.5, 2.5, 2.5)
            assert mrc.header.dmean == pytest.approx(images.mean(dtype=float), rel=1e-6)
            assert mrc.header.rms == pytest.approx(images.std(dtype=float), rel=1e-6)
            assert (mrc.header.dmin, mrc.header.dmax) == (images.min(), images.max())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.floats(0.125, 100, width=32), st.data())
def test_write_and_read_are_inverse(
    tmp_path: Path, n: int, height: int, width: int, pixel_size: float, data: st.DataObject
) -> None:
    floats = st.floats(-1e6, 1e6, width=32)
    flat = data.draw(st.lists(floats, min_size=n * height * width, max_size=n * height * width))
    images = np.array(flat, np.float32).reshape(n, height, width)
    write_stack(tmp_path / "a.mrcs", images, pixel_size_angst=pixel_size)
    np.testing.assert_array_equal(read_images(tmp_path / "a.mrcs", np.arange(n)), images)
    assert read_stack_info(tmp_path / "a.mrcs").voxel_size_angst == pytest.approx(pixel_size, rel=1e-6)


def test_a_broken_stream_leaves_nothing(tmp_path: Path) -> None:
    def pieces(shape: tuple[int, int, int]):  # type: ignore[no-untyped-def]
        yield np.zeros((2, 3, 4))
        yield np.zeros(shape)

    with pytest.raises(ValueError, match=r"images of \(3, 4\) and \(3, 5\) px"):
        write_stack(tmp_path / "a.mrcs", pieces((1, 3, 5)), pixel_size_angst=1)
    with pytest.raises(ValueError, match="3 images to write, 4 announced"):
        write_stack(tmp_path / "a.mrcs", pieces((1, 3, 4)), pixel_size_angst=1, n_images=4)
    with pytest.raises(ValueError, match="at least one image"):
        write_stack(tmp_path / "a.mrcs", iter([]), pixel_size_angst=1)
    with pytest.raises(OutputError):
        write_stack(tmp_path / "absent" / "a.mrcs", np.zeros((1, 2, 2)), pixel_size_angst=1)
    assert not list(tmp_path.iterdir())


# --- judges ----------------------------------------------------------------------------------------


def test_the_zoo_reads_as_mrcfile_does(shared_data: Path) -> None:
    plain, *packed = (
        shared_data / "mrc_zoo" / f"{n}" for n in ("EMD-3197.map", "EMD-3197.map.bz2", "emd_3197.map.gz")
    )
    expected = mrcfile.read(plain)
    for path in (plain, *packed):
        np.testing.assert_array_equal(read_images(path, np.arange(20)), expected)
    other = shared_data / "mrc_zoo" / "emd_3001.map.gz"
    np.testing.assert_array_equal(read_images(other, np.arange(25)), mrcfile.read(other))
    with pytest.raises(InputError, match=r"emd_3197\.png: found bytes that are no MRC header"):
        read_stack_info(shared_data / "mrc_zoo" / "emd_3197.png")


def test_stacks_of_other_programs_read_as_mrcfile_does(shared_data: Path) -> None:
    paths = sorted(shared_data.glob("small/*.mrc*"))
    assert len(paths) >= 4
    for path in paths:
        with warnings.catch_warnings(action="ignore"), mrcfile.mmap(path, permissive=True) as mrc:
            np.testing.assert_array_equal(read_images(path, np.array([4, 1])), mrc.data[[4, 1]])


@pytest.mark.skipif(shutil.which("relion_image_handler") is None, reason="RELION is not installed")
def test_relion_reads_our_stacks_and_we_read_its(tmp_path: Path) -> None:
    images = np.random.default_rng(2).normal(size=(5, 8, 8)).astype(np.float32)
    write_stack(tmp_path / "in.mrcs", images, pixel_size_angst=3.5)

    def relion(*command: str) -> None:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    relion("relion_image_handler", "--i", "in.mrcs", "--o", "out.mrcs", "--multiply_constant", "2")
    assert read_stack_info(tmp_path / "out.mrcs").n_images == 5
    np.testing.assert_allclose(read_images(tmp_path / "out.mrcs", ALL), 2 * images, rtol=1e-6)
    optics = {"rlnOpticsGroup": ["1"], "rlnImagePixelSize": ["3.5"], "rlnImageSize": ["8"]}
    optics |= {"rlnVoltage": ["300"], "rlnSphericalAberration": ["2.7"]}
    particles = {"rlnImageName": ["000004@in.mrcs", "000002@in.mrcs"], "rlnOpticsGroup": ["1", "1"]}
    write_tables(tmp_path / "in.star", {"optics": optics, "particles": particles})
    relion("relion_stack_create", "--i", "in.star", "--o", "made")
    np.testing.assert_array_equal(read_images(tmp_path / "made.mrcs", np.array([1, 0])), images[[1, 3]])
