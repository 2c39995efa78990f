"""A store in S3, Google Cloud Storage or Azure Blob Storage, through obstore (the Rust object_store crate).

Conditional puts are the service's own (``If-None-Match: *`` on S3 and Azure, ``x-goog-if-generation-match: 0`` on GCS).
Credentials come from where each service's tools look for them: environment, instance role, workload identity.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.names import check_name
from workers.artifacts.stores.base import StoredObject

#: URL schemes that this store takes.
SCHEMES = ("s3", "gs", "az", "abfs", "abfss")

#: Tries of one call after the first; each has to fit the call's time-out.
_MAX_RETRIES = 2


class ObjectStore:
    """See :class:`workers.artifacts.stores.base.ArtifactStore`.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://account/container/prefix``.
        options: What the service's client takes, by obstore's names: ``endpoint``, ``region``, ...
        timeout_s: Longest time without a byte, and to connect.

    Raises:
        StoreError: The URL or an option is wrong.
    """

    def __init__(self, url: str, options: Mapping[str, str] | None = None, timeout_s: float = 10.0) -> None:
        import obstore.exceptions
        from obstore.store import from_url

        self.url = url
        config: Any = dict(options or {})
        client_options: Any = {
            "timeout": datetime.timedelta(seconds=6 * timeout_s),
            "connect_timeout": datetime.timedelta(seconds=timeout_s),
            "read_timeout": datetime.timedelta(seconds=timeout_s),
            "allow_http": any(str(value).startswith("http://") for value in config.values()),
        }
        retry: Any = {"max_retries": _MAX_RETRIES, "retry_timeout": datetime.timedelta(seconds=timeout_s)}
        try:
            self._store: Any = from_url(url, config=config, client_options=client_options, retry_config=retry)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise StoreError(f"{url}: {_first_line(error)}") from error
        self._errors = obstore.exceptions

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """The object's bytes, or None."""
        try:
            result = self._store.get(check_name(name))
            size = int(result.meta["size"])
            if size > max_bytes:
                raise RefusedError(Refusal.TOO_LARGE, f"{name} has {size} bytes, more than {max_bytes}.")
            return bytes(result.bytes())
        except (self._errors.NotFoundError, FileNotFoundError):
            return None
        except (self._errors.BaseError, OSError) as error:
            raise self._error(error) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """A put that the service refuses if there is such an object."""
        try:
            self._store.put(check_name(name), data, mode="create", use_multipart=False)
        except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
            return False
        except (self._errors.BaseError, OSError) as error:
            raise self._error(error) from error
        return True

    def list(self, prefix: str) -> list[StoredObject]:
        """By name."""
        try:
            found = [item for page in self._store.list(prefix) for item in page]
        except (self._errors.BaseError, OSError) as error:
            raise self._error(error) from error
        objects = [StoredObject(item["path"], item["size"], item["last_modified"].timestamp()) for item in found]
        return sorted((item for item in objects if item.name.startswith(prefix)), key=lambda item: item.name)

    def delete(self, name: str) -> None:
        """Remove it."""
        try:
            self._store.delete(check_name(name))
        except (self._errors.NotFoundError, FileNotFoundError):
            return
        except (self._errors.BaseError, OSError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"{self.url}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
