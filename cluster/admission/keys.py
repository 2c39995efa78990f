"""API keys: who they belong to and what they may ask for.

Keys come from a YAML file or from one environment variable, never from the deployment config, which is printed and
copied into manifests. Only their SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pydantic
import yaml

from cluster.admission.errors import AuthenticationError
from workers.errors import ConfigError

_MIN_KEY_CHARS = 8


class ApiKey(pydantic.BaseModel):
    """One entry of the key file.

    Attributes:
        name: Whose key it is; appears in logs and metrics, unlike the key.
        key: The key itself, as clients send it; or give ``key_sha256``.
        key_sha256: SHA-256 of the key in hexadecimal digits.
        requests_per_minute: Most HTTP requests; None sets no limit.
        tokens_per_minute: Most tokens, prompt and output together; None sets no limit.
        weight: Share of the replicas under saturation, relative to the other keys that wait.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    key: pydantic.SecretStr | None = None
    key_sha256: str | None = pydantic.Field(default=None, pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: float | None = pydantic.Field(default=None, gt=0)
    tokens_per_minute: float | None = pydantic.Field(default=None, gt=0)
    weight: float = pydantic.Field(default=1.0, ge=0.01, le=100)

    @pydantic.model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give either key or key_sha256")
        if self.key is not None and len(self.key.get_secret_value()) < _MIN_KEY_CHARS:
            raise ValueError(f"a key must have at least {_MIN_KEY_CHARS} characters")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        if self.key_sha256 is not None:
            return bytes.fromhex(self.key_sha256)
        assert self.key is not None
        return _digest(self.key.get_secret_value())


class _KeyFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    keys: list[ApiKey] = pydantic.Field(min_length=1)


class KeyRing:
    """The keys that are let in.

    Raises:
        ConfigError: Two entries share a name or a key.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
            if len(set(values)) < len(values):
                raise ConfigError(f"API keys: two entries have the same {what}; give each its own.")
        self._keys = [(key.digest, key) for key in keys]

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The entry of the key in an ``Authorization`` header.

        Every stored digest is compared, each in constant time, so that the time taken tells nothing about them.

        Raises:
            AuthenticationError: There is no key, or it is not known.
        """
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise AuthenticationError("This server needs an API key; send the header Authorization: Bearer <key>.")
        digest = _digest(presented.strip())
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise AuthenticationError("The API key is not known here; check the header Authorization: Bearer <key>.")
        return found

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a key file: YAML with one list, ``keys``, of :class:`ApiKey`.

        Raises:
            ConfigError: The file cannot be read or says something wrong. The message never holds a key.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the API keys in {path}: {error.strerror}.") from None
        except yaml.YAMLError:
            raise ConfigError(f"The API keys in {path} are not valid YAML.") from None
        try:
            return cls(_KeyFile.model_validate(data).keys)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{path}: {_without_values(error)}") from None

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read ``name:key`` pairs separated by commas or white space; a pair without a name is called ``key-1``, ...

        Raises:
            ConfigError: A pair is wrong. The message never holds a key.
        """
        keys = []
        for number, pair in enumerate(filter(None, re.split(r"[\s,]+", text)), start=1):
            name, separator, key = pair.partition(":")
            fields: dict[str, Any] = {"name": name, "key": key} if separator else {"name": f"key-{number}", "key": name}
            try:
                keys.append(ApiKey(**fields))
            except pydantic.ValidationError as error:
                raise ConfigError(f"API key {number}: {_without_values(error)}") from None
        return cls(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _without_values(error: pydantic.ValidationError) -> str:
    """What is wrong, without the values: they are secrets."""
    sentences = (
        f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg'].removeprefix('Value error, ')}."
        for item in error.errors(include_input=False, include_url=False)
    )
    return " ".join(sentences)
