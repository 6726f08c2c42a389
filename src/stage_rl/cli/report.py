"""`stage report`: one HTML file of runs, or of a study."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from stage_rl.cli.options import refuse_taken
from stage_rl.errors import InputError
from stage_rl.files import replace_text

INSTALL = "pip install 'stage-rl[report]'"


def report(
    inputs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or of a study.", metavar="RUN...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="FILE.html.", show_default="report.html in the first folder")
    ] = None,
) -> None:
    """Write a page of curves, images, token maps and tables that opens in any browser."""
    if out is not None and (out.suffix.lower() != ".html" or not out.parent.is_dir()):
        raise InputError(f"--out {out}: no place for a report; write FILE.html in a folder that is")
    if out is not None:
        refuse_taken("--out", out)
    if not is_installed():
        raise InputError(f"stage report: plotly is not installed; run {INSTALL}")
    from stage_rl.report.page import report_page

    page = report_page(inputs)
    out = out or inputs[0] / "report.html"
    # A link that is there is replaced and not followed.
    replace_text(out, page, hint="name another --out")
    typer.echo(out)


def is_installed() -> bool:
    """Whether what a report is made with is there."""
    return all(importlib.util.find_spec(name) for name in ("plotly", "jinja2"))


def at_end_of(run: Path) -> str:
    """The line that a training ends with: its report, which it writes, or how to get one."""
    if not is_installed():
        return f"report: {INSTALL}, then stage report {run}"
    from stage_rl.report.page import report_page

    replace_text(run / "report.html", report_page([run]))
    return f"report: {run / 'report.html'}"
