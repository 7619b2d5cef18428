"""Where ratings are kept: SQLite in WAL mode, or PostgreSQL.

A participant is a row, found by the hash of the token in their link. A rating is keyed by (participant, position), so
it cannot be stored twice; it is acknowledged after its transaction is on the disk (``synchronous=FULL``). The first
rating of a position is the one that counts.

Positions count from 1; practice items have the positions ..., -1, 0 before them.
"""

import hashlib
import hmac
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from smart import UserError
from smart.study.eraser import Eraser
from smart.study.folder import Study

FORMAT = "1"
FILE = "ratings.sqlite"
ERASING = "erasing"  # a withdrawal, by its number, that may still be in SQLite's log

TABLES = sa.MetaData()
META = sa.Table(
    "meta", TABLES, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
PARTICIPANTS = sa.Table(
    "participants",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token_hash", sa.Text, nullable=False, unique=True),
    sa.Column("slot", sa.Integer, unique=True),  # number of the order; assigned with the first consent
    sa.Column("version", sa.Text),  # of the consent text
    sa.Column("consented", sa.Text),  # when, UTC
    sa.Column("headphones", sa.Text),  # answer to the headphone check
    sa.Column("finished", sa.Text),
    sa.Column("code", sa.Text),
    sqlite_autoincrement=True,  # the number of a participant who withdrew is not used again
)


def participant_column() -> sa.Column[int]:
    return sa.Column("participant", sa.Integer, sa.ForeignKey("participants.id"), primary_key=True)


TRIALS = sa.Table(
    "trials",
    TABLES,
    participant_column(),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("excerpt", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("served", sa.Float),  # when its audio was first sent, seconds since the epoch
)
RATINGS = sa.Table(
    "ratings",
    TABLES,
    participant_column(),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("rating", sa.Integer, nullable=False),
    sa.Column("client_id", sa.Text, nullable=False),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("play_count", sa.Integer, nullable=False),
    sa.Column("listened_s", sa.Float, nullable=False),
    sa.Column("response_ms", sa.Integer, nullable=False),
    sa.Column("user_agent", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("stored", sa.Float, nullable=False),  # seconds since the epoch
    sa.CheckConstraint("rating BETWEEN 1 AND 10"),
)


class Answer(NamedTuple):
    """What a browser sends about one trial. ``client_id`` names the answer, ``session`` the browser tab.

    ``play_count``: how often playback began; ``listened_s``: seconds played in total; ``response_ms``: from when the
    excerpt could first be rated to the answer.
    """

    position: int
    rating: int
    client_id: str
    session: str
    play_count: int
    listened_s: float
    response_ms: int


class Refused(Exception):
    """An answer that cannot be stored, with the reason; ``later``: it may be accepted after a while."""

    def __init__(self, reason: str, *, later: bool = False) -> None:
        super().__init__(reason)
        self.later = later


def hashed(token: str) -> str:
    """The stored form of a token. Tokens are 192 random bits, so a plain hash is safe from guessing."""
    return hashlib.sha256(token.encode()).hexdigest()


def now() -> float:
    return datetime.now(UTC).timestamp()


def iso(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def connect(study: Study, url: str | None) -> Engine:
    """An engine for ``url``, or for the study's own SQLite file. Raises ``UserError`` if it cannot be reached."""
    try:
        # the path of the study's own file is not parsed as a URL: it may contain a "?" or a "%"
        own = sa.URL.create("sqlite", database=str((study.folder / FILE).absolute()))
        parsed = sa.make_url(url) if url else own
    except (sa.exc.ArgumentError, ValueError):  # ValueError: a port that is not a number
        raise UserError("--database: is not a URL (expected postgresql://USER@HOST/NAME)") from None
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise UserError(f"--database {kind}://...: expected a sqlite or a postgresql URL")
    if kind == "postgresql":
        engine = sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=10, max_overflow=10,
            connect_args={"connect_timeout": 10},
        )  # fmt: skip
    else:
        path = Path(parsed.database or "")
        if not path.is_file():
            try:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise UserError(f"--database {path}: cannot be written ({error.strerror})") from None
        engine = sa.create_engine(parsed, connect_args={"timeout": 30}, pool_size=10, max_overflow=30)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    try:
        TABLES.create_all(engine)
    except sa.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise UserError(f"--database {parsed.render_as_string()}: cannot be used ({reason})") from None
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # this module starts transactions itself
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer waits for others when it begins, instead of failing in the middle."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


class Store:
    """The ratings of one study. It may be used from any thread."""

    def __init__(self, study: Study, url: str | None = None) -> None:
        self.study = study
        self.engine = connect(study, url)
        self.reader = self.engine.execution_options(reads=True)
        # when a sound was first sent and an answer stored, by the clock that is never set back
        self._heard: dict[tuple[int, int], float] = {}
        self._stored: dict[int, float] = {}
        self._lock = threading.Lock()
        own = self.engine.url.database if self.engine.dialect.name == "sqlite" else None
        self._eraser = Eraser(own, self._erasing, self._erased) if own else None
        with self.engine.begin() as database:
            for key, expected in (("format", FORMAT), ("study", study.design.study)):
                found = self.get(database, key)
                if found is None:
                    database.execute(META.insert().values(key=key, value=expected))
                elif found != expected:
                    self.close()
                    raise UserError(f"the database holds another study's ratings ({key} {found}); choose another one")
        if self._eraser is not None:
            self._eraser.start()  # what an earlier process could not finish

    def close(self) -> None:
        if self._eraser is not None:
            self._eraser.close()
        self.engine.dispose()

    def _erasing(self) -> str:
        with self.reader.connect() as database:
            return self.get(database, ERASING) or ""

    def _erased(self, withdrawal: str) -> None:
        with self.engine.begin() as database:  # a later withdrawal stays
            database.execute(META.delete().where((META.c.key == ERASING) & (META.c.value == withdrawal)))

    def is_erased(self) -> bool:
        """Whether nothing of a participant who withdrew is left in SQLite's log."""
        return not self._erasing()

    # --- Administration

    def get(self, database: Connection, key: str) -> str | None:
        value: str | None = database.execute(sa.select(META.c.value).where(META.c.key == key)).scalar()
        return value

    def admin_token(self, *, renew: bool = False) -> str | None:
        """A new token if there is none yet or with ``renew``, else None; only its hash is stored."""
        with self.engine.begin() as database:
            if self.get(database, "admin") is not None:
                if not renew:
                    return None
                database.execute(META.delete().where(META.c.key == "admin"))
            token = secrets.token_urlsafe(24)
            database.execute(META.insert().values(key="admin", value=hashed(token)))
            return token

    def is_admin(self, token: str) -> bool:
        with self.reader.connect() as database:
            expected = self.get(database, "admin")
        return expected is not None and hmac.compare_digest(expected, hashed(token))

    def invite(self, count: int) -> list[str]:
        """Add ``count`` participants and return their tokens."""
        tokens = [secrets.token_urlsafe(24) for _ in range(count)]
        with self.engine.begin() as database:
            database.execute(PARTICIPANTS.insert(), [{"token_hash": hashed(token)} for token in tokens])
        return tokens

    def overview(self) -> list[RowMapping]:
        """A row for each participant who has consented: id, consented, headphones, finished, code, rated."""
        rated = sa.func.count(RATINGS.c.position)
        query = (
            sa.select(PARTICIPANTS, rated.label("rated"))
            .outerjoin(RATINGS, (RATINGS.c.participant == PARTICIPANTS.c.id) & (RATINGS.c.position > 0))
            .where(PARTICIPANTS.c.slot.is_not(None))
            .group_by(PARTICIPANTS.c.id)
            .order_by(PARTICIPANTS.c.id)
        )
        with self.reader.connect() as database:
            return list(database.execute(query).mappings())

    def withdrawals(self) -> int:
        with self.reader.connect() as database:
            return int(self.get(database, "withdrawn") or 0)

    # --- One participant

    def find(self, token: str) -> RowMapping | None:
        with self.reader.connect() as database:
            query = sa.select(PARTICIPANTS).where(PARTICIPANTS.c.token_hash == hashed(token))
            return database.execute(query).mappings().first()

    def consent(self, participant: int, version: str) -> None:
        """Record the consent; the first one also assigns the order: the lowest free slot."""
        with self._writing(participant) as database:
            mine = PARTICIPANTS.c.id == participant
            other = PARTICIPANTS.c.version.is_distinct_from(version)  # a form sent twice does not change the time
            database.execute(PARTICIPANTS.update().where(mine & other).values(version=version, consented=iso(now())))
            if database.execute(sa.select(PARTICIPANTS.c.slot).where(mine)).scalar() is not None:
                return
            self._lock_slots(database)
            held = database.execute(sa.select(PARTICIPANTS.c.slot).where(PARTICIPANTS.c.slot.is_not(None)))
            taken = set(held.scalars())
            slot = next(number for number in range(len(taken) + 1) if number not in taken)
            database.execute(PARTICIPANTS.update().where(mine).values(slot=slot))
            first = 1 - self.study.design.practice
            rows = [
                {"participant": participant, "position": first + place, "excerpt": trial.excerpt, "kind": trial.kind}
                for place, trial in enumerate(self.study.trials(slot))
            ]
            database.execute(TRIALS.insert(), rows)

    def checked(self, participant: int, answer: str) -> None:
        """Record the answer to the headphone check; the first answer stays."""
        with self._writing(participant) as database:
            mine = (PARTICIPANTS.c.id == participant) & PARTICIPANTS.c.headphones.is_(None)
            database.execute(PARTICIPANTS.update().where(mine).values(headphones=answer))

    def next_position(self, participant: int) -> int | None:
        """The first position without a rating; None if all have one."""
        with self.reader.connect() as database:
            return self._next(database, participant)

    def serve(self, participant: int, position: int) -> str | None:
        """The excerpt at a position, recording when it is first sent; None if it may not be heard yet.

        The excerpt after the current one may be fetched ahead, so that it is ready when it is needed.
        """
        here = (TRIALS.c.participant == participant) & (TRIALS.c.position == position)
        with self.reader.connect() as database:
            trial = database.execute(sa.select(TRIALS.c.excerpt, TRIALS.c.served).where(here)).first()
            following = self._next(database, participant)
        if trial is None or (following is not None and position > following + 1):
            return None
        if following is not None and position >= following:
            with self._lock:
                self._heard.setdefault((participant, position), time.monotonic())
        if trial.served is None:
            with self._writing(participant) as database:
                database.execute(TRIALS.update().where(here & TRIALS.c.served.is_(None)).values(served=now()))
        return str(trial.excerpt)

    def rate(self, participant: int, answer: Answer, user_agent: str, version: str) -> int:
        """Store an answer and return the rating that counts: this one, or an earlier one of the same position.

        Raises ``Refused`` if it is another position's turn, or if the excerpt cannot have been heard: it was not sent,
        it was sent too recently, or the previous excerpt was rated too recently. That is measured by a clock that is
        never set back; only for what happened before the server was started does the time of day count, and a time in
        the future then tells nothing.
        """
        with self._writing(participant) as database:
            here = (RATINGS.c.participant == participant) & (RATINGS.c.position == answer.position)
            stored = database.execute(sa.select(RATINGS.c.rating).where(here)).scalar()
            if stored is not None:
                return int(stored)
            if answer.position != self._next(database, participant):
                raise Refused("it is not this excerpt's turn")
            instant, seconds = now(), self.study.design.seconds
            trial = (TRIALS.c.participant == participant) & (TRIALS.c.position == answer.position)
            served = database.execute(sa.select(TRIALS.c.served).where(trial)).scalar()
            if served is None or answer.listened_s < 0.95 * seconds or answer.play_count < 1:
                raise Refused("the excerpt has not been heard to the end")
            latest = sa.select(sa.func.max(RATINGS.c.stored)).where(RATINGS.c.participant == participant)
            before = float(database.execute(latest).scalar() or 0.0)
            if self._since(participant, answer.position, instant, float(served), before) < 0.9 * seconds:
                raise Refused("the excerpt cannot have been heard yet", later=True)
            row = answer._asdict() | {"participant": participant, "user_agent": user_agent, "version": version}
            database.execute(RATINGS.insert().values(stored=instant, **row))
            if self._next(database, participant) is None:
                code = secrets.token_hex(4).upper() if self.study.design.completion_code else None
                done = PARTICIPANTS.update().where(PARTICIPANTS.c.id == participant)
                database.execute(done.values(finished=iso(instant), code=code))
        with self._lock:
            self._stored[participant] = time.monotonic()
            self._heard.pop((participant, answer.position), None)
        return answer.rating

    def _since(self, participant: int, position: int, instant: float, served: float, before: float) -> float:
        """Seconds since the excerpt was first sent and the previous answer stored, whichever is later."""
        clock = time.monotonic()
        with self._lock:
            known = (self._heard.get((participant, position)), served), (self._stored.get(participant), before)
        passed = [clock - mark if mark is not None else instant - day for mark, day in known]
        return min((each for each in passed if each >= 0), default=math.inf)

    def withdraw(self, participant: int) -> bool:
        """Delete a participant and everything stored about them; only the number of withdrawals is kept.

        Returns whether nothing is left in SQLite's log either; if not, the log is emptied in the background.
        """
        with self._writing(participant) as database:
            for table in (RATINGS, TRIALS):
                database.execute(table.delete().where(table.c.participant == participant))
            database.execute(PARTICIPANTS.delete().where(PARTICIPANTS.c.id == participant))
            self._lock_slots(database)
            count = int(self.get(database, "withdrawn") or 0) + 1
            database.execute(META.delete().where(META.c.key == "withdrawn"))
            database.execute(META.insert().values(key="withdrawn", value=str(count)))
            if self._eraser is not None:
                database.execute(META.delete().where(META.c.key == ERASING))
                database.execute(META.insert().values(key=ERASING, value=str(count)))
        with self._lock:
            self._stored.pop(participant, None)
            self._heard = {key: mark for key, mark in self._heard.items() if key[0] != participant}
        return self._eraser is None or self._eraser.start()

    def rows(self) -> Iterator[RowMapping]:
        """All ratings except practice, each with its excerpt and kind, by participant and position."""
        query = (
            sa.select(RATINGS, TRIALS.c.excerpt, TRIALS.c.kind)
            .join(TRIALS, (TRIALS.c.participant == RATINGS.c.participant) & (TRIALS.c.position == RATINGS.c.position))
            .where(RATINGS.c.position > 0)
            .order_by(RATINGS.c.participant, RATINGS.c.position)
        )
        with self.reader.connect() as database:
            yield from database.execute(query).mappings()

    def _next(self, database: Connection, participant: int) -> int | None:
        rated = sa.exists().where(
            (RATINGS.c.participant == TRIALS.c.participant) & (RATINGS.c.position == TRIALS.c.position)
        )
        query = sa.select(sa.func.min(TRIALS.c.position)).where((TRIALS.c.participant == participant) & ~rated)
        position: int | None = database.execute(query).scalar()
        return position

    @contextmanager
    def _writing(self, participant: int) -> Iterator[Connection]:
        """A transaction in which no other one writes for this participant. (SQLite has one writer at a time anyway.)"""
        with self.engine.begin() as database:
            mine = sa.select(PARTICIPANTS.c.id).where(PARTICIPANTS.c.id == participant).with_for_update()
            if database.execute(mine).scalar() is None:
                raise Refused("this participant has withdrawn")
            yield database

    def _lock_slots(self, database: Connection) -> None:
        """Until the transaction ends, no other one assigns or frees a slot."""
        database.execute(sa.select(META.c.key).where(META.c.key == "study").with_for_update())
