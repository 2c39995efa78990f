"""``warmgraph bench serving``: load tests of a running server, ours or another one with the OpenAI API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.bench.client import Target, Timing
from cluster.bench.driver import Watcher, run_load
from cluster.bench.report import distribution, summarize
from cluster.bench.workload import Lengths, Workload
from workers.errors import ConfigError


class Endpoint(StrEnum):
    """Which endpoint is called."""

    COMPLETIONS = "completions"
    CHAT = "chat"


def serving(
    model: Annotated[str, typer.Option(help="The model to ask for.")],
    url: Annotated[str, typer.Option(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="How many requests to send.")] = 100,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests per second, as a Poisson process.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in flight; 16 if there is no rate.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Length of prompts: 128, or 64:256.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Length of answers: 128, or 64:256.")] = "128",
    shared: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with a common prefix.")] = 0.0,
    prefixes: Annotated[int, typer.Option(min=1, help="Number of common prefixes.")] = 8,
    prefix_share: Annotated[float, typer.Option(min=0, max=1, help="Their part of the prompt.")] = 0.5,
    endpoint: Annotated[Endpoint, typer.Option(help="What to call.")] = Endpoint.COMPLETIONS,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Send random token ids below this, not text (completions only).")
    ] = None,
    body: Annotated[str, typer.Option(help="JSON fields to add to every request.")] = "{}",
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "OPENAI_API_KEY",
    stop_early: Annotated[bool, typer.Option(help="Let the model end answers, instead of ignore_eos.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest time for one request.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> None:
    """Send a load, watch it live, and print percentiles and one JSON line."""
    if vocab_size is not None and endpoint is Endpoint.CHAT:
        raise ConfigError("--vocab-size sends token ids, which chats do not take; use --endpoint completions.")
    workload = Workload(
        Lengths.parse(prompt_tokens, "--prompt-tokens"),
        Lengths.parse(output_tokens, "--output-tokens"),
        shared,
        prefixes,
        prefix_share,
        rate,
        vocab_size,
        seed,
    )
    if rate is None and concurrency is None:
        concurrency = 16
    extra = {"temperature": 0.0, **({} if stop_early else {"ignore_eos": True}), **_parse_body(body)}
    key = os.environ.get(api_key_env)
    target = Target(
        url.rstrip("/"), model, endpoint.value, extra, {"Authorization": f"Bearer {key}"} if key else {}
    )  # fmt: skip
    console = Console(stderr=True)
    with _watching(console, requests) if not as_json else contextlib.nullcontext(_ignore) as watch:
        timings, seconds = asyncio.run(run_load(target, workload.requests(requests), concurrency, timeout_s, watch))
    summary = summarize(timings, seconds)
    if not as_json:
        console.print(_table(summary))
    load = {"rate": rate, "concurrency": concurrency, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    load |= {"shared": shared, "prefixes": prefixes, "prefix_share": prefix_share, "seed": seed}
    print(json.dumps({"benchmark": "serving", "url": url, "model": model, "load": load, **summary}))
    if len(summary["errors"]):
        raise typer.Exit(1)


def _parse_body(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--body is not JSON: {error}.", param="--body") from None
    if not isinstance(fields, dict):
        raise ConfigError("--body takes a JSON object.", param="--body")
    return fields


def _ignore(sent: int, ended: int, last: Timing) -> None:
    """The watcher for when nobody watches."""


@contextlib.contextmanager
def _watching(console: Console, num_requests: int) -> Iterator[Watcher]:
    """A live line: progress, rate, and the percentiles so far."""
    timings: list[Timing] = []
    started = time.perf_counter()

    def watch(sent: int, ended: int, last: Timing) -> None:
        timings.append(last)
        if ended == num_requests or time.perf_counter() - drawn[0] > 0.25:
            drawn[0] = time.perf_counter()
            live.update(_status(timings, sent, num_requests, time.perf_counter() - started))

    drawn = [0.0]
    with Live(console=console, auto_refresh=True, refresh_per_second=4) as live:
        yield watch


def _status(timings: list[Timing], sent: int, num_requests: int, seconds: float) -> str:
    good = [timing for timing in timings if timing.error is None]
    tokens = sum(timing.num_tokens for timing in good)
    ttft = distribution([timing.token_s[0] - timing.started_s for timing in good if timing.token_s])
    return (
        f"{len(timings)}/{num_requests} done, {sent - len(timings)} in flight, {len(timings) - len(good)} errors, "
        f"{tokens / seconds:,.0f} tokens/s, first token p50 {ttft['p50'] if ttft else 0:.0f} ms, {seconds:.0f} s"
    )


def _table(summary: dict[str, Any]) -> Table:
    names = ("mean", "p50", "p90", "p95", "p99", "max")
    table = Table(title=f"{summary['requests_per_s']} requests/s, {summary['output_tokens_per_s']} tokens/s")
    for heading in ("milliseconds", *names):
        table.add_column(heading, justify="right")
    for key, label in (("ttft_ms", "first token"), ("inter_token_ms", "between tokens"), ("e2e_ms", "whole request")):
        numbers = summary[key] or {}
        table.add_row(label, *(f"{numbers[name]:.1f}" if name in numbers else "-" for name in names))
    if summary["errors"]:
        table.caption = "errors: " + ", ".join(f"{kind} ({num})" for kind, num in summary["errors"].items())
    return table
