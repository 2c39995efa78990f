"""``warmgraph artifacts``: every command, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.artifacts import app
from tests.artifact_cases import KEY, PIECE, PLAN, s3_server
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal
from workers.artifacts.library import ArtifactLibrary, Outcome
from workers.artifacts.names import blob_name
from workers.config import ArtifactConfig
from workers.errors import ConfigError, UserError

SHORT = KEY.digest[:12]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def library() -> ArtifactLibrary:
    """This user's own store, with one bundle."""
    library = ArtifactLibrary.from_config(ArtifactConfig())
    assert library.publish(KEY, [PLAN, PIECE]) is not None
    return library


def run(*args: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def run_json(*args: Any, code: int = 0) -> Any:
    return json.loads(run(*args, "--json", code=code))


def test_ls(library: ArtifactLibrary) -> None:
    (row,) = run_json("ls")["bundles"]
    assert (row["key"], row["status"], row["formats"]) == (KEY.digest, "ok", ["aoti"])
    assert (row["num_entries"], row["build_seconds"], row["quarantine"]) == (2, 21.0, [])
    assert f"{SHORT}  ok" in run("ls")
    library.marks.quarantine(KEY.digest, library.open(KEY).bundle.heads, Refusal.SELF_CHECK, "crashed", ())  # type: ignore[union-attr]
    library.remember_failure(KEY, "ptxas failed")
    (row,) = run_json("ls")["bundles"]
    assert (row["status"], row["quarantine"], row["has_failed"]) == ("quarantined", ["self_check"], True)
    assert "build failed; quarantined: self_check" in run("ls")


def test_names_are_whole_in_a_narrow_terminal(library: ArtifactLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    library.marks.quarantine(KEY.digest, library.open(KEY).bundle.heads, Refusal.SELF_CHECK, "crashed", ())  # type: ignore[union-attr]
    assert f"{SHORT}  quarantined" in run("ls")
    assert "quarantined: self_check" in run("ls")


def test_ls_of_an_empty_store() -> None:
    assert run_json("ls")["bundles"] == []
    assert "0 bundles" in run("ls")


def test_show(library: ArtifactLibrary) -> None:
    data = run_json("show", SHORT)
    assert data["factors"]["graph"] == KEY.graph
    assert [entry["kind"] for entry in data["entries"]] == ["plan", "piece"]
    (manifest,) = data["manifests"]
    assert manifest["origins"] == list(library.trust.keys)
    text = run("show", SHORT)
    assert "environment.num_threads: 2" in text
    assert "dtype: bfloat16" in text


@pytest.mark.parametrize(
    ("key", "sentence"),
    [("ab", "is too short"), ("ffffffffff", "has no bundle whose key begins with ffffffffff")],
)
def test_a_key_that_is_none(library: ArtifactLibrary, key: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run("show", key)


def test_verify(library: ArtifactLibrary, tmp_path: Path) -> None:
    assert run_json("verify") == {KEY.digest: {"ok": True, "problems": []}}
    assert run("verify", SHORT) == f"{SHORT}: ok\n"
    blob = tmp_path / "artifacts" / "store" / blob_name(sha256(PIECE.data))
    blob.write_bytes(b"Machine code")
    report = run_json("verify", code=1)
    assert report[KEY.digest]["problems"] == ["piece first: Its bytes are not those that were signed."]
    assert blob.exists()
    assert library.marks.quarantined() == []


def test_pin_and_gc(library: ArtifactLibrary) -> None:
    assert run_json("pin", SHORT) == {"key": KEY.digest, "is_pinned": True}
    everything = ("gc", "--max-bytes", 0, "--grace-hours", 0)
    assert run_json(*everything)["kept"] == {KEY.digest: "pinned or leased"}
    assert "is no longer pinned" in run("pin", SHORT, "--remove")
    assert "would remove 1 bundle, " in run(*everything, "--dry-run")
    assert library.open(KEY).outcome is Outcome.HIT


def test_quarantine(library: ArtifactLibrary) -> None:
    assert run("quarantine") == "Nothing is in quarantine.\n"
    (mark,) = run_json("quarantine", SHORT, "--reason", "wrong tokens on host 7")
    assert (mark["reason"], mark["text"]) == ("quarantined", "wrong tokens on host 7")
    assert ArtifactLibrary.from_config(ArtifactConfig()).open(KEY).outcome is Outcome.QUARANTINED
    assert "wrong tokens on host 7" in run("quarantine")
    assert f"{SHORT} manifest" in run("quarantine")
    assert "quarantined: by hand" in run("ls")
    assert run("quarantine", SHORT, "--lift").startswith(f"{SHORT}: 1 mark taken back")
    assert run_json("quarantine", SHORT, "--lift") == []
    assert ArtifactLibrary.from_config(ArtifactConfig()).open(KEY).outcome is Outcome.HIT
    with pytest.raises(ConfigError, match="Name the bundle"):
        run("quarantine", "--lift")


def test_a_bundle_travels_with_its_signature(library: ArtifactLibrary, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    assert run_json("export", path, SHORT)["num_objects"] == 3
    text = next(iter(library.trust.keys.values())).to_text()
    other = ("--store", tmp_path / "other")
    assert run_json("import", path, *other)["num_objects"] == 3
    assert run_json("import", path, *other)["num_objects"] == 0
    assert run_json("verify", *other, "--trust", text) == {KEY.digest: {"ok": True, "problems": []}}
    stranger = run_json("keygen", tmp_path / "stranger.pem")["verifier_key"]
    with pytest.raises(UserError, match="which is not trusted here"):
        run("import", path, "--store", tmp_path / "third", "--trust", stranger)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("damage", ["blob", "manifest", "missing", "climbs", "truncated"])
def test_a_changed_export_is_not_imported(library: ArtifactLibrary, tmp_path: Path, damage: str) -> None:
    import zipfile

    run("export", tmp_path / "bundle.zip", SHORT)
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(tmp_path / "bundle.zip") as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            is_blob = name == blob_name(sha256(PIECE.data))
            if damage == "missing" and is_blob:
                continue
            if (damage == "blob" and is_blob) or (damage == "manifest" and name.startswith("bundles/")):
                data = data[:-1] + b"!"
            target.writestr(name, data)
        if damage == "climbs":
            target.writestr("blobs/../../outside", b"x")
    if damage == "truncated":
        changed.write_bytes(changed.read_bytes()[:-40])
    with pytest.raises(UserError):
        run("import", changed, "--store", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "outside").exists()


def test_keygen(tmp_path: Path) -> None:
    text = run("keygen", tmp_path / "fleet.pem").strip()
    assert text.startswith("ed25519:")
    config = ArtifactConfig(
        store=str(tmp_path / "shared"),
        trust="signed",
        verifier_keys=[text],
        signer_key_file=str(tmp_path / "fleet.pem"),
    )
    assert ArtifactLibrary.from_config(config).publish(KEY, [PLAN]) is not None
    (row,) = run_json("ls", "--store", tmp_path / "shared", "--trust", text)["bundles"]
    assert row["status"] == "ok"
    (row,) = run_json("ls", "--store", tmp_path / "shared")["bundles"]
    assert row["status"] == "refused"
    with pytest.raises(ConfigError, match="keys are never overwritten"):
        run("keygen", tmp_path / "fleet.pem")


def test_an_object_store(tmp_path: Path) -> None:
    with s3_server() as options:
        url = "s3://artifacts/fleet"
        library = ArtifactLibrary.from_config(ArtifactConfig(store=url, store_options=options))
        assert library.publish(KEY, [PLAN, PIECE]) is not None
        arguments = ("--store", url, *(part for item in options.items() for part in ("--store-option", "=".join(item))))
        assert run_json("ls", *arguments)["bundles"][0]["status"] == "ok"
        assert run_json("verify", *arguments)[KEY.digest]["ok"]
        run("pin", SHORT, *arguments)
        assert run_json("ls", *arguments)["bundles"][0]["is_pinned"]
    with pytest.raises(UserError, match="s3://artifacts/fleet"):
        run("ls", *arguments)


def test_a_config_names_the_store(library: ArtifactLibrary, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("models: [{name: m, engine: {model: m}}]")
    assert len(run_json("ls", "--config", path)["bundles"]) == 1
    with pytest.raises(ConfigError, match="Give --config, or"):
        run("ls", "--config", path, "--store", "x")
    path.write_text("models: [{name: m, engine: {model: m, artifacts: {store: null}}}]")
    with pytest.raises(ConfigError, match="nothing outlives an engine"):
        run("ls", "--config", path)
