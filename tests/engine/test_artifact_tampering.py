"""Whatever is changed in a store is refused before anything of it is parsed as code, unpickled or opened as a library.

Every changed blob holds a payload that leaves a file behind when it is executed; controls show that the payloads work.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.artifact_cases import leave_mark
from tests.compile_cases import MIXING_OPS, MixingModel, mixing_inputs
from workers.artifacts.digest import canonical_json, sha256
from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary, Outcome
from workers.artifacts.manifest import PAYLOAD_TYPE, Kind
from workers.artifacts.names import blob_name
from workers.artifacts.signing import SignerKey, read_unverified, seal
from workers.compile.compilation import PieceCompilation
from workers.compile.formats.base import make_format
from workers.compile.key import bundle_key
from workers.compile.piece_set import PieceSet
from workers.compile.piecewise import PiecewiseModel
from workers.compile.weights import weight_names
from workers.config import ArtifactConfig, CompilationConfig

CONFIG = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
KEY = bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS, graph={"model": "mixing"})


@dataclasses.dataclass(frozen=True)
class Case:
    """A copy of a store, to change.

    Attributes:
        folder: The user's artifact folder.
        mark: Exists once a payload has run.
    """

    folder: Path
    mark: Path

    @property
    def manifest(self) -> Path:
        (path,) = (self.folder / "store" / "bundles" / KEY.digest).iterdir()
        return path

    @property
    def signer(self) -> SignerKey:
        return SignerKey.from_file(self.folder / "keys" / "local.pem")

    def library(self, **config: object) -> ArtifactLibrary:
        return ArtifactLibrary.from_config(ArtifactConfig(**config), self.folder)  # type: ignore[arg-type]

    def blob(self, kind: Kind) -> Path:
        """The first blob of a kind."""
        entries = json.loads(read_unverified(self.manifest.read_bytes()))["entries"]
        digest = next(entry["sha256"] for entry in entries if entry["kind"] == kind)
        return self.folder / "store" / blob_name(digest)

    def rewrite_manifest(self, change: Callable[[dict[str, object]], None], signer: SignerKey | None) -> None:
        """Another manifest in place of the one there is."""
        fields = json.loads(read_unverified(self.manifest.read_bytes()))
        change(fields)
        envelope = seal(canonical_json(fields), PAYLOAD_TYPE, signer)
        self.manifest.unlink()
        folder = self.folder / "store" / "bundles" / KEY.digest
        (folder / sha256(envelope)).write_bytes(envelope)


def compilation(library: ArtifactLibrary, key: BundleKey = KEY) -> PieceCompilation:
    return PieceCompilation(MixingModel(2), CONFIG, {"x_TE": mixing_inputs()}, MIXING_OPS, library, key)


def load(library: ArtifactLibrary, key: BundleKey = KEY) -> PiecewiseModel | None:
    """As an engine does, up to where it would build: find, fetch, load."""
    pieces = compilation(library, key).find()
    if pieces is None:
        return None
    pieces.fetch([None])
    return PiecewiseModel(pieces, weight_names(MixingModel(2)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    library = ArtifactLibrary.from_config(ArtifactConfig(), folder)
    work = compilation(library)
    assert work.publish(work.build())
    return folder


@pytest.fixture
def case(built: Path, tmp_path: Path) -> Case:
    shutil.copytree(built, tmp_path / "artifacts")
    return Case(tmp_path / "artifacts", tmp_path / "mark")


def python_payload(mark: Path) -> bytes:
    """A piece in the fx format."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef forward(*args):\n    return args\n"
    return json.dumps({"code": code, "imports": {}, "ops": {}}).encode()


def library_payload(mark: Path) -> bytes:
    """A package with a library whose constructor runs when it is opened."""
    source = f'#include <stdio.h>\n__attribute__((constructor)) void f() {{ fclose(fopen("{mark}", "w")); }}\n'
    path = mark.with_name("payload.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source.encode(), check=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        package.writestr("piece/data/aotinductor/model/payload.so", path.read_bytes())
    return buffer.getvalue()


PAYLOADS = {"python": python_payload, "pickle": leave_mark, "library": library_payload}
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
EVERY_PAYLOAD = pytest.mark.parametrize("name", ["python", "pickle", pytest.param("library", marks=needs_gcc)])


@EVERY_PAYLOAD
def test_payloads_leave_a_mark_when_they_run(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    data = PAYLOADS[name](mark)
    if name == "python":
        make_format("fx").load(data)
    elif name == "pickle":
        pickle.loads(data)
    else:
        ctypes.CDLL(str(tmp_path / "payload.so"))
    assert mark.exists()


def test_what_was_not_changed_is_loaded(case: Case) -> None:
    model = load(case.library())
    assert model is not None
    x_TE = mixing_inputs()
    torch.testing.assert_close(model(x_TE), MixingModel(2)(x_TE))


def test_a_payload_that_a_trusted_key_signed_runs(case: Case) -> None:
    """So a mark would be there if any of the refusals below came too late."""
    library = case.library()
    pieces = compilation(library).find()
    assert pieces is not None
    entry = next(entry for entry in pieces.bundle.find(Kind.PIECE)) if pieces.bundle else None
    assert entry is not None
    library.publish(KEY, [Addition(Kind.PIECE, entry.name, python_payload(case.mark), "fx")], pieces.bundle)
    load(library)
    assert case.mark.exists()


def assert_refused(case: Case, reason: Refusal, *, is_marked: bool = True, **config: object) -> None:
    """Nothing ran, nothing was loaded, the fleet knows, and the next replica does not even try."""
    library = case.library(**config)
    with contextlib.suppress(RefusedError):
        assert load(library) is None
    assert not case.mark.exists()
    assert library.counters.refusals == {reason.value: 1}
    assert bool(library.marks.quarantined(KEY.digest)) is is_marked
    if is_marked:
        fetched = library.counters.num_fetched
        assert load(library) is None
        assert library.counters.num_fetched == fetched
        assert library.open(KEY).outcome is Outcome.QUARANTINED


@EVERY_PAYLOAD
@pytest.mark.parametrize("kind", [Kind.PLAN, Kind.PIECE, Kind.SELF_CHECK])
def test_a_blob_with_other_bytes(case: Case, kind: Kind, name: str) -> None:
    original = case.blob(kind).read_bytes()
    payload = PAYLOADS[name](case.mark)
    # Of the same size where that is possible, so that only the digest can tell.
    case.blob(kind).write_bytes(payload.ljust(len(original), b" ") if name == "python" else payload)
    is_larger = len(payload) > len(original)
    assert_refused(case, Refusal.TOO_LARGE if is_larger else Refusal.DAMAGED_BLOB)


@pytest.mark.parametrize("kind", [Kind.PLAN, Kind.PIECE, Kind.SELF_CHECK])
def test_a_truncated_blob(case: Case, kind: Kind) -> None:
    case.blob(kind).write_bytes(case.blob(kind).read_bytes()[:-1])
    assert_refused(case, Refusal.DAMAGED_BLOB)


def test_a_missing_blob(case: Case) -> None:
    case.blob(Kind.PIECE).unlink()
    assert_refused(case, Refusal.MISSING_BLOB)


def test_a_manifest_with_other_bytes(case: Case) -> None:
    data = case.manifest.read_bytes()
    case.manifest.write_bytes(data.replace(b'"payload":"', b'"payload":"A', 1))
    assert_refused(case, Refusal.MALFORMED)


def test_a_truncated_manifest(case: Case) -> None:
    case.manifest.write_bytes(case.manifest.read_bytes()[:-10])
    assert_refused(case, Refusal.MALFORMED)


def payload_in_manifest(case: Case, signer: SignerKey | None) -> None:
    """A manifest that names a payload, whose blob lies there with the right digest."""
    payload = python_payload(case.mark)
    blob = case.folder / "store" / blob_name(sha256(payload))
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(payload)

    def change(fields: dict[str, object]) -> None:
        entries = fields["entries"]
        assert isinstance(entries, list)
        for entry in entries:
            if entry["kind"] == "piece":
                entry.update(sha256=sha256(payload), num_bytes=len(payload))

    case.rewrite_manifest(change, signer)


def test_a_signature_of_somebody_else_under_a_trusted_name(case: Case) -> None:
    payload_in_manifest(case, SignerKey.generate())
    envelope = json.loads(case.manifest.read_bytes())
    envelope["signatures"][0]["keyid"] = case.signer.key_id
    data = canonical_json(envelope)
    case.manifest.rename(case.manifest.with_name(sha256(data))).write_bytes(data)
    assert_refused(case, Refusal.BAD_SIGNATURE)


def test_a_changed_signature(case: Case) -> None:
    envelope = json.loads(case.manifest.read_bytes())
    signature = envelope["signatures"][0]["sig"]
    envelope["signatures"][0]["sig"] = ("B" if signature[0] == "A" else "A") + signature[1:]
    data = canonical_json(envelope)
    case.manifest.rename(case.manifest.with_name(sha256(data))).write_bytes(data)
    assert_refused(case, Refusal.BAD_SIGNATURE)


def test_a_manifest_without_a_signature(case: Case) -> None:
    payload_in_manifest(case, None)
    assert_refused(case, Refusal.UNSIGNED, is_marked=False)


def test_a_signer_that_is_trusted_no_more(case: Case) -> None:
    old = case.signer
    payload_in_manifest(case, old)
    assert_refused(
        case,
        Refusal.UNKNOWN_SIGNER,
        is_marked=False,
        trust="signed",
        verifier_keys=[SignerKey.generate().verifier.to_text()],
    )


def test_a_valid_bundle_under_another_key(case: Case) -> None:
    other = bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS, graph={"model": "other"})
    payload_in_manifest(case, case.signer)
    folder = case.folder / "store" / "bundles" / other.digest
    folder.mkdir()
    shutil.copy(case.manifest, folder)
    library = case.library()
    assert load(library, other) is None
    assert library.counters.refusals == {"wrong_key": 1}
    assert [mark.key for mark in library.marks.quarantined()] == [other.digest]
    assert not case.mark.exists()


def test_a_manifest_that_claims_another_key(case: Case) -> None:
    """Signed, under the right name, with factors that do not give that key."""
    case.rewrite_manifest(lambda fields: fields["factors"]["graph"].update(model="x"), case.signer)  # type: ignore[index]
    assert_refused(case, Refusal.WRONG_KEY)


@pytest.mark.parametrize("kind", [Kind.PLAN, Kind.PIECE])
def test_a_symbolic_link_in_place_of_a_blob(case: Case, kind: Kind) -> None:
    outside = case.folder.parent / "outside"
    outside.write_bytes(case.blob(kind).read_bytes())
    case.blob(kind).unlink()
    case.blob(kind).symlink_to(outside)
    assert_refused(case, Refusal.MALFORMED)


def test_a_symbolic_link_in_place_of_a_folder(case: Case) -> None:
    folder = case.blob(Kind.PIECE).parent
    folder.rename(case.folder.parent / "outside")
    folder.symlink_to(case.folder.parent / "outside")
    assert_refused(case, Refusal.MALFORMED)


def test_a_symbolic_link_in_place_of_a_manifest(case: Case) -> None:
    outside = case.folder.parent / "outside"
    manifest = case.manifest
    manifest.rename(outside)
    manifest.symlink_to(outside)
    assert load(case.library()) is None


@pytest.mark.parametrize("policy", ["local-only", "none"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "../../../../outside"),
        ("name", "../../outside"),
        ("name", "/etc/passwd"),
        ("num_bytes", -1),
        ("num_bytes", True),
        ("format", "../fx"),
        ("size", 0),
        ("kind", "shell"),
        ("surprise", 1),
    ],
)
def test_a_manifest_that_leads_elsewhere(case: Case, field: str, value: object, policy: str) -> None:
    def change(fields: dict[str, object]) -> None:
        fields["entries"][-1][field] = value  # type: ignore[index]

    (case.folder.parent / "outside").write_bytes(python_payload(case.mark))
    case.rewrite_manifest(change, case.signer)
    assert_refused(case, Refusal.MALFORMED, trust=policy)


def zip_bomb(num_bytes: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.bin", bytes(num_bytes))
    return buffer.getvalue()


def lying_zip_bomb(num_bytes: int) -> bytes:
    """One that says it unpacks to ten bytes."""
    data = bytearray(zip_bomb(num_bytes))
    real, said = num_bytes.to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert data.count(real) == 2
    return bytes(data.replace(real, said))


def climbing_zip(*, link: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("lib.so" if link else "../../lib.so")
        member.external_attr = (0o120777 if link else 0o100644) << 16
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (zip_bomb(4 << 20), Refusal.TOO_LARGE),
        (lying_zip_bomb(4 << 20), Refusal.MALFORMED),
        (climbing_zip(), Refusal.MALFORMED),
        (climbing_zip(link=True), Refusal.MALFORMED),
        (zip_bomb(100)[:-30], Refusal.MALFORMED),
    ],
    ids=["bomb", "lying bomb", "climbs", "link", "truncated"],
)
def test_an_archive_that_would_do_harm_is_refused_even_if_it_is_signed(
    case: Case, package: bytes, reason: Refusal
) -> None:
    """Whoever signs may be mistaken; unpacking happens after these checks."""
    library = case.library(max_unpacked_bytes=1 << 20)
    base = library.open(KEY).bundle
    assert base is not None
    entry = next(base.find(Kind.PIECE))
    bundle = library.publish(KEY, [Addition(Kind.PIECE, entry.name, package, "aoti")], base)
    assert bundle is not None
    bad = next(found for found in bundle.find(Kind.PIECE, entry.name) if found.format == "aoti")
    with pytest.raises(RefusedError) as error:
        library.read(bundle, bad)
    assert error.value.reason is reason


def test_a_blob_above_the_limit_is_not_read(case: Case) -> None:
    assert_refused(case, Refusal.TOO_LARGE, max_blob_bytes=100)


def test_the_compile_layer_builds_what_was_refused(case: Case) -> None:
    case.blob(Kind.PIECE).write_bytes(python_payload(case.mark))
    library = case.library()
    work = compilation(library)
    pieces = work.find()
    assert isinstance(pieces, PieceSet)
    with pytest.raises(RefusedError):
        pieces.fetch([None])
    again = work.build()
    assert work.publish(again)
    assert load(library) is not None
    assert not case.mark.exists()
