"""The page as a local web server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


def launch(
    roots: Sequence[str | Path] = ("runs",), *, port: int = 7860, browser: bool = False, block: bool = True
) -> Any:
    """Serve the app on this machine alone, at http://127.0.0.1:PORT.

    roots: folders in which models are looked for, or models; what the app trains goes into the first.
    block: return only when it is stopped; else a handle with `close()` is returned.

    Raises ValueError (Gradio is not installed, no such folder but the first), OSError (the port is taken).
    """
    if not roots:
        raise ValueError("roots: got none, takes at least one folder")
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise ValueError(f"port: got {port!r}, takes 1 to 65535")
    paths = [Path(root) for root in roots]
    for path in paths[1:]:
        if not path.is_dir():
            raise ValueError(f"roots: {path}: no such folder")
    # nothing is sent anywhere
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError(
            "gui needs gradio, which is not installed: pip install 'spikedecoder[app]'"
        ) from None
    import matplotlib

    from spikedecoder.app.page import build, launch_style

    matplotlib.use("Agg")
    page = build(paths)
    page.queue(default_concurrency_limit=4)
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
            **launch_style(page),
        )
    except OSError as error:
        if "empty port" in str(error):  # Gradio's advice is a setting that this function does not read
            at = f"{HOST}:{port}"
            raise OSError(f"cannot listen at {at}: the port is taken; choose another --port") from None
        raise
    if block:
        print(f"spikedecoder at http://{HOST}:{port}; Ctrl-C stops", flush=True)
        page.block_thread()
    return page
