"""Digests: what a value or a file is, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

_CHECK = ', "check": "'
_SEAL = "sha256_of_the_above"


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_line(record: dict[str, Any]) -> bytes:
    """A JSON line that ends with a CRC-32 of what stands before: no flipped bit is taken for a figure."""
    text = json.dumps(record, ensure_ascii=False)
    return f'{text[:-1]}{_CHECK}{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def parse_checked(line: bytes) -> dict[str, Any] | None:
    """The record of one whole line, without its check; None if it is not the line that was written."""
    try:
        text, _, check = line.decode().rpartition(_CHECK)
        text += "}"
        if check != f'{zlib.crc32(text.encode()):08x}"}}\n':
            return None
        record: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return record


def sealed(contents: dict[str, Any]) -> str:
    """The JSON text of `contents`, which ends with a SHA-256 of them and has one spelling: no byte of it can rot unseen."""
    return json.dumps({**contents, _SEAL: digest_of(contents)}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The contents that `sealed` was given.

    Raises:
        ValueError: a byte of it is not what was written.
    """
    contents = json.loads(text)
    if not isinstance(contents, dict) or contents.pop(_SEAL, None) is None or sealed(contents) != text:
        raise ValueError("its bytes are not the ones that were written")
    return contents
