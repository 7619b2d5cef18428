"""Serve pages over HTTP: the socket, a server that ends with a signal, and headers that keep pages to themselves."""

import errno
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import click

from smart import UserError

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-robots-tag": "noindex, nofollow",
}


def listen(host: str, port: int, *, named: str = "--host {host} --port {port}") -> socket.socket:
    """A listening socket. Raises ``UserError``, which begins with ``named``, if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1024)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"{named.format(host=host, port=port)}: {reason}; choose another one") from None
    return listening


def serve(app: Any, listening: socket.socket, announce: Callable[[str], list[str]]) -> None:
    """Serve an ASGI application until Ctrl-C or SIGTERM; open requests are finished first.

    ``announce(address)`` returns the lines to print once signals are handled.
    """
    import uvicorn

    # no access log: paths may hold secrets
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    if threading.current_thread() is threading.main_thread():
        # for a signal before uvicorn handles them, and for the one that it raises again after its shutdown
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: setattr(server, "should_exit", True))
    name, number = listening.getsockname()[:2]
    for line in announce(f"http://{f'[{name}]' if ':' in name else name}:{number}"):
        click.echo(line)
    server.run(sockets=[listening])
