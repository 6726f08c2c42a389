"""`stage export`: what it hands on and prints."""

from pathlib import Path


def test_export_hands_its_options_on_and_prints_the_folder(stand_in, stage, tmp_path):
    seen = []

    def export(model, out, **options):
        seen.append((model, out, options))
        return out

    stand_in("stage_rl.api", "export", export)
    out = tmp_path / "out"
    done = stage("export", "runs/mine@40", out, "--layout", "deepseek", "--merge")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    assert stage("export", "shapes", "other", "--dtype", "bfloat16").exit_code == 0
    assert seen == [
        ("runs/mine@40", out, {"layout": "deepseek", "merge": True, "dtype": None}),
        (
            "shapes",
            Path("other"),
            {"layout": "transformers", "merge": False, "dtype": "bfloat16"},
        ),
    ]


def test_an_unknown_layout_is_wrong_usage(stage):
    assert stage("export", "shapes", "out", "--layout", "gguf").exit_code == 2
