"""Knows the word lists the generators draw from: names, animals, things, places."""

import random


def split(text: str) -> list[str]:
    return text.split()


FEMALE = split(
    """
    Ada Agnes Aisha Alba Alice Alma Amara Amelia Amina Ana Anika Anna Anya Astrid Ava
    Beatrice Bella Bianca Bridget Camila Carla Celia Chiara Clara Cora Dalia Dana Daphne
    Diana Dora Edith Elena Elif Elisa Ella Elsa Emilia Emma Erika Esther Eva Farah Fatima
    Fiona Flora Freya Frida Gemma Gina Greta Gwen Hana Hannah Hazel Heidi Helena Ida Ines
    Ingrid Irene Iris Isabel Ivy Jana Jasmine Joan Johanna Judith Julia June Kaia Karin
    Katya Kira Lara Laura Leila Lena Leonie Lila Lily Linda Lisa Livia Lola Lotte Lucia Lucy
    Luna Lydia Maeve Magda Maja Malia Mara Margo Maria Marina Marta Mary Matilda Maya Meera
    Mia Mila Mina Mira Molly Mona Nadia Naomi Nell Nina Nora Nour Olga Olive Olivia Paula
    Pearl Petra Phoebe Pia Polly Priya Rosa Rosie Ruby Ruth Sadie Salma Sara Selma Sienna
    Signe Silvia Sofia Stella Tamar Tara Tess Thea Tilda Tina Uma Vera Viola Wanda Wilma
    Yara Yasmin Yuki Zara Zelda Zoe
    """
)
MALE = split(
    """
    Aaron Abel Adam Adil Ahmed Alan Albert Alex Amir Anders Andre Anton Arlo Arthur Asher
    Axel Ben Bjorn Boris Bruno Caleb Carl Carlos Cyrus Daniel Dario David Diego Dylan Eddie
    Eli Elias Emil Enzo Eric Ernst Ethan Evan Ezra Fabio Felix Finn Frank Fred Gabriel
    George Gus Hamid Hans Harry Hassan Hector Henry Hugo Ian Ibrahim Igor Ilya Isaac Ivan
    Ivo Jack Jacob Jakob James Jan Jasper Joel Johan John Jonas Jorge Jose Josef Juan Jules
    Kai Karim Karl Kenji Kofi Lars Leo Leon Levi Liam Linus Louis Luca Lukas Luis Magnus
    Malik Marco Mario Mark Martin Mateo Max Micah Miguel Milo Mohan Nathan Ned Neil Nico
    Niels Nils Noah Oleg Oliver Omar Oscar Otis Otto Owen Pablo Paul Pedro Peter Philip
    Rafael Raj Ralph Ravi Remy Robin Roman Rory Ruben Sam Samir Samuel Sanjay Sasha Sean
    Simon Soren Stefan Sven Tariq Theo Thomas Tim Timo Tobias Tom Tomas Tony Umar Victor
    Viktor Vito Walter Will Yusuf Zach Zeno
    """
)
NAMES = FEMALE + MALE
ANIMALS = split(
    """
    fox bear rabbit hedgehog owl mouse turtle otter squirrel badger frog duck goose cat dog
    wolf deer hare sparrow robin heron crow donkey goat sheep pony beaver mole penguin seal
    lion tiger elephant monkey camel crab snail bee ant dragon lizard parrot swan hen kitten
    puppy lamb
    """
)
JOBS = split(
    """
    baker sailor gardener farmer teacher painter tailor miller fisherman shepherd carpenter
    clockmaker librarian doctor nurse pilot postman cook blacksmith weaver beekeeper
    musician scientist potter
    """
)
THINGS = split(
    """
    key lantern kite drum book map compass bell hat scarf boat basket ring clock flute
    ladder mirror blanket cup spoon coin button feather shell stone letter box ball whistle
    candle rope hammer umbrella violin bottle bag coat necklace telescope teapot pencil
    brush glove crown wheel puzzle star
    """
)
PLACES = split(
    """
    forest village harbour mountain meadow river castle island desert city farm garden
    library market school valley lake beach cave mill bridge tower orchard museum station
    bakery hill swamp field
    """
)
COLOURS = split("red blue green yellow white black brown purple orange pink grey golden silver")
FOODS = split(
    """
    apples bread soup cheese pears plums rice honey cake noodles berries pancakes carrots
    beans cherries tomatoes potatoes grapes lemons dumplings pie porridge
    """
)
ADJECTIVES = split(
    """
    small brave quiet clever kind curious shy cheerful old young gentle busy lonely proud
    patient
    """
)
TOWNS = split(
    """
    Lisbon Bergen Oslo Cairo Lima Quito Kyoto Osaka Hamburg Turin Porto Leeds York Boston
    Denver Madrid Paris Rome Vienna Prague Dublin Athens Delhi Nairobi Accra Seoul Hanoi
    Sydney Toronto Chicago Zurich Geneva Krakow Ghent
    """
)
HOBBIES = split(
    """
    swimming chess painting running cooking singing dancing reading cycling fishing
    gardening climbing knitting sailing skating hiking football tennis drawing baking
    """
)

_ONSETS = split("b br d dr f g gr h j k kr l m n p r s st t th tr v w z")
_NUCLEI = split("a e i o u ai ea io")
_CODAS = ["", "", "", "l", "n", "r", "s", "k", "m", "x"]


def invented_name(rng: random.Random) -> str:
    syllables = rng.choice([2, 2, 3])
    word = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(syllables))
    return (word + rng.choice(_CODAS)).capitalize()


def any_name(rng: random.Random) -> str:
    return invented_name(rng) if rng.random() < 0.15 else rng.choice(NAMES)


def pronouns(name: str, rng: random.Random) -> tuple[str, str, str]:
    """Subject, object, possessive: by the lists, by chance for an invented name."""
    female = name in FEMALE if name in NAMES else rng.random() < 0.5
    return ("she", "her", "her") if female else ("he", "him", "his")


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return noun + ("es" if noun[-1] in "sxh" else "s")


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]
