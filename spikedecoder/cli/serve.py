"""`spikedecoder serve`: a model over HTTP."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            "-c",
            help="A model's folder, a run's folder (its best model), or a name on the hub.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its folder's name.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more get status 429.")] = 64,
    max_tokens_limit: Annotated[int, typer.Option(min=1, help="New tokens that a text may have.")] = 4096,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a prompt may have.")] = 4096,
    past: Annotated[
        str,
        typer.Option(
            help="Beyond the model's context: slide (go on from the last half of it), or continue (just go "
            "on; spiking attention with static positions only)."
        ),
    ] = "slide",
    errors: Annotated[
        str,
        typer.Option(
            help="Characters or words that the model does not know: strict (status 400), drop, or replace."
        ),
    ] = "strict",
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running texts have to finish when stopped.")
    ] = 10.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that requests may call this server by, such as that of a proxy before it; repeat "
            "for several. Default: any, but at an address that only this machine can reach localhost's own."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")
    ] = "auto",
) -> None:
    """Serve a trained model over HTTP, in OpenAI's format: POST /v1/completions, GET /v1/models, GET /health.

    Ctrl-C or SIGTERM stops it. There is no password: anyone who can reach the address can use it.
    """
    try:
        from spikedecoder.serve.server import build, known_hosts, listen, run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette", "pydantic"):
            raise
        raise ValueError(
            f"serve needs {error.name}, which is not installed; pip install 'spikedecoder[serve]'"
        ) from None
    from spikedecoder.cli.inputs import load, tokenizer_of
    from spikedecoder.generation.text import ERRORS, own_tokenizer
    from spikedecoder.serve.app import Limits
    from spikedecoder.serve.engine import Engine

    if not math.isfinite(grace):
        raise ValueError(f"--grace: got {grace}, takes a finite number of seconds")
    if errors not in ERRORS:
        raise ValueError(f"--errors: got {errors!r}, takes one of {', '.join(ERRORS)}")
    model, where = load(checkpoint, device)
    own_tokenizer(model, tokenizer_of(model, where))
    engine = Engine(model, max_batch, max_queue, past)
    limits = Limits(max_tokens_limit, max_prompt_tokens, errors)
    with listen(host, port) as where_to:
        taken = where_to.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        hosts = known_hosts(where_to, shown, allow_host or ())
        server = build(engine, name or _name(where), limits, grace, hosts)

        def ready() -> None:
            if host not in _LOCAL:
                print(f"anyone who can reach {shown}:{taken} can use this server", file=sys.stderr)
            print(f"serving {name or _name(where)} at http://{shown}:{taken}/v1; Ctrl-C stops", flush=True)

        run(server, where_to, ready)


def _name(where: str) -> str:
    """The folder's name; for best/ or last/ the run's; a hub name as it is."""
    folder = Path(where)
    if not folder.exists():
        return where
    folder = Path(os.path.abspath(folder))  # not resolved: best and last are links
    return folder.parent.name if folder.name in ("best", "last") else folder.name
