"""``smart study serve``: serve the pages of a study over HTTP, from one process."""

import contextlib
import errno
import signal
import socket
import threading
from pathlib import Path

import click

from smart import UserError
from smart.study.folder import CONSENT, Study
from smart.study.store import Store
from smart.study.tell import tell


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``UserError`` if the address cannot be used."""
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
        raise UserError(f"--host {host} --port {port}: {reason}; choose another one") from None
    return listening


def serve(
    *,
    folder: Path,
    host: str,
    port: int,
    database: str | None,
    open_enrolment: bool,
    new_admin_token: bool,
) -> None:
    """Serve until a signal comes. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    import uvicorn

    from smart.study.app import make_app

    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(listen(host, port))
        study = Study(folder)
        if study.placeholders:
            tell(
                f"Warning: {folder / CONSENT} still has placeholders ({', '.join(study.placeholders):.200}); fill them "
                "in before anybody takes part, and start the server again"
            )
        store = Store(study, database)
        opened.callback(store.close)
        # no access log: the paths hold the participants' tokens
        config = uvicorn.Config(
            make_app(store, open_enrolment=open_enrolment), log_level="warning", access_log=False, lifespan="off",
            server_header=False, timeout_graceful_shutdown=10,
        )  # fmt: skip
        server = uvicorn.Server(config)
        if threading.current_thread() is threading.main_thread():
            # for a signal before uvicorn handles them, and for the one that it raises again after its shutdown
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda *_: setattr(server, "should_exit", True))
        token = store.admin_token(renew=new_admin_token)
        if token is not None:
            click.echo(f"admin token (shown only once): {token}")
        name, number = listening.getsockname()[:2]
        address = f"http://{f'[{name}]' if ':' in name else name}:{number}"
        click.echo(f"study:  {address}/" + ("join" if open_enrolment else ""))
        click.echo(f"admin:  {address}/admin (export, links, withdrawal)")
        server.run(sockets=[listening])
