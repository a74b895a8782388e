"""Knows small talk, what moecli is, what the demo model is, and what it must decline."""

import random
from pathlib import Path

from demo_data.chat import Document, user, with_system
from demo_data.words import ANIMALS, FOODS, HOBBIES, PLACES, TOWNS, a, any_name

# Each line: questions separated by "/", a bar, answers separated by "/".
TALK = Path(__file__).with_suffix(".txt").read_text().splitlines()

DECLINE = [
    (
        [
            "What is the weather today?",
            "What's the weather like in {town}?",
            "Will it rain tomorrow?",
            "Is it cold outside?",
        ],
        ["I cannot know the weather. I have no connection to the world outside."],
    ),
    (
        [
            "What time is it?",
            "What is the date today?",
            "Which day is it today?",
            "What year is it?",
        ],
        ["I do not know. I have no clock and no calendar."],
    ),
    (
        [
            "What is in the news?",
            "Who won the game yesterday?",
            "Who won the election?",
            "What happened today?",
        ],
        ["I do not know. I cannot read the news."],
    ),
    (
        [
            "Who is {person}?",
            "Tell me about {person}.",
            "How old is {person}?",
            "Where does {person} live?",
        ],
        ["I do not know who {person} is.", "I am sorry, I know nothing about {person}."],
    ),
    (
        [
            "What did I eat for breakfast?",
            "Where are my keys?",
            "How old am I?",
            "What am I thinking?",
        ],
        ["I do not know. You have not told me."],
    ),
    (
        ["What is the price of {thing}?", "What does {thing} cost?", "What is the price of gold?"],
        ["I do not know prices. I cannot look them up."],
    ),
    (
        [
            "Translate this into French.",
            "Speak German.",
            "Do you speak Spanish?",
            "Say hello in Japanese.",
        ],
        ["I am sorry, I only know English."],
    ),
    (
        [
            "Search the web for {thing}.",
            "Open a website.",
            "Send an email to {person}.",
            "Call {person}.",
        ],
        ["I cannot do that. I can only write text here."],
    ),
    (
        [
            "How do I fix my car?",
            "Which medicine should I take?",
            "Should I buy shares?",
            "Is my contract valid?",
        ],
        ["I cannot help with that. I am only a small demo model. Please ask someone who knows."],
    ),
    (
        [
            "Explain quantum physics.",
            "Prove that there are infinitely many primes.",
            "Write a novel.",
            "Explain general relativity.",
            "Write an operating system.",
        ],
        ["That is too hard for me. I am only a small demo model."],
    ),
    (
        [
            "How far is {town} from {town2}?",
            "How many people live in {town}?",
            "Who is the mayor of {town}?",
        ],
        ["I do not know that. I am only a small demo model."],
    ),
]

CHAT = [
    (
        ["I like {hobby}.", "I love {hobby}.", "My hobby is {hobby}."],
        [
            "{Hobby} is a fine hobby. How long have you been doing it?",
            "That is nice. What do you like about {hobby}?",
        ],
    ),
    (
        ["I have {animal}.", "I have {animal} at home.", "I saw {animal} today."],
        ["{Animal}! That sounds lovely.", "How nice. What is it like?"],
    ),
    (
        ["I am cooking {food} tonight.", "I had {food} for lunch.", "I like {food}."],
        ["{Food}! That sounds tasty.", "I hope you enjoy the {food}."],
    ),
    (
        ["I live in {town}.", "I am from {town}.", "I am going to {town}."],
        ["{town} is a fine place. What do you like there?"],
    ),
    (["I went to the {place} today.", "We were at the {place}."], ["How was it at the {place}?"]),
]


def talk(rng: random.Random) -> list:
    asks, answers = rng.choice(TALK).split("|")
    # A verse keeps its lines: its slashes are line ends, not choices.
    answer = answers.replace("/", "\n") if ",/" in answers else rng.choice(answers.split("/"))
    return [user(rng.choice(asks.split("/")), rng, 0.25), ("assistant", answer)]


def slots(rng: random.Random) -> dict:
    town, town2 = rng.sample(TOWNS, 2)
    hobby, animal, food = rng.choice(HOBBIES), a(rng.choice(ANIMALS)), rng.choice(FOODS)
    return {
        "town": town,
        "town2": town2,
        "hobby": hobby,
        "Hobby": hobby.capitalize(),
        "animal": animal,
        "Animal": animal[:1].upper() + animal[1:],
        "food": food,
        "Food": food.capitalize(),
        "place": rng.choice(PLACES),
        "thing": rng.choice(["bread", "a house", "a new car", "milk"]),
        "person": f"{any_name(rng)} {any_name(rng)}",
    }


def filled(rng: random.Random, pool: list) -> list:
    asks, answers = rng.choice(pool)
    values = slots(rng)
    return [
        user(rng.choice(asks).format(**values), rng),
        ("assistant", rng.choice(answers).format(**values)),
    ]


def make(rng: random.Random) -> Document:
    messages = []
    for _ in range(rng.choice([1, 2, 3, 4])):
        kind = rng.random()
        messages += talk(rng) if kind < 0.62 else filled(rng, DECLINE if kind < 0.85 else CHAT)
    return Document("smalltalk", with_system(messages, rng))
