"""Step messages on the wire, and the chunks of one request on their way to its reader."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cluster.messages import PrefixUpdate, StepMessage
from cluster.serving.token_stream import TokenStream
from tests.replica_states import replica_state
from workers.outputs import FinishReason, Logprob, TokenChunk
from workers.scheduler.prefix_journal import PrefixChanges

LAST = TokenChunk("a", [2], "y", finish_reason=FinishReason.STOP, stop_reason="y")


def test_a_step_message_comes_out_of_a_pickle_as_it_went_in() -> None:
    chunks = [
        TokenChunk("a", [1, 2], "one two"),
        TokenChunk("b", [], "", finish_reason=FinishReason.ERROR, error="It broke."),
        TokenChunk("c", [3], "é", logprobs=[{3: Logprob(-0.5, 1, "é")}], prompt_logprobs=[None], num_cached_tokens=0),
        TokenChunk("a", [4], "", stop_reason=4, finish_reason=FinishReason.STOP),
    ]
    message = StepMessage(chunks, replica_state(), PrefixUpdate(PrefixChanges(b"12345678")))
    assert pickle.loads(pickle.dumps(message, protocol=5)) == message
    heartbeat = StepMessage([], replica_state())
    assert pickle.loads(pickle.dumps(heartbeat, protocol=5)) == heartbeat


async def test_chunks_that_come_before_the_reader_wait_for_it() -> None:
    stream, got = TokenStream(), []
    stream.put([TokenChunk("a", [0], "w")])
    stream.put([TokenChunk("a", [1], "x")])
    reading = asyncio.create_task(stream.read(got.extend))
    await asyncio.sleep(0)
    assert [chunk.text for chunk in got] == ["w", "x"]
    stream.put([LAST])
    assert got[-1] is LAST, "a reader is called, not woken"
    await reading


async def test_a_stream_that_ended_before_its_reader_came() -> None:
    stream, got = TokenStream(), []
    stream.put([LAST])
    await stream.read(got.extend)
    assert got == [LAST]


async def test_a_lost_stream_hands_out_what_it_has_then_the_error() -> None:
    stream, got = TokenStream(), []
    stream.put([TokenChunk("a", [1], "x")])
    stream.fail(ZeroDivisionError())
    stream.put([LAST])
    with pytest.raises(ZeroDivisionError):
        await stream.read(got.extend)
    assert [chunk.text for chunk in got] == ["x"]
