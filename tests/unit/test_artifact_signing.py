"""Keys are private, signatures bind payload and type, and trust is what the config says."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.signing import SignerKey, VerifierKey, seal, unseal
from workers.artifacts.trust import Trust, local_signer, read_verifier_keys
from workers.config import ArtifactConfig
from workers.errors import ConfigError

SIGNER, OTHER = SignerKey.generate(), SignerKey.generate()
KEYS = {SIGNER.key_id: SIGNER.verifier}
TYPE = "application/test"


def refusal(envelope: bytes, keys: dict[str, VerifierKey] = KEYS, **options: Any) -> Refusal:
    with pytest.raises(RefusedError) as error:
        unseal(envelope, TYPE, keys, **options)
    return error.value.reason


@given(st.binary(max_size=200))
def test_what_was_sealed_comes_back(payload: bytes) -> None:
    assert unseal(seal(payload, TYPE, SIGNER), TYPE, KEYS) == (payload, SIGNER.key_id)


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    envelope = bytearray(seal(b'{"a": 1}', TYPE, SIGNER))
    index = data.draw(st.integers(0, len(envelope) - 1))
    envelope[index] ^= data.draw(st.integers(1, 255))
    try:
        payload, _ = unseal(bytes(envelope), TYPE, KEYS)
    except RefusedError:
        return
    # A change that JSON or base64 does not see leaves what was signed.
    assert payload == b'{"a": 1}'


def test_who_may_sign() -> None:
    assert refusal(seal(b"x", TYPE, None)) is Refusal.UNSIGNED
    assert refusal(seal(b"x", TYPE, OTHER)) is Refusal.UNKNOWN_SIGNER
    assert refusal(seal(b"x", "application/other", SIGNER)) is Refusal.MALFORMED
    stolen = json.loads(seal(b"x", TYPE, OTHER))
    stolen["signatures"][0]["keyid"] = SIGNER.key_id
    assert refusal(json.dumps(stolen).encode()) is Refusal.BAD_SIGNATURE
    assert refusal(json.dumps(stolen).encode(), allow_unsigned=True) is Refusal.BAD_SIGNATURE
    assert unseal(seal(b"x", TYPE, OTHER), TYPE, KEYS, allow_unsigned=True) == (b"x", None)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b'{"payload": 1}', b"[" * 100_000])
def test_what_is_no_envelope_is_refused(text: bytes) -> None:
    assert refusal(text) is Refusal.MALFORMED


def test_keys_are_files_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "fleet.pem"
    assert SIGNER.write(path)
    assert not OTHER.write(path)
    assert (stat.S_IMODE(path.stat().st_mode), [item.name for item in path.parent.iterdir()]) == (0o600, ["fleet.pem"])
    assert SignerKey.from_file(path).key_id == SIGNER.key_id
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        SignerKey.from_file(path)
    with pytest.raises(ConfigError, match="Cannot read the signer key"):
        SignerKey.from_file(tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(ConfigError, match="no unencrypted private key"):
        SignerKey.from_file(tmp_path / "text")


def test_verifier_keys_are_text(tmp_path: Path) -> None:
    text = SIGNER.verifier.to_text()
    assert VerifierKey.from_text(text).key_id == SIGNER.key_id
    (tmp_path / "fleet.pub").write_text(f"# the fleet's\n{text}  # since May\n\n{OTHER.verifier.to_text()}\n")
    keys = read_verifier_keys([text, str(tmp_path / "fleet.pub")])
    assert [key.key_id for key in keys] == [SIGNER.key_id, SIGNER.key_id, OTHER.key_id]
    for wrong in ("ed25519:", "ed25519:###", f"ed25519:{base64.b64encode(b'short').decode()}"):
        with pytest.raises(ConfigError, match="is no verifier key"):
            read_verifier_keys([wrong])
    with pytest.raises(ConfigError, match="Cannot read the verifier keys"):
        read_verifier_keys([str(tmp_path / "none")])


def test_a_laptop_trusts_itself_alone(tmp_path: Path) -> None:
    trust = Trust.from_config(ArtifactConfig(), tmp_path)
    assert stat.S_IMODE((tmp_path / "keys" / "local.pem").stat().st_mode) == 0o600
    assert Trust.from_config(ArtifactConfig(), tmp_path).signer is not None
    assert list(trust.keys) == [local_signer(tmp_path).key_id]
    assert trust.may_publish
    assert not trust.allows_unsigned
    with pytest.raises(ConfigError, match="verifier_keys has no effect with trust: local-only"):
        Trust.from_config(ArtifactConfig(verifier_keys=["x"]), tmp_path)


def test_a_home_that_cannot_be_written_gets_a_key_for_the_process(caplog: pytest.LogCaptureFixture) -> None:
    trust = Trust.from_config(ArtifactConfig(), Path("/proc/warmgraph"))
    assert trust.signer is not None
    assert trust.vouches(trust.signer.key_id)
    assert "later starts will compile again" in caplog.text


def test_a_fleet_trusts_the_keys_that_it_is_given(tmp_path: Path) -> None:
    SIGNER.write(tmp_path / "fleet.pem")
    text = SIGNER.verifier.to_text()
    replica = Trust.from_config(ArtifactConfig(trust="signed", verifier_keys=[text]), tmp_path)
    assert (replica.vouches(SIGNER.key_id), replica.vouches(OTHER.key_id), replica.vouches(None)) == (
        True,
        False,
        False,
    )
    assert not replica.may_publish
    signer_file = str(tmp_path / "fleet.pem")
    builder = ArtifactConfig(trust="signed", verifier_keys=[text], signer_key_file=signer_file)
    assert Trust.from_config(builder, tmp_path).may_publish
    with pytest.raises(ConfigError, match="there are no verifier_keys"):
        Trust.from_config(ArtifactConfig(trust="signed"), tmp_path)
    wrong = ArtifactConfig(trust="signed", verifier_keys=[OTHER.verifier.to_text()], signer_key_file=signer_file)
    with pytest.raises(ConfigError, match="is not among verifier_keys"):
        Trust.from_config(wrong, tmp_path)


def test_trusting_everybody_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trust = Trust.from_config(ArtifactConfig(trust="none"), tmp_path)
    assert trust.vouches(None)
    assert "can run code in this process" in caplog.text
