"""External images, by the layouts that are known, and what is refused."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stage_rl.errors import InputError
from stage_rl.evaluation.images import DrawnPrompt, find_images
from stage_rl.types import Prompt

PROMPTS = tuple(
    Prompt(text, i) for i, text in enumerate(("a red hat", "A dog. ", "a cat", "a red hat"))
)


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)
    return file


def found(folder):
    return {
        one.place: [str(file.relative_to(folder)) for file in one.files]
        for one in find_images(folder, PROMPTS, "test")
    }


def test_the_official_geneval_folders(tmp_path):
    for number, text in (("00000", "a red hat"), ("00003", "a red hat"), ("00001", "a cat")):
        picture(tmp_path / number / "samples" / "0001.png")
        picture(tmp_path / number / "samples" / "0000.jpg")
        (tmp_path / number / "metadata.jsonl").write_text(json.dumps({"prompt": text}))
    # Of equal texts the folder's number decides; a wrong number gives way to the text.
    assert found(tmp_path) == {
        0: ["00000/samples/0000.jpg", "00000/samples/0001.png"],
        2: ["00001/samples/0000.jpg", "00001/samples/0001.png"],
        3: ["00003/samples/0000.jpg", "00003/samples/0001.png"],
    }
    (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps({"prompt": "a cow"}))
    with pytest.raises(InputError, match="'a cow' is not a prompt of test"):
        found(tmp_path)


def test_a_list_of_files(tmp_path):
    picture(tmp_path / "x" / "1.png")
    picture(tmp_path / "2.webp")
    lines = [{"file": "x/1.png", "prompt": "a Dog"}, {"file": "2.webp", "prompt": "a cat"}]
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert found(tmp_path) == {1: ["x/1.png"], 2: ["2.webp"]}
    (tmp_path / "2.webp").unlink()
    with pytest.raises(InputError, match=r"images\.jsonl:2: file '2\.webp' is not there"):
        found(tmp_path)


def test_a_file_that_is_listed_twice_is_refused(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "x").symlink_to(tmp_path)
    for again in ("1.png", "./1.png", "x/1.png"):
        lines = [{"file": name, "prompt": "a cat"} for name in ("1.png", again)]
        (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(
            InputError, match=rf"jsonl:2: file '{again}' is listed already, in .*:1"
        ):
            found(tmp_path)


def test_names_that_are_prompts(tmp_path):
    for name in ("a red hat_000000", "a red hat_000001", "A dog_000013"):
        picture(tmp_path / "samples" / f"{name}.png")
    assert found(tmp_path) == {
        0: ["samples/a red hat_000000.png", "samples/a red hat_000001.png"],
        1: ["samples/A dog_000013.png"],
    }


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no images in a known layout"):
        found(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        found(tmp_path / "none")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a cat"}')
    with pytest.raises(InputError, match="no images under samples/"):
        found(tmp_path)


def test_an_image_of_16_bits_is_its_upper_8_and_one_of_too_many_pixels_is_named(tmp_path):
    ramp_HW = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp_HW).save(tmp_path / "deep.png")
    drawn = DrawnPrompt(0, Prompt("a"), (tmp_path / "deep.png",))
    assert drawn.read_images()[0, ..., 0].flatten().tolist() == list(range(256))
    huge = bytearray((tmp_path / "deep.png").read_bytes())
    huge[16:24] = struct.pack(">II", 20_000, 20_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "deep.png").write_bytes(huge)
    with pytest.raises(InputError, match=r"deep\.png: has too many pixels; make it smaller"):
        drawn.read_images()
