"""What the commands share: flags about the machine, exit codes, and a quiet terminal."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError, UnsupportedError

debug = False  # set by `attnproc --debug`

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting of the method; may be repeated. (default: none)"),
]
DType = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16. (default: auto: float32 on CPU, else bfloat16)"),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... (default: auto: cuda if any)")]
Offload = Annotated[
    str | None, typer.Option(help="none, model or sequential: keep weights in main memory. (default: none)")
]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code, and warnings of this package into one line each."""
    console = Console(stderr=True)
    shown = warnings.showwarning

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, AttnProcWarning):
            console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)
        else:
            shown(message, category, *args, **kwargs)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except KeyboardInterrupt:
        console.print("interrupted; files that were finished are whole, and none is half-written")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            console.print_exception()
        line = " ".join(str(error).split())
        if not isinstance(error, AttnProcError):
            line = f"{type(error).__name__}: {line} (attnproc --debug ... shows where)"
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
        codes = {SettingsError: 2, UnsupportedError: 3}
        raise typer.Exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1)) from None


def quiet_libraries() -> None:
    """Leaves the terminal to this command: no bars for loading, no notes on optional packages."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
