"""Chapter 13: a service that speaks the announcement's API, its engine, and a client.

``attnlab serve`` starts it in a process of its own, ``attnlab.serve.start`` beside a notebook;
``attnlab.serve.client.Client`` asks it, or the provider's.
"""

import ipaddress
import socket
import threading
import time

from attnlab.errors import ConfigError, InputError
from attnlab.loading import LanguageModel

DRAIN = 30  # seconds that answers under way have when the server is told to stop


class Server:
    """A service that listens at ``url``, over ``engine``. ``run`` serves here until told to stop, ``start`` in a thread.

    Args:
        host: loopback, or with a ``token`` any address of this machine. port: 0 takes a free one.
        token: what callers must send as ``Authorization: Bearer …``.
        engine: ``rows``, ``max_len``, ``max_waiting``, ``quantize_cache``, see ``Engine``.

    Raises ConfigError for another host without a token or for missing packages, InputError for a port that is taken,
    CapacityError where the rows' cache finds no room.
    """

    def __init__(
        self,
        lm: LanguageModel,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        **engine: int | str | None,
    ) -> None:
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
        self._socket = _listen(host, port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        self.engine = Engine(lm, **engine)
        config = uvicorn.Config(
            build_app(self.engine, token),
            log_level="warning",  # and no access log: nothing of what people ask is written down
            access_log=False,
            timeout_graceful_shutdown=DRAIN,
            limit_concurrency=1024,
        )
        self._uvicorn = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C. Answers under way are finished first."""
        self._uvicorn.run(sockets=[self._socket])

    def start(self) -> "Server":
        """Serve from a thread, until ``stop``."""
        self._thread = threading.Thread(target=self.run, name="attnlab-server", daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """End what ``start`` began, once answers under way are finished."""
        self._uvicorn.should_exit = True
        self._thread.join()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


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
        listening.listen()  # from now on callers wait instead of being refused
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port} can't be listened at ({error}): choose another --port, 0 for any") from error
    return listening
