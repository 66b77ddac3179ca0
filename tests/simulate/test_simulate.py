from __future__ import annotations

import math

import mrcfile
import pytest
import torch

from cryo_svae.errors import InputError
from cryo_svae.imaging.geometry import align_images, particle_to_reference, pixel_grid
from cryo_svae.simulate import (
    Molecule,
    SimulateConfig,
    load_molecule,
    project,
    render,
    simulate,
    view_rotation,
    write_simulated,
)

BOX = 32


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson of images (n, N, N) inside 0.4 N."""
    inside = pixel_grid(a.shape[-1]).norm(dim=-1) < 0.4 * a.shape[-1]
    a, b = (x[:, inside] - x[:, inside].mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def at_rest(molecule: Molecule, conformation: torch.Tensor, box: int = BOX) -> torch.Tensor:
    n = len(conformation)
    pixel_size = 3.0 * molecule.radius_angst() / box
    zero = torch.zeros(n)
    return project(molecule, conformation, zero, torch.zeros(n, 2), box_px=box, pixel_size_angst=pixel_size)


@pytest.fixture(params=["hinge", "adk", "hsp90"])
def moving(request: pytest.FixtureRequest) -> Molecule:
    if request.param == "hinge":
        return load_molecule("hinge")
    motion = request.getfixturevalue("shared_data") / "motion"
    return load_molecule(
        request.param, motion / "adk_closed_to_open.npz" if request.param == "adk" else motion
    )


def one_pixel(image: torch.Tensor) -> tuple[int, int]:
    row, col = divmod(int(image.argmax()), image.shape[-1])
    return row, col


def test_a_bead_sits_where_the_convention_says():
    bead, sigma = torch.tensor([[[5.0, 0.0]]]), 0.3
    psi, origin = torch.tensor([math.pi / 2]), torch.tensor([[2.0, -3.0]])
    image = render(bead, torch.ones(1), sigma, torch.zeros(1), torch.zeros(1, 2), BOX)[0]
    assert one_pixel(image) == (16, 21)  # row, col of (x, y) = (5, 0)
    assert image.max() == 1.0
    shifted = render(bead, torch.ones(1), sigma, torch.zeros(1), origin, BOX)[0]
    assert one_pixel(shifted) == (19, 19)  # p = q - o
    posed = render(bead, torch.ones(1), sigma, psi, origin, BOX)[0]
    row, col = one_pixel(posed)
    assert (row, col) == (14, 14)  # R(-90°) (5, 0) = (0, -5), less the origin (2, -3): (-2, -2)
    found = torch.tensor([[[col - 16.0, row - 16.0]]])
    assert torch.allclose(particle_to_reference(found, psi, origin), bead, atol=1e-5)


def test_aligning_by_the_truth_brings_back_the_reference():
    config = SimulateConfig(n_particles=20, box=64, snr=1e6, shift_std_px=2.0)
    simulated = simulate(config)
    rest = project(
        load_molecule("hinge"), simulated.conformation, torch.zeros(20), torch.zeros(20, 2),
        box_px=64, pixel_size_angst=simulated.pixel_size_angst,
    )  # fmt: skip
    aligned = align_images(simulated.images, simulated.psi_rad, simulated.origin_px)
    assert correlation(aligned, rest).min() > 0.999


@pytest.mark.parametrize("defocus", [(None, None), (10000.0, 20000.0)])
def test_snr_is_as_promised(defocus):
    low, high = defocus
    config = SimulateConfig(
        n_particles=400, box=BOX, snr=0.5, defocus_min_angst=low, defocus_max_angst=high, junk_fraction=0.3
    )
    simulated = simulate(config)
    inside = pixel_grid(BOX).norm(dim=-1) <= BOX / 2
    assert 0.2 < simulated.is_junk.float().mean() < 0.4
    noise = simulated.images[simulated.is_junk].var()
    both = simulated.images[~simulated.is_junk][:, inside].var()
    assert noise.sqrt().item() == pytest.approx(simulated.noise_std, rel=0.01)
    assert (both / noise - 1.0).item() == pytest.approx(0.5, rel=0.05)


def test_the_seed_decides_every_byte():
    same = [simulate(SimulateConfig(n_particles=5, seed=7)).images.numpy().tobytes() for _ in range(2)]
    other = simulate(SimulateConfig(n_particles=5, seed=8)).images.numpy().tobytes()
    assert same[0] == same[1] != other


def test_particles_are_white_at_low_resolution_with_a_ctf():
    config = SimulateConfig(
        n_particles=50, box=64, snr=1e6, shift_std_px=0, defocus_min_angst=8000, defocus_max_angst=9000,
        amplitude_contrast=0.1,
    )  # fmt: skip
    images = simulate(config).images
    disc = pixel_grid(64).norm(dim=-1) < 15
    edge = pixel_grid(64).norm(dim=-1) > 30
    assert (images[:, disc].mean(1) > images[:, edge].mean(1)).all()
    assert images.sum((1, 2)).min() > 0  # CTF(0) = +amplitude contrast


def test_a_pose_is_identifiable(moving):
    images = at_rest(moving, torch.zeros(1, moving.n_motions))
    turned = align_images(images, torch.tensor([math.pi]), torch.zeros(1, 2))
    assert correlation(images, turned) < 0.8


@pytest.mark.parametrize("name", ["hinge", "adk"])
def test_no_turn_makes_the_mirror_image(name, request):
    source = None
    if name == "adk":
        source = request.getfixturevalue("shared_data") / "motion/adk_closed_to_open.npz"
    molecule = load_molecule(name, source)
    image = at_rest(molecule, torch.zeros(1, 1), 33)  # an odd box mirrors about its centre
    angles = torch.arange(0, 360, 3) * (math.pi / 180)
    turned = align_images(image.flip(-1).expand(len(angles), -1, -1), angles, torch.zeros(len(angles), 2))
    assert correlation(image.expand(len(angles), -1, -1), turned).max() < 0.97


def test_motion_is_seen_and_neither_shifts_nor_turns_the_whole(moving):
    ends = torch.tensor([[-1.0], [0.0], [1.0]])
    closed, rest, opened = at_rest(moving, ends)
    assert correlation(closed[None], opened[None]) < 0.95
    positions = moving.positions(ends)
    share = moving.weights / moving.weights.sum()
    assert torch.einsum("b,nbd->nd", share, positions).abs().max() < 1e-2
    x, y = positions[..., 0], positions[..., 1]
    torque = (moving.weights * (x * y[1] - y * x[1])).sum(1) / (moving.weights * (x * x[1] + y * y[1])).sum(
        1
    )
    assert torque.abs().max() < 1e-4
    assert (rest >= 0).all()


def test_two_arms_move_alone(shared_data):
    molecule = load_molecule("hsp90-two-arms", shared_data / "motion")
    both = load_molecule("hsp90", shared_data / "motion")
    together, single = at_rest(molecule, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert torch.allclose(together, at_rest(both, torch.tensor([[1.0]]))[0], atol=1e-4)
    assert correlation(together[None], single[None]) < 0.99


def test_c2_and_ring_have_their_symmetry():
    half = torch.tensor([math.pi])
    for name, angle in (("c2", half), ("ring", half / 3.3)):
        images = at_rest(load_molecule(name), torch.tensor([[0.7]]), 64)
        turned = align_images(images, angle, torch.zeros(1, 2))
        assert correlation(images, turned) > 0.999
    quarter = align_images(at_rest(load_molecule("c2"), torch.zeros(1, 1)), half / 2, torch.zeros(1, 2))
    assert correlation(at_rest(load_molecule("c2"), torch.zeros(1, 1)), quarter) < 0.5


def test_noise_is_all_junk_of_variance_one():
    simulated = simulate(SimulateConfig(molecule="noise", n_particles=50))
    assert simulated.is_junk.all()
    assert simulated.noise_std == 1.0
    assert simulated.images.std().item() == pytest.approx(1.0, abs=0.02)


def test_view_directions_are_uniform():
    simulated = simulate(SimulateConfig(molecule="views", n_particles=2000, box=16))
    direction = simulated.direction
    assert torch.allclose(direction.norm(dim=1), torch.ones(2000), atol=1e-5)
    assert direction.mean(0).norm() < 0.06
    assert torch.allclose((direction.T @ direction) / 2000, torch.eye(3) / 3, atol=0.03)


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"molecule": "ribosome"}, "--molecule"),
        ({"box": 33}, "--box"),
        ({"snr": 0.0}, "--snr"),
        ({"defocus_min_angst": 1e4}, "--defocus-min-angst"),
        ({"junk_fraction": 1.5}, "--junk-fraction"),
    ],
)
def test_wrong_options_are_named(wrong, option):
    with pytest.raises(InputError) as caught:
        SimulateConfig(**wrong)
    assert caught.value.path == option


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(InputError, match="--source"):
        load_molecule("adk")
    with pytest.raises(InputError, match=r"monoA_snip\.pdb"):
        load_molecule("hsp90", tmp_path)
    with pytest.raises(InputError, match=r"no\.npz"):
        load_molecule("adk", tmp_path / "no.npz")


def test_written_files_hide_the_truth_from_a_run(tmp_path):
    config = SimulateConfig(n_particles=7, box=16, defocus_min_angst=1e4, defocus_max_angst=2e4)
    simulated = simulate(config)
    write_simulated(tmp_path, simulated, config)
    blind, truth = ((tmp_path / name).read_text() for name in ("particles.star", "truth.star"))
    assert "000007@particles.mrcs" in blind
    assert "_rlnDefocusU" in blind
    for label in ("rlnAnglePsi", "rlnOriginXAngst", "svaeTrueConformation1", "svaeIsJunk"):
        assert label in truth
        assert label not in blind
    with mrcfile.open(tmp_path / "particles.mrcs") as stack:
        assert (stack.data == simulated.images.numpy()).all()


def test_relion_aligns_our_particles_by_our_truth(tmp_path, relion):
    config = SimulateConfig(n_particles=12, box=64, snr=1e5, shift_std_px=2.0)
    simulated = simulate(config)
    write_simulated(tmp_path, simulated, config)
    arguments = ["--i", "truth.star", "--o", "aligned", "--apply_transformation"]
    relion("relion_stack_create", *arguments, cwd=tmp_path)
    with mrcfile.open(tmp_path / "aligned.mrcs", permissive=True) as stack:
        aligned = torch.from_numpy(stack.data.copy())
    rest = project(
        load_molecule("hinge"), simulated.conformation, torch.zeros(12), torch.zeros(12, 2),
        box_px=64, pixel_size_angst=simulated.pixel_size_angst,
    )  # fmt: skip
    assert correlation(aligned, rest).min() > 0.99


def test_relion_projects_our_views(tmp_path, relion):
    config = SimulateConfig(molecule="views", n_particles=12, box=64, snr=1e5, shift_std_px=2.0)
    simulated = simulate(config)
    write_simulated(tmp_path, simulated, config)
    molecule = load_molecule("views")
    points = molecule.positions(torch.zeros(1, 0))[0] / simulated.pixel_size_angst
    sigma = math.hypot(molecule.sigma_angst / simulated.pixel_size_angst, 0.7)
    axis = torch.arange(64.0) - 32
    x, y, z = torch.exp(-0.5 * ((points.T[..., None] - axis) / sigma) ** 2)
    with mrcfile.new(tmp_path / "volume.mrc") as file:
        file.set_data(torch.einsum("bk,bj,bi->kji", z, y, x).numpy())
        file.voxel_size = simulated.pixel_size_angst
    arguments = ["--i", "volume.mrc", "--o", "projected", "--ang", "truth.star", "--angpix"]
    relion("relion_project", *arguments, simulated.pixel_size_angst, cwd=tmp_path)
    with mrcfile.open(tmp_path / "projected.mrcs", permissive=True) as stack:
        projected = torch.from_numpy(stack.data.copy())
    assert correlation(projected, simulated.images).min() > 0.99


def test_view_rotations_turn():
    rotation = view_rotation(torch.tensor([[0.3, 1.2], [0.0, 0.0]]))
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(2, -1, -1), atol=1e-6)
    assert torch.allclose(rotation[1], torch.eye(3))
