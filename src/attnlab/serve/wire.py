"""The wire format: what a request may hold, what answers look like, and the documented error codes.

After the provider's published schema of the announcement's model and its table of errors (Cloudflare's documentation of
Workers AI: ``workers-ai-models/mistral-7b-instruct-v0.1.json``, ``platform/errors``, ``features/reject-if-busy``,
``configuration/open-ai-compatibility``). Code 10000 for a wrong token and 7003 for an unknown path are the platform's own.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, Tag

MAX_CHARACTERS = 131_072  # of a prompt, or of one message


def _a_number(value: Any) -> Any:
    if isinstance(value, str | bool):  # which would be taken for a number otherwise
        raise ValueError("a number is expected")
    return value


NUMBER = BeforeValidator(_a_number)


def _a_flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


# a documented example sends "true"
Flag = Annotated[StrictBool, BeforeValidator(_a_flag, json_schema_input_type=bool | Literal["true", "false"])]


class WireError(Exception):
    """An answer that is an error: an internal code, an HTTP status, and words."""

    def __init__(self, code: int, status: int, message: str) -> None:
        super().__init__(message)
        self.code, self.status, self.message = code, status, message


NO_JSON = WireError(3003, 400, "the request needs a body of valid JSON")


def invalid(message: str) -> WireError:
    return WireError(5004, 400, message)


def no_such_model(name: str, known: list[str]) -> WireError:
    return WireError(5007, 400, f"No such model {name}: this server runs {' and '.join(known)}")


def too_large(limit: int) -> WireError:
    return WireError(3006, 413, f"the request is larger than {limit:,} bytes")


def busy(why: str) -> WireError:
    return WireError(3040, 429, f"Capacity temporarily exceeded, please try again. ({why})")


def wrong_token() -> WireError:
    return WireError(10000, 401, "Authentication error")


class Options(BaseModel):
    model_config = ConfigDict(extra="ignore")
    rejectIfBusy: Flag = False


class _Sampling(BaseModel):
    """Fields of both forms, with the documented ranges and defaults."""

    model_config = ConfigDict(extra="ignore")  # as the provider: a field that it doesn't know does nothing
    stream: Flag = False
    raw: Flag = False
    max_tokens: Annotated[int, Field(ge=1, le=131_072), NUMBER] = 256
    temperature: Annotated[float, Field(ge=0, le=5), NUMBER] = 0.6
    top_p: Annotated[float | None, Field(ge=0, le=2), NUMBER] = None
    top_k: Annotated[int | None, Field(ge=1, le=50), NUMBER] = None
    seed: Annotated[int | None, Field(ge=1, le=9_999_999_999), NUMBER] = None
    repetition_penalty: Annotated[float | None, Field(ge=0, le=2), NUMBER] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=2), NUMBER] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=2), NUMBER] = None
    options: Options = Options()


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]


class Prompt(_Sampling):
    """One text. ``raw``: without the model's template."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    lora: str | None = None


class Messages(_Sampling):
    """A chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]


def _form(body: Any) -> str:
    chat = isinstance(body, Messages) or (isinstance(body, dict) and "messages" in body and "prompt" not in body)
    return MESSAGES if chat else PROMPT


PROMPT, MESSAGES = "a prompt", "a chat"
Run = Annotated[
    Annotated[Prompt, Tag(PROMPT)] | Annotated[Messages, Tag(MESSAGES)], Discriminator(_form)
]  # what the announcement's endpoint takes


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: Flag = False


class ChatCompletion(BaseModel):
    """OpenAI's form of the same, as far as it means something here."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=131_072), NUMBER] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=131_072), NUMBER] = None
    temperature: Annotated[float | None, Field(ge=0, le=5), NUMBER] = None
    top_p: Annotated[float | None, Field(ge=0, le=2), NUMBER] = None
    seed: Annotated[int | None, Field(ge=-(2**53), le=2**53), NUMBER] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), NUMBER] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), NUMBER] = None


def sampling(request: Prompt | Messages | ChatCompletion) -> dict[str, Any]:
    """The fields that say how to choose, in ``Sampler``'s terms. A top_p or repetition_penalty of 0 means "not set"."""
    temperature = request.temperature if request.temperature is not None else 0.6
    return {
        "temperature": temperature,
        "top_p": min(request.top_p or 1.0, 1.0),
        "top_k": getattr(request, "top_k", None),
        "repetition_penalty": getattr(request, "repetition_penalty", None) or 1.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "presence_penalty": request.presence_penalty or 0.0,
        "seed": request.seed,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def success(response: str, counted: dict[str, int]) -> dict:
    return {"result": {"response": response, "usage": counted}, "success": True, "errors": [], "messages": []}


def failure(error: WireError) -> dict:
    return {
        "result": None,
        "success": False,
        "errors": [{"code": error.code, "message": error.message}],
        "messages": [],
    }


def openai_failure(error: WireError) -> dict:
    return {
        "error": {"message": error.message, "type": "invalid_request_error", "param": None, "code": str(error.code)}
    }


def frame(event: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
