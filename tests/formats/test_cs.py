"""CryoSPARC tables: every value back to the byte, passthrough files joined by uid, clear refusals."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")

from cryo_svae.errors import InputError
from cryo_svae.formats.cs import read_cs, read_particles_cs, write_cs
from tests.cryosparc_files import locations, particle_fields, pose_2d, save_cs

REAL = ["small/empiar_10076_7.cs", "star_zoo/cryodrgn/cryosparc_J2_particles_exported.cs"]
REAL += ["star_zoo/cryodrgn/cryosparc_P12_J24_001_particles.cs"]


def assert_equal_rows(a, b):
    assert a.dtype.names == b.dtype.names
    for name in a.dtype.names:
        if a[name].dtype.kind == "S":  # padded to another width
            assert a[name].tolist() == b[name].tolist()
        else:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", REAL)
def test_real_files_come_back_to_the_byte(shared_data, tmp_path, name):
    table = read_particles_cs(shared_data / name)
    write_cs(tmp_path / "out.cs", table.fields)
    assert_equal_rows(np.load(shared_data / name), np.load(tmp_path / "out.cs"))


def test_compressed_files_are_read(tmp_path):
    from cryosparc.dataset import CSDAT_FORMAT, Dataset

    path = save_cs(tmp_path / "plain.cs", particle_fields())
    Dataset.load(path).save(tmp_path / "packed.cs", format=CSDAT_FORMAT)
    plain, packed = read_cs(path), read_cs(tmp_path / "packed.cs")
    assert plain.fields.keys() == packed.fields.keys()
    for name, values in plain.fields.items():
        assert np.array_equal(values, packed.fields[name]), name


def test_a_passthrough_file_is_joined_by_uid_not_by_row(tmp_path):
    fields, others = particle_fields(), {**pose_2d(), **locations()}
    order = [3, 0, 4, 1, 2]
    others = {name: values[order] for name, values in others.items()}
    others["ctf/df1_A"] = np.zeros(5, dtype="<f4")  # what both hold is the particle file's
    more = {"uid": fields["uid"][order], **others}
    more = {name: np.concatenate([values, values[:1]]) for name, values in more.items()}
    more["uid"][-1] = 12345  # a particle that is not ours
    table = read_particles_cs(save_cs(tmp_path / "p.cs", fields), save_cs(tmp_path / "pass.cs", more))
    assert table.fields["uid"].tolist() == fields["uid"].tolist()
    assert table.fields["alignments2D/class"].tolist() == pose_2d()["alignments2D/class"].tolist()
    assert table.fields["location/micrograph_path"].tolist() == [f">mics/{k % 2}.mrc" for k in range(5)]
    assert np.array_equal(table.fields["ctf/df1_A"], fields["ctf/df1_A"])


def test_particles_missing_from_the_passthrough_file_are_counted(tmp_path):
    fields = particle_fields()
    path = save_cs(tmp_path / "p.cs", fields)
    more = {"uid": fields["uid"][:3], "alignments2D/class": np.zeros(3, dtype="<u4")}
    with pytest.raises(InputError, match="2 of the 5 rows"):
        read_cs(path, save_cs(tmp_path / "pass.cs", more))
    none = {name: values[:0] for name, values in more.items()}
    with pytest.raises(InputError, match="5 of the 5 rows"):
        read_cs(path, save_cs(tmp_path / "none.cs", none))
    twice = {"uid": fields["uid"][[0, 1, 2, 3, 4, 4]]}
    with pytest.raises(InputError, match="a uid twice"):
        read_cs(path, save_cs(tmp_path / "twice.cs", twice))


def test_files_of_other_things_are_named_for_what_they_are(tmp_path):
    fields = particle_fields()
    uid = {"uid": fields["uid"]}
    texts = np.array(["a.mrc"] * 5)
    cases = {
        "micrographs": {**uid, "micrograph_blob/path": texts},
        "volumes": {**uid, "map/path": texts},
        "--passthrough": {**uid, **locations()},
        "without images": {**uid, **pose_2d()},
        "class averages": {**fields, "blob/res_A": np.ones(5, dtype="<f4")},
        "3 numbers an image": {**fields, "blob/shape": np.full((5, 3), 16, dtype="<u4")},
        "no rows": {name: values[:0] for name, values in fields.items()},
    }
    for expected, content in cases.items():
        path = save_cs(tmp_path / "other.cs", content)
        with pytest.raises(InputError) as caught:
            read_particles_cs(path)
        assert expected in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    good = save_cs(tmp_path / "good.cs", particle_fields()).read_bytes()
    for content in (b"", good[:-10], b"data_particles\nloop_\n", b"\x93NUMPY garbage"):
        (tmp_path / "bad.cs").write_bytes(content)
        with pytest.raises(InputError, match="damaged, or of another format"):
            read_cs(tmp_path / "bad.cs")
    with pytest.raises(InputError, match="no such file"):
        read_cs(tmp_path / "gone.cs")
    with (tmp_path / "no_uid.cs").open("wb") as file:
        np.save(file, np.zeros(3, dtype=[("blob/idx", "<u4")]))
    with pytest.raises(InputError, match="uid"):
        read_cs(tmp_path / "no_uid.cs")


def test_without_cryosparc_tools_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    path = save_cs(tmp_path / "p.cs", particle_fields())
    monkeypatch.setitem(sys.modules, "cryosparc.dataset", None)
    with pytest.raises(InputError, match=r"pip install 'cryo_svae\[cryosparc\]'"):
        read_cs(path)
