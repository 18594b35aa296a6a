"""Blocking client."""
from __future__ import annotations

from typing import Any, Iterator

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .protocol import CHANNEL_OPTIONS, Chunk, Progress, Result, error_from_status, make_request


class Stream(Iterator[Chunk]):
    """The chunks of one completion, those of n answers interleaved. Ending the iteration early (break, close, garbage collection) cancels the request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._progress = Progress()

    def __next__(self) -> Chunk:
        try:
            while True:
                response = next(self._call, None)  # the server ends the stream after the last chunk
                if response is None:
                    self._progress.end()
                    raise StopIteration
                chunk = self._progress.take(response)
                if chunk is not None:
                    return chunk
        except grpc.RpcError as error:
            self.close()
            raise error_from_status(error) from None
        except Exception:
            self.close()
            raise

    @property
    def result(self) -> Result:
        """After the last chunk; the first of several answers."""
        return self._progress.end()[0]

    @property
    def results(self) -> list[Result]:
        """After the last chunk: all n answers."""
        return self._progress.end()

    def close(self) -> None:
        """Cancels the request unless it has ended. May be repeated."""
        if not self._progress.finished:
            self._call.cancel()
            return
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_progress"):
            self.close()


class Client:
    """Any number of threads may use one client; every call is a gRPC stream of its own on one channel."""

    def __init__(self, url: str = "127.0.0.1:8001", *, model: str = "ensemble") -> None:
        self._channel = grpc.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._model = model

    def stream(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None, **options: Any) -> Stream:
        """options: max_tokens, temperature, top_p, stop ...: protocol.OPTIONS. Errors come with the first chunk."""
        return self._call(make_request(self._model, prompt, stream=True, request_id=request_id, options=options), timeout_s)

    def complete(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None, **options: Any) -> Result:
        """The whole text at once; of n answers the first."""
        return self.complete_all(prompt, request_id=request_id, timeout_s=timeout_s, **options)[0]

    def complete_all(self, prompt: str | bytes, *, request_id: str = "", timeout_s: float | None = None, **options: Any) -> list[Result]:
        """All n answers."""
        with self._call(make_request(self._model, prompt, stream=False, request_id=request_id, options=options),
                        timeout_s) as stream:
            for _ in stream:
                pass
            return stream.results

    def _call(self, request: service_pb2.ModelInferRequest, timeout_s: float | None) -> Stream:
        return Stream(self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s))

    def is_ready(self, timeout_s: float = 2.0) -> bool:
        try:
            request = service_pb2.ModelReadyRequest(name=self._model)
            return bool(self._stub.ModelReady(request, timeout=timeout_s).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
