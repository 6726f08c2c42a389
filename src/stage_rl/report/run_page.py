"""What a run folder holds, as the plain values that the report's page shows.

Shape suffixes: P groups, G images of a group, T image tokens, V codebook size, C codebook channels,
H x W pixels.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage_rl.config import flatten
from stage_rl.errors import InputError
from stage_rl.run_records import record_of

Array = NDArray[Any]

MAPS = {
    "similarity": "Similarity with opposite advantages",
    "mask": "Mask of the advantage",
    "kl_weight": "KL weight",
    "advantages": "Advantage",
    "entropy": "Entropy (nats)",
    "drift": "Entropy minus the reference's (nats)",
}
"""Token maps by their array; those of other credit functions are called as the function does."""
SIGNED = ("advantages", "drift")
"""Maps whose scale has 0 in its middle."""
LOSSLESS_SIDE = 96
"""Longer images are shown as WebP of quality 80."""
CLIPPED = (0.5, 99.5)
"""Percentiles at which the scale of a map ends."""


def logged_steps(run: Path, *, budget: int) -> dict[str, Any]:
    """The logged images of a run with their token maps, in at most about `budget` bytes: all steps,
    or as many as fit, evenly spaced and with the last.
    """
    files = _logged(run, "images")
    logged = [int(file.stem) for file in files]
    found: dict[str, Any] = {"logged": logged, "steps": [], "maps": []}
    if not files:
        return found
    kept = evenly(files, _number(budget, len(json.dumps(_step(run, files[0], {})))))
    scales = map_scales([run / "samples" / f"{file.stem}.npz" for file in kept])
    found["steps"] = [_step(run, file, scales) for file in kept]
    found["maps"] = [
        {"name": name, "label": MAPS.get(name, name), "low": low, "high": high}
        | {"signed": name in SIGNED}
        for name, (low, high) in scales.items()
    ]
    return found


def evenly(items: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of them, evenly spaced, with the last and, of two or more, the first."""
    if len(items) <= number:
        return list(items)
    places = np.linspace(len(items) - 1, 0, number).round().astype(int)
    return [items[place] for place in reversed(places.tolist())]


def _number(budget: int, size: int) -> int:
    """How many things of a size fit into a budget; one where there is any."""
    return max(1, budget // size) if budget else 0


def fixed_prompts(run: Path, *, budget: int) -> dict[str, Any]:
    """The fixed prompts, and the images of all of them step by step."""
    files = _logged(run, "fixed")
    if not files:
        return {"drawn": 0, "prompts": [], "steps": []}
    shown = [record["prompt"] for record in record_of(files[-1])]
    files = [file for file in files if [r["prompt"] for r in record_of(file)] == shown]
    size = sum(len(source) for source in cut(files[0].with_suffix(".png"), record_of(files[0])))
    steps = [
        {"step": int(file.stem), "images": cut(file.with_suffix(".png"), record_of(file))}
        for file in evenly(files, _number(budget, size))
    ]
    return {"drawn": len(files), "prompts": shown, "steps": steps}


def before_after(run: Path, *, budget: int) -> list[dict[str, Any]]:
    """The images of the base beside those of the trained policy, as before_after.json has them: all
    of them, or as many as fit into about `budget` bytes, evenly chosen.
    """
    file = run / "before_after.json"
    records = record_of(file).get("images")
    if not records:
        return []
    picture = file.with_suffix(".png")
    sides = {side: cut(picture, [one[side] for one in records]) for side in ("base", "trained")}
    pairs = [
        {"prompt": one["prompt"], "task": one["task"], "image": one["image"]}
        | {side: {"value": one[side]["value"], "source": sides[side][i]} for side in sides}
        for i, one in enumerate(records)
    ]
    return evenly(pairs, max(1, budget * len(pairs) // len(json.dumps(pairs))))


def comparison(run: Path) -> dict[str, Any]:
    """evaluation.json as tables: of each measure task, base, trained, difference and interval."""
    found = record_of(run / "evaluation.json")
    if not found:
        return {}
    tables = []
    for measure, rows in found["difference"].items():
        base, trained = (found[side]["summary"].get(measure, {}) for side in ("base", "trained"))
        lines = [
            [
                *(task, _mean(base.get(task)), _mean(trained.get(task))),
                *(f"{row['mean']:+.3f}", _interval(row.get("interval"))),
            ]
            for task, row in rows.items()
        ]
        tables.append([[measure, "base", "trained", "difference", "95 % interval"], *lines])
    keys = ("benchmark", "images", "guidance_scale", "seed", "dtype")
    words = ("", "", "guidance ", "seed ", "")
    told = [f"{word}{found['trained'].get(key)}" for key, word in zip(keys, words, strict=True)]
    return {"about": ", ".join(told), "tables": tables}


def about_run(run: Path) -> dict[str, Any]:
    """Recipe, environment and state of a run, and the commands that repeat it and go on."""
    recipe = record_of(run / "recipe.json")  # as text: one that is loaded imports what it names
    status = record_of(run / "status.json")
    seen = record_of(run / "environment.json")
    packages = seen.pop("packages", {})
    environment = {key: _text(value) for key, value in (seen | packages).items()}
    return {
        "recipe_name": recipe.get("name", ""),
        "state": " ".join(filter(None, [status.get("state", ""), status.get("why", "")])),
        "overrides": list(status.get("overrides", ())),
        "settings": {k: _text(v) for k, v in flatten(recipe)},
        "environment": environment,
        "repeat": f"stage train {run}/recipe.yaml run.dir=NEW",
        "steps": recipe["steps"],
    }


def differences(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The settings in which runs differ besides their folders, a column for each run."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"] if key != "run.dir")
    rows = [[key, *(run["settings"].get(key, "") for run in runs)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return [["setting", *(run["name"] for run in runs)], *differing] if differing else []


def map_scales(samples: Sequence[Path]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of each token map over some steps, without outliers."""
    values: dict[str, list[Array]] = {}
    for file in samples:
        for name, values_PGT in _token_maps(file).items():
            values.setdefault(name, []).append(values_PGT.ravel())
    scales = {}
    for name, parts in values.items():
        low, high = np.percentile(np.concatenate(parts), CLIPPED).tolist()
        if name in SIGNED:
            high = max(abs(low), abs(high))
            low = -high
        # A map that is the same everywhere is shown in the middle of its scale.
        scales[name] = (low, high) if high > low else (low - 0.5, high + 0.5)
    return scales


def pair_maps(codes_GTC: Array) -> Array:
    """Cosines of the codes of each two images, position by position, one row for each pair (i, j)
    with i < j, in that order; 0 where a vector is 0.
    """
    length_GT1 = np.linalg.norm(codes_GTC, axis=-1, keepdims=True)
    unit_GTC = codes_GTC / np.where(length_GT1 > 0, length_GT1, 1.0)
    pairs = list(itertools.combinations(range(len(unit_GTC)), 2))
    return np.array([(unit_GTC[i] * unit_GTC[j]).sum(-1) for i, j in pairs])


def cut(picture: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The images of a picture by their boxes, as data URIs at the size they were drawn in."""
    with _reading(picture), Image.open(picture) as whole:
        for left, top, right, bottom in (record["box"] for record in records):
            if not (left < right <= whole.width and top < bottom <= whole.height):
                raise ValueError(f"{whole.width} x {whole.height} has no such box")
        return [data_uri(_shrunk(whole.crop(record["box"]).convert("RGB"))) for record in records]


def data_uri(image: Image.Image) -> str:
    """PNG for a small image, else WebP."""
    file, form = io.BytesIO(), "PNG" if max(image.size) <= LOSSLESS_SIDE else "WEBP"
    image.save(file, form, **({"optimize": True} if form == "PNG" else {"quality": 80}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _shrunk(image: Image.Image) -> Image.Image:
    """An image as it was before a grid enlarged it by a whole factor."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    for factor in range(math.gcd(height, width), 1, -1):
        if height % factor == width % factor == 0:
            small = pixels[::factor, ::factor]
            if (small.repeat(factor, 0).repeat(factor, 1) == pixels).all():
                # An image of one colour keeps some pixels.
                return Image.fromarray(small if min(small.shape[:2]) >= 8 else pixels)
    return image


def _step(run: Path, file: Path, scales: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """A logged step; its maps are bytes from 0 (the low end of the scale) to 255."""
    records = record_of(file)
    sources = cut(file.with_suffix(".png"), records)
    images = [
        {"source": source, "prompt": r["prompt"], "reward": r["reward"], "reason": r["reason"]}
        for source, r in zip(sources, records, strict=True)
    ]
    step: dict[str, Any] = {"step": int(file.stem), "images": images, "maps": {}}
    samples = run / "samples" / f"{file.stem}.npz"
    if not samples.exists():
        return step
    scales = scales or map_scales([samples])
    for name, values_PGT in _token_maps(samples).items():
        step["maps"][name] = _as_bytes(values_PGT, *scales[name])
    tokens_PGT = _arrays(samples)["tokens"]
    step["group_size"] = tokens_PGT.shape[1]
    codebook = run / "codebook.npy"
    if codebook.exists():
        with _reading(codebook):
            codes_VC = np.load(codebook).astype(np.float32)
            pairs = np.array([pair_maps(codes_VC[tokens_GT]) for tokens_GT in tokens_PGT])
        step["pairs"] = _as_bytes(pairs, -1.0, 1.0)
    return step


def grid_of(run: Path) -> list[int]:
    """Rows and columns of the tokens of an image; empty where the run kept no images."""
    files = sorted((run / "samples").glob("*.npz"))
    if not files:
        return []
    num_tokens = _arrays(files[0])["tokens"].shape[-1]
    placed = _logged(run, "images")
    if not placed:
        return []
    left, top, right, bottom = record_of(placed[0])[0]["box"]
    rows = round(math.sqrt(num_tokens * (bottom - top) / (right - left)))
    return [rows, num_tokens // rows] if rows and num_tokens % rows == 0 else []


def _token_maps(samples: Path) -> dict[str, Array]:
    """The maps of a step by name, PGT; one with a number that is not finite has no scale."""
    arrays = _arrays(samples)
    tokens_PGT = arrays.pop("tokens")
    found = {
        name: values
        for name, values in arrays.items()
        if values.shape == tokens_PGT.shape and values.dtype.kind in "iuf"
        if np.isfinite(values).all()
    }
    if "reference_entropy" in found and "entropy" in found:
        found["drift"] = found["entropy"] - found.pop("reference_entropy")
    known = [name for name in MAPS if name in found]
    return {name: found[name] for name in [*known, *sorted(found.keys() - MAPS.keys())]}


def _as_bytes(values: Array, low: float, high: float) -> str:
    scaled = np.clip((values - low) / (high - low), 0, 1) * 255
    return base64.b64encode(scaled.round().astype(np.uint8).tobytes()).decode()


def _logged(run: Path, folder: str) -> list[Path]:
    """FOLDER/STEP.json of a run by step, where they say where images are; those of former versions
    do not.
    """
    files = sorted(file for file in (run / folder).glob("*.json") if file.stem.isdecimal())
    drawn = [file for file in files if file.with_suffix(".png").exists()]
    found = {file: record_of(file) for file in drawn}
    return [file for file, rows in found.items() if rows and all(row.get("box") for row in rows)]


def _arrays(file: Path) -> dict[str, Array]:
    """The arrays of a step, among them its tokens, PGT."""
    with _reading(file), file.open("rb") as opened, np.load(opened) as arrays:
        found = dict(arrays)
        tokens = found["tokens"]
        if tokens.ndim != 3 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype} of shape {tokens.shape}")
        return found


_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, EOFError),
    *(RuntimeError, MemoryError, zlib.error, BadZipFile, Image.DecompressionBombError),
)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Names a file that cannot be read; of PNG and npz, each has errors of its own."""
    try:
        yield
    except _UNREADABLE as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: cannot be read ({why}); restore it or remove it") from error


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _mean(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['mean']:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "not known" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"
