"""The page as a local web server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikedecoder._hosts import LOCAL

HOST = "127.0.0.1"
_SESSIONS = 8  # tabs whose last text is kept, with all that its neurons did; the oldest is forgotten first
_SAVING = 60.0  # seconds that a training has to save what it has


class _NoUploads:
    """Refuses files: the page takes none, but Gradio would keep those that any web page sends here."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        kinds = [value for name, value in scope.get("headers", ()) if name == b"content-type"]
        if any(kind.strip().lower().startswith(b"multipart/") for kind in kinds):
            await PlainTextResponse("takes no files", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def launch(
    roots: Sequence[str | Path] = ("runs",), *, port: int = 7860, browser: bool = False, block: bool = True
) -> Any:
    """Serve the app at http://127.0.0.1:PORT, which only this machine can reach.

    roots: folders in which to look for models, or folders of models. The app puts models that it trains into
        the first, which need not exist yet.
    browser: whether to open a browser window.
    block: whether to return only when the app is stopped. Otherwise returns a handle with `close()` at once.

    Raises ValueError (a bad port, a missing folder, Gradio is not installed), OSError (the port is taken).
    """
    if not roots:
        raise ValueError("roots: got none, takes at least one folder")
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise ValueError(f"port: got {port!r}, takes 1 to 65535")
    paths = [Path(root) for root in roots]
    for path in paths[1:]:
        if not path.is_dir():
            raise ValueError(f"roots: {path}: no such folder")
    # so that nothing is sent anywhere
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError(
            "gui needs gradio, which is not installed: pip install 'spikedecoder[app]'"
        ) from None
    import matplotlib
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from spikedecoder.app.page import build, launch_style
    from spikedecoder.app.training import finish_training

    matplotlib.use("Agg")
    page = build(paths)
    page.queue(default_concurrency_limit=4)
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL), www_redirect=False),
        Middleware(_NoUploads),
    ]
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=browser,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            state_session_capacity=_SESSIONS,
            app_kwargs={"middleware": middleware},
            **launch_style(page),
        )
    except OSError as error:
        if "empty port" in str(error):  # Gradio's advice is a setting that this function does not read
            at = f"{HOST}:{port}"
            raise OSError(f"cannot listen at {at}: the port is taken; choose another --port") from None
        raise
    if block:
        print(f"spikedecoder at http://{HOST}:{port}; Ctrl-C stops", flush=True)
        try:
            page.block_thread()
        finally:
            finish_training(_SAVING)  # the interpreter cannot end while another thread computes
    return page
