"""Knows conversations about small Python functions: requests, code, and what it does."""

import random

from demo_data.chat import Document, user, with_system
from demo_data.code_tasks import TASKS, Task

ASK = [
    "Write a Python function that {d}.",
    "Write a function that {d}.",
    "Python function that {d}",
    "Write Python code that {d}.",
    "Can you write a Python function that {d}?",
    "I need a function that {d}.",
    "Write a Python function {n} that {d}.",
    "Write `{n}` in Python. It {d}.",
    "Define a function {n}({args}) that {d}.",
    "How do I write a function that {d}?",
    "Write {n} in Python.",
    "Give me Python code for {n}.",
    "Please write a Python function which {d}.",
    "Show me a Python function that {d}.",
    "Write a Python function `{n}({args})`.",
    "Write a Python function to {i}.",
    "How do I {i} in Python?",
    "Write Python code to {i}.",
    "Python function to {i}",
    "Write a function to {i}.",
    "Could you write a function that {d}?",
    "Please write {n}, a Python function that {d}.",
    "Write a Python function called {n}.",
    "Can you write `{n}` for me in Python?",
]
ASK_HELD_OUT = [
    "Please write a Python function called `{n}` that {d}.",
    "Could you write Python code for a function {n} that {d}?",
]
INTRO = ["", "", "", "Here it is:\n\n", "Here is the function:\n\n", "Sure:\n\n"]


def fenced(task: Task) -> str:
    return f"```python\n{task.code}\n```"


def request(rng: random.Random, task: Task, asks: list[str]) -> str:
    does = rng.choice(task.asks)
    return rng.choice(asks).format(d=does, i=infinitive(does), n=task.name, args=task.args)


def infinitive(does: str) -> str:
    """'checks if ...' -> 'check if ...'."""
    verb, rest = does.split(" ", 1)
    return f"{verb[:-3]}y {rest}" if verb.endswith("ies") else f"{verb[:-1]} {rest}"


def make(rng: random.Random) -> Document:
    messages = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        task = rng.choice(TASKS)
        if rng.random() < 0.1:
            ask = f"What does this function do?\n\n{fenced(task)}"
            messages += [("user", ask), ("assistant", f"It {rng.choice(task.asks)}.")]
            continue
        ask = request(rng, task, ASK)
        messages += [
            user(ask, rng, 0.1) if "`" not in ask and "_" not in ask else ("user", ask),
            ("assistant", rng.choice(INTRO) + fenced(task)),
        ]
        if rng.random() < 0.15:
            messages += [
                ("user", rng.choice(["What does it do?", "Explain it."])),
                ("assistant", f"It {rng.choice(task.asks)}."),
            ]
    return Document("code", with_system(messages, rng))
