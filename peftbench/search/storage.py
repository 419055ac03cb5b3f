"""Where studies are kept, and the lock under which trials are asked for."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from peftbench.errors import UserError
from peftbench.search import FOLDER

OWN = {"sqlite": "study.db", "journal": "journal.log"}
"""Storages that are files of the results folder."""
TABLE_PAUSES = (0.3, 1.0, 2.0)
"""Seconds between attempts to make a database's tables."""


def described(storage: str, folder: Path) -> str:
    """Return where studies are, as `optuna-dashboard` and `optuna.load_study` take it; no password is shown."""
    if storage == "sqlite":
        return f"sqlite:///{folder / FOLDER / OWN[storage]}"
    if storage == "journal":
        return str(folder / FOLDER / OWN[storage])
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", storage)


def check_reachable(url: str, folder: Path) -> None:
    """Raise UserError unless the database of a URL answers; nothing is written to it."""
    with _told(url, folder), sqlalchemy.create_engine(_with_driver(url), poolclass=NullPool).connect():
        pass


def open_storage(storage: str, folder: Path) -> BaseStorage:
    """Open what `search.storage` names.

    Raises:
        UserError: a driver is missing, or nobody answers.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with _told(storage, folder):
        if storage in OWN:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        if storage == "journal":
            return JournalStorage(JournalFileBackend(str(folder / FOLDER / OWN[storage])))
        url = _with_driver(described(storage, folder) if storage == "sqlite" else storage)
        # workers wait for each other's writes
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        for pause in TABLE_PAUSES:
            with contextlib.suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
                return RDBStorage(url, engine_kwargs=options)
            time.sleep(pause)  # machines may have begun to make the tables of a new database at the same time
        return RDBStorage(url, engine_kwargs=options)


@contextlib.contextmanager
def _told(storage: str, folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a storage into UserError."""
    try:
        yield
    except ImportError as error:
        hint = "; pip install 'peftbench[postgres]'" if storage.startswith("postgres") else ""
        reason = str(error).splitlines()[0]
        raise UserError(f"search.storage={described(storage, folder)}: {reason}{hint}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"search.storage={described(storage, folder)}: cannot be opened ({reason})") from error


def _with_driver(url: str) -> str:
    """Name psycopg as the driver where a URL names none, and only that is installed."""
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        newer = importlib.util.find_spec("psycopg") is not None and importlib.util.find_spec("psycopg2") is None
        return f"postgresql{'+psycopg' if newer else ''}://{rest}"
    return url


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the search's other processes that share `folder` out; they see each other's trials whole."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(folder / FOLDER / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
