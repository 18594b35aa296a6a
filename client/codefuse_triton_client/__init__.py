"""Streaming completions from codefuse-triton over gRPC."""
from .aio import AsyncClient, AsyncStream
from .protocol import Chunk, CompletionError, InvalidRequest, Result, Timings, TopToken
from .sync import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Chunk", "Client", "CompletionError", "InvalidRequest", "Result", "Stream", "Timings",
           "TopToken"]
