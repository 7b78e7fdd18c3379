"""Bodies of requests as OpenAI's API defines them, and its way of saying what is wrong with one.

Every field that is not known, or not supported, is refused by name: a setting that is silently dropped would be taken for
one that has no effect. A field that is null counts as not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from llmkit.config import Config, UserError
from llmkit.inference.config import SamplingConfig
from llmkit.serving.config import Limits

MAX_DEPTH = 32
MAX_SEED = (1 << 63) - 1
Prompt = str | list[int]


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- fields ----------------------------------------------------------------------------------------------------------


class StreamOptions(Config):
    """Of a streamed answer."""

    include_usage: bool = False
    """One more chunk at the end, which counts the tokens."""


class Generating(Config):
    """What requests for text have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Ids of tokens, in digits -> what is added to their scores."""
    min_tokens: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), le=MAX_SEED)
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Who asks, for the records of services that keep some: there are none here."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if not (name.isascii() and name.isdigit() and len(name) <= 9):
                raise ValueError(f"{name[:20]!r} is no id of a token")
        return value

    @model_validator(mode="after")
    def _options(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    def limit(self) -> int | None:
        """Most new tokens, where the request says so."""
        return self.max_tokens

    def sampling(self, limit: int) -> SamplingConfig:
        """How tokens are chosen. Raises ApiError for values that contradict each other."""
        same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        more = ("repetition_penalty", "logit_bias", "stop")
        try:
            return SamplingConfig(
                **{name: getattr(self, name) for name in (*same, *more)},
                min_new_tokens=self.min_tokens,
                max_new_tokens=limit,
            )
        except ValidationError as e:
            raise explained(e) from None


class CompletionRequest(Generating):
    """POST /v1/completions."""

    prompt: list[Prompt]
    echo: bool = False
    """The prompt before its completion."""
    logprobs: int | None = Field(None, ge=0)
    """Tells each token's log-probability, and those of so many candidates."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        return as_list(value)

    @property
    def n_texts(self) -> int:
        """Texts that are written."""
        return self.n * len(self.prompt)

    @property
    def n_logprobs(self) -> int | None:
        """Candidates told beside each token; None: nothing is told."""
        return self.logprobs


class Message(Config):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        """Clients send an answer back as they got it, with fields of it that are null."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """The parts of a content as one text."""
        if not isinstance(value, list):
            return value
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(value) or not all(isinstance(text, str) for text in texts):
            raise ValueError("only parts of type text are supported")
        return "".join(text for text in texts if isinstance(text, str))

    def plain(self) -> dict[str, Any]:
        """As templates know it; a developer's message is what a system's was before."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, **({"name": self.name} if self.name else {})}


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_texts(self) -> int:
        """Texts that are written."""
        return self.n

    @property
    def n_logprobs(self) -> int | None:
        """Candidates told beside each token; None: nothing is told."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(Config):
    """POST /v1/embeddings."""

    model: str
    input: list[Prompt]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _inputs(cls, value: Any) -> Any:
        return as_list(value)


Body = TypeVar("Body", CompletionRequest, ChatRequest, EmbeddingRequest)
Parsed = TypeVar("Parsed", bound=Config)


def as_list(value: Any) -> Any:
    """A text, or one text's ids, as a list of one."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and type(value[0]) is int)
    value = [value] if one else value
    kinds = (str, list)
    if not isinstance(value, list) or not value or not all(type(item) in kinds for item in value):
        raise ValueError("expected a text, a list of texts, a list of ids, or a list of such lists")
    for item in value:
        if isinstance(item, list) and not (item and all(type(i) is int and 0 <= i < 1 << 31 for i in item)):
            raise ValueError("a list of ids holds at least one, and nothing but ids of tokens")
    return value


# --- from bytes to a request -----------------------------------------------------------------------------------------


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def read(kind: type[Body], data: bytes, limits: Limits) -> Body:
    """A body's bytes as a request within the limits. Raises ApiError (400) that names the field."""
    request = parse(kind, data)
    _check_limits(request, limits)
    return request


def parse(kind: type[Parsed], data: bytes) -> Parsed:
    """A body's bytes as what is expected. Raises ApiError (400) that names the field."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON in UTF-8: {str(e)[:200]}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for key in body:
        if key not in kind.model_fields:
            shown = _shown(key)
            raise ApiError(400, f"{shown}: unknown, or not supported by this server", shown, "unknown_field")
    body = {key: value for key, value in body.items() if value is not None}
    _check_plain(body, "body")
    try:
        return kind.model_validate(body)
    except ValidationError as e:
        raise explained(e) from None


def _shown(text: str) -> str:
    """A short form of a client's text, which any JSON can hold."""
    return text[:60].encode("utf-8", "replace").decode("utf-8")


def _check_plain(value: Any, name: str, depth: int = 0) -> None:
    """Refuses what no template or tokenizer should see: depth without end, and half surrogate pairs."""
    if depth > MAX_DEPTH:
        raise ApiError(400, f"{name}: nested more than {MAX_DEPTH} levels deep", name)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ApiError(400, f"{name}: half a surrogate pair at character {e.start}", name) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, name, depth + 1)
            _check_plain(item, key if depth == 0 else name, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, name, depth + 1)


def explained(error: ValidationError) -> ApiError:
    """The first of a validation's mistakes."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    what = first["msg"].removeprefix("Value error, ")
    places = [_shown(str(part)) for part in first["loc"]]
    param = ".".join(places) or what.partition(":")[0].split(" ")[0]
    return ApiError(400, f"{param}: {what}" if places else what, param, first["type"])


def _check_limits(request: CompletionRequest | ChatRequest | EmbeddingRequest, limits: Limits) -> None:
    """Raises ApiError (400) for the first of the limits that a request is beyond."""
    found: list[tuple[str, int, int]] = []
    if isinstance(request, EmbeddingRequest):
        found.append(("input", len(request.input), min(limits.max_inputs, limits.max_pending)))
    else:
        found += [
            ("n", request.n, min(limits.max_n, limits.max_pending)),
            ("stop", len(request.stop), limits.max_stops),
            ("stop", max(map(len, request.stop), default=0), limits.max_stop_chars),
            ("logit_bias", len(request.logit_bias), limits.max_biases),
        ]
    if isinstance(request, CompletionRequest):
        found += [
            ("prompt", len(request.prompt), limits.max_inputs),
            ("logprobs", request.logprobs or 0, limits.max_logprobs),
            ("n", request.n_texts, limits.max_pending),
        ]
    elif isinstance(request, ChatRequest):
        found += [
            ("messages", len(request.messages), limits.max_messages),
            ("top_logprobs", request.top_logprobs or 0, limits.max_logprobs),
        ]
    for name, given, most in found:
        if given > most:
            raise ApiError(400, f"{name}: {given} is beyond this server's limit of {most}", name, "limit_exceeded")


def from_user_error(error: UserError, param: str | None = None) -> ApiError:
    """A mistake that was found below, as the client's."""
    return ApiError(400, str(error)[:500], param)
