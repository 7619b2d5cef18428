"""``smart study serve``: serve the pages of a study over HTTP, from one process."""

import contextlib
from pathlib import Path

from smart import web
from smart.study.folder import CONSENT, Study
from smart.study.store import Store
from smart.study.tell import tell


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
    from smart.study.app import make_app

    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(web.listen(host, port))
        study = Study(folder)
        if study.placeholders:
            tell(
                f"Warning: {folder / CONSENT} still has placeholders ({', '.join(study.placeholders):.200}); fill them "
                "in before anybody takes part, and start the server again"
            )
        store = Store(study, database)
        opened.callback(store.close)

        def announce(address: str) -> list[str]:
            token = store.admin_token(renew=new_admin_token)
            return [
                *([] if token is None else [f"admin token (shown only once): {token}"]),
                f"study:  {address}/" + ("join" if open_enrolment else ""),
                f"admin:  {address}/admin (export, links, withdrawal)",
            ]

        web.serve(make_app(store, open_enrolment=open_enrolment), listening, announce)
