"""Arrays as 8-bit grey PNG files, small enough to live in a page."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Reals = NDArray[np.floating[Any]]
Grey = NDArray[np.uint8]
Pixel = TypeVar("Pixel", bound=np.generic)

LARGEST_SIDE_PX = 128


def grey_png(image: Grey) -> bytes:
    """A PNG file of an 8-bit grey image (rows, columns), row 0 at the top."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        tail = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + tail

    rows, columns = image.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    filtered = np.zeros((rows, columns + 1), dtype=np.uint8)  # filter type 0 before each row
    filtered[:, 1:] = image
    body = zlib.compress(filtered.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def data_uri(image: Grey) -> str:
    """The image as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(grey_png(image)).decode()


def shrink(images: Reals, largest_px: int = LARGEST_SIDE_PX) -> Reals:
    """Square images (…, n, n) of at most this side, by Fourier cropping."""
    box_px = images.shape[-1]
    if box_px <= largest_px:
        return images
    spectrum = fft.fftshift(fft.fft2(images), axes=(-2, -1))
    start = box_px // 2 - largest_px // 2
    kept = spectrum[..., start : start + largest_px, start : start + largest_px]
    scale = (largest_px / box_px) ** 2
    cropped: Reals = fft.ifft2(fft.ifftshift(kept, axes=(-2, -1))).real * scale
    return cropped


def smooth(images: Reals, width_px: float) -> Reals:
    """Images (…, n, n) under a Gaussian of this standard deviation."""
    ky = fft.fftfreq(images.shape[-1])[:, None]
    kx = fft.rfftfreq(images.shape[-1])[None, :]
    transfer = np.exp(-2.0 * (np.pi * width_px) ** 2 * (kx**2 + ky**2))
    smoothed: Reals = fft.irfft2(fft.rfft2(images) * transfer, s=images.shape[-2:])
    return smoothed


def to_grey(images: Reals, *, together: bool) -> Grey:
    """8 bits between the 0.5th and 99.7th percentiles, of each image or of all of them together.

    Values that are not numbers, and images without contrast, are mid-grey.
    """
    finite = np.where(np.isfinite(images), images, 0.0)
    axes = None if together else (-2, -1)
    low, high = np.percentile(finite, [0.5, 99.7], axis=axes, keepdims=True)
    span = np.where(high > low, high - low, 1.0)
    share = np.where(high > low, (finite - low) / span, 0.5)
    return np.round(255 * np.clip(share, 0.0, 1.0)).astype(np.uint8)


def sheet(images: NDArray[Pixel]) -> NDArray[Pixel]:
    """Tiles (rows, columns, m, m) as one image."""
    rows, columns, height, width = images.shape
    return images.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
