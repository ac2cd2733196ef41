"""The connection to Redis or Valkey: the library, the Lua scripts, the translation of errors, and a class for it all.

The broker runs one script at a time, by its own clock.
Each script is a file lua/NAME.lua. Its first comments state its arguments (ARGV) and its result.
A first line ``#!lua`` states how the broker runs the script when its memory is full:

- ``#!lua flags=allow-oom``: always. The script ends jobs, removes records, or adds little.
- ``#!lua flags=no-writes``: always. The script only reads. A full broker refuses reads inside MULTI.
- ``#!lua``: never. The broker refuses the script before it changes anything.
- no such line: until the first command that needs memory.

So a full broker refuses new jobs only. Its jobs can still be listed, run, ended and removed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.net.broker_url import Sentinels, redis_url, sentinels, shown

# redis is imported without its metrics, which the worker does not use. They need OpenTelemetry's SDK. If it is
# installed, its import takes 60 ms of CPU time and 3 MiB in each process.
_METRICS = "opentelemetry.sdk.metrics"
_hidden = "redis" not in sys.modules and _METRICS not in sys.modules
if _hidden:
    # The import of such a module fails. redis expects that.
    sys.modules[_METRICS] = None  # type: ignore[assignment]
try:
    import redis as redis
finally:
    if _hidden:
        del sys.modules[_METRICS]

#: Seconds to connect. A submit must fail at once while the broker is down.
_CONNECT_S = 3.0
#: The last part of the path of the embedded broker's socket.
EMBEDDED = "/broker/valkey.sock"
#: Seconds to wait for one answer. A script takes less than a millisecond, so a broker that is slower is away.
_ANSWER_S = 5.0
#: The most connections of one client. Other threads wait for a free one. A management server sends a hundred commands
#: at once, and opening a connection takes longer than a command.
_MAX_CONNECTIONS = 8
#: The line of a script that names its parts, in their order. Each part is a file lua/include/NAME.lua.
_INCLUDE = re.compile(r"^-- include: (.+)\n", re.MULTILINE)


def connect(url: str) -> redis.Redis:
    """Return a client that is not connected yet and is safe to share between threads.

    A client of Sentinels follows the master. Each command is repeated once: after a restart of the broker, the first
    command uses a dead connection of the pool.
    """
    given: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",  # a record with other bytes must not hide all others
        "socket_connect_timeout": _CONNECT_S,
        "socket_timeout": _ANSWER_S,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 1),
        "health_check_interval": 25,
    }
    if found := sentinels(url):
        return _connect_master(found, given)
    if urlsplit(url).scheme not in ("unix", "redis+socket"):
        given["socket_keepalive"] = True
    pool = redis.BlockingConnectionPool.from_url(
        redis_url(url), max_connections=_MAX_CONNECTIONS, timeout=_ANSWER_S, **given
    )
    return redis.Redis.from_pool(pool)


def _connect_master(found: Sentinels, given: dict[str, Any]) -> redis.Redis:
    """Return a client of the server that is the master when it connects.

    If a demoted master refuses a command, the client drops that connection.
    """
    given |= {"socket_keepalive": True, "db": found.db, "username": found.user, "password": found.password}
    sentinel_options = found.sentinel_options | {"socket_connect_timeout": _CONNECT_S, "socket_timeout": _CONNECT_S}
    tls = {"ssl": True, **found.ssl} if found.tls else {}
    manager = redis.sentinel.Sentinel(found.hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
    client: redis.Redis = manager.master_for(found.master, **given, **tls)  # type: ignore[no-untyped-call]
    return client


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raise Redis errors of the block as StoreUnavailable or StoreDenied, without the broker's password."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        what, remedy = (
            f"The broker refuses the password: {error}",
            "Correct user and password in broker.url, or in the file of broker.url_file",
        )
        if isinstance(error, redis.exceptions.NoPermissionError):
            what, remedy = f"The broker's ACL refuses the worker's user: {error}", "Correct the ACL of this user"
        if "HELLO must be called" in str(error):  # the answer of Redis and Valkey to a client without a password
            what, remedy = (
                "The broker wants a password",
                "Add it to broker.url, or to the file of broker.url_file: redis://:PASSWORD@HOST:PORT/DB",
            )
        raise StoreDenied(what, shown(url), remedy) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        remedy = "Check broker.url, and that Redis or Valkey runs there"
        if urlsplit(url).path.endswith(EMBEDDED):
            remedy = "Start `ssvm worker`: it runs the embedded broker"
        raise StoreUnavailable(f"The broker cannot be reached: {error}", shown(url), remedy) from error
    except redis.RedisError as error:
        raise StoreUnavailable(f"The broker reports an error: {error}", shown(url), "See its log") from error


@cache
def load_script(name: str) -> str:
    """Return the text of lua/NAME.lua. The line ``-- include: PART …`` is replaced by the texts of these parts."""
    folder = files(__package__) / "lua"

    def parts(found: re.Match[str]) -> str:
        return "".join((folder / "include" / f"{part}.lua").read_text() for part in found[1].split())

    return _INCLUDE.sub(parts, (folder / f"{name}.lua").read_text())


class BrokerClient:
    """One subject of the ledger: its keys, scripts and connection. Safe to share between threads.

    Methods raise StoreUnavailable while the broker is away. They raise StoreDenied if it refuses the worker.
    """

    #: The beginning of the keys of the class, after the prefix of the installation.
    _NAME: ClassVar[str]
    #: The scripts that the methods run.
    _SCRIPTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._key = prefix + self._NAME
        self._redis = connect(url)
        # redis-py runs a script by its digest where the broker knows it.
        self._scripts: dict[str, Any] = {name: self._redis.register_script(load_script(name)) for name in self._SCRIPTS}

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, name: str, *args: object) -> Any:
        """Run a script. Its first argument is the beginning of the keys."""
        with translated(self._url):
            return self._scripts[name](args=[self._key, *map(str, args)])

    def _run_all(self, name: str, given: Sequence[Sequence[str]]) -> list[Any]:
        """Run a script once for each list of arguments, with one request to the broker. It must be safe to repeat.

        redis-py would ask before each such request whether the broker knows the script.
        """
        script = self._scripts[name]

        def send() -> list[Any]:
            with self._redis.pipeline(transaction=False) as pipe:
                for each in given:
                    pipe.evalsha(script.sha, 0, self._key, *each)
                return pipe.execute()

        with translated(self._url):
            try:
                return send()
            except redis.exceptions.NoScriptError:
                self._redis.script_load(script.script)
                return send()
