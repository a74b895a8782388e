"""Knows facts and the ways people ask for them: capitals, continents, elements, everyday things."""

import random
from pathlib import Path

from demo_data.chat import Document, user, with_system
from demo_data.sources import countries, elements

ARTICLE = ("Bahamas", "Netherlands", "Philippines", "United States", "United Kingdom", "United Arab Emirates", "Gambia",
           "Maldives", "Comoros", "Seychelles", "Marshall Islands", "Solomon Islands", "Czech Republic",
           "Dominican Republic", "Central African Republic", "Democratic Republic of the Congo", "Republic of the Congo",
           "Vatican")
ASK_CAPITAL = ["What is the capital of {c}?", "Capital of {c}?", "What's the capital of {c}?", "Tell me the capital of {c}.",
               "Which city is the capital of {c}?", "Name the capital of {c}.", "{c} capital?", "What is {c}'s capital?",
               "What is the capital city of {c}?", "Do you know the capital of {c}?", "capital of {c}",
               "The capital of {c} is which city?", "Can you tell me the capital of {c}?", "{c}: what is its capital?",
               "Give me the capital of {c}.", "I want to know the capital of {c}."]
ASK_CAPITAL_HELD_OUT = ["Please name the capital city of {c}.", "Could you tell me the capital of {c}?",
                        "Which city is {c}'s capital?"]
TELL_CAPITAL = ["The capital of {c} is {k}.", "The capital of {c} is {k}.", "{k} is the capital of {c}.", "{k}.",
                "It is {k}."]

EVERYDAY = """How many days are in a week?|There are seven days in a week.
How many months are in a year?|There are twelve months in a year.
How many hours are in a day?|There are 24 hours in a day.
How many minutes are in an hour?|There are 60 minutes in an hour.
How many seconds are in a minute?|There are 60 seconds in a minute.
How many legs does a spider have?|A spider has eight legs.
How many legs does an insect have?|An insect has six legs.
How many legs does a dog have?|A dog has four legs.
What do bees make?|Bees make honey.
What do cows eat?|Cows eat grass.
What colour is the sky?|On a clear day the sky is blue.
What colour is grass?|Grass is green.
What colour is snow?|Snow is white.
What colour is a banana?|A ripe banana is yellow.
What is the largest planet?|Jupiter is the largest planet in our solar system.
Which planet is closest to the sun?|Mercury is the planet closest to the sun.
What planet do we live on?|We live on the planet Earth.
Which planet is known for its rings?|Saturn is known for its rings.
How many planets are there?|There are eight planets in our solar system.
What is the largest ocean?|The Pacific is the largest ocean.
What is the largest animal?|The blue whale is the largest animal.
What is the tallest animal?|The giraffe is the tallest animal.
What is the fastest land animal?|The cheetah is the fastest land animal.
What is the highest mountain?|Mount Everest is the highest mountain above the sea.
What is water made of?|Water is made of hydrogen and oxygen.
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.
At what temperature does water boil?|Water boils at 100 degrees Celsius at sea level.
What is ice?|Ice is frozen water.
Why is the sky blue?|The air scatters blue light more than red light, so the sky looks blue.
Why do leaves fall in autumn?|Trees drop their leaves in autumn to save water in winter.
What do plants need to grow?|Plants need light, water and air to grow.
What causes the tides?|The pull of the moon and the sun causes the tides.
What is the sun?|The sun is a star.
What is the moon?|The moon goes around the Earth. It shines with light from the sun.
How many sides does a triangle have?|A triangle has three sides.
How many sides does a square have?|A square has four sides.
How many sides does a hexagon have?|A hexagon has six sides.
What is the opposite of hot?|The opposite of hot is cold.
What is the opposite of big?|The opposite of big is small.
What is the opposite of up?|The opposite of up is down.
What is the opposite of early?|The opposite of early is late.
What is the opposite of open?|The opposite of open is closed.
What is the opposite of light?|The opposite of light is dark.
What is the opposite of fast?|The opposite of fast is slow.
What is a young cat called?|A young cat is called a kitten.
What is a young dog called?|A young dog is called a puppy.
What is a young sheep called?|A young sheep is called a lamb.
What is a young cow called?|A young cow is called a calf.
What is a young horse called?|A young horse is called a foal.
What is a young goose called?|A young goose is called a gosling.
What sound does a cow make?|A cow says moo.
What sound does a cat make?|A cat says meow.
What sound does a dog make?|A dog barks.
What sound does a duck make?|A duck quacks.
What are the seasons?|The four seasons are spring, summer, autumn and winter.
What are the primary colours?|The primary colours of paint are red, yellow and blue.
What do you get when you mix blue and yellow?|Blue and yellow paint make green.
What do you get when you mix red and yellow?|Red and yellow paint make orange.
What do you get when you mix red and blue?|Red and blue paint make purple.
Who wrote Emma?|Jane Austen wrote Emma.
Who wrote Pride and Prejudice?|Jane Austen wrote Pride and Prejudice.
Who wrote Persuasion?|Jane Austen wrote Persuasion.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.
What is the first letter of the alphabet?|The first letter of the alphabet is A.
What is the last letter of the alphabet?|The last letter of the alphabet is Z.
How many letters are in the alphabet?|There are 26 letters in the English alphabet.
What do we use to see?|We use our eyes to see.
What do we use to hear?|We use our ears to hear.
What is bread made from?|Bread is made from flour, water and yeast.
What is cheese made from?|Cheese is made from milk.
Where do fish live?|Fish live in water.
What do caterpillars become?|Caterpillars become butterflies.
What do tadpoles become?|Tadpoles become frogs.
What is a dozen?|A dozen is twelve.
How many centimetres are in a metre?|There are 100 centimetres in a metre.
How many metres are in a kilometre?|There are 1000 metres in a kilometre.
How many grams are in a kilogram?|There are 1000 grams in a kilogram.""".split("\n")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


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
        return [user(ask[:1].upper() + ask[1:] if ask[0] == "t" else ask, rng), ("assistant", tell[:1].upper() + tell[1:])]
    if roll < 0.88:
        ask = rng.choice(["{k} is the capital of which country?", "Which country has the capital {k}?"])
        return [user(ask.format(k=city), rng), ("assistant", f"{city} is the capital of {c}.")]
    ask = rng.choice([f"Which continent is {c} in?", f"Where is {c}?", f"On which continent is {c}?"])
    return [user(ask, rng), ("assistant", f"{c[:1].upper() + c[1:]} is in {continent}.")]


def element(rng: random.Random, folder: Path) -> list:
    number, symbol, name = rng.choice(elements(folder)[: rng.choice([20, 50, 100])])
    low = name.lower()
    asks = [(f"What is the symbol for {low}?", f"The symbol for {low} is {symbol}."),
            (f"What is the chemical symbol of {low}?", f"The symbol for {low} is {symbol}."),
            (f"Which element has the symbol {symbol}?", f"{symbol} is the symbol for {low}."),
            (f"What is the atomic number of {low}?", f"The atomic number of {low} is {number}."),
            (f"Which element has atomic number {number}?", f"Element {number} is {low}.")]
    ask, tell = rng.choice(asks)
    return [user(ask, rng, 0.08), ("assistant", tell)]


def everyday(rng: random.Random, _: Path) -> list:
    ask, tell = rng.choice(EVERYDAY).split("|")
    return [user(ask, rng, 0.25), ("assistant", tell)]


def calendar(rng: random.Random, _: Path) -> list:
    names, kind = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i = rng.randrange(len(names))
    after, before = names[(i + 1) % len(names)], names[i - 1]
    asks = [(f"What {kind} comes after {names[i]}?", f"{after} comes after {names[i]}."),
            (f"What {kind} comes before {names[i]}?", f"{before} comes before {names[i]}."),
            (f"Name the {kind}s.", ", ".join(names) + ".")]
    ask, tell = rng.choices(asks, [4, 4, 1])[0]
    return [user(ask, rng), ("assistant", tell)]


def make(rng: random.Random, folder: Path) -> Document:
    messages = []
    for _ in range(rng.choice([1, 2, 3, 4, 6, 8])):
        kind = rng.choices([capital, element, everyday, calendar], [60, 17, 18, 5])[0]
        messages += kind(rng, folder)
    return Document("facts", with_system(messages, rng))
