"""As `vllm.platforms`, of vLLM's build for CPUs."""

from types import SimpleNamespace

current_platform = SimpleNamespace(device_type="cpu")
