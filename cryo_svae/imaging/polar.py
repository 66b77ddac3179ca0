"""Images to polar Fourier samples and angular coefficients, and back.

Y(r, phi) is the Fourier transform of a box of N pixels (centre N//2, divided by N) at radius
r = 0 … N/2 - 1 Fourier pixels and angle phi (from +x towards +y, y down). A real image has
Y(r, phi + pi) = conj Y(r, phi), so its real part E has period pi, its imaginary part O changes sign
after pi, and the real function G = E + O holds all of Y: E, O = (G(phi) ± G(phi + pi)) / 2. That keeps
the arithmetic real: one ``rfft`` over phi gives the angular coefficients g_m(r), m >= 0.

Coefficients are kept for m up to the band limit 2 pi r R/N of an image inside a disc of radius R,
packed as pairs (ring, order), ring by ring from the centre, in planes of real and imaginary parts
(b, 2, P), so that those of a coarser transform come first. They are scaled so that the
sum of their squares is the image's own sum of squares (Parseval); a Gaussian likelihood of pixels is
then one of coefficients. Laws, with the pose convention of ``geometry``, I(p) = Ref(R(psi) (p + o)):

* rotation:  g_m(r) of the particle = exp(i m psi) g_m(r) of the reference;
* origin:    centring the particle shifts its content by +o, which multiplies Y by
  exp(-i alpha), alpha = 2 pi k·o/N: G <- G(phi) cos alpha - G(phi + pi) sin alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

KERNEL_WIDTH = 6  # grid cells; with 2x padding good to about 1e-5 of the largest value
FFT_IMAGES_AT_ONCE = 64
FFT_PIXELS_AT_ONCE_ON_GPU = 2**26  # of padded images: 1 GB with what becomes of them


def fast_length(at_least: int) -> int:
    """The smallest even length >= at_least whose half has only the factors 2, 3 and 5."""
    length = at_least + at_least % 2
    while True:
        rest = length // 2
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


def soft_disc(box_px: int, radius_px: float, edge_px: float) -> Float[Tensor, "n n"]:
    """A disc around pixel N//2: 1 up to radius - edge, raised cosine to 0 at the radius."""
    axis = torch.arange(box_px, dtype=torch.float32) - box_px // 2
    distance = torch.hypot(axis[:, None], axis[None, :])
    ramp = ((radius_px - distance) / edge_px).clamp(0.0, 1.0)
    return 0.5 - 0.5 * torch.cos(math.pi * ramp)


def _kaiser_bessel(distance: Tensor, beta: float) -> Tensor:
    inside = (1.0 - (2.0 * distance / KERNEL_WIDTH) ** 2).clamp(min=0.0)
    return torch.i0(beta * inside.sqrt()) / KERNEL_WIDTH


def _gridding(
    box_px: int, n_rings: int, n_angles: int
) -> tuple[Float[Tensor, "s g"], Float[Tensor, "n n"]]:
    """Sparse interpolation from the 2x padded FFT to polar samples, and the deapodisation.

    Kaiser-Bessel kernel and its width parameter: Beatty et al. 2005, IEEE TMI 24, 799.
    """
    grid = 2 * box_px
    beta = math.pi * math.sqrt((KERNEL_WIDTH / 2.0) ** 2 * 1.5**2 - 0.8)
    phi = 2.0 * math.pi / n_angles * torch.arange(n_angles // 2, dtype=torch.float64)
    radius = 2.0 * torch.arange(n_rings, dtype=torch.float64)
    kx, ky = (radius[:, None] * torch.cos(phi)).reshape(-1), (radius[:, None] * torch.sin(phi)).reshape(-1)
    offset = torch.arange(KERNEL_WIDTH, dtype=torch.float64) - KERNEL_WIDTH // 2 + 1
    cell_x, cell_y = kx.floor()[:, None] + offset, ky.floor()[:, None] + offset
    weight_x, weight_y = (
        _kaiser_bessel(cell_x - kx[:, None], beta),
        _kaiser_bessel(cell_y - ky[:, None], beta),
    )
    weight = (weight_y[:, :, None] * weight_x[:, None, :]).reshape(-1)
    cell = (cell_y.long() % grid)[:, :, None] * grid + (cell_x.long() % grid)[:, None, :]
    sample = torch.arange(len(kx)).repeat_interleave(KERNEL_WIDTH**2)
    matrix = torch.sparse_coo_tensor(
        torch.stack([sample, cell.reshape(-1)]),
        weight.float(),
        (len(kx), grid * grid),
        check_invariants=False,
    )
    axis = (torch.arange(box_px, dtype=torch.float64) - box_px // 2) / grid
    root = (beta**2 - (math.pi * KERNEL_WIDTH * axis) ** 2).sqrt()
    deapodise = root / torch.sinh(root)
    return matrix.coalesce(), (deapodise[:, None] * deapodise[None, :]).float()


def ring_area(n_rings: int) -> Float[Tensor, "r"]:
    """Quadrature weights of rings 0 … n_rings - 1 in squared Fourier pixels: 2 pi r inside.

    The first three carry the Euler-Maclaurin end correction of functions even in r: integral of r f
    = sum of r f + f/12 - f''/240 + f''''/6048 at r = 0, the derivatives from f(0), f(1) and f(2).
    """
    radius = torch.arange(n_rings, dtype=torch.float64)
    radius[:3] += torch.tensor([0.0947421, -0.0124339, 0.0010251], dtype=torch.float64)[:n_rings]
    return 2.0 * math.pi * radius


def _spread(packed: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed coefficients at their places in two axes, 0 elsewhere."""
    flat = packed.new_zeros(*packed.shape[:-2], shape[0] * shape[1], 2)
    flat[..., place, :] = packed.mT
    return torch.view_as_complex(flat.unflatten(-2, shape))


def _collect(spread: Tensor, place: Tensor) -> Tensor:
    flat = spread.flatten(-2)[..., place]
    return torch.stack([flat.real, flat.imag], -2)


class PolarTransform(nn.Module):
    """Images of box N (even) to packed angular coefficients and back; nothing is learned.

    box_px:        N.
    radius_px:     R, radius of the soft disc that images are multiplied by.
    max_shift_px:  largest shift later applied to samples; sets the angular oversampling.
    n_rings:       rings 0 … n_rings - 1 alone, by default all N/2. A transform of fewer knows
                   coefficients only: images go through the whole one.

    Attributes: ``n_rings``, ``n_orders`` (orders 0 … n_orders - 1), ``first_ring`` that has each order,
    ``n_angles``, ``n_pairs`` P; buffers ``ring`` and ``order`` (P,) of each pair, ``one_sided`` (P,): 1 of
    order 0, 1/2 of the others, ``mask`` (N, N) and ``noise_dof`` (n_rings,): how many independent real
    numbers white noise has on each ring.
    """

    ring: Tensor
    order: Tensor
    place: Tensor
    _place_by_order: Tensor
    mask: Tensor
    noise_dof: Tensor
    one_sided: Tensor
    _halved: Tensor
    _doubled: Tensor
    _in_ring: Tensor
    _waves: Tensor
    _fourier: Tensor
    _root_area: Tensor
    _interpolate: Tensor
    _deapodise: Tensor

    def __init__(
        self, box_px: int, radius_px: float, max_shift_px: float = 0.0, n_rings: int | None = None
    ) -> None:
        super().__init__()
        self.box_px, self.radius_px = box_px, radius_px
        self.n_rings = box_px // 2 if n_rings is None else n_rings
        rings = torch.arange(self.n_rings, dtype=torch.float64)
        # A Bessel function J_m(x) is negligible a little after m = x.
        limit = torch.ceil(2.0 * math.pi * rings * radius_px / box_px).long() + 2
        limit[0] = 0
        self.n_orders = int(limit.max()) + 1
        beyond = math.ceil(2.0 * math.pi * self.n_rings * max_shift_px / box_px)
        self.n_angles = fast_length(2 * self.n_orders + beyond)
        ring, order = torch.meshgrid(torch.arange(self.n_rings), torch.arange(self.n_orders), indexing="ij")
        kept = order <= limit[ring]
        self.first_ring: list[int] = kept.int().argmax(0).tolist()
        order, ring = order[kept], ring[kept]
        self.n_pairs = len(ring)
        area = ring_area(self.n_rings)
        both_signs = torch.where(torch.arange(self.n_angles // 2 + 1) > 0, math.sqrt(2.0), 1.0)
        mask = soft_disc(box_px, radius_px, max(2.0, 0.06 * box_px))
        phi = 2.0 * math.pi / self.n_angles * torch.arange(self.n_angles // 2, dtype=torch.float64)
        direction = torch.stack([torch.cos(phi), torch.sin(phi)])
        waves = 2.0 * math.pi / box_px * rings[:, None] * direction[:, None]
        m_phi = torch.arange(self.n_orders, dtype=torch.float64)[:, None] * phi
        sign = 1.0 - 2.0 * (torch.arange(self.n_orders)[:, None] % 2)  # e^{-im(phi + pi)} over e^{-im phi}
        planes = torch.cat([torch.cos(m_phi), -torch.sin(m_phi)])
        scale = both_signs[: self.n_orders, None] / self.n_angles
        fourier = torch.stack([planes, torch.cat([sign, sign]) * planes], -1).flatten(1)
        fourier *= torch.cat([scale, scale])
        self.register_buffer("ring", ring, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", ring * (self.n_angles // 2 + 1) + order, persistent=False)
        self.register_buffer("_place_by_order", order * self.n_rings + ring, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("noise_dof", (area * (mask.double() ** 2).mean()).float(), persistent=False)
        self.register_buffer("_halved", 1.0 / both_signs[order], persistent=False)
        self.register_buffer("one_sided", (1.0 / both_signs[order]).square(), persistent=False)
        self.register_buffer("_doubled", both_signs / self.n_angles, persistent=False)
        in_ring = (ring[:, None] == torch.arange(self.n_rings)).float()
        self.register_buffer("_in_ring", in_ring, persistent=False)
        self.register_buffer("_waves", waves.flatten(1).float(), persistent=False)
        self.register_buffer("_fourier", fourier.float(), persistent=False)
        self.register_buffer("_root_area", area.sqrt().float(), persistent=False)
        if n_rings is None:
            interpolate, deapodise = _gridding(box_px, self.n_rings, self.n_angles)
            self.register_buffer("_interpolate", interpolate, persistent=False)
            self.register_buffer("_deapodise", deapodise, persistent=False)

    def ring_sum(self, values: Float[Tensor, "*b p"]) -> Float[Tensor, "*b r"]:
        """Sums of what belongs to each pair over the pairs of each ring, the same at every call."""
        sums: Tensor = values @ self._in_ring
        return sums

    def dense(self, packed: Float[Tensor, "*b 2 p"]) -> Complex[Tensor, "*b r f"]:
        """Packed coefficients as (..., n_rings, n_angles//2 + 1), zero beyond the band limit."""
        return _spread(packed, self.place, (self.n_rings, self.n_angles // 2 + 1))

    def pack(self, dense: Complex[Tensor, "*b r f"]) -> Float[Tensor, "*b 2 p"]:
        """The inverse of ``dense``; drops what is beyond the band limit."""
        return _collect(dense, self.place)

    def by_order(self, packed: Float[Tensor, "*b 2 p"]) -> Complex[Tensor, "*b o r"]:
        """Packed coefficients as (..., n_orders, n_rings), zero beyond the band limit."""
        return _spread(packed, self._place_by_order, (self.n_orders, self.n_rings))

    def packed_from_orders(self, by_order: Complex[Tensor, "*b o r"]) -> Float[Tensor, "*b 2 p"]:
        """The inverse of ``by_order``; drops what is beyond the band limit."""
        return _collect(by_order, self._place_by_order)

    def samples(self, packed: Float[Tensor, "b 2 p"]) -> Float[Tensor, "b r a"]:
        """G(r, phi), the real polar function of each image, rings scaled as the coefficients are."""
        samples: Tensor = torch.fft.irfft(
            self.dense(packed * self._halved), n=self.n_angles, norm="forward"
        )
        return samples

    def spectra(self, samples: Float[Tensor, "*b r a"]) -> Complex[Tensor, "*b r f"]:
        """Dense coefficients of polar samples; beyond the band limit not zero."""
        spectra: Tensor = torch.fft.rfft(samples) * self._doubled
        return spectra

    def forward(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b 2 p"]:
        """Packed angular coefficients of images inside the soft disc."""
        if len(images) == 0:  # FFT libraries refuse none
            return images.new_zeros(0, 2, self.n_pairs)
        on_gpu = images.device.type == "cuda"
        at_once = FFT_PIXELS_AT_ONCE_ON_GPU // (2 * self.box_px) ** 2 if on_gpu else FFT_IMAGES_AT_ONCE
        parts = images.split(max(1, at_once))
        return torch.cat([self.pack(self.spectra(self._sample(part * self.mask))) for part in parts])

    def _sample(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b r a"]:
        half = self.box_px // 2
        padded = nn.functional.pad(images * self._deapodise, (half, half, half, half))
        spectrum = torch.fft.fft2(torch.fft.ifftshift(padded, dim=(-2, -1))) / self.box_px
        columns = torch.view_as_real(spectrum).permute(1, 2, 0, 3).reshape(4 * self.box_px**2, -1)
        polar = torch.sparse.mm(self._interpolate, columns)
        real, imag = (
            polar.view(self.n_rings, self.n_angles // 2, len(images), 2).permute(2, 0, 1, 3).unbind(-1)
        )
        return torch.cat([real + imag, real - imag], -1) * self._root_area[:, None]

    def image(self, packed: Float[Tensor, "b 2 p"]) -> Float[Tensor, "b n n"]:
        """Images of packed coefficients inside the soft disc: the inverse on band-limited images."""
        samples = self.samples(packed)
        here, opposite = (samples * (self._root_area / self.n_angles)[:, None]).chunk(2, -1)
        polar = torch.stack([here + opposite, here - opposite], -1)  # both halves of the plane: no 1/2
        columns = polar.permute(1, 2, 0, 3).reshape(self.n_rings * self.n_angles // 2, -1)
        grid = 2 * self.box_px
        spectrum = torch.sparse.mm(self._interpolate.t(), columns).view(grid, grid, len(packed), 2)
        field = torch.fft.ifft2(
            torch.view_as_complex(spectrum.permute(2, 0, 1, 3).contiguous()), norm="forward"
        )
        half = self.box_px // 2
        centred = torch.fft.fftshift(field.real, dim=(-2, -1))[:, half:-half, half:-half]
        images: Tensor = centred * self._deapodise / self.box_px * (self.mask > 0)
        return images

    def shift_phase(self, shift_px: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b r h"]:
        """alpha(r, phi) = 2 pi k·shift/N of shifts (x, y) in pixels, at the angles of half a turn.

        On the other half alpha has the other sign.
        """
        alpha: Tensor = (shift_px @ self._waves).unflatten(-1, (self.n_rings, self.n_angles // 2))
        return alpha

    def shift(
        self, samples: Float[Tensor, "b r a"], shift_px: Float[Tensor, "b 2"]
    ) -> Float[Tensor, "b r a"]:
        """Samples of images whose content is moved by shifts (x, y) in pixels."""
        alpha = self.shift_phase(shift_px)
        return _turned(samples, torch.cos(alpha), torch.sin(alpha))

    def shifted_spectra(
        self,
        samples: Float[Tensor, "b r a"],
        shifts_px: Float[Tensor, "t 2"] | Float[Tensor, "b t 2"],
        rounded: bool = False,
    ) -> Complex[Tensor, "b o t r"]:
        """Coefficients of images moved by each of t shifts, the same for all or each its own.

        rounded: good to three digits on a GPU, which is then faster.
        """
        if samples.device.type == "cuda":
            with tensor_float_32() if rounded else nullcontext():
                return self._shifted_spectra_by_product(samples, shifts_px)
        shape = (len(samples), self.n_orders, shifts_px.shape[-2], self.n_rings)
        spectra = samples.new_empty(shape, dtype=torch.complex64)
        scaled = samples * self._doubled[-1]
        for t, moved in enumerate(self._moved(scaled, shifts_px)):  # one at a time stays in the cache
            spectra[:, :, t].copy_(torch.fft.rfft(moved)[..., : self.n_orders].mT)
        spectra[:, 0] *= self._doubled[0] / self._doubled[-1]
        return spectra

    def _moved(
        self, samples: Float[Tensor, "b r a"], shifts_px: Float[Tensor, "t 2"] | Float[Tensor, "b t 2"]
    ) -> Iterator[Float[Tensor, "b r a"]]:
        """Samples of images moved by each of t shifts."""
        if shifts_px.ndim == 2:
            for here in self.shift_phase(shifts_px):
                yield _turned(samples, torch.cos(here), torch.sin(here))
            return
        # first along x, then along y: points of a grid have few of each, and sines take long
        along_x, along_y = _Waves(self, 0), _Waves(self, 1)
        before: Tensor | None = None
        for x, y in shifts_px.permute(1, 2, 0):
            if before is None or not torch.equal(x, before):
                before, halfway = x, _turned(samples, *along_x.of(x))
            yield _turned(halfway, *along_y.of(y))

    def _shifted_spectra_by_product(
        self, samples: Float[Tensor, "b r a"], shifts_px: Float[Tensor, "t 2"] | Float[Tensor, "b t 2"]
    ) -> Complex[Tensor, "b o t r"]:
        """The same by products of matrices: on a GPU Fourier transforms and transposed copies take longer.

        With both halves of the turn as a complex number, a shift is a product by exp(i alpha).
        """
        here, opposite = samples.chunk(2, -1)
        alpha = self.shift_phase(shifts_px)
        phase = torch.polar(alpha.new_ones(()).expand(alpha.shape), alpha)
        moved = torch.complex(here, opposite)[:, None] * phase
        columns = torch.view_as_real(moved).flatten(1, 2).flatten(2)
        planes = torch.bmm(self._fourier.expand(len(samples), -1, -1), columns.mT)
        real, imag = planes.unflatten(-1, (-1, self.n_rings)).chunk(2, 1)
        return torch.complex(real, imag)


class _Waves:
    """cos alpha and sin alpha of shifts along one axis, those known already without computing them."""

    def __init__(self, polar: PolarTransform, axis: int) -> None:
        self._polar, self._axis = polar, axis
        self._known: list[tuple[Tensor, Tensor, Tensor]] = []

    def of(self, shift_px: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b r h"], Float[Tensor, "b r h"]]:
        """Those of shifts of each particle along the axis."""
        for known, cos, sin in self._known:
            if torch.equal(known, shift_px):
                return cos, sin
        opposite = [(cos, -sin) for known, cos, sin in self._known if torch.equal(known, -shift_px)]
        if opposite:
            cos, sin = opposite[0]
        else:
            both = shift_px.new_zeros(len(shift_px), 2)
            both[:, self._axis] = shift_px
            alpha = self._polar.shift_phase(both)
            cos, sin = torch.cos(alpha), torch.sin(alpha)
        self._known.append((shift_px, cos, sin))
        return cos, sin


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """While this lasts a GPU multiplies float32 matrices with 10 bits of mantissa, and faster."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _turned(
    samples: Float[Tensor, "b r a"], cos: Float[Tensor, "*b r h"], sin: Float[Tensor, "*b r h"]
) -> Float[Tensor, "b r a"]:
    """Samples, both halves of the turn taken for a complex number, times cos + i sin."""
    here, opposite = samples.chunk(2, -1)
    turned = torch.empty_like(samples)
    first, second = turned.chunk(2, -1)
    torch.mul(here, cos, out=first).addcmul_(opposite, sin, value=-1.0)
    torch.mul(opposite, cos, out=second).addcmul_(here, sin)
    return turned
