"""Knows every option that more than one command takes: names, metavar, help, environment name.

Values come as they were typed; `moecli.settings` gives them meaning.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from moecli.errors import MoecliError


def option(*names: str, help: str, metavar: str | None = None) -> Any:
    """An option with its environment name MOECLI_<LONG NAME>."""
    long = next(name for name in names if name.startswith("--"))
    envvar = "MOECLI_" + long[2:].upper().replace("-", "_")
    return typer.Option(*names, help=help, metavar=metavar, envvar=envvar, show_default=False)


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A directory, a name from `moecli list`, or `demo`."),
]
ModelOption = Annotated[
    str | None, option("-m", "--model", metavar="MODEL", help="The same as the argument MODEL.")
]
Ctx = Annotated[
    str | None,
    option(
        "-c", "--ctx", metavar="TOKENS", help="Length of the context; takes `32k`. At most 8k else."
    ),
]
Ram = Annotated[
    str | None,
    option(
        "--ram", metavar="SIZE", help="RAM to stay within: `24GiB`, or `80%` of what is available."
    ),
]
Vram = Annotated[
    str | None,
    option(
        "--vram",
        metavar="SIZE",
        help="VRAM to stay within: `20GiB`, or `80%` of the card; else what is free. 0: no card.",
    ),
]
Device = Annotated[
    str | None,
    option("--device", metavar="NAME", help="What computes: auto, cpu, or cuda (a graphics card)."),
]
Placement = Annotated[
    str | None,
    option(
        "--placement",
        metavar="NAME",
        help="Of experts in VRAM: lru (by use), pinned (fixed), slice (a part of each), or auto.",
    ),
]
Lane = Annotated[
    str | None,
    option(
        "--lane",
        metavar="NAME",
        help="What serves experts that VRAM lacks: link (to the card), cpu, both, or auto.",
    ),
]
RunScheme = Annotated[
    str | None,
    option(
        "--dense-scheme",
        metavar="NAME",
        help="Of attention, shared experts and head while running: stored, nf4 or llm-int8.",
    ),
]
KvDtype = Annotated[
    str | None,
    option(
        "--kv-dtype",
        metavar="NAME",
        help="Of the KV cache: bf16, or int8 (half the memory; computes on the processor only).",
    ),
]
Threads = Annotated[
    str | None, option("--threads", metavar="N", help="CPU threads; else one a physical core.")
]
Kernels = Annotated[
    str | None,
    option("--kernels", metavar="NAME", help="What computes: auto, reference, torch, cpu, triton."),
]
System = Annotated[str | None, option("-s", "--system", metavar="TEXT", help="System prompt.")]
MaxTokens = Annotated[
    str | None,
    option("-n", "--max-tokens", metavar="N", help="Stop an answer after N tokens."),
]
Temp = Annotated[
    str | None,
    option("--temp", metavar="X", help="Temperature; 0 takes the likeliest token."),
]
TopP = Annotated[
    str | None,
    option("--top-p", metavar="P", help="Draw from the likeliest tokens that add up to P."),
]
TopK = Annotated[
    str | None, option("--top-k", metavar="N", help="Draw from the N likeliest tokens; 0: all.")
]
MinP = Annotated[
    str | None,
    option("--min-p", metavar="P", help="Leave out tokens below P times the likeliest."),
]
Seed = Annotated[str | None, option("--seed", metavar="N", help="Makes draws repeatable.")]
Stop = Annotated[
    list[str] | None,
    option("--stop", metavar="TEXT", help="End the answer before TEXT; may be repeated."),
]
Revision = Annotated[
    str | None,
    option("--revision", metavar="NAME", help="Of the repository: a branch, a tag or a commit."),
]
DryRun = Annotated[
    bool, option("--dry-run", help="Say what would be done, what it takes; do nothing.")
]
Json = Annotated[bool, option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, option("-v", "--verbose", help="Say on stderr how fast it was.")]
Yes = Annotated[bool, option("-y", "--yes", help="Do not ask.")]

SAMPLING: dict[str, Any] = {
    **{"max_tokens": MaxTokens, "temp": Temp, "top_p": TopP, "top_k": TopK, "min_p": MinP},
    **{"seed": Seed, "stop": Stop},
}
PLAN: dict[str, Any] = {
    **{"ctx": Ctx, "ram": Ram, "vram": Vram, "device": Device, "placement": Placement},
    **{"lane": Lane, "dense_scheme": RunScheme, "kv_dtype": KvDtype},
}
ENGINE: dict[str, Any] = {**PLAN, "threads": Threads, "kernels": Kernels}


def gathering(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of a command: it takes these options, and gets the values by name in `given`.

    They stand in the help where `given` stands among the parameters.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in options}
            command(**values, given=given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter)
                continue
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters += [
                inspect.Parameter(name, kind, default=None, annotation=annotation)
                for name, annotation in options.items()
            ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def typed(ctx: typer.Context, name: str) -> bool:
    """Whether the parameter stood on the command line, rather than in the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def one_model(ctx: typer.Context, argument: str | None, flag: str | None) -> str | None:
    """MODEL from the argument, the flag or MOECLI_MODEL; both on the command line is an error."""
    if argument is None:
        return flag
    if typed(ctx, "model_flag"):
        raise MoecliError(
            f"the model is given twice: `{argument}` and `{flag}`", "give one", exit_code=2
        )
    return argument


def require_model(ctx: typer.Context, argument: str | None, flag: str | None) -> str:
    model = one_model(ctx, argument, flag)
    if model is None:
        raise MoecliError(
            "which model? MODEL is missing",
            f"`moecli list` shows what is here; `{ctx.command_path} demo` takes the embedded one",
            exit_code=2,
        )
    return model


def debugging() -> bool:
    return os.environ.get("MOECLI_DEBUG", "") not in ("", "0")
