"""What a server is told: where it listens, who may ask, and how much. Torch-free."""

from __future__ import annotations

import ipaddress

from pydantic import Field, model_validator

from llmkit.config import Config


class Limits(Config):
    """How much one request, and all of them together, may ask for."""

    max_body_bytes: int = Field(1 << 20, ge=1)
    """Of a request's body; more is refused with 413 before it is read."""
    max_messages: int = Field(256, ge=1)
    """Of one conversation."""
    max_n: int = Field(8, ge=1)
    """Samples of one prompt."""
    max_inputs: int = Field(64, ge=1)
    """Prompts of one completion request, or texts of one for embeddings."""
    max_stops: int = Field(4, ge=0)
    """Stop strings of a request, as OpenAI's API has it."""
    max_stop_chars: int = Field(64, ge=1)
    """Of one stop string."""
    max_logprobs: int = Field(20, ge=0)
    """Candidates that are told beside each token."""
    max_biases: int = Field(300, ge=0)
    """Entries of logit_bias."""
    max_pending: int = Field(128, ge=1)
    """Texts (samples of prompts) that are written or wait at a time; a request beyond it is told 429 to come back."""
    read_timeout_s: float = Field(10.0, gt=0)
    """In which a request's head, and then its body, must have come."""
    write_timeout_s: float = Field(30.0, gt=0)
    """In which a client must take what it is sent; one that doesn't is dropped."""
    request_timeout_s: float = Field(600.0, gt=0)
    """In which a request is answered; one that takes longer is cancelled."""
    drain_s: float = Field(30.0, ge=0)
    """After a signal to stop: how long requests may take to their end."""


class ServingConfig(Config):
    """A server."""

    host: str = Field("127.0.0.1", min_length=1)
    """The address to listen on. Anything but this machine's own needs an api_key."""
    port: int = Field(8000, ge=0, le=65535)
    """0: any free one, which is told."""
    name: str = Field(min_length=1, max_length=200)
    """What requests call the model."""
    api_key: str | None = Field(None, min_length=1, repr=False)
    """What clients send as `Authorization: Bearer KEY`. None: whoever reaches the port may ask."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _closed(self) -> ServingConfig:
        if self.api_key is None and not self.is_local:
            raise ValueError(
                f"host {self.host} is open to other machines: set --api-key, or LLMKIT_API_KEY in the environment"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: only printable ASCII can be sent in a header")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
