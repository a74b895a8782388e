"""Knows facts and the ways people ask for them: capitals, continents, elements, everyday things."""

import random
from pathlib import Path

from demo_data.chat import Document, user, with_system
from demo_data.sources import countries, elements
from demo_data.words import split

ARTICLE = (
    "Bahamas",
    "Netherlands",
    "Philippines",
    "United States",
    "United Kingdom",
    "United Arab Emirates",
    "Gambia",
    "Maldives",
    "Comoros",
    "Seychelles",
    "Marshall Islands",
    "Solomon Islands",
    "Czech Republic",
    "Dominican Republic",
    "Central African Republic",
    "Democratic Republic of the Congo",
    "Republic of the Congo",
    "Vatican",
)
ASK_CAPITAL = [
    "What is the capital of {c}?",
    "Capital of {c}?",
    "What's the capital of {c}?",
    "Tell me the capital of {c}.",
    "Which city is the capital of {c}?",
    "Name the capital of {c}.",
    "{c} capital?",
    "What is {c}'s capital?",
    "What is the capital city of {c}?",
    "Do you know the capital of {c}?",
    "capital of {c}",
    "The capital of {c} is which city?",
    "Can you tell me the capital of {c}?",
    "{c}: what is its capital?",
    "Give me the capital of {c}.",
    "I want to know the capital of {c}.",
    "Could you name the capital of {c}?",
    "Please tell me the capital of {c}.",
    "And the capital of {c}?",
    "What about the capital of {c}?",
    "Tell me {c}'s capital, please.",
    "Look up the capital city of {c} for me.",
]
ASK_CAPITAL_HELD_OUT = [
    "Please name the capital city of {c}.",
    "Could you tell me the capital of {c}?",
    "Which city is {c}'s capital?",
]
TELL_CAPITAL = [
    "The capital of {c} is {k}.",
    "The capital of {c} is {k}.",
    "{k} is the capital of {c}.",
    "{k}.",
    "It is {k}.",
]

EVERYDAY = Path(__file__).with_name("everyday.txt").read_text().splitlines()  # question|answer
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split(
    "January February March April May June July August September October November December"
)


def the(country: str) -> str:
    return "the " + country if country in ARTICLE else country


def capital(rng: random.Random, folder: Path) -> list:
    country, city, continent = rng.choice(countries(folder))
    c = the(country)
    roll = rng.random()
    if roll < 0.78:
        ask, tell = rng.choice(ASK_CAPITAL), rng.choice(TELL_CAPITAL)
        ask = ask.format(c=c)
        tell = tell.format(c=c, k=city)
        if rng.random() < 0.1:  # as it is often typed
            ask = ask.lower()
        return [
            user(ask[:1].upper() + ask[1:] if ask[0] == "t" else ask, rng),
            ("assistant", tell[:1].upper() + tell[1:]),
        ]
    if roll < 0.88:
        ask = rng.choice(
            ["{k} is the capital of which country?", "Which country has the capital {k}?"]
        )
        return [user(ask.format(k=city), rng), ("assistant", f"{city} is the capital of {c}.")]
    ask = rng.choice(
        [f"Which continent is {c} in?", f"Where is {c}?", f"On which continent is {c}?"]
    )
    return [user(ask, rng), ("assistant", f"{c[:1].upper() + c[1:]} is in {continent}.")]


def element(rng: random.Random, folder: Path) -> list:
    number, symbol, name = rng.choice(elements(folder)[: rng.choice([20, 50, 100])])
    low = name.lower()
    asks = [
        (f"What is the symbol for {low}?", f"The symbol for {low} is {symbol}."),
        (f"What is the chemical symbol of {low}?", f"The symbol for {low} is {symbol}."),
        (f"Which element has the symbol {symbol}?", f"{symbol} is the symbol for {low}."),
        (f"What is the atomic number of {low}?", f"The atomic number of {low} is {number}."),
        (f"Which element has atomic number {number}?", f"Element {number} is {low}."),
    ]
    ask, tell = rng.choice(asks)
    return [user(ask, rng, 0.08), ("assistant", tell)]


def everyday(rng: random.Random, _: Path) -> list:
    ask, tell = rng.choice(EVERYDAY).split("|")
    return [user(ask, rng, 0.25), ("assistant", tell)]


def calendar(rng: random.Random, _: Path) -> list:
    names, kind = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i = rng.randrange(len(names))
    after, before = names[(i + 1) % len(names)], names[i - 1]
    asks = [
        (f"What {kind} comes after {names[i]}?", f"{after} comes after {names[i]}."),
        (f"What {kind} comes before {names[i]}?", f"{before} comes before {names[i]}."),
        (f"Name the {kind}s.", ", ".join(names) + "."),
    ]
    ask, tell = rng.choices(asks, [4, 4, 1])[0]
    return [user(ask, rng), ("assistant", tell)]


def make(rng: random.Random, folder: Path) -> Document:
    messages = []
    for _ in range(rng.choice([1, 2, 3, 4, 6, 8])):
        kind = rng.choices([capital, element, everyday, calendar], [60, 17, 18, 5])[0]
        messages += kind(rng, folder)
    return Document("facts", with_system(messages, rng))
