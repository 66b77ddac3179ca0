"""The images of particles, read from many stacks when they are needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import read_pixels
from cryo_svae.particles.particle_set import ParticleSet


class ImageSource:
    """Images of a particle set; holds no image and no open file. May be read from by several threads.

    waited_s:    seconds in which nothing was done but wait for images.
    before_read: called before each read; what it raises ends the reading.
    """

    def __init__(self, particles: ParticleSet, before_read: Callable[[], None] = lambda: None) -> None:
        self.particles = particles
        self._before_read = before_read
        self.waited_s = 0.0

    def read(self, index: NDArray[np.intp]) -> NDArray[np.generic]:
        """Images (b, n, n) of particles ``index`` (b,), all of one box, in that order.

        Of the type that the stack has them in; of several, the least that holds all their numbers.
        """
        self._before_read()
        boxes = self.particles.box_px[index]
        if len(index) == 0 or np.any(boxes != boxes[0]):
            raise ValueError("a read takes one or more particles of one box")
        stack_of = self.particles.stack_of[index]
        places = [np.flatnonzero(stack_of == stack) for stack in np.unique(stack_of)]
        parts = [self._of_one_stack(index[here]) for here in places]
        if len(parts) == 1:
            return parts[0]
        images = np.empty(
            (len(index), *parts[0].shape[1:]), np.result_type(*(part.dtype for part in parts))
        )
        for here, part in zip(places, parts, strict=True):
            images[run_of(here)] = part
        return images

    def _of_one_stack(self, index: NDArray[np.intp]) -> NDArray[np.generic]:
        particles, box_px = self.particles, int(self.particles.box_px[index[0]])
        path = particles.stacks[particles.stack_of[index[0]]].path
        images = read_pixels(path, particles.slice_of[index])
        if images.shape[1:] != (box_px, box_px):
            raise InputError(
                path,
                found=f"images of {images.shape[2]} x {images.shape[1]} px",
                expected=f"{box_px} px a side, as when the job began",
                remedy="put the stack back as it was, and go on with --resume.",
            )
        return images


def run_of(rows: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """Rows (b,) as a slice where each follows the last, which costs no copy of what is indexed."""
    if len(rows) and np.all(np.diff(rows) == 1):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
