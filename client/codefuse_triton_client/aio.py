"""asyncio client."""
from __future__ import annotations

from typing import Any, AsyncIterator

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .protocol import CHANNEL_OPTIONS, Chunk, Progress, Result, error_from_status, make_request


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one completion, those of n answers interleaved. aclose(), the end of `async with`, garbage collection or the task's cancellation cancel."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._progress = Progress()

    async def __anext__(self) -> Chunk:
        try:
            while True:
                response = await self._call.read()  # the server ends the stream after the last chunk
                if response is grpc.aio.EOF:
                    self._progress.end()
                    raise StopAsyncIteration
                chunk = self._progress.take(response)
                if chunk is not None:
                    return chunk
        except grpc.RpcError as error:
            raise error_from_status(error) from None
        except BaseException:
            self._call.cancel()
            raise

    @property
    def result(self) -> Result:
        """After the last chunk; the first of several answers."""
        return self._progress.end()[0]

    @property
    def results(self) -> list[Result]:
        """After the last chunk: all n answers."""
        return self._progress.end()

    async def aclose(self) -> None:
        """Cancels the request unless it has ended. May be repeated."""
        if not self._progress.finished:
            self._call.cancel()
            return
        try:
            while await self._call.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError:
            pass

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self._call.cancel()


class AsyncClient:
    """Every call is a gRPC stream of its own on one channel. Make it inside a running event loop."""

    def __init__(self, url: str = "127.0.0.1:8001", *, model: str = "ensemble") -> None:
        self._channel = grpc.aio.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._model = model

    def stream(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None,
               **options: Any) -> AsyncStream:
        """options: max_tokens, temperature, top_p, stop ...: protocol.OPTIONS. Errors come with the first chunk."""
        return self._call(make_request(self._model, prompt, stream=True, request_id=request_id, options=options), timeout_s)

    async def complete(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None,
                       **options: Any) -> Result:
        """The whole text at once; of n answers the first."""
        return (await self.complete_all(prompt, request_id=request_id, timeout_s=timeout_s, **options))[0]

    async def complete_all(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None,
                           **options: Any) -> list[Result]:
        """All n answers."""
        async with self._call(make_request(self._model, prompt, stream=False, request_id=request_id, options=options),
                              timeout_s) as stream:
            async for _ in stream:
                pass
            return stream.results

    def _call(self, request: service_pb2.ModelInferRequest, timeout_s: float | None) -> AsyncStream:
        return AsyncStream(self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
