"""What answers a model between its turns, as a recipe says it. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.sandbox.config import SandboxConfig

TOOLS = ("calculator", "python")


class ToolsConfig(Config):
    """Tools that the model calls in its answers; what they return is the next message, of the role `tool`."""

    kind: Literal["tools"]
    """Which environment this is."""
    tools: tuple[Literal["calculator", "python"], ...] = ("calculator",)
    """calculator: arithmetic, exactly. python: a program, in the sandbox; what it prints is returned."""
    format: Literal["json", "tags"] = "json"
    """json: `<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>` (python: `code`). tags:
    `<calculator>6*7</calculator>`, `<python>print(6*7)</python>`."""
    max_turns: int = Field(4, ge=1, le=256)
    """Turns of the model, the first included; a call in the last one is not answered."""
    max_chars: int = Field(1000, ge=16)
    """Longer results are cut, which the result says."""
    sandbox: SandboxConfig = SandboxConfig()
    """Limits of python's programs."""

    @model_validator(mode="after")
    def _named_once(self) -> ToolsConfig:
        if not self.tools or len(set(self.tools)) < len(self.tools):
            raise ValueError(f"tools: at least one, each once (got {list(self.tools)})")
        return self


class FunctionConfig(Config):
    """A function of yours that answers: `f(messages, text, fields) -> list of messages, text or None`."""

    kind: Literal["function"]
    """Which environment this is."""
    function: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[:.][A-Za-z_]\w*$")
    """`package.module:name`; the module is looked for in the working directory too. None ends the answer; text becomes a
    message of the user."""
    max_turns: int = Field(4, ge=1, le=256)
    """Turns of the model, the first included."""


EnvironmentConfig = Annotated[ToolsConfig | FunctionConfig, Field(discriminator="kind")]
