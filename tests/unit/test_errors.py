"""Errors cross processes: they must survive pickling with everything they carry."""

from __future__ import annotations

import pickle

import pytest

from workers.errors import (
    EngineDeadError,
    InvalidRequestError,
    PoisonedRequestError,
    PromptTooLongError,
    QueueFullError,
    WarmgraphError,
)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("top_p is wrong", param="top_p"),
        PromptTooLongError("too long"),
        QueueFullError("full", 2.5),
        EngineDeadError("dead"),
        PoisonedRequestError("again and again"),
    ],
)
def test_errors_survive_pickling(error: WarmgraphError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
