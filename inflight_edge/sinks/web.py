"""The live page: what the pipeline sees and says, in a browser; a sink with a small HTTP server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import secrets
import threading
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from inflight_edge._optional import require
from inflight_edge.errors import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks._live import LiveView
from inflight_edge.uri import Uri

__all__ = ["WebSink", "from_address"]

_LOG = logging.getLogger(__name__)
_PAGE = {"": "index.html", "app.js": "app.js", "app.css": "app.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_COOKIE = "inflight_edge_token"
_TOKEN = "INFLIGHT_EDGE_WEB_TOKEN"
# Seconds between two messages to a browser, and how long the server may take to start or stop.
_PERIOD, _PATIENCE = 0.25, 10.0
# A connection without a request is closed then: idle ones would use up this process's files.
_IDLE_S = 15.0
# Browsers that may watch at a time: each costs the device time.
MAX_VIEWERS = 16


class WebSink:
    """Serves the live page; keeps what it shows in bounded memory.

    address  HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080; port 0 takes a free one.
    token    asked of every browser.  None: none is asked on a loopback address; on any other one a random token is
             made and logged once, with the address to open.

    url      what to open, once the sink is open.
    Only requests whose Host is the address are answered, so that no other web page can read along by its own name for
    a loopback address.  Raises OptionError for a bad address or token.
    """

    name = "web"

    def __init__(self, address: str, *, token: str | None = None) -> None:
        self._host, self._port = _split(address)
        self._loopback = _is_loopback(self._host)
        if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
            raise OptionError("token: expected at least 16 printable ASCII characters, got fewer or others")
        self._token = token if token is not None or self._loopback else secrets.token_urlsafe(24)
        self._made_token = token is None and self._token is not None
        self.url = ""
        self._view: LiveView | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._viewers = 0

    def open(self, context: Context) -> None:
        """Start the server in a thread of its own.  Raises SinkError when the address cannot be bound."""
        web = require("aiohttp.web", "pip install 'inflight-edge[web]'")
        require("PIL.Image", "pip install 'inflight-edge[camera]'")
        self._view = LiveView(context)
        started = threading.Event()
        problems: list[Exception] = []

        def serve() -> None:
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(self._serve(web, started))
            except Exception as error:  # noqa: BLE001 - a thread's exception would be lost: open() or the log says it
                _LOG.error("web: the live page's server failed: %s", error)
                problems.append(error)
            finally:
                loop.close()
                started.set()

        self._thread = threading.Thread(target=serve, name="web", daemon=True)
        self._thread.start()
        if not started.wait(_PATIENCE) or problems:
            reason = problems[0] if problems else f"no answer in {_PATIENCE:g} s"
            raise SinkError(f"web: {self._host}:{self._port}: cannot be served: {reason}; choose another port")
        if self._made_token:  # a warning, so that it is seen in a quiet log too: without it nobody gets in
            _LOG.warning("live page, with a token made for this run: %s?token=%s", self.url, self._token)
        else:
            _LOG.info("live page: %s", self.url)

    def write(self, outcome: Outcome) -> None:
        """Keep the outcome for the browsers.  Never waits for one."""
        if self._view is None:
            raise SinkError("web: not open; call open first")
        self._view.add(outcome)

    def flush(self) -> None:
        """Nothing is kept that could be handed on."""

    def close(self) -> None:
        """Stop the server."""
        loop, stop, thread = self._loop, self._stop, self._thread
        self._thread = None
        if thread is None:
            return
        if loop is not None and stop is not None and thread.is_alive():
            try:
                loop.call_soon_threadsafe(stop.set)
            except RuntimeError:  # the loop was closed between the two lines: it is what was wanted
                _LOG.debug("web: the server had stopped already")
        thread.join(_PATIENCE)
        self._view = None  # after the last request
        if thread.is_alive():
            raise SinkError(f"web: the server did not stop in {_PATIENCE:g} s")

    async def _serve(self, web: Any, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        @web.middleware  # type: ignore[untyped-decorator]  # aiohttp is imported on demand
        async def guard(request: Any, handler: Any) -> Any:
            return await self._guard(request, handler)

        application = web.Application(middlewares=[guard], client_max_size=1024)
        application.add_routes(
            [
                web.get("/", self._page),
                web.get("/{name:app\\.(?:js|css)}", self._page),
                web.get("/events", self._events),
                web.get("/frame/{camera}", self._frame),
                web.get("/flagged/{number:\\d{1,18}}", self._flagged),
            ]
        )
        runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=1.0, handler_cancellation=True, keepalive_timeout=_IDLE_S
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host, self._port)
            await site.start()
            self._port = runner.addresses[0][1]
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.url = f"http://{host}:{self._port}/"
            started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _guard(self, request: Any, handler: Any) -> Any:
        """Host, then token, then the request; the headers of every answer."""
        web = require("aiohttp.web", "")
        try:
            if not self._known_host(request.headers.get("Host", "")):
                raise web.HTTPForbidden(text="unknown host; open the page by the address it was started with\n")
            if self._token is not None and not self._allowed(request):
                raise web.HTTPUnauthorized(text="token missing or wrong; add ?token=... to the address\n")
            if "token" in request.query:  # out of the address bar, into a cookie
                answer = web.HTTPSeeOther(request.path)
                answer.set_cookie(_COOKIE, request.query["token"], httponly=True, samesite="Strict", path="/")
                raise answer
            answer = await handler(request)
        except web.HTTPException as error:
            error.headers.update(_HEADERS)
            raise
        if not answer.prepared:
            answer.headers.update(_HEADERS)
        return answer

    def _known_host(self, given: str) -> bool:
        if not self._loopback:
            return True  # reached by names that this machine need not know; the token protects
        try:
            name = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            return False
        return name == "localhost" or _is_loopback(name)

    def _allowed(self, request: Any) -> bool:
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        offered = (request.query.get("token"), request.cookies.get(_COOKIE), header)
        wanted = (self._token or "").encode()
        return any(hmac.compare_digest(text.encode("utf-8", "surrogateescape"), wanted) for text in offered if text)

    async def _page(self, request: Any) -> Any:
        web = require("aiohttp.web", "")
        name = _PAGE[request.match_info.get("name", "")]
        body = files("inflight_edge.sinks").joinpath("page").joinpath(name).read_bytes()
        return web.Response(body=body, content_type=_TYPES[name.rpartition(".")[2]], charset="utf-8")

    async def _events(self, request: Any) -> Any:
        """Server-sent events: what is new, four times a second.  A slow browser gets fewer, never older ones."""
        web = require("aiohttp.web", "")
        view, stop = self._view, self._stop
        assert view is not None and stop is not None  # noqa: PT018
        if self._viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} browsers watch already\n")
        answer = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        self._viewers += 1
        try:
            await answer.prepare(request)
            cursor = 0
            while not stop.is_set():
                message, cursor = view.news(cursor)
                await answer.write(f"data: {json.dumps(message, allow_nan=False)}\n\n".encode())
                try:
                    await asyncio.wait_for(stop.wait(), _PERIOD)
                except asyncio.TimeoutError:
                    continue
        except (ConnectionResetError, ConnectionAbortedError):
            _LOG.debug("web: a browser has gone")
        finally:
            self._viewers -= 1
        return answer

    async def _frame(self, request: Any) -> Any:
        view = self._view
        assert view is not None
        camera = request.match_info["camera"]
        return self._picture(await asyncio.get_running_loop().run_in_executor(None, view.latest, camera))

    async def _flagged(self, request: Any) -> Any:
        assert self._view is not None
        return self._picture(self._view.flagged_picture(int(request.match_info["number"])))

    def _picture(self, data: bytes | None) -> Any:
        web = require("aiohttp.web", "")
        if data is None:
            raise web.HTTPNotFound(text="no such picture\n")
        return web.Response(body=data, content_type="image/jpeg")


def from_address(address: Uri) -> WebSink:
    """``web:HOST:PORT``; a token of the owner's in the environment, INFLIGHT_EDGE_WEB_TOKEN.  Raises OptionError."""
    address.finish()
    return WebSink(address.rest.removeprefix("//"), token=os.environ.get(_TOKEN) or None)


def _split(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.netloc != address or parts.username is not None:
        raise OptionError(f"web address: expected HOST:PORT such as 127.0.0.1:8080, got {address!r}")
    return host, port


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
