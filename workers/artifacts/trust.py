"""Whose bundles are used, and as whom this process publishes.

The three policies of ``ArtifactConfig.trust``, as keys. Knows where keys lie; nothing of what they sign.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Self

from workers.artifacts.signing import SignerKey, VerifierKey
from workers.config import ArtifactConfig
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

Policy = Literal["signed", "local-only", "none"]

#: The user's own key below the artifact folder.
LOCAL_KEY_FILE = "keys/local.pem"


@dataclasses.dataclass(frozen=True)
class Trust:
    """A policy with its keys.

    Attributes:
        policy: As configured.
        keys: Trusted verifier keys by id.
        signer: Signs what this process publishes; None for one that only reads (or, with ``none``, does not sign).
    """

    policy: Policy
    keys: Mapping[str, VerifierKey] = dataclasses.field(default_factory=dict)
    signer: SignerKey | None = None

    @classmethod
    def from_config(cls, config: ArtifactConfig, folder: Path) -> Self:
        """The keys that a config asks for.

        Args:
            folder: The user's artifact folder, where the key of ``local-only`` lies; it is made at first use.

        Raises:
            ConfigError: A key is missing, unreadable or does not fit the policy.
        """
        if config.trust == "local-only":
            _refuse_keys(config)
            signer = local_signer(folder)
            return cls("local-only", {signer.key_id: signer.verifier}, signer)
        keys = {key.key_id: key for key in read_verifier_keys(config.verifier_keys)}
        signer_file = config.signer_key_file
        signer_key = SignerKey.from_file(Path(signer_file).expanduser()) if signer_file else None
        if config.trust == "signed":
            if not keys:
                raise ConfigError(
                    "artifacts.trust is 'signed', but there are no verifier_keys: make a key with"
                    " `warmgraph artifacts keygen` and list its public half.",
                    param="verifier_keys",
                )
            if signer_key is not None and signer_key.key_id not in keys:
                raise ConfigError(
                    f"The public half of signer_key_file ({signer_key.verifier.to_text()}) is not among verifier_keys;"
                    " add it, or nobody could read what is published.",
                    param="verifier_keys",
                )
        else:
            logger.warning("artifacts.trust is 'none': whoever can write to the store can run code in this process")
        return cls(config.trust, keys, signer_key)

    @property
    def allows_unsigned(self) -> bool:
        """Whether bundles are used that no trusted key vouches for."""
        return self.policy == "none"

    @property
    def may_publish(self) -> bool:
        """Whether what this process would write could be read by its like."""
        return self.signer is not None or self.allows_unsigned

    def vouches(self, key_id: str | None) -> bool:
        """Whether something made by the holder of this key is used."""
        return self.allows_unsigned or key_id in self.keys


def local_signer(folder: Path) -> SignerKey:
    """The user's own key below the artifact folder, made if need be; of several processes at once, one makes it.

    Where no file can be written the key ends with this process, and so does the use of what it signs.

    Raises:
        ConfigError: There is one, and others may read it.
    """
    path = folder / LOCAL_KEY_FILE
    if not path.exists():
        signer = SignerKey.generate()
        try:
            if signer.write(path):
                logger.info("made a key for local artifacts: %s", path)
        except OSError as error:
            logger.warning("no key can be kept in %s (%s): later starts will compile again", folder, error.strerror)
            return signer
    return SignerKey.from_file(path)


def read_verifier_keys(entries: Iterable[str]) -> list[VerifierKey]:
    """Keys given as text, or as files with one key a line and comments after ``#``.

    Raises:
        ConfigError: A file cannot be read, or an entry is no key.
    """
    keys = []
    for entry in entries:
        if entry.startswith("ed25519:"):
            keys.append(VerifierKey.from_text(entry))
            continue
        try:
            lines = Path(entry).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the verifier keys in {entry}: {error}.", param="verifier_keys") from None
        texts = [line.partition("#")[0].strip() for line in lines]
        keys += [VerifierKey.from_text(text) for text in texts if text]
    return keys


def _refuse_keys(config: ArtifactConfig) -> None:
    for name in ("verifier_keys", "signer_key_file"):
        if getattr(config, name):
            raise ConfigError(
                f"artifacts.{name} has no effect with trust: local-only, which trusts this user's own key alone;"
                " set trust: signed.",
                param=name,
            )
