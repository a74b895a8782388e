"""Knows the small Python functions: what each is asked as, its body, and the checks it must pass.

code_tasks.txt has a line for each: name | arguments | what it does (separated by /) | body (lines
separated by ~) | checks (separated by ;).
"""

from pathlib import Path


class Task:
    """One function the model can be asked for."""

    def __init__(self, line: str):
        self.name, self.args, asks, body, checks = line.split("|")
        self.asks = asks.split("/")
        self.checks = checks.split(";")
        self.body = "\n".join("    " + part for part in body.split("~"))

    @property
    def code(self) -> str:
        return f"def {self.name}({self.args}):\n{self.body}"

    def passes(self, code: str) -> bool:
        """Whether the code, run in this process, defines the function and passes the checks."""
        space: dict = {}
        exec(code, space)
        return all(eval(check, {"f": space[self.name]}) for check in self.checks)


TASKS = [Task(line) for line in Path(__file__).with_suffix(".txt").read_text().splitlines()]
