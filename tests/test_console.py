"""Progress of long work on the error stream."""

from stage_rl import console


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.progress("evaluate it", 10) as advance:
        advance(4)
        advance(6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [
        "evaluate it: 4/10",
        "evaluate it: 10/10",
    ]
