"""SHA-256 and canonical JSON: what names, digests and signatures are made of."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_sha256(text: object) -> bool:
    """Whether this is a digest as :func:`sha256` writes it."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def canonical_json(value: Any) -> bytes:
    """Equal values give equal bytes: keys sorted, no spaces, ASCII only.

    Raises:
        ValueError: It holds NaN or infinity, which JSON does not have.
        TypeError: It holds what JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
