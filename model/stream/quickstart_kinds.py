"""The kinds of questions in the generated corpus: what each asks, how it is worded, how it is answered.

Easy kinds (copy, first word, even or odd) are there so that a tiny GPT-2 answers right within two minutes of CPU; hard ones (dates, sums
that carry) so that a larger one still has something to learn. Digits are written apart ("4 7 2"): each is a token of its own then.

Everything is invented or computed. Even the towns, flags and bakers of `WORLD` exist nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Fields = dict[str, str]
"""What a template's {names} stand for."""
Template = tuple[tuple[str, ...], str, str]
"""Ways to ask, the reasoning, the answer."""

WORDS = {
    "en": "apple bird cloud door egg fish garden hill island jar key lamp moon night ocean pear queen river stone tree uncle voice wind yard",
    "fr": "arbre banc bateau bois carte chat cheval chien clef coq eau fleur four gant jardin lac lait lampe loup lune main mer mont neige",
    "es": "agua arco barco bosque caballo calle campo casa cielo copa flor fuego gato lago leche libro luna luz mano mar mesa nube pan pez",
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "es": "lunes martes miércoles jueves viernes sábado domingo",
}
COUNTS = {"en": "one two three four five six", "fr": "un deux trois quatre cinq six", "es": "uno dos tres cuatro cinco seis"}
PARITY = {"en": "even odd", "fr": "pair impair", "es": "par impar"}
YES_NO = {"en": "yes no", "fr": "oui non", "es": "sí no"}
OPPOSITES = (
    "hot cold, big small, up down, old new, fast slow, high low, wet dry, full empty, hard soft, left right, good bad, rich poor"
)
UNITS = (
    ("weeks", "days", 7),
    ("hours", "minutes", 60),
    ("metres", "centimetres", 100),
    ("dozen", "eggs", 12),
    ("kilograms", "grams", 1000),
)
TOWNS = "Aster Elm Haven Nova Orion Raven Thorn Vale"
WORLD = {
    "flag": "red blue green white",
    "baker": "Anna Ben Clara David",
    "doctor": "Grace Henry Jack Kate",
}
"""Each town has one of each; `_town` says which."""


@dataclass(frozen=True)
class Kind:
    """One kind of question."""

    share: float
    """Weight among the kinds."""
    draw: Callable[[random.Random, str], Fields]
    """A question's content in a language. Its field `about` names the article: equal content, equal name."""
    templates: dict[str, Template]
    """By language."""
    recalled: bool = False
    """The answer is a fact that must be known, not worked out: then the wording belongs to the article,
    so that a fact asked in held-out articles was seen, in other words, in training."""


def _words(rng: random.Random, language: str, low: int, high: int) -> list[str]:
    return rng.sample(WORDS[language].split(), rng.randint(low, high))


def _listed_words(low: int, high: int) -> Callable[[random.Random, str], Fields]:
    def draw(rng: random.Random, language: str) -> Fields:
        words = _words(rng, language, low, high)
        counted = ", ".join(f"{word} {number}" for number, word in enumerate(words, 1))
        return {
            "about": "-".join(words),
            "words": " ".join(words),
            "first": words[0],
            "last": words[-1],
            "reversed": " ".join(reversed(words)),
            "counted": counted,
            "count": str(len(words)),
        }

    return draw


def _repeat(rng: random.Random, language: str) -> Fields:
    (word,), times = _words(rng, language, 1, 1), rng.randint(2, 4)
    return {"about": f"{word}-{times}", "word": word, "times": COUNTS[language].split()[times - 1], "repeated": " ".join([word] * times)}


def _odd_one_out(rng: random.Random, language: str) -> Fields:
    usual, odd = _words(rng, language, 2, 2)
    words = [usual, usual, usual]
    words.insert(rng.randint(0, 3), odd)
    return {"about": "-".join(words), "words": " ".join(words), "usual": usual, "odd": odd}


def _parity(rng: random.Random, language: str) -> Fields:
    number = [rng.randint(1, 9), *(rng.randint(0, 9) for _ in range(rng.randint(1, 2)))]
    digits = " ".join(map(str, number))
    return {"about": digits.replace(" ", ""), "digits": digits, "last": digits[-1], "parity": PARITY[language].split()[number[-1] % 2]}


def _compare(rng: random.Random, language: str) -> Fields:
    a, b = rng.sample(range(21), 2)
    yes, no = YES_NO[language].split()
    return {
        "about": f"{min(a, b)}-{max(a, b)}",
        "a": str(a),
        "b": str(b),
        "larger": str(max(a, b)),
        "smaller": str(min(a, b)),
        "yes": yes if a > b else no,
    }


def _sort(rng: random.Random, language: str) -> Fields:
    digits = rng.sample(range(10), 3)
    low, middle, high = sorted(digits)
    return {
        "about": f"{low}{middle}{high}",
        "digits": " ".join(map(str, digits)),
        "low": str(low),
        "middle": str(middle),
        "high": str(high),
    }


def _sum_of_digits(rng: random.Random, language: str) -> Fields:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"about": f"{a}-{b}", "a": str(a), "b": str(b), "sum": str(a + b)}


def _sum(carry: bool) -> Callable[[random.Random, str], Fields]:
    def draw(rng: random.Random, language: str) -> Fields:
        while True:
            (a, b), (c, d) = (rng.randint(1, 9), rng.randint(0, 9)), (rng.randint(1, 9), rng.randint(0, 9))
            if (b + d > 9) == carry and a + c + carry < 10:
                break
        return {
            "about": f"{a}{b}-{c}{d}",
            **{"a": str(a), "b": str(b), "c": str(c), "d": str(d)},
            "ones": " ".join(str(b + d)),
            "one": str((b + d) % 10),
            "ten": str(a + c + carry),
        }

    return draw


def _day_after(low: int, high: int) -> Callable[[random.Random, str], Fields]:
    def draw(rng: random.Random, language: str) -> Fields:
        names, day, later = DAYS[language].split(), rng.randrange(7), rng.randint(low, high)
        between = ", ".join(names[(day + step) % 7] for step in range(1, later + 1))
        about = f"{DAYS['en'].split()[day]}-{later}"
        return {"about": about, "day": names[day], "later": str(later), "between": between, "then": names[(day + later) % 7]}

    return draw


def _date(rng: random.Random, language: str) -> Fields:
    names, day, first, later = DAYS[language].split(), rng.randrange(7), rng.randint(1, 24), rng.randint(1, 5)
    return {
        "about": f"{names[day]}-{first}-{later}",
        "day": names[day],
        "from": str(first),
        "to": str(first + later),
        "later": str(later),
        "between": ", ".join(names[(day + step) % 7] for step in range(1, later + 1)),
        "then": names[(day + later) % 7],
    }


def _first_letter(rng: random.Random, language: str) -> Fields:
    (word,) = _words(rng, language, 1, 1)
    return {"about": word, "word": word, "letter": word[0]}


def _opposite(rng: random.Random, language: str) -> Fields:
    pair = rng.choice(OPPOSITES.split(", ")).split()
    a, b = rng.sample(pair, 2)
    return {"about": a, "a": a, "b": b}


def _unit(rng: random.Random, language: str) -> Fields:
    (large, small, ratio), count = rng.choice(UNITS), rng.randint(2, 9)
    return {
        "about": f"{count}-{large}",
        **{"count": str(count), "large": large, "small": small, "ratio": str(ratio), "product": str(count * ratio)},
    }


def _town(rng: random.Random, language: str) -> Fields:
    town, what = rng.choice(TOWNS.split()), rng.choice(list(WORLD))
    value = random.Random(f"{town}'s {what}").choice(WORLD[what].split())  # the same in every corpus
    return {"about": f"{town}-{what}", "town": town, "what": what, "value": value}


KINDS: dict[str, Kind] = {
    "copy words": Kind(9, _listed_words(1, 2), {"en": (("Copy {words}.", "Write {words}."), "The text is {words}.", "{words}")}),
    "repeat": Kind(9, _repeat, {"en": (("Say {word} {times} times.", "Repeat {word} {times} times."), "The word is {word}.", "{repeated}")}),
    "first letter": Kind(9, _first_letter, {"en": (("What is the first letter of {word}?", "Which letter begins {word}?", "How does {word} begin?"), "The word {word} begins with {letter}.", "{letter}")}, recalled=True),
    "opposites": Kind(9, _opposite, {"en": (("What is the opposite of {a}?", "Name the opposite of {a}.", "What is not {a}?"), "The opposite of {a} is {b}.", "{b}")}, recalled=True),
    "town facts": Kind(9, _town, {"en": (("What is the {what} of {town}?", "Name the {what} of {town}.", "Which {what} has {town}?"), "The {what} of {town} is {value}.", "{value}")}, recalled=True),
    "even or odd": Kind(9, _parity, {"en": (("Is {digits} even or odd?", "Even or odd: {digits}?"), "It ends in {last}, which is {parity}.", "{parity}")}),
    "larger number": Kind(9, _compare, {"en": (("Which is larger, {a} or {b}?", "What is the larger of {a} and {b}?"), "We know {larger} > {smaller}.", "{larger}")}),
    "first word": Kind(6, _listed_words(2, 3), {"en": (("What is the first word of {words}?", "Which word comes first in {words}?"), "It begins with {first}.", "{first}")}),
    "last word": Kind(6, _listed_words(2, 3), {"en": (("What is the last word of {words}?", "Which word comes last in {words}?"), "It ends with {last}.", "{last}")}),
    "add digits": Kind(6, _sum_of_digits, {"en": (("What is {a} + {b}?", "Add {a} and {b}."), "We have {a} + {b} = {sum}.", "{sum}")}),
    "count words": Kind(3, _listed_words(1, 4), {"en": (("How many words are in {words}?", "Count the words {words}."), "The count: {counted}.", "{count}")}),
    "reverse words": Kind(2, _listed_words(2, 3), {"en": (("Reverse the words {words}.", "Say {words} backwards."), "The last is {last}, so {reversed}.", "{reversed}")}),
    "odd one out": Kind(2, _odd_one_out, {"en": (("Which differs in {words}?", "Find the odd one in {words}."), "Most are {usual}, not {odd}.", "{odd}")}),
    "compare numbers": Kind(3, _compare, {"en": (("Is {a} larger than {b}?", "Is {a} more than {b}?"), "We know {larger} > {smaller}.", "{yes}")}),
    "sort numbers": Kind(2, _sort, {"en": (("Sort {digits}.", "Put {digits} in order."), "First {low}, then {middle}, then {high}.", "{low} {middle} {high}")}),
    "add numbers": Kind(2, _sum(carry=False), {"en": (("What is {a} {b} + {c} {d}?", "Add {a} {b} and {c} {d}."), "Ones {b} + {d} = {one}, tens {a} + {c} = {ten}.", "{ten} {one}")}),
    "add with carry": Kind(1.5, _sum(carry=True), {"en": (("What is {a} {b} + {c} {d}?", "Add {a} {b} and {c} {d}."), "Ones {b} + {d} = {ones}, tens {a} + {c} + 1 = {ten}.", "{ten} {one}")}),
    "week days": Kind(2, _day_after(1, 4), {"en": (("What day is {later} days after {day}?", "{later} days after {day} is which day?"), "Then {between}.", "{then}")}),
    "dates": Kind(1.5, _date, {"en": (("If May {from} is a {day}, what is May {to}?",), "It is {later} later: {between}.", "{then}")}),
    "units": Kind(2, _unit, {"en": (("How many {small} are {count} {large}?", "Turn {count} {large} into {small}."), "Each is {ratio}, so {count} x {ratio} = {product}.", "{product}")}, recalled=True),
}
