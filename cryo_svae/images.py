"""Images of particles by number, read lazily from many stacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import read_images
from cryo_svae.particles import ParticleSet


class ImageSource:
    """Images of a particle set; holds no image and no open file.

    waited_s:    seconds in which nothing was done but wait for images.
    before_read: called before each read; what it raises ends the reading.
    """

    def __init__(self, particles: ParticleSet, before_read: Callable[[], None] = lambda: None) -> None:
        self.particles = particles
        self._before_read = before_read
        self.waited_s = 0.0

    def read(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Images (b, n, n) of particles ``index`` (b,), all of one box, in that order."""
        self._before_read()
        particles = self.particles
        boxes = particles.box_px[index]
        if len(index) == 0 or np.any(boxes != boxes[0]):
            raise ValueError("a read takes one or more particles of one box")
        images = np.empty((len(index), int(boxes[0]), int(boxes[0])), dtype=np.float32)
        stack_of = particles.stack_of[index]
        for stack in np.unique(stack_of):
            here = np.flatnonzero(stack_of == stack)
            slices = particles.slice_of[index[here]]
            path = particles.stacks[stack].path
            found = read_images(path, slices)
            if found.shape[1:] != images.shape[1:]:
                raise InputError(
                    path,
                    found=f"images of {found.shape[2]} x {found.shape[1]} px",
                    expected=f"{images.shape[2]} px a side, as when the job began",
                    remedy="put the stack back as it was, and go on with --resume.",
                )
            images[here] = found
        return images
