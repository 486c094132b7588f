"""A client for this server and for the provider's: the same wire format, another host."""

import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from attnlab.errors import AttnlabError, CapacityError, InputError

BUSY = {3040}  # the documented codes that pass by themselves


class ServiceError(AttnlabError):
    """The service answered with an error. ``codes``: what it named, ``status``: of HTTP."""

    def __init__(self, message: str, status: int, codes: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.status, self.codes = status, tuple(codes)


class Client:
    """Asks a service that speaks the announcement's API.

    Args:
        url: where it is: ``"http://127.0.0.1:8000"``, or the provider's ``"https://api.cloudflare.com"``.
        model: the id to ask for.
        account, token: who asks. The local service takes any account, and a token only if it was started with one.
        retries: how often to try again while the service says that it has no room, waiting longer each time.
        timeout: seconds without a byte until it gives up.

    >>> from attnlab.serve.client import Client
    >>> client = Client("http://127.0.0.1:8000", "companion")
    """

    def __init__(
        self,
        url: str,
        model: str,
        account: str = "local",
        token: str | None = None,
        retries: int = 5,
        timeout: float = 60.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"a service's url begins with http:// or https://; got {url!r}")
        self.path = f"{url.rstrip('/')}/client/v4/accounts/{account}/ai/run/{model}"
        self.retries = retries
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(headers=headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, prompt: str | Sequence[dict[str, str]], **fields: Any) -> dict[str, Any]:
        """The whole answer: ``{"response": ..., "usage": ...}``. ``fields``: max_tokens, temperature, seed and so on.

        Raises ServiceError for an error envelope, CapacityError while there is no room after all retries, or no service.
        """
        with self._post(self._body(prompt, fields | {"stream": False})) as reply:
            answer = _json(reply.read())
        if not isinstance(answer, dict) or not isinstance(answer.get("result"), dict):
            raise ServiceError("the service's answer has no result", reply.status_code)
        return answer["result"]

    def stream(self, prompt: str | Sequence[dict[str, str]], **fields: Any) -> Iterator[str]:
        """The answer's text, piece by piece. Leaving the loop early closes the connection, which frees the row.

        A network chunk may end within an event, an event may hold fields that mean nothing, and the last one may lack its
        blank line: events are read line by line, and of an event only ``response`` counts. Raises as ``run`` does, and
        ServiceError for a stream that ends before it says that it is complete.
        """
        with self._post(self._body(prompt, fields | {"stream": True})) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = _json(data)
                if not isinstance(event, dict):
                    continue
                if event.get("errors"):
                    raise _error(event, reply.status_code)
                if text := event.get("response"):
                    yield text
            raise ServiceError("the stream broke off before its end", reply.status_code)

    def _body(self, prompt: str | Sequence[dict[str, str]], fields: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": prompt, **fields} if isinstance(prompt, str) else {"messages": list(prompt), **fields}

    def _post(self, body: dict[str, Any]) -> "_Reply":
        return _Reply(self, body)


class _Reply:
    """One request, tried again while the service is busy; as a context, its response."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self.client, self.body = client, body

    def __enter__(self) -> httpx.Response:
        http, pause = self.client._http, 0.25
        for attempt in range(self.client.retries + 1):
            try:
                response = http.send(http.build_request("POST", self.client.path, json=self.body), stream=True)
            except httpx.TransportError as error:
                raise CapacityError(
                    f"no service answers at {self.client.path} ({type(error).__name__}: {error})"
                ) from error
            if response.status_code < 400:
                self.response = response
                return response
            try:
                error = _error(_json(response.read()), response.status_code)
            finally:
                response.close()
            if not (response.status_code == 429 and BUSY & set(error.codes)):
                raise error
            if attempt < self.client.retries:
                time.sleep(pause * random.uniform(0.5, 1.0))  # not all at the same moment
                pause *= 2
        raise CapacityError(f"the service has no room, also after {self.client.retries} more tries: {error}")

    def __exit__(self, *_: object) -> None:
        self.response.close()


def _json(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _error(answer: Any, status: int) -> ServiceError:
    errors = answer.get("errors") if isinstance(answer, dict) else None
    listed = [e for e in errors if isinstance(e, dict)] if isinstance(errors, list) else []
    words = "; ".join(str(e.get("message")) for e in listed) or f"HTTP status {status}"
    return ServiceError(words, status, [e["code"] for e in listed if isinstance(e.get("code"), int)])
