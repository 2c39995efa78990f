"""Asks a running server; the one place of the command line that does."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from workers.errors import UserError

_TIMEOUT_S = 60.0


def replica_reports(url: str, section: str) -> dict[str, dict[str, dict[str, Any]]]:
    """One section of GET /status, by model and replica.

    Raises:
        UserError: The server does not answer, or is not one of ours.
    """
    address = f"{url.rstrip('/')}/status"
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--url must begin with http:// or https:// (got {url!r}).", param="url")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
            document = json.load(response)
        return {
            model: {name: replica[section] for name, replica in status["replicas"].items()}
            for model, status in document["models"].items()
        }
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{address} does not answer: {error}; is the server running there?", param="url") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{address} did not answer as warmgraph does; give the API's base URL.", param="url") from None
