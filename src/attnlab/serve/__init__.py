"""Chapter 13: a service that speaks the announcement's API, its engine, and a client.

``attnlab serve`` starts it; ``attnlab.serve.client.Client`` asks it, or the provider's.
"""

import ipaddress
import socket
from collections.abc import Callable

from attnlab.errors import ConfigError, InputError
from attnlab.loading import LanguageModel

DRAIN = 30  # seconds that answers under way have when the server is told to stop


def serve(
    lm: LanguageModel,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    rows: int = 16,
    max_len: int = 2048,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve a model until the process is told to stop (SIGTERM, Ctrl-C); answers under way are finished first.

    Args:
        host: loopback, or with a ``token`` any address of this machine.
        port: 0 takes a free one.
        token: what callers must send as ``Authorization: Bearer …``.
        rows, max_len: see ``Engine``.
        started: called with the address once requests are taken.

    Raises ConfigError for another host without a token or for missing packages, InputError for a port that is taken, CapacityError for no room.
    """
    try:
        import uvicorn

        from attnlab.serve.app import build_app
    except ImportError as error:
        raise ConfigError(f'{error.name} is missing: pip install "attnlab[serve]"') from error
    from attnlab.serve.engine import Engine

    if not _is_loopback(host) and not token:
        raise ConfigError(f"{host} can be reached from other machines, so callers must bring a token: pass one")
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise ConfigError("a token is one or more printable ASCII characters")
    listening = _listen(host, port)
    app = build_app(Engine(lm, rows, max_len), token)

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if started is not None and self.started:
                shown = f"[{host}]" if ":" in host else host
                started(f"http://{shown}:{listening.getsockname()[1]}")

    config = uvicorn.Config(
        app,
        log_level="warning",  # and no access log: nothing of what people ask is written down
        access_log=False,
        timeout_graceful_shutdown=DRAIN,
        limit_concurrency=1024,
    )
    Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port} can't be listened at ({error}): choose another --port, 0 for any") from error
    return listening
