"""Knows every option that more than one command takes: names, metavar, help, environment name.

Values come as they were typed; `moecli.settings` gives them meaning.
"""

import os
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
    str | None, option("--vram", metavar="SIZE", help="VRAM to stay within: `20GiB` or `80%`.")
]
Threads = Annotated[
    str | None, option("--threads", metavar="N", help="CPU threads; else one a physical core.")
]
Kernels = Annotated[
    str | None,
    option("--kernels", metavar="NAME", help="Backend that computes: auto, reference, torch."),
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
Json = Annotated[bool, option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, option("-v", "--verbose", help="Say on stderr how fast it was.")]
Yes = Annotated[bool, option("-y", "--yes", help="Do not ask.")]


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
