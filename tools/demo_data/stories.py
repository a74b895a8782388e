"""Knows short stories about one named hero, requests for them, and questions on them."""

import random
from dataclasses import dataclass

from demo_data.chat import Document, user, with_system
from demo_data.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    PLACES,
    THINGS,
    a,
    any_name,
    cap,
    pronouns,
)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about; helper is an animal or a job, friend its name or ''."""

    name: str
    kind: str
    he: str
    him: str
    his: str
    adjective: str
    thing: str
    colour: str
    place: str
    place2: str
    helper: str
    friend: str
    food: str

    @property
    def who(self) -> str:
        return self.friend or f"the {self.helper}"


def cast(rng: random.Random) -> Cast:
    name = any_name(rng)
    he, him, his = pronouns(name, rng)
    kind = rng.choices(
        [rng.choice(ANIMALS), rng.choice(JOBS), "girl" if he == "she" else "boy"], [5, 3, 3]
    )[0]
    place, place2 = rng.sample(PLACES, 2)
    friend = any_name(rng) if rng.random() < 0.3 else ""
    return Cast(
        name,
        kind,
        he,
        him,
        his,
        rng.choice(ADJECTIVES),
        rng.choice(THINGS),
        rng.choice(COLOURS),
        place,
        place2,
        rng.choice([x for x in ANIMALS + JOBS if x != kind]),
        "" if friend == name else friend,
        rng.choice(FOODS),
    )


def tell(rng: random.Random, c: Cast, *parts: list[str]) -> str:
    values = {
        **c.__dict__,
        "He": cap(c.he),
        "His": cap(c.his),
        "Who": cap(c.who),
        "who": c.who,
        "akind": a(f"{c.adjective} {c.kind}"),
        "athing": a(f"{c.colour} {c.thing}"),
        "ahelper": a(c.helper),
        "met": f"{a(c.helper)} named {c.friend}" if c.friend else a(c.helper),
    }
    return " ".join(rng.choice(p).format(**values) for p in parts)


OPEN = [
    "Once there was {akind} named {name} who lived near the {place}.",
    "{name} was {akind}. {He} lived by the {place}.",
    "There once lived {akind} called {name} in a house near the {place}.",
    "Long ago, {akind} named {name} lived at the edge of the {place}.",
    "In a small house by the {place} lived {akind}. {His} name was {name}.",
    "{name} the {kind} lived near the {place} and was known to be {adjective}.",
]
END = [
    "From that day on, {name} was never lonely again.",
    "{name} went home and slept well that night.",
    "And every evening after that, {name} smiled when {he} thought of that day.",
    "{name} never forgot that day at the {place2}.",
    "And so {name} was happy.",
    "That night {name} told the whole story to everyone at the {place}.",
    "After that, {name} and {who} were good friends.",
]

LOST = [
    OPEN,
    [
        "{name} had {athing} that {he} loved more than anything.",
        "The dearest thing {he} had was {athing}.",
        "Every day {name} played with {his} {colour} {thing}.",
    ],
    [
        "One morning the {thing} was gone.",
        "One day {name} lost the {thing}.",
        "But one windy day the {thing} was gone.",
    ],
    [
        "{name} looked under the bed, behind the door and in the garden, but it was gone.",
        "{He} looked everywhere. It was not in the house, and it was not by the {place}.",
        "{name} was sad and searched the whole day.",
    ],
    ["Then {he} met {met}.", "On the way to the {place2}, {name} met {met}."],
    [
        '"What is wrong?" asked {who}. "I have lost my {thing}," said {name}.',
        '"Why are you so sad, {name}?" asked {who}. "My {thing} is gone," said {name}.',
        '"Have you seen my {colour} {thing}?" asked {name}. "No," said {who}, "but I will help."',
    ],
    [
        "Together they walked to the {place2} and looked there.",
        "They went to the {place2} and searched side by side.",
    ],
    [
        "At last {name} saw the {colour} {thing} behind a stone.",
        "There, under a tree, lay the {colour} {thing}!",
        "{Who} found the {thing} in the tall grass and gave it back to {name}.",
    ],
    [
        '"Thank you!" said {name}, and {he} shared {his} {food} with {who}.',
        "{name} laughed with joy and thanked {who}.",
    ],
    END,
]
JOURNEY = [
    OPEN,
    [
        "{name} had never seen the {place2}, but {he} dreamed of it every night.",
        "All {his} life {name} had wanted to see the {place2}.",
    ],
    [
        "One morning {name} packed some {food} and {athing} and set out.",
        "So {name} took {his} {colour} {thing}, put some {food} in a bag and left.",
    ],
    [
        "The road was long and it began to rain.",
        "After an hour the road became steep and dark.",
        "The wind was cold and the path was hard to see.",
    ],
    [
        '"I must not give up," said {name}.',
        '"Shall I turn back?" thought {name}. "No, I will go on."',
    ],
    ["Under a tree {he} met {met}.", "By the road sat {met}."],
    [
        '"Where are you going, {name}?" asked {who}. "To the {place2}," said {name}.',
        '"Please, which way is the {place2}?" asked {name}. "Follow me," said {who}.',
    ],
    [
        "{Who} showed {him} the way, and {name} gave {who} some {food}.",
        "They walked together and shared the {food}.",
    ],
    [
        "When the sun came out, {name} stood at the {place2} at last.",
        "In the evening {name} came to the {place2}.",
    ],
    [
        "It was more beautiful than {he} had dreamed.",
        "{name} sat down and looked at it for a long time.",
    ],
    END,
]
MAKE = [
    OPEN,
    ["One day {name} wanted to make {athing}.", "{name} had a plan: {he} would make {athing}."],
    ["{He} had never made one before.", '"I do not know how," said {name}, "but I can learn."'],
    [
        "The first {thing} broke at once.",
        "On the first day everything went wrong, and the {thing} fell apart.",
    ],
    ["{name} wanted to cry, but {he} tried again.", '"Once more," said {name}.'],
    ["Then {met} came by and watched.", "{cap_met} from the {place2} came by."],
    [
        '"You are too quick, {name}," said {who}. "Take your time."',
        '"May I help?" asked {who}. "Yes, please," said {name}.',
    ],
    [
        "{name} listened and worked slowly, all day long.",
        "So {name} worked with care, and {who} held the pieces.",
    ],
    [
        "In the evening the {colour} {thing} was ready.",
        "At last {name} held a fine {colour} {thing}.",
    ],
    ["Everyone in the {place2} came to see it.", "{name} was proud and showed it to everyone."],
    END,
]
HELP = [
    OPEN,
    [
        "One cold day {name} walked to the {place2} to buy some {food}.",
        "One day {name} went to the {place2}.",
    ],
    [
        "There {he} heard a quiet voice. It was {met}, stuck in a hole.",
        "By the path {name} saw {met} that could not move.",
    ],
    ['"Help me, please!" cried {who}.', '"Please, {name}, help me!" cried {who}.'],
    ["{name} was afraid, but {he} did not run away.", "{name} did not wait."],
    [
        "{He} ran home and came back with {athing}.",
        "{name} remembered {his} {colour} {thing} and took it out of the bag.",
    ],
    [
        "With the {thing}, {name} pulled and pulled, and at last {who} was free.",
        "{name} used the {thing}, and soon {who} was safe.",
    ],
    [
        '"You saved me, {name}," said {who}.',
        '"Thank you, {name}! I will not forget this," said {who}.',
    ],
    [
        "The next day {who} brought {name} a basket of {food}.",
        "They sat down and ate {food} together.",
    ],
    END,
]
FEAR = [
    OPEN,
    [
        "{name} was afraid of the dark {place2}.",
        "There was only one thing {name} feared: the old {place2}.",
    ],
    [
        "One night {his} {colour} {thing} rolled away, right into the {place2}.",
        "One evening the wind blew {his} {thing} into the {place2}.",
    ],
    [
        '"I am too small," said {name}. {His} heart beat fast.',
        "{name} stood still and could hardly breathe.",
    ],
    [
        "But {he} took a deep breath and went in.",
        "Then {name} closed {his} eyes, counted to three and stepped inside.",
    ],
    ["It was dark, but it was not bad at all.", "Inside, {name} saw hundreds of tiny lights."],
    ["{cap_met} sat there and waved.", "There {he} met {met}."],
    [
        '"Do not be afraid, {name}," said {who}. "The dark is only the day asleep."',
        '"I was afraid of you!" said {name}, and {who} laughed.',
    ],
    [
        "{name} laughed too and was not afraid any more.",
        "So {name} learned that the {place2} was a good place.",
    ],
    END,
]
SHARE = [
    OPEN,
    [
        "{name} had more {food} than {he} could eat.",
        "One summer {name} had a whole basket of {food}.",
    ],
    ["{cap_met} came to the door.", "One day {met} came by."],
    [
        '"I am hungry," said {who}. "May I have some {food}?"',
        '"{name}, I have had nothing to eat today," said {who}.',
    ],
    ['"No, these are mine," said {name} at first.', "{name} thought about it for a while."],
    [
        "But when {he} saw the sad face, {name} was sorry.",
        "Then {name} remembered how it felt to be hungry.",
    ],
    [
        '"Come in," said {name}, "there is enough for two."',
        "So {name} shared the {food}, and they ate together.",
    ],
    [
        "In the winter {name} had nothing left, and {who} came with {athing} and warm soup.",
        "The next day {who} brought {name} {athing} to say thank you.",
    ],
    END,
]
PLOTS = {"lost": LOST, "journey": JOURNEY, "make": MAKE, "help": HELP, "fear": FEAR, "share": SHARE}

ASK = [
    "Tell me a story about {x}.",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Can you tell me a story about {x}?",
    "I want a story about {x}.",
    "Please tell a story about {x}.",
    "Make up a story about {x}.",
    "A story about {x}, please.",
    "Tell a short story about {x}.",
    "Once more, a story. This time about {x}.",
    "Give me a bedtime story about {x}.",
    "I would like a story about {x}.",
    "Could you tell me a story about {x}?",
    "Please write a story about {x}.",
    "Write a story for me about {x}.",
]
ASK_HELD_OUT = [
    "Could you write a little story about {x}?",
    "I would love to hear a story about {x}.",
    "Please write me a short story about {x}.",
]
HERO = [
    "{akind} named {name}",
    "{name}",
    "{name} the {kind}",
    "{kinda} called {name}",
    "{kinda} named {name}",
    "{name}, {akind}",
    "{kinda} named {name} and {athing}",
    "{name} and {athing}",
    "{kinda} named {name} in a {place}",
]


# What the hero does, said in the request, by plot.
DEEDS = {
    "lost": ["who lost {athing}", "who loses {his} {thing}"],
    "journey": ["who goes to the {place2}", "who wants to see the {place2}"],
    "make": ["who makes {athing}", "who wants to make {athing}"],
    "help": ["who helps {ahelper}", "who saves {ahelper}"],
    "fear": ["who is afraid of the {place2}", "who is afraid of the dark"],
    "share": ["who has too much {food}", "who shares {his} {food}"],
}


def request(rng: random.Random, c: Cast, asks: list[str], plot: str = "") -> str:
    hero = rng.choice(HERO).format(
        akind=a(f"{c.adjective} {c.kind}"),
        kinda=a(c.kind),
        name=c.name,
        kind=c.kind,
        athing=a(c.thing),
        place=c.place,
    )
    if plot and rng.random() < 0.1:  # nobody named: the hero is the model's choice
        if rng.random() < 0.5:
            return rng.choice(["Tell me a story.", "Write a short story.", "I want a story."])
        hero = a(c.kind)
    elif plot and rng.random() < 0.4:
        deed = rng.choice(DEEDS[plot]).format(
            athing=a(c.thing),
            ahelper=a(c.helper),
            **{k: getattr(c, k) for k in ("his", "thing", "place2", "food")},
        )
        hero = f"{a(c.kind)} {rng.choice(['named', 'called'])} {c.name} {deed}"
    return rng.choice(asks).format(x=hero)


def story(rng: random.Random, c: Cast, plot: str) -> str:
    met = f"{a(c.helper)} named {c.friend}" if c.friend else a(c.helper)
    parts = [[o.replace("{cap_met}", cap(met)) for o in options] for options in PLOTS[plot]]
    text = tell(rng, c, *parts)
    if rng.random() < 0.35:
        sentences = text.split(". ")
        cut = len(sentences) // 2
        text = ". ".join(sentences[:cut]) + ".\n\n" + ". ".join(sentences[cut:])
    if rng.random() < 0.12:
        text = f"{c.name} and the {cap(c.thing)}\n\n{text}"
    return text


def questions(rng: random.Random, c: Cast, plot: str) -> list[tuple[str, list[str]]]:
    asks = [
        (
            "Who is the story about?",
            [f"The story is about {c.name}.", f"It is about {c.name} the {c.kind}."],
        ),
        (
            "What is the name of the hero?",
            [f"The hero is called {c.name}.", f"The name is {c.name}."],
        ),
        (f"Where does {c.name} live?", [f"{c.name} lives near the {c.place}."]),
        (
            f"Who does {c.name} meet?",
            [f"{c.name} meets {c.who}." if c.friend else f"{c.name} meets {a(c.helper)}."],
        ),
        (
            f"What is {c.name}?",
            [f"{c.name} is {a(c.adjective + ' ' + c.kind)}.", f"{c.name} is {a(c.kind)}."],
        ),
    ]
    if plot == "lost":
        asks += [
            (f"What did {c.name} lose?", [f"{c.name} lost {a(c.colour + ' ' + c.thing)}."]),
            (f"What colour was the {c.thing}?", [f"The {c.thing} was {c.colour}."]),
        ]
    if plot == "make":
        asks += [(f"What did {c.name} make?", [f"{c.name} made {a(c.colour + ' ' + c.thing)}."])]
    if plot == "journey":
        asks += [
            (f"Where did {c.name} go?", [f"{c.name} went to the {c.place2}."]),
            (
                f"What did {c.name} take along?",
                [f"{c.name} took {c.food} and {a(c.colour + ' ' + c.thing)}."],
            ),
        ]
    return asks


def make(rng: random.Random) -> Document:
    c, plot = cast(rng), rng.choice(list(PLOTS))
    text = story(rng, c, plot)
    asks = questions(rng, c, plot)
    if rng.random() < 0.2:
        ask, answers = rng.choice(asks)
        messages = [("user", f"{text}\n\n{ask}"), ("assistant", rng.choice(answers))]
        asks = [x for x in asks if x[0] != ask]
    else:
        messages = [user(request(rng, c, ASK, plot), rng, 0.1), ("assistant", text)]
    for ask, answers in rng.sample(asks, rng.choice([0, 1, 1, 2, 3])):
        messages += [user(ask, rng, 0.1), ("assistant", rng.choice(answers))]
    if rng.random() < 0.12:
        c2, plot2 = cast(rng), rng.choice(list(PLOTS))
        messages += [
            user(request(rng, c2, ASK, plot2), rng, 0.1),
            ("assistant", story(rng, c2, plot2)),
        ]
    return Document("stories", with_system(messages, rng))
