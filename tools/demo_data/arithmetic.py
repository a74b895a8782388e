"""Knows sums: to 20, the 12x12 table, two-digit ones in steps, and small word problems."""

import random

from demo_data.chat import Document, user, with_system
from demo_data.words import FOODS, THINGS, any_name, plural, split

ASK = [
    "What is {q}?",
    "{q} = ?",
    "Calculate {q}.",
    "How much is {q}?",
    "What's {q}?",
    "{q}",
    "{q}?",
    "Compute {q}.",
    "Can you work out {q}?",
    "Please tell me what {q} is.",
    "Tell me {q}.",
    "{q} =",
    "Hi, what is {q}?",
    "What does {q} make?",
    "I need to know {q}.",
    "Solve {q}.",
    "What is the result of {q}?",
    "Compute {q} for me.",
    "Work out {q} for me, please.",
    "{q}, please.",
    "Hello, can you do {q}?",
    "Can you tell me {q}?",
    "Could you calculate {q}?",
    "Please work out {q}.",
    "Give me the answer to {q}.",
    "What is the answer to {q}?",
    "I have to do {q}. What is it?",
    "And {q}?",
    "What about {q}?",
    "Could you please tell me how much {q} is?",
    "What do I get if I work out {q}?",
]
ASK_HELD_OUT = [
    "Could you tell me what {q} comes to?",
    "What do you get for {q}?",
    "Please calculate {q} for me.",
]
ANSWER = ["{q} = {r}", "{q} = {r}.", "{r}", "The answer is {r}.", "{q} is {r}.", "{q} = {r}"]


SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
NUMBERS = split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)


def expression(a: int, op: str, b: int, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.25:
        return f"{a} {SPOKEN[op]} {b}"
    sign = "x" if op == "*" and roll < 0.5 else op
    return f"{a}{sign}{b}" if rng.random() < 0.15 else f"{a} {sign} {b}"


def apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]


def easy(rng: random.Random) -> tuple[int, str, int]:
    roll = rng.random()
    if roll < 0.48:
        total = rng.randint(0, 20)
        a = rng.randint(0, total)
        return a, "+", total - a
    if roll < 0.71:
        a = rng.randint(0, 20)
        return a, "-", rng.randint(0, a)
    a, b = rng.randint(0 if rng.random() < 0.1 else 1, 12), rng.randint(1, 12)
    return (a * b, "/", b) if roll > 0.93 else (a, "*", b)


def steps(a: int, op: str, b: int) -> str:
    """Two-digit sums worked by tens and ones; products by splitting the first factor."""
    r = apply(a, op, b)
    (ta, oa), (tb, ob) = divmod(a, 10), divmod(b, 10)
    if op == "+":
        return (
            f"Tens: {ta * 10} + {tb * 10} = {ta * 10 + tb * 10}. Ones: {oa} + {ob} = {oa + ob}. "
            f"{ta * 10 + tb * 10} + {oa + ob} = {r}."
        )
    if op == "-":
        return f"{a} - {tb * 10} = {a - tb * 10}. {a - tb * 10} - {ob} = {r}."
    return (
        f"{a} = {ta * 10} + {oa}. {ta * 10} x {b} = {ta * 10 * b}. {oa} x {b} = {oa * b}. "
        f"{ta * 10 * b} + {oa * b} = {r}."
    )


def hard(rng: random.Random) -> tuple[int, str, int]:
    op = rng.choice("++-*")
    if op == "*":
        return rng.randint(11, 99), "*", rng.randint(2, 9)
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return (max(a, b), op, min(a, b)) if op == "-" else (a, op, b)


def question(rng: random.Random) -> list:
    if rng.random() < 0.75:
        a, op, b = easy(rng)
        q = expression(a, op, b, rng)
        r = apply(a, op, b)
        ask = rng.choice(ASK)
        if rng.random() < 0.06 and max(a, b) <= 20:
            q = f"{NUMBERS[a]} {SPOKEN[op]} {NUMBERS[b]}"
        elif op == "+" and rng.random() < 0.1:
            ask = rng.choice(
                ["Add {a} and {b}.", "What is the sum of {a} and {b}?", "{a} and {b} makes what?"]
            )
        shown = (
            q
            if q[0].isdigit() and " " in q and rng.random() < 0.7
            else f"{a} {op if op != '*' else 'x'} {b}"
        )
        return [
            user(ask.format(q=q, a=a, b=b), rng, 0.1),
            ("assistant", rng.choice(ANSWER).format(q=shown, r=r)),
        ]
    a, op, b = hard(rng)
    q = expression(a, op, b, rng)
    extra = rng.choice(["", "", " Work it out in steps.", " Show your work."])
    return [user(rng.choice(ASK).format(q=q) + extra, rng, 0.1), ("assistant", steps(a, op, b))]


def compare(rng: random.Random) -> list:
    a, b = rng.sample(range(1, 100), 2)
    kind = rng.choice(["larger", "smaller"])
    best = max(a, b) if kind == "larger" else min(a, b)
    return [user(f"Which is {kind}, {a} or {b}?", rng), ("assistant", f"{best} is {kind}.")]


def parity(rng: random.Random) -> list:
    a = rng.randint(1, 99)
    word = "odd" if a % 2 else "even"
    return [user(f"Is {a} even or odd?", rng), ("assistant", f"{a} is {word}.")]


def count(rng: random.Random) -> list:
    a, n, step = rng.randint(1, 40), rng.randint(4, 9), rng.choice([1, 1, 1, 2, 5, 10])
    values = [a + i * step for i in range(n)]
    ask = f"Count from {a} to {values[-1]}" + (f" in steps of {step}." if step > 1 else ".")
    return [user(ask, rng), ("assistant", ", ".join(map(str, values)))]


def word_problem(rng: random.Random) -> list:
    name, things = any_name(rng), rng.choice([*FOODS[6:9], *(plural(t) for t in THINGS[:12])])
    a, b = rng.randint(2, 12), rng.randint(1, 8)
    if rng.random() < 0.5:
        q = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
        return [user(q, rng), ("assistant", f"{a} + {b} = {a + b}. {name} has {a + b} {things}.")]
    b = rng.randint(1, a)
    q = f"{name} has {a} {things} and gives away {b}. How many {things} are left?"
    return [user(q, rng), ("assistant", f"{a} - {b} = {a - b}. {name} has {a - b} {things} left.")]


def make(rng: random.Random) -> Document:
    messages = []
    for _ in range(rng.choice([1, 2, 3, 4, 6, 8])):
        kind = rng.choices([question, word_problem, compare, parity, count], [80, 9, 4, 3, 4])[0]
        messages += kind(rng)
    return Document("arithmetic", with_system(messages, rng, 0.08))
