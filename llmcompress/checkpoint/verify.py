"""Whether a checkpoint's files are what was written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmcompress.errors import InputError, RunError
from llmcompress.models.files import file_digest


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of a folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip((file.name for file in files), pool.map(file_digest, files), strict=True))


def check_files(files: list[Path], recorded: dict[str, str]) -> None:
    """RunError naming the first tensor file that is missing, unreadable, or not the one that was written.

    A file with a recorded SHA-256 is hashed, about a second a gigabyte; one without is opened and its size checked.
    """
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: _check(file, recorded.get(file.name)), files))


def _check(file: Path, expected: str | None) -> None:
    if not file.is_file():
        raise RunError(f"{file}: missing")
    if expected is not None and file_digest(file) != expected:
        raise RunError(f"{file}: corrupt: its SHA-256 is not the recorded one; copy or compress it again")
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: corrupt: {error}") from None


def verify(folder: Path) -> int:
    """Checks every tensor file of a checkpoint; returns their number. RunError names the first bad one.

    InputError if the folder is no compressed checkpoint, or records no checksums.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a checkpoint: it has no config.json")
    try:
        recorded: dict[str, str] = json.loads(path.read_text()).get("quantization_config", {}).get("checksums", {})
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: corrupt: {error}") from None
    if not recorded:
        raise InputError(f"{path}: records no checksums; `llmcompress apply` does, `save_pretrained` does not")
    unrecorded = {file.name for file in folder.glob("*.safetensors")} - set(recorded)
    if unrecorded:
        raise RunError(f"{folder / sorted(unrecorded)[0]}: not recorded in config.json")
    check_files([folder / name for name in sorted(recorded)], recorded)
    return len(recorded)
