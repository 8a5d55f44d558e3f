"""A TCP proxy that can cut all its connections: ``python -m tests.chaos.proxy LISTEN TARGET``, then SIGUSR1."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from workers.processes import LOCALHOST


class Proxy:
    """Forwards every connection to a port of this machine."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either end closes it."""
        try:
            far_reader, far_writer = await asyncio.open_connection(LOCALHOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        self._writers -= both

    def cut(self) -> None:
        """Cut every connection, whatever is under way on it."""
        for writer in self._writers:
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(port: int, target: int) -> None:
    """Forward until killed."""
    proxy = Proxy(target)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, proxy.cut)
    async with await asyncio.start_server(proxy.forward, LOCALHOST, port) as server:
        print("proxy ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
