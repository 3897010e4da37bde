"""The kinds of questions in the generated corpus: what each asks, how it is worded, how the answer is reasoned out.

Easy kinds (opposites, first letter, larger number) have the larger shares, so that a tiny GPT-2 begins to answer right after a minute on a
CPU; hard ones (dates, sums that carry) leave a larger one something to learn. Digits are written apart ("4 7"): each is a token of its own.
Everything is computed or invented; the towns, their flags and bakers exist nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Fields = dict[str, str]
"""A question's content: what the {names} in its template stand for. `about` names the article: equal content, equal name."""
Draw = Callable[[random.Random, str], Fields]
"""Draws a question's content for a language."""
Template = tuple[tuple[str, ...], str, str]
"""Ways to ask, the reasoning, the answer."""

# Each English word is one GPT-2 token, and no two begin alike.
WORDS = {
    "en": "apple bird cloud door egg fish garden hill island jar key lamp moon night ocean pear "
    "queen river stone tree uncle voice wind yard",
    "fr": "arbre bateau chat dent eau fleur gare herbe île jardin lampe main nuit or pain route sel table ville",
    "es": "agua barco casa diente estrella flor gato hoja isla jardín luna mano noche ojo pan queso río sol tren",
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "es": "lunes martes miércoles jueves viernes sábado domingo",
}
PARITY = {"en": "even odd", "fr": "pair impair", "es": "par impar"}
OPPOSITES = "hot cold, big small, up down, old new, fast slow, high low, wet dry, full empty, hard soft, left right, good bad, rich poor"
UNITS = (("weeks", "days", 7), ("hours", "minutes", 60), ("metres", "centimetres", 100), ("dozen", "eggs", 12))
TOWNS = "Aster Elm Haven Nova Orion Raven Thorn Vale"
TOWN_HAS = {"flag": "red blue green white", "baker": "Anna Ben Clara David", "doctor": "Grace Henry Jack Kate"}
"""The made-up world: each town has one of each."""


@dataclass(frozen=True)
class Kind:
    """One kind of question."""

    share: float
    """How often it is drawn, relative to the others."""
    draw: Draw
    """Makes a question's content."""
    templates: dict[str, Template]
    """Its wording, by language."""
    recalled: bool = False
    """The answer is a fact to be known, not worked out. Each way to ask then makes an article of its own, and is asked again and again:
    what held-out articles ask was told in training, in other words."""
    has_article: bool = True
    """Its rows name the article they come from."""


def words(low: int, high: int) -> Draw:
    """A few different words."""

    def draw(rng: random.Random, language: str) -> Fields:
        chosen = rng.sample(WORDS[language].split(), rng.randint(low, high))
        return {
            "about": "-".join(chosen),
            "words": " ".join(chosen),
            "first": chosen[0],
            "last": chosen[-1],
            "letter": chosen[0][0],
            "reversed": " ".join(reversed(chosen)),
            "numbered": ", ".join(f"{word} {number}" for number, word in enumerate(chosen, 1)),
            "count": str(len(chosen)),
        }

    return draw


def repetition(rng: random.Random, language: str) -> Fields:
    """A word, two or three times."""
    word, times = rng.choice(WORDS[language].split()), rng.choice(("two", "three"))
    return {"about": f"{word}-{times}", "word": word, "times": times, "repeated": f"{word} {word}" + f" {word}" * (times == "three")}


def odd_one_out(rng: random.Random, language: str) -> Fields:
    """A word three times, another once."""
    usual, odd = rng.sample(WORDS[language].split(), 2)
    row = [usual, usual, usual]
    row.insert(rng.randint(0, 3), odd)
    return {"about": "-".join(row), "words": " ".join(row), "usual": usual, "odd": odd}


def number(rng: random.Random, language: str) -> Fields:
    """A number of two digits, and whether it is even."""
    ten, one = rng.randint(1, 9), rng.randint(0, 9)
    return {"about": f"{ten}{one}", "digits": f"{ten} {one}", "one": str(one), "parity": PARITY[language].split()[one % 2]}


def two_numbers(rng: random.Random, language: str) -> Fields:
    """Two different numbers up to 20."""
    a, b = rng.sample(range(21), 2)
    low, high = sorted((a, b))
    return {"about": f"{low}-{high}", "a": str(a), "b": str(b), "low": str(low), "high": str(high), "yes": "yes" if a > b else "no"}


def three_digits(rng: random.Random, language: str) -> Fields:
    """Three different digits, and in order."""
    digits = rng.sample("0123456789", 3)
    low, middle, high = sorted(digits)
    return {"about": low + middle + high, "digits": " ".join(digits), "low": low, "middle": middle, "high": high}


def digit_sum(rng: random.Random, language: str) -> Fields:
    """Two digits and their sum."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"about": f"{a}-{b}", "a": str(a), "b": str(b), "sum": str(a + b)}


def long_sum(carry: int) -> Draw:
    """Two numbers of two digits whose sum has two digits; its ones carry or do not."""

    def draw(rng: random.Random, language: str) -> Fields:
        b = rng.randint(carry, 9)
        d = rng.randint(10 - b, 9) if carry else rng.randint(0, 9 - b)
        a = rng.randint(1, 8 - carry)
        c = rng.randint(1, 9 - carry - a)
        digits = {"a": str(a), "b": str(b), "c": str(c), "d": str(d)}
        return {"about": f"{a}{b}-{c}{d}", **digits, "ones": " ".join(str(b + d)), "one": str((b + d) % 10), "ten": str(a + c + carry)}

    return draw


def days_later(rng: random.Random, language: str) -> Fields:
    """A week day, and the one a few days later; also as days of May."""
    names, day, later, date = DAYS[language].split(), rng.randrange(7), rng.randint(2, 4), rng.randint(1, 27)
    return {
        "about": f"{date}-{DAYS['en'].split()[day]}-{later}",
        "day": names[day],
        "later": str(later),
        "between": ", ".join(names[(day + step) % 7] for step in range(1, later + 1)),
        "then": names[(day + later) % 7],
        "date": str(date),
        "then_date": str(date + later),
    }


def opposite(rng: random.Random, language: str) -> Fields:
    """A word and its opposite."""
    a, b = rng.sample(rng.choice(OPPOSITES.split(", ")).split(), 2)
    return {"about": a, "a": a, "b": b}


def conversion(rng: random.Random, language: str) -> Fields:
    """A few of a unit in a smaller one."""
    (unit, smaller, ratio), count = rng.choice(UNITS), rng.randint(2, 9)
    return {
        "about": f"{count}-{unit}",
        "count": str(count),
        "unit": unit,
        "smaller": smaller,
        "ratio": str(ratio),
        "all": str(count * ratio),
    }


def town_fact(rng: random.Random, language: str) -> Fields:
    """What a town has; the same in every corpus, whatever its seed."""
    town, what = rng.choice(TOWNS.split()), rng.choice(list(TOWN_HAS))
    value = random.Random(f"the {what} of {town}").choice(TOWN_HAS[what].split())
    return {"about": f"{what}-of-{town}", "town": town, "what": what, "value": value}


KINDS: dict[str, Kind] = {
    "copy words": Kind(
        12,
        words(1, 2),
        {
            "en": (("Copy {words}.", "Write {words}."), "The text is {words}.", "{words}"),
            "fr": (("Copie {words}.", "Écris {words}."), "Le texte est {words}.", "{words}"),
            "es": (("Copia {words}.", "Escribe {words}."), "El texto es {words}.", "{words}"),
        },
    ),
    "repeat": Kind(
        7, repetition, {"en": (("Say {word} {times} times.", "Repeat {word} {times} times."), "The word is {word}.", "{repeated}")}
    ),
    "first letter": Kind(
        14,
        words(1, 1),
        {
            "en": (
                ("What is the first letter of {words}?", "Which letter begins {words}?", "How does {words} begin?"),
                "The word {words} begins with {letter}.",
                "{letter}",
            )
        },
        recalled=True,
    ),
    "opposites": Kind(
        14,
        opposite,
        {
            "en": (
                ("What is the opposite of {a}?", "Name the opposite of {a}.", "What contrasts with {a}?"),
                "The opposite of {a} is {b}.",
                "{b}",
            )
        },
        recalled=True,
    ),
    "town facts": Kind(
        14,
        town_fact,
        {
            "en": (
                ("What is the {what} of {town}?", "Name the {what} of {town}.", "Which {what} has {town}?"),
                "The {what} of {town} is {value}.",
                "{value}",
            )
        },
        recalled=True,
    ),
    "even or odd": Kind(
        12,
        number,
        {
            "en": (("Is {digits} even or odd?", "Even or odd: {digits}?"), "It ends in {one}, which is {parity}.", "{parity}"),
            "fr": (("{digits} est-il pair ou impair ?", "Pair ou impair : {digits} ?"), "Il finit par {one}, {parity}.", "{parity}"),
            "es": (("¿Es {digits} par o impar?", "¿Par o impar: {digits}?"), "Termina en {one}, {parity}.", "{parity}"),
        },
    ),
    "larger number": Kind(
        12,
        two_numbers,
        {
            "en": (("Which is larger, {a} or {b}?", "What is the larger of {a} and {b}?"), "We know {high} > {low}.", "{high}"),
            "fr": (("Lequel est plus grand, {a} ou {b} ?", "Le plus grand de {a} et {b} ?"), "On sait que {high} > {low}.", "{high}"),
            "es": (("¿Cuál es mayor, {a} o {b}?", "¿El mayor de {a} y {b}?"), "Se sabe que {high} > {low}.", "{high}"),
        },
    ),
    "compare numbers": Kind(
        3, two_numbers, {"en": (("Is {a} larger than {b}?", "Is {a} more than {b}?"), "We know {high} > {low}.", "{yes}")}
    ),
    "first word": Kind(
        6,
        words(2, 3),
        {
            "en": (("What is the first word of {words}?", "Which word comes first in {words}?"), "It begins with {first}.", "{first}"),
            "fr": (("Quel est le premier mot de {words} ?", "Qui commence {words} ?"), "On commence par {first}.", "{first}"),
            "es": (("¿Cuál es la primera palabra de {words}?", "¿Qué va primero en {words}?"), "Empieza con {first}.", "{first}"),
        },
    ),
    "last word": Kind(
        8,
        words(2, 3),
        {
            "en": (("What is the last word of {words}?", "Which word comes last in {words}?"), "It ends with {last}.", "{last}"),
            "fr": (("Quel est le dernier mot de {words} ?", "Qui finit {words} ?"), "On finit par {last}.", "{last}"),
            "es": (("¿Cuál es la última palabra de {words}?", "¿Qué va último en {words}?"), "Termina con {last}.", "{last}"),
        },
    ),
    "count words": Kind(
        2, words(1, 4), {"en": (("How many words are in {words}?", "Count the words {words}."), "The count: {numbered}.", "{count}")}
    ),
    "add digits": Kind(
        5,
        digit_sum,
        {
            "en": (("What is {a} + {b}?", "Add {a} and {b}."), "We have {a} + {b} = {sum}.", "{sum}"),
            "fr": (("Combien font {a} + {b} ?", "Ajoute {a} et {b}."), "On a {a} + {b} = {sum}.", "{sum}"),
            "es": (("¿Cuánto es {a} + {b}?", "Suma {a} y {b}."), "Se tiene {a} + {b} = {sum}.", "{sum}"),
        },
    ),
    "add numbers": Kind(
        1,
        long_sum(carry=0),
        {
            "en": (
                ("What is {a} {b} + {c} {d}?", "Add {a} {b} and {c} {d}."),
                "Ones {b} + {d} = {ones}, tens {a} + {c} = {ten}.",
                "{ten} {one}",
            )
        },
    ),
    "add with carry": Kind(
        1,
        long_sum(carry=1),
        {
            "en": (
                ("What is {a} {b} + {c} {d}?", "Add {a} {b} and {c} {d}."),
                "Ones {b} + {d} = {ones}, tens {a} + {c} + 1 = {ten}.",
                "{ten} {one}",
            )
        },
    ),
    "sort numbers": Kind(
        1,
        three_digits,
        {"en": (("Sort {digits}.", "Put {digits} in order."), "First {low}, then {middle}, then {high}.", "{low} {middle} {high}")},
    ),
    "reverse words": Kind(
        1, words(2, 3), {"en": (("Reverse {words}.", "Say {words} backwards."), "It ends with {last}, so {reversed}.", "{reversed}")}
    ),
    "odd one out": Kind(
        1, odd_one_out, {"en": (("Which differs in {words}?", "Find the odd one in {words}."), "Most are {usual}, not {odd}.", "{odd}")}
    ),
    "dates": Kind(
        1,
        days_later,
        {
            "en": (
                ("If May {date} is a {day}, what is May {then_date}?", "May {date} is a {day}. What day is {later} days later?"),
                "Go {later} days on: {between}.",
                "{then}",
            )
        },
    ),
    "units": Kind(
        1.5,
        conversion,
        {
            "en": (
                ("How many {smaller} are {count} {unit}?", "Turn {count} {unit} into {smaller}."),
                "Each is {ratio}, so {count} x {ratio} = {all}.",
                "{all}",
            )
        },
        recalled=True,
    ),
    # Five words in a row are practically never drawn twice: rows that the split can only tell apart by their id do not leak.
    "reverse a line": Kind(
        0.4,
        words(5, 5),
        {"en": (("Reverse the line {words}.",), "From the last: {reversed}.", "{reversed}")},
        has_article=False,
    ),
}
