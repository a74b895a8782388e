"""Knows recall from context: names, things, lists and words said earlier in a conversation."""

import random

from demo_data.chat import Document, sloppy, user, with_system
from demo_data.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    PLACES,
    THINGS,
    TOWNS,
    a,
    any_name,
    cap,
    invented_name,
)

SAY_NAME = [
    "My name is {n}.",
    "Hi, I'm {n}.",
    "I am {n}.",
    "Hello, my name is {n}.",
    "You can call me {n}.",
    "I'm {n}, nice to meet you.",
    "Hey, {n} here.",
    "Hi! My name is {n}. How are you?",
    "My name's {n}.",
    "Good morning, I am {n}.",
    "Please call me {n}.",
    "Hello! I'm called {n}.",
    "my name is {n}",
]
SAY_NAME_HELD_OUT = [
    "Hello there, my name is {n} and I like tea.",
    "By the way, I'm {n}.",
    "Good evening. My name is {n}.",
]
ASK_NAME = [
    "What is my name?",
    "What's my name?",
    "Do you remember my name?",
    "Who am I?",
    "Can you tell me my name?",
    "Do you know my name?",
    "Tell me my name.",
    "What did I say my name was?",
    "say my name",
]
ASK_NAME_HELD_OUT = [
    "So what is my name?",
    "Please tell me what my name is.",
    "Remind me, what's my name?",
]
GREET = [
    "Nice to meet you, {n}!",
    "Hello, {n}!",
    "Hi {n}, how can I help you?",
    "Welcome, {n}! What can I do for you?",
    "Good to meet you, {n}.",
    "Hello {n}! How are you today?",
]
TELL_NAME = [
    "Your name is {n}.",
    "You are {n}.",
    "You told me your name is {n}.",
    "Your name is {n}.",
    "It is {n}.",
]

# What a person may say about themselves: statement, questions, answer.
TRAITS = [
    ("I live in {x}.", ["Where do I live?", "Which town do I live in?"], "You live in {x}.", TOWNS),
    (
        "My favourite colour is {x}.",
        ["What is my favourite colour?", "Which colour do I like best?"],
        "Your favourite colour is {x}.",
        COLOURS,
    ),
    (
        "I love {x}.",
        ["What do I love?", "What did I say I love?"],
        "You love {x}.",
        HOBBIES + FOODS,
    ),
    ("I work as {ax}.", ["What is my job?", "What do I work as?"], "You work as {ax}.", JOBS),
    (
        "I have a pet {x}.",
        ["What pet do I have?", "Which animal do I have?"],
        "You have a pet {x}.",
        ANIMALS,
    ),
    ("I lost my {x} today.", ["What did I lose?"], "You lost your {x}.", THINGS),
    ("I like to eat {x}.", ["What do I like to eat?"], "You like to eat {x}.", FOODS),
    (
        "My dog is called {name}.",
        ["What is my dog called?", "What is the name of my dog?"],
        "Your dog is called {name}.",
        None,
    ),
    (
        "My sister's name is {name}.",
        ["What is my sister's name?"],
        "Your sister's name is {name}.",
        None,
    ),
    (
        "My friend {name} is coming today.",
        ["Who is coming today?", "What is my friend's name?"],
        "Your friend {name} is coming.",
        None,
    ),
    (
        "The secret word is {word}.",
        ["What is the secret word?", "Tell me the secret word."],
        "The secret word is {word}.",
        None,
    ),
    ("My number is {num}.", ["What is my number?"], "Your number is {num}.", None),
]
ACKNOWLEDGE = [
    "I see.",
    "Thank you for telling me.",
    "Good to know.",
    "That is nice.",
    "I will remember that.",
    "All right.",
]


def fill(rng: random.Random, trait) -> tuple[str, str, str]:
    say, asks, answer, pool = trait
    x = rng.choice(pool) if pool else ""
    slots = {
        "x": x,
        "ax": a(x) if x else "",
        "name": any_name(rng),
        "word": rng.choice(THINGS + ANIMALS + PLACES),
        "num": rng.randint(10, 999),
    }
    if rng.random() < 0.2:
        slots["word"] = invented_name(rng).lower()
    return say.format(**slots), rng.choice(asks), answer.format(**slots)


def about_me(rng: random.Random) -> list:
    """The user says a few things, perhaps a name, then asks for them back."""
    facts, messages = [], []
    if rng.random() < 0.75:
        n = any_name(rng)
        facts.append(
            (
                rng.choice(SAY_NAME).format(n=n),
                rng.choice(ASK_NAME),
                rng.choice(TELL_NAME).format(n=n),
                rng.choice(GREET).format(n=n),
            )
        )
    for trait in rng.sample(
        TRAITS, rng.choice([0, 1, 1, 2, 3]) if facts else rng.choice([1, 2, 3])
    ):
        facts.append((*fill(rng, trait), rng.choice(ACKNOWLEDGE)))
    if len(facts) > 1 and rng.random() < 0.5:
        head = "".join(f[0] + " " for f in facts).strip()
        messages = [user(head, rng), ("assistant", facts[0][3])]
    else:
        for say, _, _, reply in facts:
            messages += [user(say, rng), ("assistant", reply)]
    rng.shuffle(facts)
    for _, ask, answer, _ in facts:
        messages += [user(ask, rng), ("assistant", answer)]
    return messages


def name_in_system(rng: random.Random) -> list:
    n = any_name(rng)
    return [
        ("system", f"The user's name is {n}."),
        user(rng.choice(ASK_NAME), rng),
        ("assistant", rng.choice(TELL_NAME).format(n=n)),
    ]


def unknown_name(rng: random.Random) -> list:
    return [
        user(rng.choice(ASK_NAME), rng),
        (
            "assistant",
            rng.choice(
                [
                    "I do not know your name. You have not told me.",
                    "You have not told me your name yet.",
                    "I don't know your name yet.",
                ]
            ),
        ),
    ]


def repeat(rng: random.Random) -> list:
    """Say it again: the longer lists are what makes copying form at all."""
    pool = rng.choice([THINGS + ANIMALS + PLACES + FOODS + COLOURS, NAMES, NAMES + TOWNS + THINGS])
    words = [
        rng.choice(pool)
        for _ in range(rng.randint(1, 6) if rng.random() < 0.5 else rng.randint(7, 30))
    ]
    if rng.random() < 0.3:
        words = [invented_name(rng).lower() if rng.random() < 0.5 else w for w in words]
    text = rng.choice([" ", ", "]).join(words)
    ask = rng.choice(
        [
            "Repeat: {t}",
            "Say this again: {t}",
            "Repeat after me: {t}",
            "Please repeat: {t}",
            "Say: {t}",
            "Copy these words: {t}",
        ]
    )
    return [("user", ask.format(t=text)), ("assistant", text)]


def copying(rng: random.Random) -> Document:
    """Chance words said two or three times: nothing but copying predicts the second time."""
    pool = rng.choice(
        [THINGS + ANIMALS + PLACES + FOODS + COLOURS, NAMES, NAMES + TOWNS + THINGS + HOBBIES]
    )
    words = [rng.choice(pool) for _ in range(rng.choice([3, 4, 5, 6, 8, 10, 14, 20]))]
    line = rng.choice([" ", ", "]).join(words)
    if rng.random() < 0.5:
        return Document(
            "recall", text=rng.choice(["\n", ". ", "\n\n"]).join([line] * rng.choice([2, 3, 4]))
        )
    ask = rng.choice(["Repeat: {t}", "Say this again: {t}", "{t}\n\nRepeat this."])
    again = [("user", "Again."), ("assistant", line)] if rng.random() < 0.3 else []
    return Document("recall", (("user", ask.format(t=line)), ("assistant", line), *again))


def list_question(rng: random.Random) -> list:
    words = rng.sample(THINGS + ANIMALS + FOODS, rng.randint(2, 5))
    listed = ", ".join(words)
    place = rng.choice(["first", "last", "second"])
    pick = {"first": words[0], "last": words[-1], "second": words[1]}[place]
    ask = rng.choice(
        [
            f"Here is a list: {listed}. What is the {place} word?",
            f"What is the {place} word in: {listed}?",
        ]
    )
    return [
        ("user", ask),
        ("assistant", rng.choice([f"The {place} word is {pick}.", cap(pick) + "."])),
    ]


def owners(rng: random.Random) -> list:
    """Who has what: several pairs, then questions both ways."""
    n = rng.randint(2, 4)
    names = list(dict.fromkeys(any_name(rng) for _ in range(n)))
    things = rng.sample(THINGS, len(names))
    colours = [rng.choice(COLOURS) + " " if rng.random() < 0.4 else "" for _ in names]
    pairs = list(zip(names, (c + t for c, t in zip(colours, things, strict=True)), strict=True))
    text = " ".join(f"{n} has {a(t)}." for n, t in pairs)
    messages, first = [], True
    rng.shuffle(pairs)
    for name, thing in pairs[: rng.randint(1, len(pairs))]:
        ask, answer = rng.choice(
            [
                (f"Who has the {thing}?", f"{name} has the {thing}."),
                (f"What does {name} have?", f"{name} has {a(thing)}."),
            ]
        )
        messages += [("user", f"{text} {ask}" if first else ask), ("assistant", answer)]
        first = False
    return messages


def where(rng: random.Random) -> list:
    thing, place, name = rng.choice(THINGS), rng.choice(PLACES), any_name(rng)
    town = rng.choice(TOWNS)
    text = f"{name} from {town} left {a(thing)} at the {place}."
    asks = [
        (f"Where is the {thing}?", f"The {thing} is at the {place}."),
        (f"Who left the {thing}?", f"{name} left the {thing}."),
        (f"What did {name} leave at the {place}?", f"{name} left {a(thing)} at the {place}."),
        (f"Where is {name} from?", f"{name} is from {town}."),
    ]
    messages = []
    for i, (ask, answer) in enumerate(rng.sample(asks, rng.randint(1, 3))):
        messages += [
            (
                "user",
                f"{text} {ask}" if i == 0 else sloppy(ask, rng) if rng.random() < 0.1 else ask,
            ),
            ("assistant", answer),
        ]
    return messages


def make(rng: random.Random) -> Document:
    kinds = [about_me, name_in_system, unknown_name, repeat, list_question, owners, where]
    kind = rng.choices(kinds, [40, 5, 3, 20, 7, 14, 11])[0]
    messages = kind(rng)
    for _ in range(rng.choice([0, 0, 1, 2])):
        if kind in (repeat, list_question):
            messages += kind(rng)
    return Document("recall", with_system(messages, rng))
