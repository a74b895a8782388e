"""Help pages, versions, exit codes, and what must not be imported for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("pull", "plan", "quantize", "run", "chat", "list", "show", "rm", "bench", "doctor")
HEAVY = ("torch", "transformers", "safetensors", "tokenizers", "jinja2", "rich", "numpy")


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from moecli.cli import run_app; code = run_app(sys.argv[1:]);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr);"
        "sys.exit(code)"
    )
    result = python(code, "--help")
    assert result.returncode == 0
    assert "Commands:" in result.stdout
    imported = result.stderr.split()
    assert "typer" in imported
    assert not set(imported) & set(HEAVY)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(cli, command) -> None:
    outcome = cli(command, "-h")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome == cli(command, "--help")
    assert outcome.out.startswith(f"Usage: moecli {command} ")
    examples = outcome.out.split("\nExamples:\n")[1].splitlines()
    assert 2 <= len(examples) <= 4
    assert all("moecli " in line and line.startswith("  ") for line in examples)
    assert "\x1b" not in outcome.out
    prose = outcome.out.split("\nExamples:\n")[0]
    assert max(map(len, prose.splitlines())) <= 80


def test_bare_command_prints_help(cli) -> None:
    outcome = cli()
    assert outcome == cli("--help") == cli("-h")
    assert outcome.code == 0
    listed = outcome.out.split("Commands:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(COMMANDS)


def test_version(cli) -> None:
    assert cli("--version").out == "moecli 0.1.0\n"


def test_options_have_an_environment_name_and_no_contested_letter() -> None:
    from typer.main import get_command

    from moecli.cli import app

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for param in command.params:
            if param.param_type_name == "argument":
                continue
            long = next(opt for opt in param.opts if opt.startswith("--"))
            assert param.envvar == "MOECLI_" + long[2:].upper().replace("-", "_"), (name, long)
            assert not {"-t", "-b", "-k", "-g"} & set(param.opts), name
            assert param.help, (name, long)


def test_an_environment_name_means_the_same_to_every_command() -> None:
    """MOECLI_X set for one command must not be an error, or something else, to another."""
    from typer.main import get_command

    from moecli.cli import app

    alike = {"MOECLI_SCHEME"}  # the same names, told in two ways
    meant: dict[str, set[tuple[str | None, bool]]] = {}
    for command in get_command(app).commands.values():  # type: ignore[attr-defined]
        for param in command.params:
            if param.param_type_name == "option" and param.envvar not in alike:
                meant.setdefault(param.envvar, set()).add((param.help, param.is_flag))
    assert not {name: told for name, told in meant.items() if len(told) > 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "no such command 'nonsense'"),
        (["qantize"], "Did you mean 'quantize'?"),
        (["run", "--nonsense"], "no such option: --nonsense"),
        (["list", "extra"], "extra"),
        (["rm"], "missing argument"),
    ],
)
def test_usage_errors(cli, args, message) -> None:
    outcome = cli(*args)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert re.search(r"\n\nhint: `moecli( \w+)? -h` shows how it is used\n$", outcome.err)


@pytest.mark.parametrize("count", [1, 1000], ids=["less than a buffer", "more than a pipe"])
def test_reader_that_leaves_is_no_failure_to_talk_about(count: int) -> None:
    """As in `moecli list | head -1`."""
    code = (
        "import sys; from moecli import store; from moecli.cli import main;"
        "m = [store.StoredModel('n' * 1000, 'p', 's', 1, 't')] * int(sys.argv[1]);"
        "store.models = lambda: m; sys.argv = ['moecli', 'list']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_documented_commands_are_current() -> None:
    """docs/commands.md is made by tools/commands_doc.py, which says how."""
    from tools.commands_doc import document

    assert (ROOT / "docs/commands.md").read_text(encoding="utf-8") == document()


def test_the_page_of_modules_is_current() -> None:
    """docs/modules.md is made by tools/modules_doc.py, which says how."""
    from tools.modules_doc import document

    assert (ROOT / "docs/modules.md").read_text(encoding="utf-8") == document()
