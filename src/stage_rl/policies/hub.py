"""Where weights lie: the package's own, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stage_rl.errors import WeightsError

SHIPPED_MODEL = "shapes"
EXAMPLE = "deepseek-community/Janus-Pro-1B"
DESCRIPTIONS = ("*.json", "*.jinja")
"""Configuration, tokenizer and processor: small, and enough to refuse what is no Janus."""
TENSORS = ("*.safetensors",)
PICKLED_TENSORS = ("*.bin", "*.pt")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """A folder of weights, or of the descriptions of a hub model whose weights may be missing."""

    name: str
    """As the user wrote it."""
    folder: Path
    hub: HubFolder | None = None

    def fetch_weights(self) -> None:
        """Downloads the tensors of a hub model; of pickled ones only where there are no others."""
        if self.hub is None:
            return
        self.hub.download(TENSORS)
        if not any(self.folder.glob("*.safetensors")):
            self.hub.download(PICKLED_TENSORS)


@dataclass(frozen=True)
class HubFolder:
    """A model of the hub, at a revision, or a folder in it."""

    name: str
    repository: str
    inside: str
    revision: str | None

    def download(self, patterns: tuple[str, ...]) -> Path:
        """The folder in the local cache, after the files of these patterns came into it."""
        prefix = f"{self.inside}/" if self.inside else ""
        try:
            root = snapshot_download(
                self.repository,
                revision=self.revision,
                allow_patterns=[prefix + pattern for pattern in patterns],
                # A * of the hub's patterns also matches what lies in folders.
                ignore_patterns=[f"{prefix}*/*"],
            )
        except (RepositoryNotFoundError, GatedRepoError) as error:
            raise WeightsError(
                f"{self.name}: neither a folder nor a model of the hub that you may read; write "
                f"a folder with a Janus checkpoint, a hub id such as {EXAMPLE}, or {SHIPPED_MODEL}; "
                "for a gated model log in with `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise WeightsError(
                f"{self.name}: the hub's model has no revision '{self.revision}'; write another"
            ) from error
        except (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise WeightsError(
                f"{self.name}: no such folder, and the hub cannot be reached for a model of that "
                "name, which is not in the local cache either; write a folder, or get it where "
                f"there is a network: hf download {self.repository}"
            ) from error
        except OSError as error:
            raise WeightsError(
                f"{self.name}: the download failed ({one_line(error)}); make room or try again"
            ) from error
        return Path(root) / self.inside


def find(path: str | Path) -> Source:
    """The weights behind a folder, `shapes`, or a hub id: OWNER/NAME, OWNER/NAME/FOLDER, @REVISION.

    Of a hub model only the descriptions are fetched. What names nothing is a `WeightsError`.
    """
    name = str(path)
    if name == SHIPPED_MODEL:
        return Source(name, _shapes_folder())
    folder = Path(path).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.exists():
        raise WeightsError(f"{path}: is a file; write the folder of the weights")
    match = HUB_ID.fullmatch(name)
    if match is None or name[0] in "./~" or ".." in name.split("/"):
        raise WeightsError(
            f"{path}: no such folder; write a folder with a Janus checkpoint, "
            f"a hub id such as {EXAMPLE}, or {SHIPPED_MODEL}"
        )
    hub = HubFolder(name, match[1], match[2].strip("/"), match[3])
    return Source(name, hub.download(DESCRIPTIONS), hub)


def one_line(error: Exception) -> str:
    """The text of an error as at most 300 characters on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _shapes_folder() -> Path:
    folder = Path(str(resources.files("stage_rl") / "shapes" / "checkpoint"))
    if not (folder / "config.json").is_file():
        raise WeightsError(
            "shapes: this copy of the package has no weights; reinstall it, "
            "or build them with `stage shapes pretrain`"
        )
    return folder
