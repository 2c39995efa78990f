"""Step messages between processes of one node: a Unix socket, one pickle per message.

A message through an actor's or gRPC's stream costs over a millisecond of CPU in the two processes together, this a
tenth of that. The socket lies in a folder that only this user can enter, so that what is unpickled comes from the
deployment itself. Knows bytes and messages; who may have which messages is the replica's business.
"""

from __future__ import annotations

import asyncio
import pickle
import shutil
import struct
import tempfile
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from cluster.messages import StepMessage

_SIZE = struct.Struct("<I")
_ID_BYTES = 32
#: Read at once; a step of 64 streams takes about 5 KiB.
_BUFFER_BYTES = 1 << 20


class StepServer:
    """Sends every connection its messages.

    Args:
        next_message: Waits for the next message of a connection id; raises KeyError for one that is not open.
    """

    def __init__(self, next_message: Callable[[str], Awaitable[StepMessage]]) -> None:
        self._next_message = next_message
        self._path: Path | None = None
        self._server: asyncio.Server | None = None
        self._writers: dict[str, asyncio.StreamWriter] = {}

    async def path(self) -> str:
        """Where to connect; the first call opens the socket."""
        if self._path is None:
            folder = Path(tempfile.mkdtemp(prefix="wg-steps-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = folder / "steps.sock"
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        return str(self._path)

    def close(self, connection_id: str) -> None:
        """End a connection."""
        writer = self._writers.pop(connection_id, None)
        if writer is not None:
            writer.close()

    def shut_down(self) -> None:
        """End all connections and take no more."""
        if self._server is not None:
            self._server.close()
        for connection_id in [*self._writers]:
            self.close(connection_id)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection_id = ""
        try:
            connection_id = (await reader.readexactly(_ID_BYTES)).decode()
            self._writers[connection_id] = writer
            while not writer.is_closing():
                data = pickle.dumps(await self._next_message(connection_id), protocol=5)
                writer.writelines((_SIZE.pack(len(data)), data))
                await writer.drain()
        except (KeyError, OSError, asyncio.IncompleteReadError):
            pass  # either side has closed it; the ingress connects again if it wants to
        finally:
            writer.close()
            if self._writers.get(connection_id) is writer:
                del self._writers[connection_id]


async def read_messages(path: str, connection_id: str) -> AsyncIterator[StepMessage]:
    """The messages of a connection, until the other side closes it.

    Raises:
        OSError: The socket cannot be reached from here.
    """
    reader, writer = await asyncio.open_unix_connection(path, limit=_BUFFER_BYTES)
    try:
        writer.write(connection_id.encode())
        while True:
            (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
            message: StepMessage = pickle.loads(await reader.readexactly(size))
            yield message
    except (asyncio.IncompleteReadError, OSError):
        return
    finally:
        writer.close()
