"""Libraries, keys and stores for tests of the artifact layer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.artifacts.signing import SignerKey
from workers.artifacts.stores.base import ArtifactStore, StoredObject
from workers.artifacts.stores.memory import MemoryStore
from workers.artifacts.trust import Policy, Trust
from workers.config import ArtifactConfig

KEY = BundleKey({"environment": {"torch": "2.13", "num_threads": 2}, "dtype": "bfloat16"}, {"sizes": [1]}, {"log": "x"})
PLAN = Addition(Kind.PLAN, "plan", b'{"plan": 1}', seconds=1.0)
PIECE = Addition(Kind.PIECE, "first", b"machine code", format="aoti", seconds=20.0)


def make_library(
    store: ArtifactStore | None = None,
    *,
    signer: SignerKey | None = None,
    keys: tuple[SignerKey, ...] = (),
    policy: Policy = "signed",
    **config: Any,
) -> ArtifactLibrary:
    """A library that signs as ``signer`` and trusts it and ``keys``."""
    trusted = [*keys, *([signer] if signer else [])]
    trust = Trust(policy, {key.key_id: key.verifier for key in trusted}, signer)
    return ArtifactLibrary(store or MemoryStore(), trust, ArtifactConfig(**config))


def read_all(library: ArtifactLibrary, key: BundleKey = KEY) -> dict[str, bytes]:
    """Every entry of a bundle that must be there, by name."""
    bundle = library.open(key).bundle
    assert bundle is not None
    return {entry.name: library.read(bundle, entry) for entry in bundle.entries}


class UnreliableStore(MemoryStore):
    """A store that raises what it is told to, and counts calls.

    Attributes:
        reading: Raised by get and list.
        writing: Raised by puts and deletes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reading: Exception | None = None
        self.writing: Exception | None = None
        self.num_calls = 0

    def get(self, name: str, max_bytes: int) -> bytes | None:
        self._fail(self.reading)
        return super().get(name, max_bytes)

    def list(self, prefix: str) -> list[StoredObject]:
        self._fail(self.reading)
        return super().list(prefix)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self._fail(self.writing)
        return super().put_if_absent(name, data)

    def delete(self, name: str) -> None:
        self._fail(self.writing)
        super().delete(name)

    def _fail(self, error: Exception | None) -> None:
        self.num_calls += 1
        if error is not None:
            raise error


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A real S3 server (moto's) on 127.0.0.1 with the bucket ``artifacts``; yields the options of a store."""
    import boto3
    from moto.server import ThreadedMotoServer

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        options = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
        with mock.patch.dict(os.environ, credentials):
            client = boto3.client("s3", endpoint_url=options["endpoint"], region_name="us-east-1")
            client.create_bucket(Bucket="artifacts")
            client.close()
            yield options
    finally:
        server.stop()


def leave_mark(path: Path) -> bytes:
    """A pickle that leaves a file behind if anybody opens it."""
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (path,))

    return pickle.dumps(Payload())
