"""What a server is asked to run: how often each batch size occurs.

From nothing (a uniform load), from a recorded histogram, or from a trace. Knows numbers and file formats, nothing about
graphs.

A trace is a text file with one JSON object per line, one line per batch or run of equal batches, in any order::

    {"num_tokens": 5}
    {"num_tokens": 12, "count": 340}

``num_tokens`` is the size of the batch (of a decode batch: its requests), ``count`` how many such batches there were
(default 1). Empty lines are skipped; any other key is refused.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import ConfigError
from workers.graphs.histogram import FORMAT_NAME, BatchHistogram, HistogramError

#: Number of batches by size in tokens.
Load = Mapping[int, int]

_TRACE_KEYS = {"num_tokens", "count"}


def uniform_load(max_size: int) -> Load:
    """Every batch size from 1 to ``max_size``, once each.

    Raises:
        ConfigError: ``max_size`` is below 1.
    """
    if max_size < 1:
        raise ConfigError(f"the largest batch size must be at least 1 (got {max_size}).", param="max_size")
    return dict.fromkeys(range(1, max_size + 1), 1)


def read_load(path: Path) -> Load:
    """The load in a histogram (``BatchHistogram.to_json``) or in a trace; the contents say which it is.

    Raises:
        ConfigError: The file cannot be read, is neither, or is empty; says which line is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    read = _read_histogram if FORMAT_NAME.encode() in data[:4096] else _read_trace
    load = read(path, data)
    if not load:
        raise ConfigError(f"{path} holds no batches.")
    return load


def _read_histogram(path: Path, data: bytes) -> Load:
    try:
        return dict(BatchHistogram.from_json(data).token_counts())
    except HistogramError as error:
        raise ConfigError(f"{path}: {error}.") from None


def _read_trace(path: Path, data: bytes) -> Load:
    load: collections.Counter[int] = collections.Counter()
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is neither a batch histogram nor a trace: it is not text.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            raise ConfigError(f'{path}, line {number}: not JSON; a line is {{"num_tokens": 5}}.') from None
        size, count = _entry(entry, f"{path}, line {number}")
        load[size] += count
    return load


def _entry(entry: Any, where: str) -> tuple[int, int]:
    if not isinstance(entry, dict) or "num_tokens" not in entry:
        raise ConfigError(f'{where}: a line is an object with "num_tokens" and, optionally, "count".')
    unknown = sorted(entry.keys() - _TRACE_KEYS)
    if unknown:
        raise ConfigError(f'{where}: unknown key {unknown[0]!r}; a line has "num_tokens" and, optionally, "count".')
    size, count = entry["num_tokens"], entry.get("count", 1)
    for name, value in (("num_tokens", size), ("count", count)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}: {name} must be a whole number of at least 1 (got {value!r}).")
    return size, count
