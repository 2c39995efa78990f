"""What goes wrong in a command is one sentence and an exit status, never a stack."""

from __future__ import annotations

import pytest

from cluster.cli import main as cli
from workers.compile.errors import BuildFailedError
from workers.errors import ConfigError, WarmgraphError


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("models: use one of [float32, bfloat16]"), 2), (BuildFailedError("g++ failed [as ever]"), 1)],
)
def test_errors_are_sentences(
    error: WarmgraphError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == status
    assert capsys.readouterr().err == f"error: {error}\n", "brackets are text"
