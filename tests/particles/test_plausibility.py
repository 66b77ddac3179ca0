"""What no microscope has is refused; what is hardly meant, or not modelled, is named."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cryo_svae.cli import main
from cryo_svae.errors import InputError
from cryo_svae.formats.mrc import write_stack
from cryo_svae.formats.star import read_star
from cryo_svae.particles.labels import FIELDS, LABELS, Treatment
from cryo_svae.particles.particle_set import read_particles
from cryo_svae.particles.plausibility import doubts, ignored_aberrations
from tests.conftest import image_names, optics_columns

DEFOCUS = {"rlnDefocusU": ["15000"] * 5, "rlnDefocusV": ["14000"] * 5, "rlnDefocusAngle": ["30"] * 5}
ONE_ZERO = ["0", *["15000"] * 4]
MAGNIFICATION = {
    f"rlnMagMat{k}": [v] for k, v in {"00": "1.01", "01": "0", "10": "0", "11": "0.99"}.items()
}

# Where: (columns of the optics, columns of the particles), what must be said.
REFUSED = {
    "volts": ({"rlnVoltage": ["300000"]}, {}, "_rlnVoltage: found 300000, expected 20 to 3000 kV"),
    "no volts": ({"rlnVoltage": ["0"]}, {}, "_rlnVoltage: found 0, expected 20 to 3000 kV"),
    "Cs in Å": ({"rlnSphericalAberration": ["2.7e7"]}, {}, "_rlnSphericalAberration: found 2.7e.07"),
    "contrast in %": ({"rlnAmplitudeContrast": ["10"]}, {}, "_rlnAmplitudeContrast: found 10"),
    "defocus in µm": ({}, {"rlnDefocusU": ["1.5"] * 5}, "_rlnDefocusU: found 1.5, expected Å"),
    "defocus in pm": ({}, {"rlnDefocusU": ["1.5e6"] * 5}, "_rlnDefocusU: found 1.5e.06"),
    "volumes": ({"rlnImageDimensionality": ["3"]}, {}, "_rlnImageDimensionality: found 3, expected 2"),
    "another box": ({"rlnImageSize": ["32"]}, {}, "_rlnImageSize: found 32, expected 16"),
    "another side": ({}, {"rlnImageSizeX": ["16", "18", "16", "16", "16"]}, "_rlnImageSizeX: found 18"),
    "the other side": ({"rlnImageSizeY": ["14"]}, {}, "_rlnImageSizeY: found 14, expected 16"),
    "a depth": ({"rlnImageSizeZ": ["16"]}, {}, "_rlnImageSizeZ: found 16, expected 1"),
    "data of volumes": ({"rlnDataDimensionality": ["3"]}, {}, "_rlnDataDimensionality: found 3"),
    "subtomograms": (
        {},
        {"rlnTomoVisibleFrames": ["[1,0,1]"] * 5},
        "VisibleFrames: found '.1,0,1.'",
    ),
    "stacks of tilts": (
        {"rlnTomoSubTomosAre2DStacks": ["1"]},
        {},
        "Are2DStacks: found '1'",
    ),
    "no CTF left": ({"rlnCtfDataAreCtfCorrected": ["1"]}, {}, "_rlnCtfDataAreCtfCorrected: found 1"),
    "half a matrix": ({"rlnMagMat00": ["1.01"]}, {}, "_rlnMagMat01: found no such column"),
    "no matrix": ({**MAGNIFICATION, "rlnMagMat11": ["0"]}, {}, "_rlnMagMat11: found 0"),
    "no flag": ({"rlnCtfDataArePhaseFlipped": ["2"]}, {}, "_rlnCtfDataArePhaseFlipped: found 2"),
    "no scale": ({}, {"rlnCtfScalefactor": ["0"] * 5}, "_rlnCtfScalefactor: found 0, expected above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_microscope_has_is_refused_with_place_and_cure(make_dataset, capsys, tmp_path, case):
    of_optics, of_particles, said = REFUSED[case]
    star = make_dataset(optics=optics_columns(1, **of_optics), particles={**DEFOCUS, **of_particles})
    with pytest.raises(InputError) as caught:
        read_particles(star)
    assert re.search(said, str(caught.value))
    assert str(star) in str(caught.value)
    assert "To mend" in str(caught.value)
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_relion_5_says_in_a_block_of_its_own_that_images_are_stacks_of_tilts(make_dataset):
    star = make_dataset()
    said = "data_general\n\n_rlnTomoSubTomosAre2DStacks {}\n\n"
    whole = star.read_text()
    star.write_text(said.format(0) + whole)
    assert len(read_particles(star)) == 5
    star.write_text(said.format(1) + whole.replace("000001@", ""))  # stacks are named whole
    with pytest.raises(InputError, match=r"rlnTomoSubTomosAre2DStacks.*several tilts") as caught:
        read_particles(star)
    assert caught.value.line == 3


def test_images_that_are_corrected_for_a_ctf_that_is_not_there_are_taken_as_they_are(make_dataset):
    star = make_dataset(optics=optics_columns(1, rlnCtfDataAreCtfCorrected=["1"]))
    assert read_particles(star).ctf is None


def test_a_line_of_the_optics_block_is_the_place_of_its_error(make_dataset):
    star = make_dataset(optics=optics_columns(2, rlnVoltage=["300", "3e5"]), particles={
        **DEFOCUS, "rlnOpticsGroup": ["1", "1", "2", "2", "1"]
    })  # fmt: skip
    with pytest.raises(InputError) as caught:
        read_particles(star)
    optics = read_star(star).block("optics")
    assert caught.value.line == optics.line_of(1)


def test_premultiplied_images_need_their_ctf(make_dataset):
    star = make_dataset(optics=optics_columns(1, rlnCtfDataAreCtfPremultiplied=["1"]))
    with pytest.raises(InputError, match="premultiplied by their CTF"):
        read_particles(star)


DOUBTED = {
    "an unknown label": ({"rlnSomethingNew": ["1"]}, {}, "_rlnSomethingNew"),
    "an image twice": ({}, {"rlnImageName": [*image_names(4), "000002@stack.mrcs"]}, "1 image"),
    "no defocus among others": ({}, {"rlnDefocusU": ONE_ZERO, "rlnDefocusV": ONE_ZERO}, "no defocus"),
    "overfocus": ({}, {"rlnDefocusU": ["-15000"] * 5, "rlnDefocusV": ["-15000"] * 5}, "overfocus"),
    "contrast of 80 %": ({"rlnAmplitudeContrast": ["0.8"]}, {}, "above 0.5"),
    "another pixel size": ({"rlnImagePixelSize": ["1.25"]}, {}, "found 1.25 Å, expected 2.5 Å"),
    "magnified anew": ({}, {"rlnMagnificationCorrection": ["1", "1.02", "1", "1", "1"]}, "1.02 (1 part"),
    "a mirror image": ({}, {"rlnIsFlip": ["0", "0", "1", "1", "0"]}, "_rlnIsFlip: found 1 (2 part"),
    "damage": ({"rlnCtfBfactorPerElectronDose": ["4"]}, {}, "found 4 (5 particle(s)), expected 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOUBTED)
def test_what_is_hardly_meant_is_named_once(make_dataset, capsys, tmp_path, case):
    of_optics, of_particles, said = DOUBTED[case]
    assert doubts(read_particles(make_dataset(particles=DEFOCUS))) == []
    star = make_dataset(optics=optics_columns(1, **of_optics), particles={**DEFOCUS, **of_particles})
    (line,) = doubts(read_particles(star))
    assert said in line
    assert line.startswith(str(star))
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 0
    assert said in capsys.readouterr().out


def test_zero_defocus_of_all_is_a_set_in_focus(make_dataset):
    none = {"rlnDefocusU": ["0"] * 5, "rlnDefocusV": ["0"] * 5}
    assert doubts(read_particles(make_dataset(particles={**DEFOCUS, **none}))) == []


@pytest.mark.parametrize("header", [0.0, 1.0, 2.51])
def test_a_header_that_knows_no_pixel_size_is_no_doubt(make_dataset, header):
    star = make_dataset(particles=DEFOCUS)
    write_stack(
        star.parent / "stack.mrcs", np.random.rand(5, 16, 16).astype(np.float32), pixel_size_angst=header
    )
    assert doubts(read_particles(star)) == []


ABERRATIONS = {
    "beam tilt": {"rlnBeamTiltX": ["1.0"], "rlnBeamTiltY": ["0.0"]},
    "trefoil": {"rlnOddZernike": ["[0,0,800,0,0,0]"]},
    "four-fold": {"rlnEvenZernike": ["[0,0,0,0,3000,0,0,0,0]"]},
}


@pytest.mark.parametrize("case", ABERRATIONS)
def test_aberrations_are_named_where_they_matter_at_the_working_resolution(make_dataset, case):
    star = make_dataset(optics=optics_columns(1, **ABERRATIONS[case]), particles=DEFOCUS)
    particles = read_particles(star)
    assert doubts(particles) == []
    assert ignored_aberrations(particles, 10.0) == []
    (line,) = ignored_aberrations(particles, 1.0)
    assert next(iter(ABERRATIONS[case])) in line
    assert "not modelled" in line


def test_a_shift_and_a_constant_are_no_aberrations(make_dataset):
    """The first odd terms shift images, the first even one is a constant: neither is worth a word."""
    columns = {"rlnOddZernike": ["[100,-50]"], "rlnEvenZernike": ["[9]"]}
    particles = read_particles(make_dataset(optics=optics_columns(1, **columns), particles=DEFOCUS))
    assert ignored_aberrations(particles, 1.0) == []


def test_the_phase_of_beam_tilt_is_that_of_its_formula(make_dataset):
    """2 pi Cs lam² k³ theta, of which the best shift leaves a third or so."""
    star = make_dataset(optics=optics_columns(1, rlnBeamTiltX=["2.0"]), particles=DEFOCUS)
    (line,) = ignored_aberrations(read_particles(star), 1.0)
    degrees = float(re.search(r"up to (\d+)°", line).group(1))
    whole = 360.0 * 2.7e7 * 0.0196875**2 * 0.5**3 * 2e-3
    assert 0.2 * whole < degrees < 0.5 * whole


def test_every_label_of_relion_that_speaks_of_optics_is_in_the_table(relion, tmp_path):
    """Of what RELION knows; what belongs to its own jobs and models, by its name, is not for here."""
    said = relion("relion_refine", "--print_metadata_labels", cwd=tmp_path)
    known = dict(re.findall(r"^\s*(rln\w+) \(.*?: (.*)$", said, re.M))
    assert len(known) > 400
    speaks = re.compile(
        r"CTF|optic|aberr|defocus|voltage|Zernike|beam.?tilt|magnification|phase-plate", re.I
    )
    of_jobs = re.compile(
        "rln(Do|Refs|MagnificationSearch|Coarse|CtfValue|.*StarFile$|LogAmpl|FourierShell)"
    )
    spoken = {name for name, words in known.items() if speaks.search(words) and not of_jobs.match(name)}
    assert len(spoken) > 25
    assert spoken - set(LABELS) == set()


# Of images, optics and sampling, what src/metadata_label.h has beyond that of 3.1: in 4.0, then in 5.0.
RELION_4 = """
    rlnMicrographIceThickness rlnTomoName rlnTomoHand rlnTomoTiltSeriesPixelSize rlnTomoSubtomogramBinning
    rlnTomoParticleName rlnTomoParticleId rlnTomoDefocusSlope"""
RELION_5 = """
    rlnCtfBfactorPerElectronDose rlnCtfIceRingDensity rlnCtfDataAreCtfCorrected rlnTomoSubTomosAre2DStacks
    rlnTomoTomogramBinning rlnTomoVisibleFrames rlnMicrographNameEven rlnMicrographNameOdd"""


def test_labels_are_those_of_a_relion(relion, tmp_path):
    said = relion("relion_refine", "--print_metadata_labels", cwd=tmp_path)
    known = set(re.findall(r"^\s*(rln\w+) \(", said, re.M))
    later = {*RELION_4.split(), *RELION_5.split()}
    assert known & later == set()
    assert set(LABELS) <= known | later
    assert later <= set(LABELS)


def test_what_the_table_promises_of_a_label_is_done():
    """Each refused label is refused above, and each ignored one named."""
    refused = {label for optics, particles, _ in REFUSED.values() for label in (*optics, *particles)}
    named = {label for optics, particles, _ in DOUBTED.values() for label in (*optics, *particles)}
    named |= {label for columns in ABERRATIONS.values() for label in columns}
    for label, treatment in LABELS.items():
        assert treatment is not Treatment.REFUSED or label in refused, label
        assert treatment is not Treatment.IGNORED or label in named, label


def test_the_table_says_one_thing_of_each_label():
    assert all(name.startswith("rln") for name in LABELS)
    assert all(re.match(r"(blob|ctf)/", name) for name in FIELDS)
    for label in MAGNIFICATION:
        assert LABELS[label] is Treatment.MODELLED


def test_scale_and_b_factor_survive_conversion_either_way(make_dataset, tmp_path):
    more = {
        "rlnCtfScalefactor": ["0.5", "0.75", "1", "1.25", "1.5"],
        "rlnCtfBfactor": ["0", "10", "20", "30", "40"],
    }
    star = make_dataset(particles={**DEFOCUS, **more})
    assert main(["convert", str(star), str(tmp_path / "there.cs")]) == 0
    assert main(["convert", str(tmp_path / "there.cs"), str(tmp_path / "back.star")]) == 0
    for path in ("there.cs", "back.star"):
        ctf = read_particles(tmp_path / path).ctf
        assert ctf.scale.tolist() == [0.5, 0.75, 1.0, 1.25, 1.5]
        assert ctf.b_factor_angst2.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_neutral_columns_cost_nothing(make_dataset):
    neutral = {"rlnCtfScalefactor": ["1"] * 5, "rlnCtfBfactor": ["0"] * 5}
    flags = {"rlnCtfDataArePhaseFlipped": ["0"], "rlnCtfDataAreCtfPremultiplied": ["0"]}
    star = make_dataset(optics=optics_columns(1, **flags), particles={**DEFOCUS, **neutral})
    ctf = read_particles(star).ctf
    assert (ctf.scale, ctf.b_factor_angst2, ctf.phase_flipped, ctf.premultiplied) == (None,) * 4


@pytest.mark.parametrize(
    "name", ["apoferritin/apof_48px_3.0A_relion30.star", "apoferritin/apof_48px_3.0A_relion31.star",
             "bgal/bgal_40px_9.56A.star", "small/empiar_10076_7.star", "small/empiar_10076_7.cs",
             "small/relion31.star", "small/relion31.v2.star"],
)  # fmt: skip
def test_real_files_raise_no_false_alarm(shared_data, name):
    particles = read_particles(shared_data / name)
    assert doubts(particles) == []
    assert ignored_aberrations(particles, float(particles.pixel_size_angst.max())) == []
