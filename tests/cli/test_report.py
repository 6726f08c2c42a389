"""`stage report`: what it answers where something is missing."""

import importlib.util

import pytest


def test_help_needs_no_torch(stage_process):
    done = stage_process("report", "--help")
    assert done.returncode == 0, done.stderr
    assert "RUN..." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RUN...'"),
        (["RUN", "--out", "a.htm"], "--out a.htm: no place for a report; write FILE.html in a f"),
        (["RUN", "--out", "no/a.html"], "--out no/a.html: no place for a report; write FILE.html"),
        (["RUN"], "RUN: holds neither a run nor the results of a study; name a folder that does"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, arguments, message, run_main
):
    monkeypatch.chdir(tmp_path)
    code, printed = run_main("report", *arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch, run_main):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else real(name)
    )
    code, printed = run_main("report", tmp_path)
    assert code == 2
    assert printed.endswith("plotly is not installed; run pip install 'stage-rl[report]'\n")


def test_a_link_in_the_place_of_the_report_is_not_written_through(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("stage_rl.report.page.report_page", lambda runs: "a page")
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    page = tmp_path / "run" / "report.html"
    page.symlink_to(tmp_path / "mine")
    assert run_main("report", tmp_path / "run")[0] in (0, None)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (page.is_symlink(), page.read_text()) == (False, "a page")
