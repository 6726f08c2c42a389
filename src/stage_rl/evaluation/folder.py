"""The folder of an evaluation: claimed for one model and way of sampling, refused for another."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from stage_rl.distributed import World
from stage_rl.errors import InputError
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.scores import hash8
from stage_rl.files import read_record, replace_text
from stage_rl.policies.base import Policy
from stage_rl.policies.digest import base_digest

FOLDER = Path("evaluations")
"""Of evaluations that name none."""


def check_writable(out: Path) -> None:
    """Refuses a folder that no file can be written to, before a model is loaded for it.

    Leaves nothing behind.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written to ({error.strerror}); name another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def open_folder(policy: Policy | None, request: Request, model: str, world: World) -> Path:
    """The folder of the evaluation; one of other images is an `InputError`."""
    about: dict[str, Any] = {"images": str(request.images and request.images.resolve())}
    if policy is not None:
        kept = ("guidance_scale", "seed", "dtype", "smoke")
        about = {"model": model, "weights": base_digest(policy)}
        about |= {key: getattr(request, key) for key in kept}
        if request.temperature != 1:  # folders of temperature 1 say nothing of it
            about["temperature"] = request.temperature
        if request.top_k is not None:
            about["top_k"] = request.top_k
    slug = re.sub(r"[^A-Za-z0-9.@]+", "-", model).strip("-.")[-60:]
    out = request.out or FOLDER / f"{slug or 'images'}-{hash8(about)}"
    world.broadcast_object(lambda: _claim(out, about))
    return out


def release_folder(out: Path) -> None:
    """Leaves no claim on a folder in which nothing came to be: the next command may be another."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == ["setup.json"]:
            (out / "setup.json").unlink()
            out.rmdir()


def _claim(out: Path, about: Mapping[str, Any]) -> None:
    file = out / "setup.json"
    if file.exists():
        kept = read_record(file)
        if kept is None:
            raise InputError(f"{file}: is cut off or damaged; name another --out")
        others = [key for key in {**kept, **about} if kept.get(key) != about.get(key)]
        if others:
            raise InputError(
                f"{out}: was made with another {', '.join(others)}; name another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: is not empty and not the folder of an evaluation; name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(about, indent=1) + "\n")
