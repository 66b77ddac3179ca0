"""What STAR and .cs both hold goes there and back to the bit, with the signs and units of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")

from cryo_svae.errors import InputError
from cryo_svae.formats.cs import read_cs
from cryo_svae.imaging import geometry
from cryo_svae.particles.star_and_cs import Noted, cs_fields, star_of_cs
from tests.cryosparc_files import locations, particle_fields, pose_2d, pose_3d, save_cs


def star_block(tmp_path, fields):
    star, left_out = star_of_cs(read_cs(save_cs(tmp_path / "p.cs", fields)))
    return star, star.block("particles"), left_out


def numbers(block) -> Noted:
    texts = {"rlnImageName", "rlnMicrographName", "ucsfUid"}
    return Noted({label: block.numbers(label) for label in block.labels if label not in texts})


def test_units_and_signs(tmp_path):
    fields = particle_fields(2)
    fields |= {
        "alignments2D/pose": np.array([math.pi / 2, 5.0], dtype="<f4"),
        "alignments2D/shift": np.array([[3, -4], [0, 1]], dtype="<f4"),
        "alignments2D/psize_A": np.array([2.0, 5.0], dtype="<f4"),
        "alignments2D/class": np.array([0, 41], dtype="<u4"),
        **locations(2),
    }
    fields["ctf/df_angle_rad"][0] = math.radians(30)
    fields["blob/idx"][:] = [0, 7]
    _, block, _ = star_block(tmp_path, fields)
    assert block.numbers("rlnAnglePsi") == pytest.approx([90, math.degrees(5.0)])
    assert block.numbers("rlnOriginXAngst").tolist() == [6.0, 0.0]
    assert block.numbers("rlnOriginYAngst").tolist() == [-8.0, 5.0]
    assert block.text("rlnClassNumber") == ["1", "42"]
    assert block.text("rlnImageName") == ["000001@stack.mrcs", "000008@stack.mrcs"]
    assert block.text("rlnDefocusAngle")[0] == "30"  # the shortest text that gives the same bits
    x, y = (locations(2)[f"location/center_{axis}_frac"].astype(float) for axis in "xy")
    assert block.numbers("rlnCoordinateX") == pytest.approx(60 * x)
    assert block.numbers("rlnCoordinateY") == pytest.approx(40 * y)
    assert block.text("rlnMicrographName") == ["mics/0.mrc", "mics/1.mrc"]


@pytest.mark.parametrize("poses", [{}, pose_2d(), pose_3d(), {**pose_2d(), **pose_3d()}])
def test_what_both_hold_comes_back_to_the_bit(tmp_path, poses):
    fields = {**particle_fields(), **poses}
    fields |= {"svae/z": np.random.default_rng(0).normal(size=(5, 12)).astype("<f4")}
    fields |= {"svae/pose_std": np.linspace(0.1, 1, 5).astype("<f4")}
    _, block, left_out = star_block(tmp_path, fields)
    assert left_out == [
        name
        for name in fields
        if name in ("blob/sign", "blob/import_sig", "ctf/type")
        or (name == "alignments3D/class" and "alignments2D/pose" in fields)
    ]
    columns = numbers(block)
    back = cs_fields(columns, fields["blob/psize_A"].astype(float))
    carried = [name for name in back if not name.endswith("psize_A")]
    assert {name for name in poses if name not in left_out and not name.endswith("psize_A")} <= set(carried)
    for name in carried:
        assert back[name].dtype == fields[name].dtype
        if name == "alignments3D/pose":
            turn = Rotation.from_rotvec(back[name]) * Rotation.from_rotvec(fields[name]).inv()
            assert turn.magnitude().max() < 1e-6
        elif name == "alignments3D/shift":  # in pixels of the images now: 2.5 Å, not 1.25
            np.testing.assert_allclose(back[name] * 2.5, fields[name] * 1.25, rtol=1e-6)
        else:
            assert back[name].tobytes() == fields[name].tobytes(), name


@settings(max_examples=50, deadline=None)
@given(
    arrays("<f4", 4, elements=st.floats(-100, 100, width=32)),
    arrays("<f4", (4, 2), elements=st.floats(-1000, 1000, width=32)),
    st.floats(0.25, 64, width=32),
)
def test_any_2d_pose_comes_back_to_the_bit(tmp_path_factory, pose, shift, size):
    sizes = np.full(4, size, dtype="<f4")
    fields = particle_fields(4)
    fields |= {"alignments2D/pose": pose, "alignments2D/shift": shift, "alignments2D/psize_A": sizes}
    _, block, _ = star_block(tmp_path_factory.mktemp("cs"), fields)
    back = cs_fields(numbers(block), sizes.astype(float))
    assert np.array_equal(back["alignments2D/pose"], pose)
    assert np.array_equal(back["alignments2D/shift"], shift)


def test_a_3d_pose_is_relions_euler_matrix_transposed():
    rot, tilt, psi = np.radians([20.0, 50.0, -70.0])
    ca, sa, cb, sb = np.cos(rot), np.sin(rot), np.cos(tilt), np.sin(tilt)
    cg, sg = np.cos(psi), np.sin(psi)
    relion = np.array(  # Euler_angles2matrix of RELION's euler.cpp
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ]
    )
    vector = geometry.euler_to_rotation_vectors(np.array([[20.0, 50.0, -70.0]]))
    np.testing.assert_allclose(Rotation.from_rotvec(vector[0]).as_matrix(), relion.T, atol=1e-12)
    np.testing.assert_allclose(geometry.rotation_vectors_to_euler(vector), [[20.0, 50.0, -70.0]])


def test_exposure_groups_become_optics_groups(tmp_path):
    fields = particle_fields()
    fields["ctf/accel_kv"][1::2] = 200
    star, block, left_out = star_block(tmp_path, fields)
    optics = star.block("optics")
    assert optics.text("rlnOpticsGroup") == ["8", "9"]
    assert optics.numbers("rlnVoltage").tolist() == [300.0, 200.0]
    assert block.text("rlnOpticsGroup") == ["8", "9", "8", "9", "8"]
    assert "ctf/exp_group_id" not in left_out
    fields["blob/psize_A"][0] = 3.5  # a group of two pixel sizes: two optics groups, and it is said
    star, block, left_out = star_block(tmp_path, fields)
    optics = star.block("optics")
    assert "ctf/exp_group_id" in left_out
    sizes = dict(zip(optics.text("rlnOpticsGroup"), optics.numbers("rlnImagePixelSize"), strict=True))
    assert [sizes[group] for group in block.text("rlnOpticsGroup")] == [3.5, 2.5, 2.5, 2.5, 2.5]
    assert optics.text("rlnOpticsGroupName") == [
        "exposure_group_7_1",
        "exposure_group_7_2",
        "exposure_group_8_3",
    ]


def test_fields_of_another_shape_are_refused(tmp_path):
    fields = {**particle_fields(), "alignments2D/pose": np.zeros((5, 3), dtype="<f4")}
    with pytest.raises(InputError, match="alignments2D/pose"):
        star_block(tmp_path, fields)


def test_class_0_is_left_out_and_so_is_not_asked_for():
    columns = Noted({"rlnClassNumber": np.array([0.0, 1.0]), "rlnRandomSubset": np.array([0.0, 1.0])})
    assert cs_fields(columns, np.ones(2)) == {}
    assert not columns.asked & {"rlnClassNumber", "rlnRandomSubset"}
