"""The service: the announcement's API, and OpenAI's form of it, over one engine."""

import asyncio
import contextlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from attnlab.errors import AttnlabError, CapacityError
from attnlab.generate import TextStream, is_chat, prompt_ids
from attnlab.sampling import Sampler
from attnlab.serve import wire
from attnlab.serve.engine import End, Engine, Job

ANNOUNCED = "@cf/mistral/mistral-7b-instruct-v0.1"  # the id in the announcement; any model may stand in for it here
MAX_BODY = 4 * 2**20  # bytes: more than any prompt within the limits takes
_PATIENCE = 16  # times that many bytes are read, before a client that sends more is cut off
_POLL = 0.2  # seconds between looks at whether the client of a whole answer is still there


@dataclass
class Answer:
    """One conversation from the service's side: text as it comes, and what it took."""

    job: Job
    pieces: asyncio.Queue
    text: TextStream
    made: int = 0
    end: End | None = None

    async def next(self) -> str | None:
        """The next piece of text, or None when the answer is complete. Raises the AttnlabError that ended it."""
        while self.end is None:
            item = await self.pieces.get()
            if isinstance(item, End):
                self.end = item
                if item.error is not None:
                    raise item.error
                if piece := self.text.finish():
                    return piece
                break
            self.made += 1
            if piece := self.text.push(item):
                return piece
        return None

    @property
    def usage(self) -> dict[str, int]:
        return wire.usage(len(self.job.ids), self.made)


@dataclass
class Service:
    """What the routes share: the engine, the names its model answers to, and the token that callers must bring."""

    engine: Engine
    token: str | None = None
    names: list[str] = field(default_factory=list)

    def check(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token is not None and not hmac.compare_digest(given.encode(), self.token.encode()):
            raise wire.wrong_token()

    def check_model(self, name: str) -> None:
        if name not in self.names:
            raise wire.no_such_model(name, self.names)

    def ask(self, request: wire.Prompt | wire.Messages | wire.ChatCompletion) -> Answer:
        """Hand a request to the engine. Raises WireError for what it can't take."""
        lm = self.engine.lm
        raw = getattr(request, "raw", False)
        if isinstance(request, wire.Prompt):
            prompt = request.prompt
        else:
            prompt = [message.model_dump() for message in request.messages]
            if (
                raw or not lm.tokenizer.is_instruct
            ):  # a base model has no template: its chat is the texts, one after another
                prompt, raw = "\n".join(message["content"] for message in prompt), True
        limit = getattr(request, "max_completion_tokens", None) or request.max_tokens or 256
        options = getattr(request, "options", None)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(item: int | End) -> None:  # from the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        try:
            ids = prompt_ids(lm, prompt, raw)
            sampler = Sampler(**wire.sampling(request), prompt_ids=ids)
            job = self.engine.submit(ids, limit, sampler, deliver, options is not None and options.rejectIfBusy)
        except CapacityError as error:
            raise wire.busy(str(error)) from error
        except AttnlabError as error:
            raise wire.invalid(str(error)) from error
        return Answer(job, pieces, TextStream(lm.tokenizer, begins=is_chat(lm, prompt, raw)))

    async def whole(self, answer: Answer, request: Request) -> str:
        """The whole text; its row is freed if the client leaves meanwhile."""
        parts: list[str] = []

        async def collect() -> None:
            while (piece := await answer.next()) is not None:
                parts.append(piece)

        work = asyncio.ensure_future(collect())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=_POLL)
                if not work.done() and await request.is_disconnected():
                    raise wire.WireError(3008, 408, "the client left before its answer was complete")
            work.result()
        except AttnlabError as error:
            raise wire.busy(str(error)) from error
        finally:
            work.cancel()
            self.engine.cancel(answer.job)
        return "".join(parts)

    async def events(
        self,
        answer: Answer,
        event: Callable[[str], dict],
        last: list[Callable[[], dict]],
        after_error: Callable[[wire.WireError], dict],
    ) -> AsyncIterator[str]:
        """Frames as the text comes, then those of ``last``; the row is freed if the client leaves."""
        try:
            while (piece := await answer.next()) is not None:
                yield wire.frame(event(piece))
                await asyncio.sleep(0)  # pieces that have gathered don't make the loop wait: let it see who has left
            for closing in last:
                yield wire.frame(closing())
            yield wire.DONE
        except AttnlabError as error:  # headers are long gone: the stream says it, and ends without [DONE]
            yield wire.frame(after_error(wire.busy(str(error))))
        finally:
            self.engine.cancel(answer.job)


def build_app(engine: Engine, token: str | None = None) -> FastAPI:
    """The service over ``engine``. ``token``: what callers must send as ``Authorization: Bearer …``; None: nothing."""
    service = Service(engine, token, list(dict.fromkeys([engine.lm.name, ANNOUNCED])))

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close, 30.0)

    app = FastAPI(title="attnlab", summary="The announcement's API on your own machine.", lifespan=lifespan)
    app.add_middleware(_Bodies, limit=MAX_BODY)
    app.state.service = service

    def respond(request: Request, error: wire.WireError) -> JSONResponse:
        body = wire.openai_failure if request.url.path.endswith("/chat/completions") else wire.failure
        return JSONResponse(body(error), error.status)

    @app.exception_handler(wire.WireError)
    async def _(request: Request, error: wire.WireError) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        try:
            service.check(request)  # who may not ask learns nothing about how to
        except wire.WireError as refused:
            return respond(request, refused)
        first = error.errors()[0]
        _, *path = first["loc"]  # the first is "body"
        if first["type"] == "json_invalid" or (first["type"] == "missing" and not path):
            return respond(request, wire.NO_JSON)
        where = ".".join(str(part) for part in path if part not in (wire.PROMPT, wire.MESSAGES)) or "body"
        return respond(request, wire.invalid(f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # a body that even the parser gave up on
            return respond(request, wire.NO_JSON)
        if error.status_code == 404:
            return respond(request, wire.WireError(7003, 404, f"Could not route to {request.url.path}"))
        answer = respond(request, wire.WireError(7001, error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})  # which methods there are
        return answer

    names = {"enum": service.names}  # for the description; what else is asked for gets the documented error

    class Chat(wire.ChatCompletion):
        model: Annotated[str, Field(json_schema_extra=names)]

    responses = {code: {"description": "an error envelope"} for code in (400, 401, 404, 405, 408, 413, 429)}
    responses[200] = {"content": {"text/event-stream": {}}, "description": "the answer; with stream, as events"}

    @app.post("/client/v4/accounts/{account}/ai/run/{model:path}", responses=responses)
    async def run(account: str, model: Annotated[str, Path(json_schema_extra=names)], request: Request, body: wire.Run):
        """The announcement's endpoint: ``prompt`` or ``messages``; with ``stream``, server-sent events."""
        service.check(request)
        service.check_model(model)
        if getattr(body, "lora", None) is not None:
            raise wire.WireError(5005, 405, "this model was not loaded with LoRA adapters")
        answer = service.ask(body)
        if not body.stream:
            text = await service.whole(answer, request)
            return wire.success(text, answer.usage)
        closing = [lambda: {"response": "", "usage": answer.usage}]
        events = service.events(answer, lambda piece: {"response": piece}, closing, wire.failure)
        return StreamingResponse(events, media_type="text/event-stream")

    @app.post("/client/v4/accounts/{account}/ai/v1/chat/completions", responses=responses)
    async def chat_completions(account: str, request: Request, body: Chat):
        """OpenAI's form, for its clients: ``base_url`` is everything before ``/chat/completions``."""
        service.check(request)
        service.check_model(body.model)
        answer = service.ask(body)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            text = await service.whole(answer, request)
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": answer.end.reason,
            }
            return {"object": "chat.completion", **about, "choices": [choice], "usage": answer.usage}

        def chunk(delta: dict, reason: str | None = None) -> dict:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return {"object": "chat.completion.chunk", **about, "choices": [choice]}

        closing = [lambda: chunk({}, answer.end.reason)]
        if body.stream_options is not None and body.stream_options.include_usage:
            closing.append(lambda: chunk({}) | {"choices": [], "usage": answer.usage})
        events = service.events(answer, lambda piece: chunk({"content": piece}), closing, wire.openai_failure)
        return StreamingResponse(events, media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict:
        """What the server is doing: the model, rows at work and in all, requests that wait."""
        state = engine.state
        return {
            "model": engine.lm.name,
            "decoding": state.decoding,
            "rows": state.rows,
            "waiting": state.waiting,
            "tokens": state.tokens,
        }

    return app


class _Bodies:
    """Refuse a body over ``limit`` bytes. A good part of what is too much is read and dropped: a client that is still
    sending when the connection closes never sees the answer.

    Every body is read as JSON, whatever its header calls it: ``curl -d`` without one calls it a form, and the provider's own
    examples do just that.
    """

    def __init__(self, app, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = scope | {"headers": [*others, (b"content-type", b"application/json")]}
        body, size, more = [], 0, True
        while more and size <= _PATIENCE * self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            more, part = message.get("more_body", False), message.get("body", b"")
            size += len(part)
            if size <= self.limit:
                body.append(part)
        if size > self.limit:
            error = wire.failure(wire.too_large(self.limit))
            return await JSONResponse(error, 413, headers={"connection": "close"})(scope, receive, send)
        whole = [{"type": "http.request", "body": b"".join(body), "more_body": False}]

        async def replayed():
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, send)
