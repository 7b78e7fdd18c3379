"""What a program in the sandbox may use. Torch-free."""

from __future__ import annotations

from pydantic import Field

from llmkit.config import Config


class SandboxConfig(Config):
    """The cage in which programs run."""

    timeout_s: float = Field(4.0, gt=0, le=600)
    """Wall time of a program, its tests included."""
    memory_mb: int = Field(512, ge=64, le=65536)
    """Address space of a process, Python itself included."""
    file_mb: int = Field(16, ge=1, le=4096)
    """Size of the program's only writable folder, which is in memory."""
    output_kb: int = Field(64, ge=1, le=16384)
    """What it may print before it is ended."""
    processes: int = Field(1, ge=1, le=64)
    """Processes and threads it may have at once. Memory is limited for each of them, not for all."""
    workers: int | None = Field(None, ge=1, le=256)
    """Programs that run side by side. Default: the number of cores, at most 8."""
    unsafe: bool = False
    """Runs programs where namespaces are not to be had, kept from the network, files and other processes by nothing."""
