"""STAR files, read without loss and written back to the letter.

The grammar is RELION's: ``data_name`` headings, ``loop_`` tables of one row per line, lists of
``_label value``, ``#`` comments, cells in '...' or "..." (a quote closes only before white space, so
``it's`` is a plain cell), and text between two lines that begin with ``;``. A ``#`` or a quote inside
a cell is part of it. Behind a blank line a line that begins with ``_``, ``data_`` or ``loop_`` is no
row; control bytes are refused. A data block with several tables becomes several ``StarBlock`` of one name.

A file is read once, as bytes. Tables keep the places of their cells, 4 bytes a cell, and no copies, so
a million particles take little more memory than their file. Tokens are found for many rows at once;
only rows with quotes or comments take the exact, slow way.
"""

from __future__ import annotations

from cryo_svae.formats.star_reader import read_star
from cryo_svae.formats.star_table import StarBlock, StarFile
from cryo_svae.formats.star_writer import Numbers, quote, star_of_tables, write_star, write_tables

__all__ = [
    "Numbers",
    "StarBlock",
    "StarFile",
    "quote",
    "read_star",
    "star_of_tables",
    "write_star",
    "write_tables",
]
