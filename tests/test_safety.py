"""What comes from outside stays data: checkpoints, names, paths; and nothing goes out."""

from __future__ import annotations

import ast
import os
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cryo_svae.cli import main
from cryo_svae.errors import InputError
from cryo_svae.learning.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import image_names, optics_columns
from tests.learning.test_training import fresh
from tests.test_architecture import imports, modules
from tests.test_cli import QUICK, run

# --- checkpoints -----------------------------------------------------------------------------------


class _Trap:
    """Runs a command when a careless loader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(make_dataset, tmp_path, capsys):
    torch.save({"model": _Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    star = make_dataset()
    out = tmp_path / "job"
    assert main(["estimate", str(star), "--model", str(tmp_path / "trap.pt"), "--out", str(out)]) == 2
    assert "a file that torch cannot load" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("box_px", 10**9),
        ("box_px", 7),
        ("box_px", "12"),
        ("z_dim", 10**9),
        ("z_dim", True),
        ("engine", "__import__"),
        ("engine_config", {"hidden": 8}),
        ("engine_config", None),
        ("preparation", {"box_px": 12}),
        ("use_ctf", "no"),
        ("model", {}),
        ("model", None),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", 3),
        ("epochs_done", -1),
        ("history", [{"elbo": "0"}]),
        ("history", 5),
        ("format", 99),
    ],
)
def test_a_checkpoint_with_a_wrong_field_is_refused(tmp_path, field, value):
    path = tmp_path / "model.pt"
    save_checkpoint(path, fresh()[0])
    content = torch.load(path, weights_only=True)
    torch.save({**content, field: value}, path)
    with pytest.raises(InputError, match="To mend"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_type_in_its_settings_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, fresh()[0])
    content = torch.load(path, weights_only=True)
    for name, item, value in (("engine_config", "hidden", "8"), ("preparation", "box_px", 1.5)):
        torch.save({**content, name: {**content[name], item: value}}, path)
        with pytest.raises(InputError, match=name):
            load_checkpoint(path)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    checkpoint = fresh()[0]
    with torch.no_grad():
        next(checkpoint.engine.parameters()).fill_(torch.nan)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(InputError, match="not numbers"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_damaged_checkpoint_is_read_rightly_or_refused(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, fresh()[0])
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_checkpoint(path)
        except InputError:
            refused += 1
    assert refused > 5


# --- names and paths -------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))


EVIL = "<img/src=x/onerror=alert(1)>&\"'</script><script>alert(2)</script>"


def test_names_from_the_input_are_text_in_the_report(make_dataset, tmp_path):
    """The page of a job whose every name is hostile has the elements of a harmless job's page."""
    pages = []
    for name in ("plain", EVIL.replace("/", "∕")):
        folder = tmp_path / name
        names = ["mics " + name] * 20
        star = make_dataset(
            20,
            folder=folder,
            optics=optics_columns(rlnOpticsGroupName=[name]),
            particles={
                "rlnMicrographName": names,
                "rlnImageName": image_names(20, f"{name}.mrcs"),
                **{f"rlnDefocus{k}": ["15000"] * 20 for k in "UV"},
                "rlnDefocusAngle": ["0"] * 20,
            },
        )
        (folder / "stack.mrcs").rename(folder / f"{name}.mrcs")
        star = star.rename(folder / f"{name}.star")
        assert run(star, folder / f"job {name}") == 0
        tags = _Tags()
        tags.feed((folder / f"job {name}" / "report.html").read_text())
        pages.append(tags.found)
    assert pages[0] == pages[1]


def test_stacks_outside_the_project_are_read_and_named(make_dataset, tmp_path, capsys, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for name in ("../elsewhere/stack.mrcs", f"{elsewhere}/stack.mrcs"):
        star = make_dataset(folder=project, particles={"rlnImageName": image_names(5, name)})
        shutil.move(project / "stack.mrcs", elsewhere / "stack.mrcs")
        monkeypatch.chdir(project)
        assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 0
        said = capsys.readouterr().out
        assert f"1 stack(s) of other folders: {elsewhere}/stack.mrcs" in said
    make_dataset(folder=project)
    assert main(["inspect", str(star), "--out", str(tmp_path / "m.png")]) == 0
    assert "other folders" not in capsys.readouterr().out


# --- nothing goes out ------------------------------------------------------------------------------

OUTSIDE = {"socket", "ssl", "http", "urllib", "requests", "ftplib", "smtplib", "asyncio", "webbrowser"}
SHELLS = {"subprocess", "os.system", "os.popen", "pty", "pickle", "shelve", "marshal", "dill", "joblib"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_no_module_reaches_for_the_network_a_shell_or_pickle(path):
    assert not {name for name in imports(path) if name.split(".")[0] in OUTSIDE | SHELLS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"os.system", "os.popen", "compile", "__import__"}


def test_a_whole_job_opens_no_connection(make_dataset, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection to the network")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(make_dataset(12), tmp_path / "job", *QUICK) == 0
