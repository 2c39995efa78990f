"""What the README shows is executed."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import httpx
import pytest

from tests.cluster.conftest import Deployment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.model
def test_the_python_snippet_runs(default_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["serve", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_warmgraph_commands_parse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs and overrides are read; what is quick runs, and what starts an engine is asked for its help."""
    from cluster.cli.main import app
    from cluster.config import DeploymentConfig

    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^warmgraph (.*?)(?:\s+#.*)?$", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command)
        for config in (word for word in words if word.endswith(".yaml")):
            DeploymentConfig.from_file(config, [value for flag, value in itertools.pairwise(words) if flag == "--set"])
        if words[0] in ("diagnose", "graphs", "serve", "startup"):
            words.append("--help")
        app(words, standalone_mode=False)
        assert capsys.readouterr().out


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_the_curl_line_is_answered(deployment: Deployment) -> None:
    (line,) = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("curl ")]
    words = shlex.split(line)
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    body = words[words.index("-d") + 1].replace("smollm2-135m-instruct", "tiny")
    answer = httpx.post(
        words[1].replace("http://127.0.0.1:8000", deployment.url),
        content=body,
        headers=dict([words[words.index("-H") + 1].split(": ")]),
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
