"""Ed25519 keys and signed envelopes (DSSE, the format of in-toto and Sigstore).

A signer key makes signatures and a verifier key only checks them, so replicas that load need hold nothing that could
forge. A key's id is a digest of its public half; several ids may be trusted at once, which is how keys are rotated.
What is signed is the payload's bytes as they are, so nothing has to be parsed before it has been verified.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from workers.artifacts.digest import canonical_json, sha256
from workers.artifacts.errors import Refusal, RefusedError
from workers.errors import ConfigError

_PREFIX = "ed25519:"
_KEY_ID_LENGTH = 16
_MAX_SIGNATURES = 8


class VerifierKey:
    """The public half of a key.

    Attributes:
        key_id: 16 hexadecimal digits.
    """

    def __init__(self, public: Ed25519PublicKey) -> None:
        self._public = public
        self._raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.key_id = sha256(self._raw)[:_KEY_ID_LENGTH]

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read ``ed25519:<base64>``.

        Raises:
            ConfigError: It is something else.
        """
        try:
            if not text.startswith(_PREFIX):
                raise ValueError
            raw = base64.b64decode(text.removeprefix(_PREFIX).strip(), validate=True)
            return cls(Ed25519PublicKey.from_public_bytes(raw))
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"{text[:60]!r} is no verifier key: give ed25519:<base64>, as `warmgraph artifacts keygen` prints it.",
                param="verifier_keys",
            ) from None

    def to_text(self) -> str:
        """``ed25519:<base64>``, for configs."""
        return _PREFIX + base64.b64encode(self._raw).decode()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made the signature."""
        try:
            self._public.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class SignerKey:
    """A private key, with its public half."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.verifier = VerifierKey(private.public_key())

    @property
    def key_id(self) -> str:
        """The verifier's."""
        return self.verifier.key_id

    @classmethod
    def generate(cls) -> Self:
        """A new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ConfigError: It cannot be read, is no Ed25519 key, or others may read it.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                status, data = os.fstat(file.fileno()), file.read(1 << 16)
        except OSError as error:
            raise ConfigError(
                f"Cannot read the signer key {path}: {error.strerror}.", param="signer_key_file"
            ) from None
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid not in (os.getuid(), 0):
            raise ConfigError(
                f"The signer key {path} must belong to this user and be readable by nobody else: chmod 600 {path}.",
                param="signer_key_file",
            )
        try:
            private = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} holds no unencrypted private key: {error}.", param="signer_key_file") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a key that is not Ed25519.", param="signer_key_file")
        return cls(private)

    def write(self, path: Path) -> bool:
        """Write the key with mode 0600 (PEM, PKCS #8), whole or not at all; False if there is a file already."""
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = path.parent / f".{path.name}.{secrets.token_hex(8)}"
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, path)
        except FileExistsError:
            return False
        finally:
            scratch.unlink()
        return True

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(message)


def seal(payload: bytes, payload_type: str, signer: SignerKey | None) -> bytes:
    """An envelope around a payload; without a signer it carries no signature."""
    signatures = []
    if signer is not None:
        signature = signer.sign(_to_be_signed(payload, payload_type))
        signatures.append({"keyid": signer.key_id, "sig": base64.b64encode(signature).decode()})
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": signatures,
    }
    return canonical_json(envelope)


def unseal(
    envelope: bytes, payload_type: str, keys: Mapping[str, VerifierKey], *, allow_unsigned: bool = False
) -> tuple[bytes, str | None]:
    """The payload of an envelope that a trusted key signed, unparsed.

    Args:
        keys: Trusted keys by id.
        allow_unsigned: Take what has no signature, or one by an unknown key. A wrong signature is refused even then.

    Returns:
        The payload, and the id of the key that vouches for it (None without one).

    Raises:
        RefusedError: It is malformed, unsigned, or signed by somebody else.
    """
    payload, found_type, signatures = _parse(envelope)
    if found_type != payload_type:
        raise RefusedError(Refusal.MALFORMED, f"The envelope holds {found_type[:60]!r}, not {payload_type!r}.")
    message = _to_be_signed(payload, payload_type)
    for key_id, signature in signatures:
        if key_id in keys:
            if keys[key_id].verify(signature, message):
                return payload, key_id
            raise RefusedError(Refusal.BAD_SIGNATURE, f"The signature of key {key_id} does not match.")
    if allow_unsigned:
        return payload, None
    if not signatures:
        raise RefusedError(Refusal.UNSIGNED, "It is not signed.")
    names = ", ".join(key_id for key_id, _ in signatures)
    raise RefusedError(Refusal.UNKNOWN_SIGNER, f"It is signed by {names}, which is not trusted here.")


def read_unverified(envelope: bytes) -> bytes:
    """The payload of an envelope, whoever signed it. For bookkeeping only: nothing it says may be relied on.

    Raises:
        RefusedError: It is no envelope.
    """
    return _parse(envelope)[0]


def _to_be_signed(payload: bytes, payload_type: str) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _parse(envelope: bytes) -> tuple[bytes, str, list[tuple[str, bytes]]]:
    try:
        fields = json.loads(envelope)
        payload = base64.b64decode(fields["payload"], validate=True)
        kind, signatures = fields["payloadType"], fields["signatures"]
        if not isinstance(kind, str) or not isinstance(signatures, list) or len(signatures) > _MAX_SIGNATURES:
            raise ValueError("unexpected fields")
        pairs = [(str(item["keyid"]), base64.b64decode(item["sig"], validate=True)) for item in signatures]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(Refusal.MALFORMED, f"It is no signed envelope: {error}.") from error
    return payload, kind, pairs
