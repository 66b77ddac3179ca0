"""Selections: what is asked for, nothing else, and never a word of Python run."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryo_svae.cli import main
from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.star import read_star, write_tables
from cryo_svae.results.selection import (
    SelectionConfig,
    fulfils,
    names_of,
    read_job_particles,
    select,
    select_rows,
)
from tests.conftest import image_names, optics_columns

N = 12
MERIT = [0.9, 0.1, 0.5, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4, 0.95, 0.05, 0.55]
Z1 = [-2, -1, 0, 1, 2, 3, -3, 0.5, 1.5, -0.5, 2.5, -1.5]
CLASS = [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 7, 1]


def job_columns() -> dict[str, list[str]]:
    return {
        "rlnImageName": image_names(N),
        "rlnMicrographName": [f"mics/{k % 3}.mrc" for k in range(N)],
        "rlnOpticsGroup": ["1"] * N,
        "rlnDefocusU": [str(10000.0 + 100 * k) for k in range(N)],
        "rlnDefocusV": [str(9000.0 + 100 * k) for k in range(N)],
        "rlnAnglePsi": [str(30.0 * k - 170) for k in range(N)],
        "rlnOriginXAngst": [f"{k:.6f}" for k in range(N)],
        "rlnOriginYAngst": [f"{-k:.6f}" for k in range(N)],
        "rlnClassNumber": [str(k) for k in CLASS],
        "rlnParticleFigureOfMerit": [f"{merit:.6f}" for merit in MERIT],
        "svaeZ1": [f"{z:.8g}" for z in Z1],
        "svaeZ2": [f"{z * z:.8g}" for z in Z1],
        "svaeLogLikelihood": [f"{-100 * k:.4f}" for k in range(N)],
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_tables(folder / "particles.star", {"optics": optics_columns(), "particles": job_columns()})
    return folder


@pytest.fixture(scope="module")
def block(job):
    return read_job_particles(job)[1]


@pytest.fixture(scope="module")
def star(job):
    return read_job_particles(job)[0]


def rows(star, **options) -> list[int]:
    return select_rows(star, star.block("particles"), SelectionConfig(**options)).tolist()


def where(block, expression: str) -> list[int]:
    return np.flatnonzero(fulfils(block, expression)).tolist()


def test_classes(star):
    assert rows(star, classes="1") == [0, 3, 11]
    assert rows(star, classes=" 1, 4-6 ") == [0, 3, 6, 7, 8, 11]
    assert rows(star, classes="7,7") == [9, 10]


@pytest.mark.parametrize("text", ["", "a", "0", "8", "3-2", "1-", "-3", "1;2", "1-99999999999", "1.0", "²"])
def test_classes_that_are_none(star, text):
    with pytest.raises(InputError, match="--classes"):
        rows(star, classes=text)


def test_a_list_of_particles_in_any_layout(star, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("3\n1, 12\r\n 3\n\n")
    assert rows(star, particles=path) == [0, 2, 11]
    assert rows(star, particles=path, invert=True) == [1, *range(3, 11)]


@pytest.mark.parametrize("text", ["0", "13", "1\n-2", "1\n2.0", "1\nx", "99999999999999999999"])
def test_a_list_with_a_wrong_number_names_its_line(star, tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        rows(star, particles=path)
    assert f"list.txt:{text.count(chr(10)) + 1}: found" in str(error.value)


def test_a_list_that_is_missing_or_no_text(star, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        rows(star, particles=tmp_path / "none.txt")
    (tmp_path / "raw").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        rows(star, particles=tmp_path / "raw")


def test_the_best_share_of_what_else_is_asked(star):
    assert rows(star, top="25%") == [0, 5, 9]
    assert rows(star, top="50%", classes="1") == [0, 3]
    assert rows(star, top="1%") == [9]
    assert rows(star, top="100%") == list(range(N))
    assert rows(star, top="25%", invert=True) == [1, 2, 3, 4, 6, 7, 8, 10, 11]


@pytest.mark.parametrize("text", ["0%", "101%", "50", "-5%", "nan%", "5%%", ""])
def test_shares_that_are_none(star, text):
    with pytest.raises(InputError, match="--top"):
        rows(star, top=text)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("figure_of_merit > 0.4 and z1 > 0", [3, 5, 7]),
        ("rlnParticleFigureOfMerit>.4 and svaeZ1>0", [3, 5, 7]),
        ("not (z1 < 2.5 or z2 > 7)", [10]),
        ("class_number == 7", [9, 10]),
        ("-1 < z1 <= 0.5", [2, 7, 9]),
        ("abs(psi) < 30", [5, 6]),
        ("x + y == 0 and x * 2 - y / -2 >= 15", [10, 11]),
        ("defocus == 9500 + 100 * 3", [3]),
        ("log_likelihood >= -100", [0, 1]),
        ("z1 / 0 > 1e300", [3, 4, 5, 7, 8, 10]),
        ("1 < 2", list(range(N))),
        ("+z1 >= 3\n  or z1 != z1", [5]),
    ],
)
def test_expressions(block, expression, expected):
    assert where(block, expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "__import__('os')",
        "().__class__",
        "z1.real > 0",
        "(lambda: 1)() > 0",
        "z1[0] > 0",
        "9**9**9 > 0",
        "z1 ** 2 > 0",
        "z1 if z1 else z1",
        "[z1 > 0]",
        "{1: 2}",
        "(y := 3) > 0",
        "z1 @ z1 > 0",
        "z1 // 1 > 0",
        "z1 % 2 > 0",
        "1 << 99 > 0",
        "z1 > 0 & z2 > 0",
        "~z1 > 0",
        "z1 in (1, 2)",
        "z1 is 1",
        "z1 > '0'",
        "z1 > 1j",
        "z1 > True",
        "True",
        "f'{z1}' > 0",
        "abs(z1, z2) > 0",
        "abs(*z1) > 0",
        "abs(x=z1) > 0",
        "max(z1) > 0",
        "abs > 0",
        "open('x') > 0",
        "yield",
        "await z1",
        "z1 > 0; z2 > 0",
        "import os",
        "z1 = 1",
        "z1 > 10" + "0" * 400,
        "z1 > 1" + "0" * 5000,
        "-" * 1900 + "z1 > 0",
        "(" * 900 + "z1" + ")" * 900 + " > 0",
        "z1 > 0 and " * 170 + "z1",
        "",
        "   ",
        "z1 >",
        "z1 > 0 and",
        "z1 > \0",
        "z1 > 01",
        "z1",
        "z1 and z2 > 0",
        "not z1",
        "(z1 > 0) + 1 > 0",
        "z1 > 0 > (z2 > 0)",
        "abs(z1 > 0) > 0",
        "rlnMicrographName > 0",
        "z3 > 0",
        "é > 0",
        "z1 > 'é' and q",
        "\ud800 > 1",
    ],
)
def test_everything_else_is_refused(block, expression):
    with pytest.raises(InputError, match="--where") as error:
        fulfils(block, expression)
    assert "^" in str(error.value)


def test_the_place_is_marked_and_the_names_are_told(block):
    with pytest.raises(InputError) as error:
        fulfils(block, "z1 > 0 and qualité < 'é' or figure > 0.4")
    lines = str(error.value).splitlines()
    assert lines[-1].index("^") == lines[-2].index("qualité")
    assert lines[-1].count("^") == len("qualité")
    assert "z1, z2, psi, x, y, class_number" in lines[0]
    assert "rlnDefocusU" in lines[0]
    with pytest.raises(InputError, match=r"rlnMicrographName, which holds .mics/0\.mrc."):
        fulfils(block, "rlnMicrographName == 1")


def test_our_own_pose_comes_before_the_3d_one(tmp_path):
    columns = {**job_columns(), "svaeAnglePsi": ["5.0"] * N, "svaeOriginXAngst": ["1.0"] * N}
    write_tables(tmp_path / "particles.star", {"optics": optics_columns(), "particles": columns})
    block = read_job_particles(tmp_path)[1]
    assert where(block, "psi == 5 and x == 1") == list(range(N))
    assert where(block, "rlnAnglePsi == -170") == [0]


def test_names_are_those_that_the_file_can_fill(job, tmp_path):
    columns = {label: cells for label, cells in job_columns().items() if label != "rlnDefocusV"}
    write_tables(tmp_path / "particles.star", {"particles": columns})
    block = read_job_particles(tmp_path)[1]
    assert "defocus" not in names_of(block)
    with pytest.raises(InputError, match="unknown name 'defocus'"):
        fulfils(block, "defocus > 1")


numbers = st.recursive(
    st.one_of(
        st.sampled_from(["z1", "z2", "x", "y", "psi"]),
        st.integers(0, 9).map(str),
        st.floats(0, 4, allow_nan=False).map("{:.2f}".format),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(" ".join).map("({})".format),
        inner.map("-{}".format),
        inner.map("abs({})".format),
    ),
    max_leaves=5,
)
comparisons = st.tuples(numbers, st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]), numbers)
conditions = st.recursive(
    st.one_of(
        comparisons.map(" ".join),
        st.tuples(numbers, comparisons.map(" ".join)).map(" < ".join),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
        inner.map("not ({})".format),
        inner.map("({})".format),
    ),
    max_leaves=6,
)


@given(conditions)
@settings(max_examples=150, deadline=None)
def test_expressions_mean_what_they_mean_in_python(block, expression):
    truths = fulfils(block, expression).tolist()
    columns = {name: block.numbers(label) for name, label in NAMES.items()}
    for row in range(N):
        values = {name: float(cells[row]) for name, cells in columns.items()}
        assert truths[row] == eval(expression, {"abs": abs}, values)


NAMES = {
    "z1": "svaeZ1",
    "z2": "svaeZ2",
    "x": "rlnOriginXAngst",
    "y": "rlnOriginYAngst",
    "psi": "rlnAnglePsi",
}


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_flags_or_an_input_error(block, text):
    with contextlib.suppress(InputError):
        assert fulfils(block, text).shape == (N,)


def test_nothing_selected_and_nothing_asked_are_errors(star):
    with pytest.raises(InputError, match="none of 12"):
        rows(star, where="z1 > 100")
    with pytest.raises(InputError, match="none of 12"):
        rows(star, top="100%", invert=True)
    with pytest.raises(InputError, match="nothing to select by"):
        SelectionConfig(invert=True)


def test_the_file_written_has_the_rows_to_the_letter_and_the_optics(job, tmp_path):
    out = tmp_path / "selected.star"
    assert select(job, out, SelectionConfig(where="figure_of_merit > 0.4", classes="1,3")) == (5, N)
    before, after = read_star(job / "particles.star"), read_star(out)
    kept = [0, 2, 3, 5, 11]
    assert after.block("optics").text("rlnOpticsGroupName") == ["optics1"]
    for label in before.block("particles").labels:
        cells = before.block("particles").text(label)
        assert after.block("particles").text(label) == [cells[row] for row in kept]
    with pytest.raises(OutputError, match="selected from"):
        select(job, job / "particles.star", SelectionConfig(top="50%"))
    with pytest.raises(InputError, match=r"no particles\.star"):
        select(tmp_path, out, SelectionConfig(top="50%"))


def test_a_selection_goes_through_relion(relion, job, tmp_path):
    select(job, tmp_path / "selected.star", SelectionConfig(top="50%"))
    said = relion("relion_star_handler", "--i", "selected.star", "--o", "again.star", cwd=tmp_path)
    ours, theirs = (
        read_star(tmp_path / name).block("particles") for name in ("selected.star", "again.star")
    )
    assert theirs.n_rows == N // 2, said
    for label in ("rlnImageName", "svaeZ1", "svaeLogLikelihood"):
        assert theirs.text(label) == ours.text(label)
    np.testing.assert_allclose(theirs.numbers("rlnAnglePsi"), ours.numbers("rlnAnglePsi"))


def picked(tmp_path, xs: list[float], merit: list[float], micrographs: str, **optics: list[str]):
    n = len(xs)
    particles = {
        "rlnImageName": image_names(n),
        "rlnMicrographName": [f"mics/{name}.mrc" for name in micrographs],
        "rlnOpticsGroup": ["1"] * n,
        "rlnCoordinateX": [str(x) for x in xs],
        "rlnCoordinateY": [str(0.5 * x) for x in xs],
        "rlnParticleFigureOfMerit": [str(each) for each in merit],
    }
    write_tables(tmp_path / "particles.star", {"optics": optics_columns(**optics), "particles": particles})
    return read_job_particles(tmp_path)[0]


def test_of_particles_picked_twice_the_better_stays(tmp_path):
    twice = picked(tmp_path, [0, 10, 20, 100, 10, 5], [0.5, 0.9, 0.7, 0.1, 0.2, 0.3], "aaaabb")
    assert rows(twice, min_distance="12px") == [1, 3, 5]
    assert rows(twice, min_distance="12px", invert=True) == [0, 2, 4]
    assert rows(twice, min_distance="11px") == [0, 1, 2, 3, 5]  # (0, 0) to (10, 5) is 11.2
    # a chain whose best is an end: the middle goes, and the other end, near to nothing that stays, does not
    chain = picked(tmp_path, [0, 10, 20], [0.9, 0.5, 0.3], "aaa")
    assert rows(chain, min_distance="12px") == [0, 2]


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from("ab"), st.integers(0, 9)), min_size=1, max_size=12
    ),
    st.integers(1, 30),
)
def test_what_stays_is_apart_and_what_goes_has_a_better_neighbour(tmp_path_factory, picks, distance):
    xs, names, merits = zip(*picks, strict=True)
    folder = tmp_path_factory.mktemp("picks")
    star = picked(folder, list(map(float, xs)), list(map(float, merits)), "".join(names))
    kept = set(rows(star, min_distance=f"{distance}px"))

    def near(a: int, b: int) -> bool:
        return names[a] == names[b] and np.hypot(xs[a] - xs[b], 0.5 * (xs[a] - xs[b])) < distance

    for a in range(len(picks)):
        nearer = [b for b in kept if b != a and near(a, b)]
        if a in kept:
            assert not nearer
        else:
            assert any(merits[b] >= merits[a] for b in nearer)


@pytest.mark.parametrize("label", ["rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize"])
def test_a_distance_in_angst_is_one_in_the_micrographs_pixels(tmp_path, label):
    twice = picked(tmp_path, [0, 10, 20, 100], [0.5, 0.9, 0.7, 0.1], "aaaa", **{label: ["0.5"]})
    assert rows(twice, min_distance="5.6") == rows(twice, min_distance="11.2px") == [1, 3]
    assert rows(twice, min_distance="5.5") == rows(twice, min_distance="11px") == [0, 1, 2, 3]


def test_a_distance_in_angst_needs_the_micrographs_pixel_size(tmp_path):
    twice = picked(tmp_path, [0, 10], [0.5, 0.9], "aa")
    with pytest.raises(InputError, match=r"no pixel size of the micrographs(.|\n)*--min-distance 40px"):
        rows(twice, min_distance="40")


def test_duplicates_need_micrographs_and_places(star):
    with pytest.raises(InputError, match=r"--min-distance.*found particles without rlnCoordinateX"):
        rows(star, min_distance="10")


@pytest.mark.parametrize("text", ["0", "0px", "-4", "40 mm", "inf", "", "1e3"])
def test_a_distance_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="min-distance"):
        SelectionConfig(min_distance=text)


@pytest.fixture
def classified(tmp_path):
    """A job of five classes: two good ones, one of noise, one blurred, one tiny."""
    size, merit = [60, 50, 40, 30, 10], ["0.9", "1.1", "-0.004", "1.0", "1.0"]
    angst = ["15.0", "16.0", "60.0", "40.0", "16.0"]
    number = np.repeat([1, 2, 3, 4, 5], size)
    particles = {
        "rlnImageName": image_names(len(number)),
        "rlnOpticsGroup": ["1"] * len(number),
        "rlnClassNumber": [str(each) for each in number],
        "rlnParticleFigureOfMerit": [merit[each - 1] for each in number],
    }
    write_tables(tmp_path / "particles.star", {"optics": optics_columns(), "particles": particles})
    classes = {
        "rlnEstimatedResolution": angst,
        "svaeResolution05Angst": angst,
        "svaeNrParticles": [str(each) for each in size],
        "svaeMeanFigureOfMerit": merit,
    }
    write_tables(tmp_path / "classes.star", {"classes": classes})
    return tmp_path


def test_auto_takes_the_good_classes_and_says_which_and_why(classified, capsys):
    out = classified / "good.star"
    assert main(["select", str(classified), "--auto", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "--auto takes the classes 1-2; look at them in report.html" in said[5]
    assert said[0].endswith("15.0 Å  taken")
    assert "left out: merit 0.00, below half of 1.10" in said[2]
    assert "left out: 40.0 Å at an FRC of 0.5, above 1.5 times" in said[3]
    assert "left out: 10 particles, fewer than 20" in said[4]
    assert said[6] == f"110 of 190 particles in {out}"
    assert set(read_star(out).block("particles").integers("rlnClassNumber")) == {1, 2}


def test_auto_is_one_condition_of_several(classified):
    assert select(classified, classified / "a.star", SelectionConfig(auto=True, invert=True)) == (80, 190)
    of_two = SelectionConfig(auto=True, where="class_number == 2")
    assert select(classified, classified / "b.star", of_two) == (50, 190)


def test_where_no_class_is_good_auto_takes_none(classified, tmp_path, capsys):
    classes = read_star(classified / "classes.star").block("classes")
    columns = {label: list(classes.text(label)) for label in classes.labels}
    write_tables(
        classified / "classes.star", {"classes": {**columns, "svaeResolution05Angst": ["999.0"] * 5}}
    )
    assert main(["select", str(classified), "--auto", "--out", str(tmp_path / "none.star")]) == 2
    said = capsys.readouterr().err
    assert "no resolution at an FRC of 0.5" in said
    assert "name classes by --classes" in said
    assert not (tmp_path / "none.star").exists()
    (classified / "classes.star").unlink()
    assert main(["select", str(classified), "--auto", "--out", str(tmp_path / "none.star")]) == 2
    assert "no classes.star" in capsys.readouterr().err
