"""Hooks of mkdocs: pages made from the program itself, and equations as MathML, which browsers draw alone.

mkdocs build --strict
"""

from __future__ import annotations

import argparse
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from cryo_svae import cli, config

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "example_data" / "walkthrough.ipynb"
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is made from the program."""
    if "<!-- options -->" in markdown:
        markdown = markdown.replace("<!-- options -->", every_option())
    if "<!-- walkthrough -->" in markdown:
        markdown = markdown.replace("<!-- walkthrough -->", walkthrough())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """TeX to MathML; an equation that cannot be read ends the build."""
    return EQUATION.sub(
        lambda found: convert(
            html.unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block"
        ),
        content,
    )


def every_option() -> str:
    """Tables of every command's options, as its ``--help`` has them."""
    commands = next(
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    summaries = {action.dest: action.help or "" for action in commands._choices_actions}
    parts = []
    for name, command in commands.choices.items():
        if command.late_options is not None:
            config.add_options(command, *command.late_options())
            command.late_options = None
        parts.append(f"## cryo-svae {name}\n\n{_sentence(summaries[name])}\n")
        for group in command._action_groups:
            actions = [action for action in group._group_actions if action.dest != "help"]
            if actions:
                parts.append(_table(group.title or "", actions))
    return "\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(title: str, actions: list[argparse.Action]) -> str:
    title = {"positional arguments": "Arguments", "options": "Job"}.get(title, title)
    rows = [f"**{title}**\n", "| option | meaning, and what it is by default |", "|---|---|"]
    for action in actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        value = ""
        if action.choices:
            value = " " + " | ".join(f"`{choice}`" for choice in action.choices).replace("|", "&#124;")
        elif action.option_strings and action.nargs != 0:
            value = f" `{action.metavar}`"
        text = html.escape((action.help or "").replace("%%", "%"), quote=False).replace("|", "&#124;")
        rows.append(f"| {names}{value} | {text} |")
    return "\n".join(rows) + "\n"


def walkthrough() -> str:
    """The notebook, its code and what it printed and drew."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream" and output["name"] == "stdout":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"].split())
                parts.append(f"![What the code above draws](data:image/png;base64,{picture})")
    return "\n\n".join(parts)
