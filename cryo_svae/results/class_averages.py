"""CTF-corrected averages of the aligned particles of each class, with their resolutions.

Every particle is turned and shifted in Fourier space, where its CTF turns with it. For each class and
half-set the sums S = sum CTF F and D = sum CTF² over the particles give the average by a Wiener
filter. Fourier space is interpolated bicubically on a twofold padded grid; that keeps what bicubic
interpolation of the image itself loses near Nyquist (a third of the amplitude there).

The halves share no particle, but poses and classes come from one model fitted to all of them, so
their Fourier ring correlation (FRC) is an upper bound where that model has fitted noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryo_svae.imaging import geometry
from cryo_svae.imaging.ctf import CtfTable, ctf_at
from cryo_svae.learning.estimation import EstimateTable
from cryo_svae.particles.images import ImageSource
from cryo_svae.particles.known_poses import turned_ctf
from cryo_svae.particles.particle_set import ParticleSet
from cryo_svae.particles.preprocessing import Preparation, prepared_images, soft_circle, working_ctf

# Pixels of padded images at once: what a processor's cache holds (64 particles of 64 px), and what keeps
# a GPU busy.
PIXELS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
EDGE_SHARE_OF_BOX = 0.06  # width of soft edges
FEWEST_IN_A_HALF = 3  # with fewer, an FRC says nothing
HALF_REGULARISATION = 0.1  # of a ring's mean D, against division by the zeros of the CTF
SMOOTHED_RINGS = 3  # FRC rings averaged for the filter
THRESHOLD, THRESHOLD_05 = 0.143, 0.5


@dataclass(frozen=True)
class ClassAverages:
    """Averages of k classes of images of n pixels, as the particles are prepared (white, noise of sd 1).

    image:                 (k, n, n) both halves, Wiener-filtered by their FRC; zero for an empty class.
    half:                  (k, 2, n, n) each half, CTF-corrected but not filtered.
    frc:                   (k, n/2) between the halves inside the soft circular mask, of rings
                           0 … n/2 - 1; 0 where a half is empty.
    resolution_0143_angst: (k,) resolution where the FRC first falls below 0.143. NaN where it is below
                           from the first ring, or where a half has fewer than 3 particles; twice the
                           pixel size where the FRC never falls below.
    resolution_05_angst:   (k,) the same at 0.5.
    n_particles:           (k,) usable particles.
    mean_figure_of_merit:  (k,) of those; 0 for an empty class.
    """

    image: NDArray[np.float32]
    half: NDArray[np.float32]
    frc: NDArray[np.float64]
    resolution_0143_angst: NDArray[np.float64]
    resolution_05_angst: NDArray[np.float64]
    n_particles: NDArray[np.intp]
    mean_figure_of_merit: NDArray[np.float64]
    pixel_size_angst: float

    @property
    def frequency_per_angst(self) -> NDArray[np.float64]:
        """Spatial frequency (n/2,) of each ring in 1/Å."""
        side_angst = self.image.shape[-1] * self.pixel_size_angst
        frequency: NDArray[np.float64] = np.arange(self.frc.shape[1]) / side_angst
        return frequency


class HalfPlane:
    """The P points of an N x N image's Fourier half plane (kx >= 0) within rings 0 … N/2 - 1.

    point:  (P, 2) as (kx, ky) in Fourier pixels.
    ring:   (P,).
    weight: (P,) how many of the whole plane's points each stands for.
    window: (N, N) soft inscribed circle.
    """

    def __init__(self, box_px: int, device: torch.device) -> None:
        plane = geometry.pixel_grid(box_px, device).reshape(-1, 2)
        ring = plane.norm(dim=-1).round().long()
        kept = (plane[:, 0] >= 0) & (ring < box_px // 2)
        self.box_px, self.n_rings = box_px, box_px // 2
        self.point, self.ring = plane[kept], ring[kept]
        self.weight = torch.where(self.point[:, 0] > 0, 2.0, 1.0).double()
        edge = soft_edge_px(box_px)
        self.window = soft_circle(box_px, box_px / 2 - edge, edge).to(device)
        self._column, self._row = self.point[:, 0].long(), self.point[:, 1].long() % box_px

    def spectrum(self, images: Float[Tensor, "*k n n"]) -> Complex[Tensor, "*k p"]:
        """Fourier transform, phase zero at pixel N//2."""
        whole: Tensor = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)))
        return whole[..., self._row, self._column]

    def image(self, spectrum: Complex[Tensor, "*k p"]) -> Float[Tensor, "*k n n"]:
        """The inverse of ``spectrum``, on images without what lies beyond the rings."""
        shape = (*spectrum.shape[:-1], self.box_px, self.box_px // 2 + 1)
        whole = spectrum.new_zeros(shape)
        whole[..., self._row, self._column] = spectrum
        images: Tensor = torch.fft.fftshift(torch.fft.irfft2(whole, s=(self.box_px,) * 2), dim=(-2, -1))
        return images

    def ring_sum(self, values: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        """Sums over each ring of the whole plane."""
        sums = values.new_zeros(*values.shape[:-1], self.n_rings)
        return sums.index_add_(-1, self.ring, values * self.weight)

    def ring_mean(self, values: Float[Tensor, "*k p"]) -> Float[Tensor, "*k r"]:
        """Means over each ring."""
        return self.ring_sum(values) / self.ring_sum(torch.ones_like(self.weight))


def soft_edge_px(box_px: int) -> float:
    """Width of the soft edges of masks."""
    return max(2.0, EDGE_SHARE_OF_BOX * box_px)


def aligned_spectra(
    images: Float[Tensor, "b n n"],
    psi_rad: Float[Tensor, "b"],
    origin_px: Float[Tensor, "b 2"],
    plane: HalfPlane,
) -> Complex[Tensor, "b p"]:
    """Fourier transforms of aligned particles at the points of a half plane, phase zero at N//2.

    The aligned image A(q) = I(R(-psi) q - o) has F_A(k) = F_I(k') exp(-2 pi i k'·o/N) at
    k' = R(-psi) k. Beyond the inscribed circle particles count as background, so that corners do
    not come round into the turned image. Right to 2 % of the amplitude (the cubic kernel's gain).
    """
    rotation = geometry.rotation_matrix(psi_rad)
    turned = rotation.mT @ plane.point.T
    behind = turned[:, 0] < 0  # a real image's transform there is the conjugate of that at -k'
    column, row = torch.where(behind[:, None], -turned, turned).unbind(1)
    spectra = _half_spectra(images * plane.window)
    n_rows, n_columns = spectra.shape[-2:]
    x = (4.0 * column + 3.0) / n_columns - 1.0
    y = 4.0 * row / n_rows
    real, imag = torch.nn.functional.grid_sample(
        spectra, torch.stack([x, y], -1)[:, None], "bicubic", "zeros", align_corners=False
    )[:, :, 0].unbind(1)
    moved = (rotation @ origin_px[..., None])[..., 0]  # k'·o = k·R(psi) o
    phase = (-2.0 * math.pi / plane.box_px) * (moved @ plane.point.T)
    sampled = torch.complex(real, torch.where(behind, -imag, imag))
    return sampled * torch.complex(torch.cos(phase), torch.sin(phase))


def _half_spectra(images: Float[Tensor, "b n n"]) -> Float[Tensor, "b 2 rows columns"]:
    """Real and imaginary parts of images' transforms, padded to twice the box; phase zero at pixel n//2.

    Row n + j is ky = j/2, from -n/2 to n/2, and column 1 + i is kx = i/2, from -1/2, in Fourier pixels.
    """
    n, half = images.shape[-1], images.shape[-1] // 2
    row = torch.arange(n, device=images.device)
    signed = images * (1.0 - 2.0 * ((row + half) % 2))[:, None]  # puts ky = 0 in the middle
    padded = images.new_zeros(len(images), 2 * n, 2 * n)
    first, last = slice(half), slice(-half, None)
    for here, its in ((first, last), (last, first)):
        padded[:, here, first], padded[:, here, last] = signed[:, its, last], signed[:, its, first]
    spectra = images.new_empty(len(images), 2, 2 * n + 1, n + 2)
    spectra[:, :, :-1, 1:] = torch.view_as_real(torch.fft.rfft2(padded)).permute(0, 3, 1, 2)
    spectra[:, :, -1] = spectra[:, :, 0]
    # the conjugate at -k: rows from 2 n down to 1, then row 0, which is row 2 n
    spectra[:, 0, :, 0], spectra[:, 1, :, 0] = spectra[:, 0, :, 2].flip(-1), -spectra[:, 1, :, 2].flip(-1)
    return spectra


def half_sets(
    particles: ParticleSet, usable: NDArray[np.bool_], class_number: NDArray[np.intp], seed: int
) -> NDArray[np.intp]:
    """Half (0 or 1) of each particle: the file's rlnRandomSubset, else drawn evenly in each class.

    The column is taken where it holds 1 and 2 and nothing else.
    """
    if particles.block.has("rlnRandomSubset"):
        subset = particles.block.numbers("rlnRandomSubset")
        if set(np.unique(subset).tolist()) == {1.0, 2.0}:
            return subset.astype(np.intp) - 1
    drawn = np.random.default_rng(seed).random(len(class_number))
    order = np.lexsort((drawn, class_number, ~usable))
    half = np.empty(len(class_number), dtype=np.intp)
    half[order] = np.arange(len(order)) % 2
    return half


def class_averages(
    source: ImageSource,
    table: EstimateTable,
    class_number: NDArray[np.intp],
    n_classes: int,
    preparation: Preparation,
    *,
    use_ctf: bool,
    seed: int,
    device: torch.device,
) -> ClassAverages:
    """Averages of the usable particles of classes 1 … k, their images read once in order.

    Memory does not grow with the number of particles. Wiener's constant is 1/SSNR of each ring,
    from the FRC F between the halves: SSNR = 2F/(1 - F) for their sum, F averaged over three
    rings, and nothing kept where that is below 0.143. Where there is no FRC, SSNR = 1.
    """
    plane = HalfPlane(preparation.box_px, device)
    half = half_sets(source.particles, table.usable, class_number, seed)
    key = 2 * (class_number - 1) + half
    sums = _sums(source, table, key, 2 * n_classes, preparation, use_ctf, plane)
    signal, power = (each.view(n_classes, 2, -1) for each in (sums.signal, sums.power))
    numbers = class_number[table.usable] - 1
    in_half = np.bincount(2 * numbers + half[table.usable], minlength=2 * n_classes).reshape(n_classes, 2)
    counts = in_half.sum(1)
    merit = np.bincount(numbers, weights=table.figure_of_merit[table.usable], minlength=n_classes)

    ring_power = plane.ring_mean(power)[..., plane.ring]
    flat = (power + HALF_REGULARISATION * ring_power) / (1.0 + HALF_REGULARISATION)
    halves = plane.image(_quotient(signal, flat))
    radius, edge = preparation.mask_radius_px, soft_edge_px(preparation.box_px)
    mask = soft_circle(preparation.box_px, max(radius - edge, 0.0), edge).to(device)
    frc = ring_correlation(halves[:, 0] * mask, halves[:, 1] * mask)
    enough = torch.from_numpy(in_half.min(1) >= FEWEST_IN_A_HALF).to(device)
    inverse_ssnr = torch.where(enough[:, None], _inverse_ssnr(frc), 1.0)[:, plane.ring]
    wiener = power.sum(1) + ring_power.sum(1) * inverse_ssnr
    images = plane.image(_quotient(signal.sum(1), wiener))

    curves = frc.cpu().numpy()
    side_angst = preparation.box_px * preparation.pixel_size_angst

    def resolution(threshold: float) -> NDArray[np.float64]:
        rings = np.array([crossing_ring(curve, threshold) for curve in curves])
        return np.where(enough.cpu().numpy(), side_angst / rings, np.nan)

    return ClassAverages(
        image=images.float().cpu().numpy(),
        half=halves.float().cpu().numpy(),
        frc=curves,
        resolution_0143_angst=resolution(THRESHOLD),
        resolution_05_angst=resolution(THRESHOLD_05),
        n_particles=counts,
        mean_figure_of_merit=merit / np.maximum(counts, 1),
        pixel_size_angst=preparation.pixel_size_angst,
    )


@dataclass(frozen=True)
class Members:
    """Particles to be averaged, on the device that does it.

    row:         (b,) of the sums, 2 class + half, counted from 0.
    psi_rad, origin_px: (b,) and (b, 2) in working pixels, their poses.
    ctf:         their CTF parameters, turned with them, or None.
    """

    row: Int[Tensor, "b"]
    psi_rad: Float[Tensor, "b"]
    origin_px: Float[Tensor, "b 2"]
    ctf: CtfTable | None

    def __getitem__(self, some: slice) -> Members:
        ctf = None if self.ctf is None else self.ctf[some]
        return Members(self.row[some], self.psi_rad[some], self.origin_px[some], ctf)


class Sums:
    """S (k, P) and D (k, P) of k classes and halves, in double precision, at the points of a half plane."""

    def __init__(self, n_rows: int, plane: HalfPlane) -> None:
        shape, device = (n_rows, len(plane.point)), plane.point.device
        self.plane = plane
        self.signal = torch.zeros(shape, dtype=torch.complex128, device=device)
        self.power = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, images: Float[Tensor, "b n n"], usable: Bool[Tensor, "b"], members: Members) -> None:
        """Adds prepared images; those not usable are zero, and have no part in D."""
        plane = self.plane
        spectrum = aligned_spectra(images, members.psi_rad, members.origin_px, plane)
        transfer = usable.float()[:, None].expand(spectrum.shape)
        if members.ctf is not None:
            transfer = transfer * ctf_at(members.ctf, plane.point / plane.box_px)
        for sums, values in ((self.signal, spectrum * transfer), (self.power, transfer.square())):
            # unlike index_add_, always in the same order, on a GPU too
            sums.index_put_((members.row,), values.to(sums.dtype), accumulate=True)


def _members(
    source: ImageSource,
    table: EstimateTable,
    key: NDArray[np.intp],
    preparation: Preparation,
    use_ctf: bool,
    device: torch.device,
) -> Members:
    rows = torch.from_numpy(np.flatnonzero(table.usable))
    psi = torch.from_numpy(geometry.radians(table.psi_deg)).float()[rows].to(device)
    origin = torch.from_numpy(table.origin_angst / preparation.pixel_size_angst).float()[rows]
    ctf = None
    if use_ctf and source.particles.ctf is not None:
        ctf = turned_ctf(working_ctf(source.particles.ctf, preparation)[rows].to(device), psi)
    return Members(torch.from_numpy(key)[rows].to(device), psi, origin.to(device), ctf)


def _sums(
    source: ImageSource,
    table: EstimateTable,
    key: NDArray[np.intp],
    n_rows: int,
    preparation: Preparation,
    use_ctf: bool,
    plane: HalfPlane,
) -> Sums:
    """Sums over the usable particles; ``key`` (n,) is 2 class + half, counted from 0."""
    device = plane.point.device
    members = _members(source, table, key, preparation, use_ctf, device)
    sums = Sums(n_rows, plane)
    batch_size = max(1, PIXELS_AT_ONCE[device.type] // (2 * plane.box_px) ** 2)
    first = 0
    rows = np.flatnonzero(table.usable)
    for _, images, usable in prepared_images(source, rows, preparation, device=device):
        for image, counts in zip(images.split(batch_size), usable.split(batch_size), strict=True):
            last = first + len(image)
            sums.add(image, counts, members[first:last])
            first = last
    return sums


def _quotient(signal: Complex[Tensor, "*k p"], weight: Float[Tensor, "*k p"]) -> Complex[Tensor, "*k p"]:
    """S divided by a weight; 0 where the weight is 0 (no particle) or infinite (no signal)."""
    return torch.where(weight > 0, signal / torch.where(weight > 0, weight, 1.0), 0.0)


def _inverse_ssnr(frc: Float[Tensor, "k r"]) -> Float[Tensor, "k r"]:
    """1/SSNR of the average of both halves; infinite where the smoothed FRC is below 0.143."""
    side = SMOOTHED_RINGS // 2
    padded = torch.cat([frc[:, :1].expand(-1, side), frc, frc[:, -1:].expand(-1, side)], 1)
    smooth = padded.unfold(1, SMOOTHED_RINGS, 1).mean(-1).clamp(max=1.0)
    return torch.where(smooth >= THRESHOLD, (1.0 - smooth) / (2.0 * smooth.clamp(min=THRESHOLD)), torch.inf)


def ring_correlation(a: Float[Tensor, "k n n"], b: Float[Tensor, "k n n"]) -> Float[Tensor, "k r"]:
    """FRC of rings 0 … n/2 - 1 (rounded radii); 0 where an image has nothing in a ring."""
    plane = HalfPlane(a.shape[-1], a.device)
    first, second = plane.spectrum(a.double()), plane.spectrum(b.double())
    cross = plane.ring_sum((first * second.conj()).real)
    norm = (plane.ring_sum(first.abs() ** 2) * plane.ring_sum(second.abs() ** 2)).sqrt()
    return torch.where(norm > 0, cross / torch.where(norm > 0, norm, 1.0), 0.0)


def crossing_ring(frc: NDArray[np.float64], threshold: float) -> float:
    """Where an FRC of n/2 rings first falls below a threshold, between rings.

    NaN where it starts below, n/2 where it never falls. Ring 0, which holds the mean, is left out.
    """
    below = np.flatnonzero(frc[1:] < threshold) + 1
    if len(below) == 0:
        return float(len(frc))
    ring = int(below[0])
    if ring == 1:
        return math.nan
    before, after = float(frc[ring - 1]), float(frc[ring])
    return ring - 1 + (before - threshold) / (before - after)
