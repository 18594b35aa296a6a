"""codefuse-triton: a code LLM engine of its own, served by Triton."""
from ._native import Chunk, DeviceError, LoadError, Outbox, QueueFull, devices
from .engine import Engine, Stream
from .result import Result
from .vocab import Vocab

__all__ = ["Chunk", "DeviceError", "Engine", "LoadError", "Outbox", "QueueFull", "Result", "Stream", "Vocab", "devices"]
