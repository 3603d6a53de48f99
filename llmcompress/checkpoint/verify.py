"""Whether a checkpoint's files are what was written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmcompress.errors import InputError, RunError
from llmcompress.models.files import file_digest

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Records the SHA-256 of every tensor file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip((f.name for f in files), pool.map(file_digest, files), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=2) + "\n")


def check_files(files: list[Path]) -> None:
    """RunError naming the first tensor file that is missing, unreadable, or not the one that was written.

    A file with a recorded SHA-256 is hashed, about a second a gigabyte; one without is opened and its size checked.
    """
    by_folder: dict[Path, dict[str, str]] = {}
    for folder in {file.parent for file in files}:
        recorded = folder / CHECKSUMS
        by_folder[folder] = json.loads(recorded.read_text()) if recorded.is_file() else {}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: _check(file, by_folder[file.parent].get(file.name)), files))


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
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a checkpoint: it has no config.json")
    if not (folder / CHECKSUMS).is_file():
        raise InputError(f"{folder}: records no checksums ({CHECKSUMS}); they are written by llmcompress")
    try:
        names = sorted(json.loads((folder / CHECKSUMS).read_text()))
    except json.JSONDecodeError as error:
        raise RunError(f"{folder / CHECKSUMS}: corrupt: {error}") from None
    unrecorded = {file.name for file in folder.glob("*.safetensors")} - set(names)
    if unrecorded:
        raise RunError(f"{folder / sorted(unrecorded)[0]}: not recorded in {CHECKSUMS}")
    check_files([folder / name for name in names])
    return len(names)
