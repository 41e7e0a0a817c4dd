"""Serves a page to play with a model, and the JSON behind it: routes, headers, who may ask, and errors in one line.

No answer holds a path of the machine or a traceback: what is not the asker's fault is said on the terminal alone.
"""

import contextlib
import dataclasses
import ipaddress
import json
import secrets
import socket
import threading
import traceback
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.app.commands import write_request
from utils.app.drawing import Drawn, draw
from utils.app.jobs import Job, JobCancelledError, JobQueue, QueueFullError, ServerEndsError
from utils.app.model import MAX_UPLOAD_BYTES, Served, hide_paths
from utils.app.requests import Ask, parse_json, parse_request
from utils.base.messages import UserError, one_line, warn
from utils.base.pages import hash_source, read_part, read_style

# Answers whose files can be downloaded: the newest, as many as these bounds allow.
KEPT_RESULTS = 16
KEPT_BYTES = 2**28
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_CONNECTIONS = 64
NOBODY = "nobody waits for this answer"
FAULT = "the server failed at this request; its terminal says why"


# --- The page ---


def read_page() -> tuple[str, str]:
    """Returns (the page with its style and its script inside, the policy that lets only these run)."""
    # Files of their own, to be read and edited; a browser gets one page.
    html = read_part(__file__, "app.html")
    style = read_style(__file__, "app.css")
    script = read_part(__file__, "own.js") + read_part(__file__, "app.js")
    # Only what has these hashes runs: a name that became an element could do nothing.
    policy = (
        f"default-src 'none'; style-src {hash_source(style)}; script-src {hash_source(script)}; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'"
    )
    return html.replace("/* app.css */", style).replace("/* app.js */", script), policy


# --- Who may ask ---


def is_loopback(host: str) -> bool:
    """Returns whether a server bound to this host is reached from the machine itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_strangers(headers: Headers, is_local: bool) -> str:
    """Returns why a request is refused; empty where it may pass.

    A page of another site could send its visitor's browser here. Its requests say where they come from, or are for a
    name that the site has pointed at this machine (DNS rebinding).
    """
    host = headers.get("host", "")
    if is_local and urlsplit(f"//{host}").hostname not in LOOPBACK_NAMES:
        return "this server answers to 127.0.0.1 and localhost alone"
    origin = headers.get("origin")
    if is_local and origin is not None and urlsplit(origin).netloc != host:
        return "requests of other sites are refused"
    if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
        return "requests of other sites are refused"
    return ""


class Guard:
    """ASGI application around another: refuses strangers, and gives every answer its headers."""

    def __init__(self, app: Any, is_local: bool, policy: str):
        self.app = app
        self.is_local = is_local
        # A Space shows the page in a frame.
        ancestors = "'none'" if is_local else "'self' https://huggingface.co"
        self.headers = {
            "content-security-policy": f"{policy}; frame-ancestors {ancestors}",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in self.headers.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        # A refusal has the headers of any other answer.
        if reason := refuse_strangers(Headers(scope=scope), self.is_local):
            await refuse(403, reason)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


class Answer(JSONResponse):
    """JSON in ASCII, which also writes names of files that are no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def refuse(status: int, reason: str) -> Answer:
    """Returns an answer that says in one line why there is no other."""
    return Answer({"error": hide_paths(reason)}, status_code=status)


# --- The requests ---


class Server:
    """The routes of a served model, with the queue of its requests and the answers that can still be downloaded."""

    def __init__(self, served: Served, is_local: bool = True):
        self.served = served
        self.queue = JobQueue(served.limits.queue)
        self.kept: OrderedDict[str, Drawn] = OrderedDict()
        self.plotting = threading.Lock()  # figures are drawn one at a time
        self.reading = anyio.CapacityLimiter(1)  # so are the images of requests decoded
        self.page, policy = read_page()
        self.description = served.describe()
        routes = [
            Route("/", lambda _: HTMLResponse(self.page)),
            Route("/api/model", lambda _: Answer(self.description)),
            Route("/api/results/{key}/{file}", self.download),
            Route("/api/{task}", self.ask, methods=["POST"]),
        ]
        handlers: Any = {
            HTTPException: lambda _, error: refuse(error.status_code, error.detail),
            ClientDisconnect: lambda _, error: refuse(499, NOBODY),
            Exception: lambda _, error: refuse(500, FAULT),  # uvicorn prints it
        }
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)
        self.app = Guard(starlette, is_local, policy)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.queue.close()

    async def ask(self, request: Request) -> Response:
        """Answers POST /api/sample, /api/interpolate, /api/invert and /api/inpaint."""
        # Browsers ask before they send this type to another site, and are not answered.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return refuse(415, "send JSON, with content-type application/json (curl --json)")
        # What cannot be drawn is refused before it waits.
        content = await read_body(request)
        if content is None:
            return refuse(413, f"a request holds up to {MAX_UPLOAD_BYTES >> 20} MiB; make its images smaller")
        task = request.path_params["task"]
        try:
            body = parse_json(content)
            arguments = (task, body, self.served)
            ask = await anyio.to_thread.run_sync(parse_request, *arguments, limiter=self.reading)
            job = self.queue.submit(lambda job: self.work(ask, job))
        except UserError as error:
            return refuse(422, one_line(error))
        except QueueFullError:
            return refuse(503, f"{self.queue.limit} requests are waiting already; try again in a while")
        except Exception:
            traceback.print_exc()
            return refuse(500, FAULT)

        # The job waits or runs from here on; whoever asked follows it, or waits for its end.
        if body.get("stream"):
            return StreamingResponse(self.stream(job), media_type="application/x-ndjson")
        return await self.finish(request, ask, job)

    def work(self, ask: Ask, job: Job) -> tuple[str, dict[str, Any]]:
        """Returns (the key of what was drawn, the answer); on the thread that computes."""
        start = monotonic()
        drawn = draw(self.served, ask, job)
        answer = {
            "seconds": round(monotonic() - start, 2),
            "command": write_request(self.served, ask),
            **drawn.to_json(),
        }
        return self.keep(drawn), answer

    def keep(self, drawn: Drawn) -> str:
        """Keeps what was drawn to be downloaded, and returns its key, which others cannot guess."""
        key = secrets.token_urlsafe(16)
        self.kept[key] = dataclasses.replace(drawn, film=None)  # of which no file is made
        # The oldest go first; the newest stays, whatever its size.
        while len(self.kept) > 1 and (
            len(self.kept) > KEPT_RESULTS or sum(each.num_bytes for each in self.kept.values()) > KEPT_BYTES
        ):
            self.kept.popitem(last=False)
        return key

    async def stream(self, job: Job) -> AsyncGenerator[str, None]:
        """Yields a line of JSON whenever something has changed; the last one has the images or an error."""
        updates = self.queue.follow(job)
        try:
            async for update in updates:
                if update["state"] == "finished":
                    key, answer = update["result"]
                    update = {"state": "finished", "result": key, **answer}
                yield json.dumps(update) + "\n"
        except Exception as error:
            yield json.dumps({"state": "failed", "error": hide_paths(explain(error)[1])}) + "\n"
        finally:
            await updates.aclose()  # which cancels the job of a client that has left

    async def finish(self, request: Request, ask: Ask, job: Job) -> Response:
        """Waits for a job, and answers with its images; ends it where the client has left."""
        async with contextlib.aclosing(self.queue.follow(job)) as updates:
            try:
                async for update in updates:
                    if update["state"] == "finished":
                        key, answer = update["result"]
                        if ask.format == "npz":
                            return Response(self.kept[key].to_npz(), media_type="application/octet-stream")
                        return Answer({"result": key, **answer})
                    if await request.is_disconnected():
                        break
            except Exception as error:
                return refuse(*explain(error))
        return refuse(499, NOBODY)

    async def download(self, request: Request) -> Response:
        """Answers GET /api/results/KEY/grid.png and samples.npz."""
        drawn = self.kept.get(request.path_params["key"])
        name = request.path_params["file"]
        if drawn is None or name not in ("grid.png", "samples.npz"):
            return refuse(404, f"only the last {KEPT_RESULTS} results are kept; draw this one again")

        # Made now, off the thread that answers: most results are never downloaded.
        def write() -> bytes:
            with self.plotting:
                return drawn.to_figure() if name == "grid.png" else drawn.to_npz()

        content = await anyio.to_thread.run_sync(write)
        media_type = "image/png" if name == "grid.png" else "application/octet-stream"
        return Response(
            content, media_type=media_type, headers={"content-disposition": f'attachment; filename="{name}"'}
        )


async def read_body(request: Request) -> bytes | None:
    """Returns the body of a request; None for one that is too large, of which the rest is not read."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_UPLOAD_BYTES:
            return None
    return bytes(content)


def explain(error: Exception) -> tuple[int, str]:
    """Returns (status, one line) for what went wrong in a job. Faults of the code are printed on the terminal."""
    if isinstance(error, UserError):
        return 422, one_line(error)
    if isinstance(error, ServerEndsError):
        return 503, "the server has been ended"
    if isinstance(error, JobCancelledError):
        return 499, NOBODY
    traceback.print_exception(error)
    return 500, FAULT


# --- The server ---


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens there. Raises UserError where it cannot: before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"--host={host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all") from None
    # A port that a server has just left may be taken again at once.
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        raise UserError(
            f"--port={port}: {error.strerror} on {host}; name another port, or 0 for any free one"
        ) from None
    return found


def make_server(served: Served, host: str) -> uvicorn.Server:
    """Returns a server of a model, for a socket bound to this host: `run(sockets=[...])` serves until it is stopped."""
    if not is_loopback(host):
        warn(f"--host={host}: everyone who reaches this machine can use the page; there is no password")
    pages = Server(served, is_loopback(host))
    config = uvicorn.Config(
        pages.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    # Streams end by themselves as soon as the server is to: it waits for them.
    pages.queue.should_end = lambda: server.should_exit
    return server
