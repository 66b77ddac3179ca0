"""STAR files: read exactly, written back to the letter, refused clearly."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import starfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryo_svae.errors import InputError, OutputError
from cryo_svae.formats.star import quote, read_star, write_star, write_tables

PARTICLES = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
           1 001

# version 30001

data_particles

loop_
_rlnImageName #1
_rlnMicrographName #2
_rlnAnglePsi #3
_rlnClassNumber #4
000001@a/stack.mrcs\t"my mics/m 1.mrc"  0012.50  3
000002@a/stack.mrcs it's#1.mrc 1.5e-9 12345678   # kept
000003@a/stack.mrcs data_2020/m.mrc nan 3.000000

"""


def star_at(folder: Path, text: str | bytes) -> Path:
    path = folder / "particles.star"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rewritten(path: Path, **changes: object) -> str:
    star = read_star(path)
    write_star(path.with_name("out.star"), star, **changes)  # type: ignore[arg-type]
    return path.with_name("out.star").read_bytes().decode("utf-8", "surrogateescape")


# --- reading ---------------------------------------------------------------------------------------


def test_cells_come_as_they_stand(tmp_path: Path) -> None:
    star = read_star(star_at(tmp_path, PARTICLES))
    assert [(b.name, b.is_loop, b.n_rows) for b in star.blocks] == [
        ("optics", True, 1),
        ("particles", True, 3),
    ]
    particles = star.block("particles")
    assert particles is not None
    assert star.block("movies") is None
    assert particles.labels == ("rlnImageName", "rlnMicrographName", "rlnAnglePsi", "rlnClassNumber")
    assert particles.has("rlnAnglePsi")
    assert not particles.has("_rlnAnglePsi")
    assert particles.text("rlnMicrographName") == ["my mics/m 1.mrc", "it's#1.mrc", "data_2020/m.mrc"]
    assert particles.text("rlnAnglePsi") == ["0012.50", "1.5e-9", "nan"]
    np.testing.assert_array_equal(particles.numbers("rlnAnglePsi"), [12.5, 1.5e-9, math.nan])
    assert particles.integers("rlnClassNumber").tolist() == [3, 12345678, 3]
    assert [particles.line_of(row) for row in range(3)] == [20, 21, 22]


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("data_\nloop_\n_a\n1\n", ["1"]),
        ("data_\r\n\r\nloop_ \r\n_a #1 \r\n1 \r\n2\r\n \r\n", ["1", "2"]),
        ("data_\r\r\nloop_\r\r\n_a\r\r\n1\r\r\n2\r", ["1", "2"]),
        ("data_\nloop_\n_a\n1\n\n# a list\n_b 2\n", ["1"]),
        ("data_\nloop_ # rows\n_a # first\n\n# here\n1\n\n# and here\n2\n\n\n", ["1", "2"]),
        ("data_\nloop_\n_a\n_b\n\t1\t2\n  3 4", ["1", "3"]),
        ("data_\nloop_\n_a #1\n", []),
        ("data_\nloop_\n_a #1", []),
        ("data_\n_a 7\n", ["7"]),
        ("data_\n\n_b 'x y'\n_a   \"it's \" # yes\n", ["it's "]),
        ("data_\n_a\n;two\nlines\n;\n_b 3\n", ["two\nlines"]),
        ("data_\n_b 3\n_a\n", [""]),
        ("data_\nloop_\n_b\n_a\ndata_x data_y\nloop_ _c\n_c 5\n", ["data_y", "_c", "5"]),
        ("\ufeffdata_\nloop_\n_a\nµ/粒子.mrc\n", ["µ/粒子.mrc"]),
        ("data_\nloop_\n_a\n_b\n'a b' '#'\n\"c'\" \"'\"\n", ["a b", "c'"]),
        ("data_\nloop_\n_a\n" + "x" * 300 + "\n" + " " * 300 + "y" + " " * 300 + "\n", ["x" * 300, "y"]),
    ],
)
def test_the_grammar(tmp_path: Path, text: str, cells: list[str]) -> None:
    block = read_star(star_at(tmp_path, text)).block("")
    assert block is not None
    assert block.text("a") == cells
    assert block.n_rows == len(cells)


def test_two_blocks_of_one_name_and_two_tables_in_one_block(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_\nloop_\n_a\n1\n\n_b 2\ndata_\nloop_\n_a\n3\nloop_\n_c\n4\ndata_empty\n")
    star = read_star(path)
    assert [(b.name, b.labels, b.n_rows) for b in star.blocks] == [
        ("", ("a",), 1),
        ("", ("b",), 1),
        ("", ("a",), 1),
        ("", ("c",), 1),
        ("empty", (), 0),
    ]
    out = rewritten(path, block="", columns={"a": ["9"], "z": ["8"]})
    assert out.startswith("data_\nloop_\n_a\n_z #2 \n9 8\n\n_b 2\ndata_\nloop_\n_a\n3\n")


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = star_at(tmp_path, b"data_\nloop_\n_a\n_b\n\xe9t\xe9.mrc 1\n")
    cells = read_star(path).blocks[0].text("a")
    assert (
        rewritten(path, block="", columns={"a": cells}).encode("utf-8", "surrogateescape")
        == path.read_bytes()
    )


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        (b"", "particles.star: ", "an empty file"),
        (b" \n\n", "particles.star: ", "an empty file"),
        (b"# only this\n", "particles.star:1: ", "the end of the file"),
        (b"\x89PNG\0\0", "particles.star: ", "a file that is not text"),
        (bytes(208) + b"MAP " + bytes(812), "particles.star: ", "an MRC file"),
        ("data_x\n_a 1\n".encode("utf-16"), "particles.star: ", "a file that is not text"),
        (b"loop_\n_a\n1\n", "particles.star:1: ", "'loop_'"),
        (b"hello\ndata_\n", "particles.star:1: ", "'hello'"),
        (b"data_\n1 2 3\n", "particles.star:2: ", "'1 2 3'"),
        (b"data_\n_a #1\n_b #2\n1 2\n", "particles.star:4: ", "'1 2'"),
        (b"data_\nloop_\n1 2\n", "particles.star:2: ", "'loop_'"),
        (b"data_\nloop_\n_a 1\n1 2\n", "particles.star:3: ", "'_a 1'"),
        (b"data_\nloop_\n_a\n_b\n1 2\n3\n", "particles.star:6: column _b (#2): ", "a row of 1 cell,"),
        (b"data_\nloop_\n_a\n_b\n1 2\n3 4 5\n", "particles.star:6: column #3: ", "a row of 3 cells"),
        (b"data_\nloop_\n_a\n_b\n1 2\n3 # 4\n", "particles.star:6: column _b (#2): ", "a row of 1 cell,"),
        (b"data_\nloop_\n_a\n_b\n1\n2 3 4\n", "particles.star:5: column _b (#2): ", "a row of 1 cell,"),
        (b"data_\nloop_\n_a\n_b\n_a\n1 2 3\n", "particles.star:5: ", "label _a for the second time"),
        (b"data_\n_a 1\n_a 2\n", "particles.star:3: ", "label _a for the second time"),
        (
            b"data_\nloop_\n_a\n_b\n1 'x\n",
            "particles.star:5: column #2: ",
            "a quote that is not closed: 'x",
        ),
        (b'data_\n_a "x\n', "particles.star:2: column #2: ", "a quote that is not closed"),
        (b"data_\n_a x y\n", "particles.star:2: ", "'_a x y'"),
        (b"data_\n_a\n;text\n", "particles.star:3: ", "';text'"),
        (b"data_\nloop_\n_a\n_b\n1 2\n\ndata_x 3\n", "particles.star:7: ", "'data_x 3'"),
        (b"data_\nloop_\n_a\n_b\n1 2\n\n# c\n\ndata_x 3\n", "particles.star:9: ", "'data_x 3'"),
        (b"data_\nloop_\n_a\n_b\n1 2\n \n# c\nloop_ 3\n", "particles.star:8: ", "'loop_ 3'"),
        (b"data_x y\nloop_\n_a\n1\n", "particles.star:1: ", "'data_x y'"),
        (b"data_\rloop_\r_a\r1\r", "particles.star:1: ", "byte 0x0d within the line"),
        (b"data_\nloop_\n_a\n_b\n1\x172 3\n", "particles.star:5: ", "byte 0x17 within the line"),
        (b"data_\nloop_\n_a\n_b\n1 2\n3\x0b4\n", "particles.star:6: ", "byte 0x0b within the line"),
        (b"data_\nloop_\n_a\n_b\n1 2\n3\r4\r\n", "particles.star:6: ", "byte 0x0d within the line"),
    ],
)
def test_what_is_no_star_file_is_told_with_its_place(
    tmp_path: Path, text: bytes, place: str, found: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_star(star_at(tmp_path, text))
    message = str(caught.value)
    assert f"{place}found {found}" in message
    assert ", expected " in message
    assert "\n  To mend: " in message


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.star: found no such file or directory"):
        read_star(tmp_path / "absent.star")
    with pytest.raises(InputError, match="a folder"):
        read_star(tmp_path)


@pytest.mark.parametrize(
    "cell",
    [
        "<NA>",
        '""',
        "abc",
        "1_000",
        "0x10",
        "1,5",
        "--1",
        "0x",
        "12345_6",
        "1e",
        ".",
        "1.5.2",
        "١",
        "1d5",
        "nan(0)",
    ],
)
@pytest.mark.parametrize("padding", ["", "x" * 100])
def test_what_is_no_number_is_told_with_its_place(tmp_path: Path, cell: str, padding: str) -> None:
    path = star_at(tmp_path, f"data_\nloop_\n_a #1\n_b #2\n1{padding and ' '}   2\n3 {cell}\n")
    with pytest.raises(InputError) as caught:
        read_star(path).blocks[0].numbers("b")
    shown = cell.strip('"')
    assert f"particles.star:6: column _b (#2): found '{shown}', expected a number" in str(caught.value)


def test_numbers_in_every_spelling(tmp_path: Path) -> None:
    spelt = [
        "1",
        "+1",
        "-1.",
        ".5",
        "1e3",
        "1E-3",
        "nan",
        "-nan",
        "NaN",
        "inf",
        "-Inf",
        "'7'",
        "0" * 80 + "8",
    ]
    path = star_at(tmp_path, "data_\nloop_\n_a\n" + "\n".join(spelt))
    expected = [1, 1, -1, 0.5, 1e3, 1e-3, math.nan, math.nan, math.nan, math.inf, -math.inf, 7, 8]
    np.testing.assert_array_equal(read_star(path).blocks[0].numbers("a"), expected)


@pytest.mark.parametrize("cell", ["3.5", "nan", "inf", "1e300", "9007199254740993"])
def test_what_is_no_whole_number_is_told(tmp_path: Path, cell: str) -> None:
    path = star_at(tmp_path, f"data_x\n_rlnClassNumber {cell}\n")
    with pytest.raises(InputError) as caught:
        read_star(path).blocks[0].integers("rlnClassNumber")
    assert f"particles.star:2: column _rlnClassNumber (#1): found '{cell}', expected a whole" in str(
        caught.value
    )


def test_an_empty_value_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"particles\.star:2: column _a \(#1\): found '', expected a number"
    ):
        read_star(star_at(tmp_path, "data_\n_a\n")).blocks[0].numbers("a")


def test_an_unknown_column_or_block_is_told_with_what_there_is(tmp_path: Path) -> None:
    star = read_star(star_at(tmp_path, PARTICLES))
    with pytest.raises(
        InputError, match=r"block data_optics, which has _rlnOpticsGroup, _rlnOpticsGroupName"
    ):
        star.blocks[0].text("rlnVoltage")
    with pytest.raises(
        InputError, match=r"found data_optics, data_particles, expected a block data_images"
    ):
        write_star(tmp_path / "out.star", star, block="images", columns={})


# --- writing ---------------------------------------------------------------------------------------


def test_columns_are_appended_and_replaced_and_nothing_else_moves(tmp_path: Path) -> None:
    path = star_at(tmp_path, PARTICLES)
    columns = {"svaeZ1": ["1", "-2.5", "a b"], "rlnAnglePsi": ["7", "8.25", "-9"], "svaeZ2": ["x", "y", ""]}
    expected = (
        PARTICLES.replace("_rlnClassNumber #4\n", "_rlnClassNumber #4\n_svaeZ1 #5 \n_svaeZ2 #6 \n")
        .replace("  0012.50  3\n", "  7  3 1 x\n")
        .replace("1.5e-9 12345678   # kept", "8.25 12345678 -2.5 y   # kept")
        .replace("nan 3.000000\n", '-9 3.000000 "a b" ""\n')
    )
    assert rewritten(path, block="particles", columns=columns) == expected


def test_rows_are_chosen_in_order(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_a\nloop_\n_x\n\n1 # one\n\n# between\n2 \n3\ndata_b\n_y 1")
    out = rewritten(path, block="a", columns={"z": ["p", "q", "r"]}, rows=np.array([2, 0, 2]))
    assert out == "data_a\nloop_\n_x\n_z #2 \n\n# between\n3 p\n1 q # one\n3 r\ndata_b\n_y 1"
    assert rewritten(path, block="a", columns={}, rows=np.array([], int)) == (
        "data_a\nloop_\n_x\n\n# between\ndata_b\n_y 1"
    )


def test_a_cell_like_a_label_may_come_first(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_\nloop_\n_x\n_y\na 1\n_b 2\n")
    out = rewritten(path, block="", columns={}, rows=np.array([1, 0]))
    assert out == 'data_\nloop_\n_x\n_y\n"_b" 2\na 1\n'


def test_the_last_row_may_lack_its_line_end(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_\r\nloop_\r\n_x\r\n1\r\n2")
    assert (
        rewritten(path, block="", columns={"z": ["p", "q"]})
        == "data_\r\nloop_\r\n_x\r\n_z #2 \r\n1 p\r\n2 q"
    )
    assert (
        rewritten(path, block="", columns={}, rows=np.array([1, 0])) == "data_\r\nloop_\r\n_x\r\n2\r\n1\r\n"
    )


def test_an_empty_loop_gets_its_labels(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_\nloop_\n_x #1")
    assert rewritten(path, block="", columns={"z": []}) == "data_\nloop_\n_x #1\n_z #2 \n"


def test_a_list_becomes_a_loop(tmp_path: Path) -> None:
    path = star_at(tmp_path, "data_optics\n\n_a  'x y'\n# why\n_b  2 # two\n_c\n\ndata_particles\n_d 4\n")
    out = rewritten(path, block="optics", columns={"b": ["3"], "z": ["4"]})
    assert out == (
        "data_optics\n\n# why\nloop_ \n_a #1 \n_b #2 \n_c #3 \n_z #4 \n"
        "'x y' 3 \"\" 4\n\ndata_particles\n_d 4\n"
    )
    assert rewritten(path, block="particles", columns={}) == path.read_text()
    assert rewritten(path, block="particles", columns={"d": ["5"]}).endswith("\nloop_ \n_d #1 \n5\n")
    path = star_at(tmp_path, "data_\n_a _x\n_b\n;one\n;\n_c 1")
    assert (
        rewritten(path, block="", columns={"c": ["2"]})
        == 'data_\nloop_ \n_a #1 \n_b #2 \n_c #3 \n"_x" one 2\n'
    )


def test_cells_must_be_as_many_as_rows(tmp_path: Path) -> None:
    star = read_star(star_at(tmp_path, PARTICLES))
    with pytest.raises(ValueError, match="3 rows to write, but not as many cells for z"):
        write_star(tmp_path / "out.star", star, block="particles", columns={"z": ["1", "2"]})
    assert not (tmp_path / "out.star").exists()


def test_a_file_may_be_written_over_itself(tmp_path: Path) -> None:
    path = star_at(tmp_path, PARTICLES)
    star = read_star(path)
    write_star(path, star, block="optics", columns={"z": ["1"]})
    particles = star.block("particles")
    assert particles is not None
    assert particles.text("rlnClassNumber") == ["3", "12345678", "3.000000"]


def test_new_tables_are_laid_out_as_relion_does(tmp_path: Path) -> None:
    path = tmp_path / "new.star"
    tables = {
        "particles": {"rlnImageName": ["1@a b.mrcs", "x"], "rlnAnglePsi": ["-1.5", "2"]},
        "none": {"a": []},
    }
    write_tables(path, tables, lists={"general": {"rlnNrClasses": "3", "rlnNote": "two words"}})
    text = path.read_text()
    assert text.startswith("\n# version 30001\n\ndata_general\n\n_rlnNrClasses ")
    assert "\ndata_particles\n\nloop_ \n_rlnImageName #1 \n_rlnAnglePsi #2 \n" in text
    star = read_star(path)
    assert [(b.name, b.is_loop, b.n_rows) for b in star.blocks] == [
        ("general", False, 1),
        ("particles", True, 2),
        ("none", True, 0),
    ]
    assert star.blocks[0].text("rlnNote") == ["two words"]
    assert star.blocks[1].text("rlnImageName") == ["1@a b.mrcs", "x"]


@pytest.mark.parametrize("cell", ["a\nb", "a\r", "a\0b", "a\x17b", "a\" b' c"])
def test_a_cell_that_no_row_can_hold_is_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(OutputError, match="cannot be written in a STAR file"):
        write_tables(tmp_path / "new.star", {"x": {"a": [cell]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cell", "quoted"),
    [("0012", "0012"), ("it's", "it's"), ("a#b", "a#b"), ("[1,2]", "[1,2]"), ("Sally", "Sally")]
    + [
        (bare, f'"{bare}"')
        for bare in ["", " ", "a b", "a\tb", "#a", "_a", ";a", "$a", "data_x", "LOOP_", "'a"]
    ]
    + [('"a"', "'\"a\"'"), ('a" b', "'a\" b'")],
)
def test_quotes_only_where_needed(cell: str, quoted: str) -> None:
    assert quote(cell) == quoted


# --- laws ------------------------------------------------------------------------------------------

LETTERS = st.characters(codec="utf-8", min_codepoint=33, exclude_categories=["Cc", "Cs"])
PLAIN = st.text(LETTERS, min_size=1, max_size=12).filter(lambda cell: quote(cell) == cell)
AWKWARD = st.sampled_from(
    ["0012", "1.5e-9", "nan", "12345678", "it's", "a#b", "x" * 200, "data", "loop", "-0"]
)
SPACED = st.text(st.sampled_from("ab'\"#_; \t"), max_size=8).filter(
    lambda cell: not ('" ' in cell or "' " in cell or '"\t' in cell or "'\t" in cell)
)
CELLS = st.one_of(PLAIN, AWKWARD, SPACED)
LABELS = st.lists(
    st.from_regex(r"[A-Za-z][A-Za-z0-9.\[\]]{0,9}", fullmatch=True), min_size=1, max_size=5, unique=True
)
BLANK = st.sampled_from([" ", "  ", "\t", " \t "])
GAP = st.sampled_from(["", "", "\n", " \n\n", "# version 30001\n", "\n# 'quoted\n \n"])


@dataclass
class Written:
    """A block as it stands in the text, and what must be read from it."""

    text: str
    name: str
    labels: tuple[str, ...]
    rows: list[list[str]]


@st.composite
def blocks(draw: st.DrawFn) -> Written:
    name = draw(st.sampled_from(["", "optics", "particles", "µ"]))
    labels = draw(LABELS)
    is_loop = draw(st.booleans())
    n_rows = draw(st.integers(0, 4)) if is_loop else 1
    rows = [[draw(CELLS) for _ in labels] for _ in range(n_rows)]
    text = f"{draw(GAP)}data_{name}{draw(BLANK)}\n{draw(GAP)}"
    if not is_loop:
        for label, cell in zip(labels, rows[0], strict=True):
            text += f"_{label}{draw(BLANK)}{quote(cell)}"
            text += draw(st.sampled_from(["", " ", " # why"])) + "\n" + draw(GAP)
        return Written(text, name, tuple(labels), rows)
    text += "loop_ \n" + draw(GAP)
    for k, label in enumerate(labels):
        text += f"_{label}{draw(st.sampled_from(['', f' #{k + 1} ', ' # unit']))}\n{draw(GAP)}"
    for row in rows:
        text += draw(st.sampled_from(["", "   ", "\t"]))
        text += "".join(quote(cell) + draw(BLANK) for cell in row)
        text += draw(st.sampled_from(["", "# note 'x"])) + "\n" + draw(GAP)
    return Written(text, name, tuple(labels), rows)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[Written]]:
    parts = draw(st.lists(blocks(), min_size=1, max_size=3))
    text = "".join(part.text for part in parts)
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    if draw(st.booleans()):
        text = text.removesuffix("\n").removesuffix("\r")
    return text.encode(), parts


IN_ONE_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@IN_ONE_FOLDER
@given(files())
def test_what_was_written_is_read_and_written_back(
    tmp_path: Path, file: tuple[bytes, list[Written]]
) -> None:
    text, parts = file
    star = read_star(star_at(tmp_path, text))
    assert [(b.name, b.labels) for b in star.blocks] == [(p.name, p.labels) for p in parts]
    for block, part in zip(star.blocks, parts, strict=True):
        assert [block.text(label) for label in block.labels] == [
            [row[k] for row in part.rows] for k in range(len(part.labels))
        ]
    write_star(tmp_path / "out.star", star, block=parts[0].name, columns={})
    assert (tmp_path / "out.star").read_bytes() == text


@IN_ONE_FOLDER
@given(files(), st.data())
def test_new_cells_are_read_back_and_old_ones_kept(
    tmp_path: Path, file: tuple[bytes, list[Written]], data: st.DataObject
) -> None:
    text, parts = file
    star = read_star(star_at(tmp_path, text))
    name = data.draw(st.sampled_from([part.name for part in parts]))
    at = next(i for i, part in enumerate(parts) if part.name == name)
    n_rows = len(parts[at].rows)
    rows = data.draw(st.none() | st.lists(st.integers(0, max(n_rows - 1, 0)), max_size=5 if n_rows else 0))
    n_out = n_rows if rows is None else len(rows)
    cells = st.lists(CELLS, min_size=n_out, max_size=n_out)
    changed = data.draw(st.sampled_from(parts[at].labels))
    columns = {"svaeZ1": data.draw(cells), changed: data.draw(cells)}
    write_star(
        tmp_path / "out.star",
        star,
        block=name,
        columns=columns,
        rows=None if rows is None else np.array(rows, int),
    )
    again = read_star(tmp_path / "out.star")
    assert len(again.blocks) == len(star.blocks)
    for i, (new, old) in enumerate(zip(again.blocks, star.blocks, strict=True)):
        for label in old.labels:
            before = old.text(label)
            if i == at:
                before = columns.get(
                    label, [before[row] for row in (range(n_rows) if rows is None else rows)]
                )
            assert new.text(label) == before
    assert again.blocks[at].text("svaeZ1") == columns["svaeZ1"]


@IN_ONE_FOLDER
@given(st.lists(st.floats(), min_size=1, max_size=30))
def test_numbers_are_read_to_the_last_bit(tmp_path: Path, values: list[float]) -> None:
    write_tables(tmp_path / "new.star", {"": {"x": [repr(value) for value in values]}})
    np.testing.assert_array_equal(read_star(tmp_path / "new.star").blocks[0].numbers("x"), values)


@IN_ONE_FOLDER
@given(st.text("d_loop#'\"; \n\tax1", max_size=60) | st.binary(max_size=60))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str | bytes) -> None:
    path = star_at(tmp_path, text if isinstance(text, bytes) else "data_\nloop_\n_a\n" + text)
    try:
        star = read_star(path)
    except InputError:
        return
    for block in star.blocks:
        assert all(len(block.text(label)) == block.n_rows for label in block.labels)
    write_star(tmp_path / "out.star", star, block=star.blocks[0].name, columns={})
    assert (tmp_path / "out.star").read_bytes() == path.read_bytes()


def test_rows_beyond_one_chunk_agree(tmp_path: Path) -> None:
    n = 70_000
    names = [f"{i}@a b.mrcs" if i % 1000 == 0 else f"{i}@ab.mrcs" for i in range(n)]
    write_tables(tmp_path / "a.star", {"particles": {"name": names, "x": [f"{i}.5" for i in range(n)]}})
    star = read_star(tmp_path / "a.star")
    new = [f"z{i}" for i in range(n)]
    write_star(
        tmp_path / "b.star", star, block="particles", columns={"x": new, "y": new}, rows=np.arange(n)[::-1]
    )
    block = read_star(tmp_path / "b.star").blocks[0]
    assert block.text("name") == names[::-1]
    assert block.text("x") == block.text("y") == new
    np.testing.assert_array_equal(star.blocks[0].numbers("x"), np.arange(n) + 0.5)


@IN_ONE_FOLDER
@given(st.lists(st.text("019+-.eEinfatyNA_xXd", min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_number_is_what_python_reads_without_underscores(tmp_path: Path, cells: list[str]) -> None:
    try:
        expected = [float(cell) if "_" not in cell else float("no") for cell in cells]
    except ValueError:
        expected = None
    write_tables(tmp_path / "new.star", {"": {"x": cells, "y": cells}})
    block = read_star(tmp_path / "new.star").blocks[0]
    if expected is None:
        with pytest.raises(InputError, match="expected a number"):
            block.numbers("x")
    else:
        np.testing.assert_array_equal(block.numbers("x"), expected)


# --- judges ----------------------------------------------------------------------------------------


def zoo(shared_data: Path) -> list[Path]:
    return sorted(shared_data.glob("star_zoo/**/*.star")) + sorted(shared_data.glob("[ab]*/*.star"))


def test_starfile_reads_the_same(shared_data: Path, tmp_path: Path) -> None:
    paths = zoo(shared_data)
    assert len(paths) > 25
    for path in paths:
        star = read_star(path)
        labels = sorted({label for block in star.blocks for label in block.labels})
        judged = starfile.read(path, always_dict=True, parse_as_string=labels)
        assert list(judged) == [block.name for block in star.blocks]
        for block in star.blocks:
            table = judged[block.name]
            assert list(table) == list(block.labels)
            for label in block.labels:
                theirs = list(table[label]) if block.is_loop else [table[label]]
                assert block.text(label) == theirs, (path, label)


def test_starfile_reads_the_same_numbers(shared_data: Path) -> None:
    for path in zoo(shared_data):
        judged = starfile.read(path, always_dict=True)
        for block in read_star(path).blocks:
            for label in block.labels:
                theirs = np.atleast_1d(np.asarray(judged[block.name][label]))
                if theirs.dtype.kind in "if" and "" not in block.text(label):
                    np.testing.assert_array_equal(block.numbers(label), theirs, err_msg=f"{path} {label}")


def test_every_file_of_the_zoo_comes_back_to_the_letter(shared_data: Path, tmp_path: Path) -> None:
    for path in zoo(shared_data):
        star = read_star(path)
        write_star(tmp_path / "out.star", star, block=star.blocks[0].name, columns={})
        assert (tmp_path / "out.star").read_bytes() == path.read_bytes()


def test_starfile_reads_what_we_write(tmp_path: Path) -> None:
    star = read_star(star_at(tmp_path, PARTICLES.replace("it's#1.mrc", "its.mrc")))
    columns = {"svaeZ1": ["1.5", "-2e-9", "0"], "rlnAnglePsi": ["7", "8.25", "-9"]}
    write_star(tmp_path / "out.star", star, block="particles", columns=columns)
    table = starfile.read(tmp_path / "out.star", always_dict=True)["particles"]
    assert table["svaeZ1"].tolist() == [1.5, -2e-9, 0]
    assert table["rlnAnglePsi"].tolist() == [7, 8.25, -9]
    assert table["rlnMicrographName"].tolist() == ["my mics/m 1.mrc", "its.mrc", "data_2020/m.mrc"]


@pytest.mark.skipif(shutil.which("relion_star_handler") is None, reason="RELION is not installed")
def test_relion_reads_what_we_write(tmp_path: Path) -> None:
    optics = {
        "rlnOpticsGroupName": ["my group"],
        "rlnOpticsGroup": ["1"],
        "rlnImagePixelSize": ["1.5"],
        "rlnImageSize": ["64"],
        "rlnImageDimensionality": ["2"],
        "rlnVoltage": ["300"],
        "rlnSphericalAberration": ["2.7"],
        "rlnAmplitudeContrast": ["0.1"],
    }
    particles = {
        "rlnImageName": [f"{k:06d}@a.mrcs" for k in range(1, 5)],
        "rlnMicrographName": ["m 1.mrc", "it's.mrc", "data_2.mrc", "m#4.mrc"],
        "rlnOpticsGroup": ["1"] * 4,
    }
    write_tables(tmp_path / "new.star", {"optics": optics, "particles": particles})
    added = {"rlnClassNumber": ["1", "2", "1", "2"], "svaeZ1": ["-1.23456789", "a b", "3e-12", "0"]}
    write_star(tmp_path / "in.star", read_star(tmp_path / "new.star"), block="particles", columns=added)
    files = ["--i", "in.star", "--o", "out.star"]
    select = ["--select", "rlnClassNumber", "--minval", "2", "--maxval", "2"]
    subprocess.run(
        ["relion_star_handler", *files, *select], cwd=tmp_path, check=True, capture_output=True, timeout=60
    )
    block = read_star(tmp_path / "out.star").block("particles")
    assert block is not None
    for label, cells in (particles | added).items():
        assert block.text(label) == [cells[1], cells[3]]
