"""`hfvram web`: the page on a port, and nothing else of this machine on it."""

import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

from hfvram.errors import HfvramError

HERE: Final = Path(__file__).parent
OWN: Final = ("127.0.0.1", "localhost", "::1")
"""Hosts on which nobody but the machine's own users is answered."""
MOST_BODY_BYTES: Final = 256 * 1024
CLOSED: Final = tuple(
    f"/gradio_api/{name}"
    for name in (
        "upload",
        "file",
        "proxy",
        "stream",
        "component_server",
        "deep_link",
        "reset",
        "runs",
        "vibe",
        "custom_component",
    )
)
"""Of Gradio's own paths those that read or write files, or fetch for others: the page has no use for them."""
POLICY: Final = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""Gradio's templates need inline code and eval; nothing is ever fetched from elsewhere."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def serve(host: str, port: int, *, browser: bool) -> None:
    """Serve until it is interrupted. Raises `missing_extra` without Gradio, `io` where the port can't be had."""
    public = host not in OWN
    quiet(public)
    try:
        import gradio  # noqa: F401
        import plotly  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise HfvramError("missing_extra", f"the page needs {error.name}: pip install 'hfvram[web]'") from None
    listening = listen(host, port)
    port = listening.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    print(f"hfvram: the page is at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if browser:
        import webbrowser

        threading.Timer(1.0, webbrowser.open, (address,)).start()
    config = uvicorn.Config(application(public=public), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])


def quiet(public: bool) -> None:
    """No analytics and nothing fetched from elsewhere; for strangers, not with the token of this machine either."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    if public:
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        if constants := sys.modules.get("huggingface_hub.constants"):
            constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True  # type: ignore[attr-defined]


def listen(host: str, port: int) -> socket.socket:
    """A socket on that port; any free one for 0. Raises `io`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        message = f"no page at {host}:{port}: {error.strerror or error} (--port takes another)"
        raise HfvramError("io", message) from None


def application(*, public: bool) -> Any:
    """The page as an ASGI application."""
    quiet(public)
    import gradio as gr
    from fastapi import FastAPI

    from hfvram.show.web.page import page
    from hfvram.show.web.run import Runner

    runner = Runner()
    runner.warm()
    blocks = page(runner, local_gpu=not public)
    blocks.queue(max_size=512)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        theme=gr.themes.Base(font=fonts, font_mono=("ui-monospace", "Menlo", "Consolas", "monospace")),
        css=(HERE / "page.css").read_text(),
        head=f"<script>{(HERE / 'page.js').read_text()}</script>",
        footer_links=[],
        run_history=False,
        max_file_size=1,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    return guarded(app)


def guarded(app: Any) -> Any:
    """The application without the paths that it has no use for, without large bodies, and with headers that keep it at
    home."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if scope["path"].startswith(CLOSED):
            await _refuse(send, 404)
            return
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            await _refuse(send, 413)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"same-origin"),
                ]
            await send(message)

        await app(scope, receive, with_headers)

    return guard


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"not here\n"})
