"""Writes example_data/walkthrough.ipynb from walkthrough.py, runs it, and keeps what it printed and drew.

python docs/make_notebook.py
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

EXAMPLE = Path(__file__).resolve().parents[1] / "example_data"
CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)


def cells(script: str) -> list[nbformat.NotebookNode]:
    """The cells of a script that ``# %%`` and ``# %% [markdown]`` divide."""
    _, *parts = CELL.split(script)
    made = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()]
            made.append(new_markdown_cell("\n".join(lines), id=f"cell-{number}"))
        else:
            made.append(new_code_cell(text.strip(), id=f"cell-{number}"))
    return made


def main() -> None:
    """Made anew, run in its own folder, and written."""
    notebook = new_notebook(cells=cells((EXAMPLE / "walkthrough.py").read_text()))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, EXAMPLE / "walkthrough.ipynb")


if __name__ == "__main__":
    main()
