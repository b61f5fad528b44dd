"""Ten small tools over short lists, dates and a seeded world, for tool_conversations.py.

Each tool has the schema of its arguments, the function that runs it, and the words that ask for it.
Facts about the world are the same in every conversation.
"""

import dataclasses
import datetime
import json
import random
import string
from collections.abc import Callable, Iterable
from typing import Any

from nanollama_jax.errors import BadInput

LARGEST = 10**15  # of a number that a call may give
CITIES = {
    "Lima": -5,
    "Quito": -5,
    "Havana": -5,
    "Boston": -5,
    "Chicago": -6,
    "Denver": -7,
    "Dakar": 0,
    "London": 0,
    "Lisbon": 0,
    "Oslo": 1,
    "Paris": 1,
    "Rome": 1,
    "Berlin": 1,
    "Madrid": 1,
    "Lagos": 1,
    "Cairo": 2,
    "Athens": 2,
    "Nairobi": 3,
    "Dubai": 4,
    "Dhaka": 6,
    "Hanoi": 7,
    "Manila": 8,
    "Tokyo": 9,
    "Sydney": 10,
}  # hours from UTC, in winter as in summer
ITEMS = (
    "lamp",
    "chair",
    "table",
    "book",
    "pen",
    "cup",
    "hat",
    "coat",
    "shirt",
    "bag",
    "ball",
    "clock",
    "lemon",
    "cake",
    "spoon",
    "plate",
    "rope",
    "map",
    "ring",
    "boat",
)
SKIES = ("sun", "rain", "snow", "clouds", "fog", "wind")
UNITS = {
    "g": ("mass", 1),
    "kg": ("mass", 1000),
    "m": ("length", 1),
    "km": ("length", 1000),
    "hours": ("time", 1),
    "days": ("time", 24),
}
CONVERSIONS = (("kg", "g"), ("g", "kg"), ("km", "m"), ("m", "km"), ("days", "hours"))
OPERATIONS = {"add": "plus", "subtract": "minus", "multiply": "times", "divide": "divided by"}
WORDS = (
    "banana",
    "summer",
    "window",
    "pepper",
    "garden",
    "butter",
    "coffee",
    "cheese",
    "bottle",
    "ladder",
    "monkey",
    "orange",
    "puzzle",
    "rabbit",
    "school",
    "silver",
    "spring",
    "street",
    "ticket",
    "tomato",
    "valley",
    "winter",
    "yellow",
    "basket",
)

Call = tuple[str, dict[str, Any]]  # name, arguments


@dataclasses.dataclass(frozen=True)
class Missing:
    argument: str  # that the request leaves out
    asks: str
    replies: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]  # by split


@dataclasses.dataclass(frozen=True)
class Tool:
    """Templates have the arguments' names in braces, `answer` also the result's; {sign} is the word
    for an operation."""

    description: str
    properties: dict[str, dict[str, Any]]  # JSON schemas of the arguments, all required
    run: Callable[..., dict[str, Any]]
    draw: Callable[[random.Random], tuple[Any, ...]]  # arguments, in order
    finds: str
    answer: str
    requests: dict[str, tuple[str, ...]]  # by split
    missing: Missing | None = None


def schema(name: str) -> dict[str, Any]:
    """A tool as a row lists it: {"name", "description", "parameters": JSON schema}."""
    properties = TOOLS[name].properties
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": TOOLS[name].description, "parameters": parameters}


def execute(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs a tool. Raises `BadInput` for an unknown tool or for arguments that it does not take."""
    if name not in TOOLS:
        raise BadInput(f"there is no tool {name!r}: there are {', '.join(TOOLS)}")
    properties = TOOLS[name].properties
    if set(arguments) != set(properties):
        raise BadInput(
            f"{name} takes {', '.join(properties)}, not {', '.join(arguments) or 'nothing'}: give "
            "all of them and no others"
        )
    for argument, value in arguments.items():
        kind, among = properties[argument]["type"], properties[argument].get("enum")
        if isinstance(value, bool) or not isinstance(
            value, {"string": str, "integer": int, "number": int | float}[kind]
        ):
            raise BadInput(f"{name}: `{argument}` is {value!r}, not of type {kind}")
        if not isinstance(value, str) and not abs(value) < LARGEST:
            raise BadInput(f"{name}: `{argument}` is too large")
        if among and value not in among:
            raise BadInput(f"{name}: `{argument}` is {value!r}: give one of {', '.join(among)}")
    try:
        return TOOLS[name].run(**arguments)
    except (ValueError, KeyError, ArithmeticError) as error:
        raise BadInput(f"{name} cannot take {json.dumps(arguments)}: {error!r}") from error


def _calculate(operation: str, a: float, b: float) -> dict[str, Any]:
    if operation == "divide":
        result = a / b
    else:
        result = {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]
    return {"result": _whole(round(result, 2))}


def _convert_units(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    (quantity, size), (to_quantity, to_size) = UNITS[from_unit], UNITS[to_unit]
    if quantity != to_quantity:
        raise ValueError(f"{from_unit} is a {quantity}, {to_unit} a {to_quantity}")
    return {"result": _whole(round(value * size / to_size, 5))}


def _convert_time(time: str, from_city: str, to_city: str) -> dict[str, Any]:
    at = datetime.datetime.strptime(time, "%H:%M") + datetime.timedelta(
        hours=CITIES[to_city] - CITIES[from_city]
    )
    return {"result": at.strftime("%H:%M")}


def _add_days(date: str, days: int) -> dict[str, Any]:
    return {"result": (datetime.date.fromisoformat(date) + datetime.timedelta(days)).isoformat()}


def _days_between(start: str, end: str) -> dict[str, Any]:
    return {"days": (datetime.date.fromisoformat(end) - datetime.date.fromisoformat(start)).days}


def _get_price(item: str, city: str) -> dict[str, Any]:
    return {"price": _world("price", _known(item, ITEMS), _known(city, CITIES)).randint(2, 60)}


def _get_population(city: str) -> dict[str, Any]:
    return {"population": 1000 * _world("population", _known(city, CITIES)).randint(100, 9000)}


def _get_weather(city: str, date: str) -> dict[str, Any]:
    rng = _world("weather", _known(city, CITIES), datetime.date.fromisoformat(date).isoformat())
    return {"sky": rng.choice(SKIES), "temperature": rng.randint(-5, 35)}


def _get_distance(from_city: str, to_city: str) -> dict[str, Any]:
    cities = sorted((_known(from_city, CITIES), _known(to_city, CITIES)))
    return {"km": 10 * _world("distance", *cities).randint(20, 1500)}


def _count_letter(word: str, letter: str) -> dict[str, Any]:
    if len(letter) != 1:
        raise ValueError("`letter` is not one letter")
    return {"count": word.count(letter)}


def _world(*names: str) -> random.Random:
    """The generator of the facts about `names`, the same in every conversation."""
    return random.Random(f"world {' '.join(names)}")


def _known(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"{name} is unknown")
    return name


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _date(rng: random.Random) -> str:
    return (datetime.date(2024, 1, 1) + datetime.timedelta(rng.randrange(3 * 365))).isoformat()


def _two_dates(rng: random.Random) -> tuple[str, str]:
    start = _date(rng)
    return start, _add_days(start, rng.randint(2, 60))["result"]


def _letter_and_word(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return word, rng.choice(rng.choice((word, string.ascii_lowercase)))


_STRING, _NUMBER, _INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_UNIT = _STRING | {"enum": list(UNITS)}

TOOLS = {
    "calculate": Tool(
        description="Calculate with two numbers",
        properties={"operation": _STRING | {"enum": list(OPERATIONS)}, "a": _NUMBER, "b": _NUMBER},
        run=_calculate,
        draw=lambda rng: (rng.choice(tuple(OPERATIONS)), rng.randint(2, 99), rng.randint(2, 99)),
        finds="{a} {sign} {b}",
        answer="{a} {sign} {b} is {result}.",
        requests={
            "train": (
                "What is {a} {sign} {b}?",
                "Calculate {a} {sign} {b}.",
                "How much is {a} {sign} {b}?",
                "I need to know what {a} {sign} {b} is.",
                "Please tell me the result of {a} {sign} {b}.",
            ),
            "test": (
                "Please calculate {a} {sign} {b}.",
                "Tell me how much {a} {sign} {b} is.",
                "I need the result of {a} {sign} {b}.",
            ),
        },
    ),
    "convert_units": Tool(
        description="Convert a value to another unit",
        properties={"value": _NUMBER, "from_unit": _UNIT, "to_unit": _UNIT},
        run=_convert_units,
        draw=lambda rng: (rng.randint(2, 99), *rng.choice(CONVERSIONS)),
        finds="{value} {from_unit} in {to_unit}",
        answer="{value} {from_unit} is {result} {to_unit}.",
        requests={
            "train": (
                "Convert {value} {from_unit} to {to_unit}.",
                "How many {to_unit} is {value} {from_unit}?",
                "What is {value} {from_unit} in {to_unit}?",
                "I have {value} {from_unit}. How much is that in {to_unit}?",
                "Please give me {value} {from_unit} in {to_unit}.",
            ),
            "test": (
                "Please convert {value} {from_unit} to {to_unit}.",
                "How much is {value} {from_unit} in {to_unit}?",
                "I have {value} {from_unit}. How many {to_unit} is that?",
            ),
        },
        missing=Missing(
            "to_unit",
            "To which unit?",
            ("{to_unit}.", "To {to_unit}, please."),
            {
                "train": (
                    "Convert {value} {from_unit}.",
                    "I have {value} {from_unit}. Convert it, please.",
                ),
                "test": ("Please convert {value} {from_unit}.",),
            },
        ),
    ),
    "convert_time": Tool(
        description="Convert a time to that of another city",
        properties={"time": _STRING, "from_city": _STRING, "to_city": _STRING},
        run=_convert_time,
        draw=lambda rng: (
            f"{rng.randrange(24):02}:{rng.choice((0, 15, 30, 45)):02}",
            *rng.sample(tuple(CITIES), 2),
        ),
        finds="the time in {to_city} at {time} in {from_city}",
        answer="At {time} in {from_city} it is {result} in {to_city}.",
        requests={
            "train": (
                "It is {time} in {from_city}. What time is it in {to_city}?",
                "When it is {time} in {from_city}, what is the time in {to_city}?",
                "I am in {from_city}, and my call is at {time}. What time is that in {to_city}?",
                "Convert {time} in {from_city} to the time in {to_city}.",
            ),
            "test": (
                "What time is it in {to_city} when it is {time} in {from_city}?",
                "My call is at {time} in {from_city}. What is that in {to_city}?",
            ),
        },
        missing=Missing(
            "to_city",
            "In which city are you?",
            ("{to_city}.", "I am in {to_city}."),
            {
                "train": (
                    "My call is at {time} in {from_city}. What time is that for me?",
                    "It is {time} in {from_city}. What time is it for me?",
                ),
                "test": ("What time is it for me when it is {time} in {from_city}?",),
            },
        ),
    ),
    "add_days": Tool(
        description="The date some days later",
        properties={"date": _STRING, "days": _INTEGER},
        run=_add_days,
        draw=lambda rng: (_date(rng), rng.randint(2, 60)),
        finds="the date {days} days after {date}",
        answer="{days} days after {date} it is {result}.",
        requests={
            "train": (
                "What date is {days} days after {date}?",
                "Today is {date}. Which date is it in {days} days?",
                "Add {days} days to {date}.",
                "I leave on {date} for {days} days. When am I back?",
                "Tell me the date that comes {days} days after {date}.",
            ),
            "test": (
                "Which date comes {days} days after {date}?",
                "Today is {date}. I leave for {days} days. When am I back?",
            ),
        },
        missing=Missing(
            "date",
            "What is the date today?",
            ("{date}.", "Today is {date}."),
            {
                "train": (
                    "Which date is it in {days} days?",
                    "I leave today for {days} days. When am I back?",
                ),
                "test": ("Tell me which date it is in {days} days.",),
            },
        ),
    ),
    "days_between": Tool(
        description="Number of days between two dates",
        properties={"start": _STRING, "end": _STRING},
        run=_days_between,
        draw=_two_dates,
        finds="the days from {start} to {end}",
        answer="It is {days} days from {start} to {end}.",
        requests={
            "train": (
                "How many days are there between {start} and {end}?",
                "How many days is it from {start} to {end}?",
                "Count the days from {start} to {end}.",
                "Today is {start}. How many days are left to {end}?",
                "I leave on {start} and am back on {end}. How many days is that?",
                "I leave on {end}. How many days is that from {start}?",
                "Today is {start}, and I am back on {end}. How many days is that?",
            ),
            "test": (
                "Count the days between {start} and {end}.",
                "How many days are left from {start} to {end}?",
                "I am back on {end}, and today is {start}. How many days is it to that?",
            ),
        },
        missing=Missing(
            "end",
            "To which date?",
            ("{end}.", "To {end}."),
            {
                "train": (
                    "Today is {start}. How many days are left?",
                    "Count the days from {start} on.",
                ),
                "test": ("Today is {start}. Count the days that are left.",),
            },
        ),
    ),
    "get_price": Tool(
        description="Price of an item in a city, in dollars",
        properties={"item": _STRING, "city": _STRING},
        run=_get_price,
        draw=lambda rng: (rng.choice(ITEMS), rng.choice(tuple(CITIES))),
        finds="the price of a {item} in {city}",
        answer="A {item} costs {price} dollars in {city}.",
        requests={
            "train": (
                "What does a {item} cost in {city}?",
                "How much is a {item} in {city}?",
                "I am in {city}. What is the price of a {item}?",
                "Tell me the price of a {item} in {city}.",
                "I want to buy a {item} in {city}. What does it cost?",
                "Please look up what a {item} costs in {city}.",
            ),
            "test": (
                "How much does a {item} cost in {city}?",
                "Please look up the price of a {item} in {city}.",
                "I am in {city}, and I want to buy a {item}. How much is it?",
            ),
        },
        missing=Missing(
            "city",
            "In which city?",
            ("{city}.", "In {city}.", "I am in {city}."),
            {
                "train": (
                    "What does a {item} cost?",
                    "Tell me the price of a {item}.",
                    "How much is a {item}?",
                ),
                "test": (
                    "How much does a {item} cost?",
                    "I want to buy a {item}. What is the price?",
                ),
            },
        ),
    ),
    "get_population": Tool(
        description="Number of people in a city",
        properties={"city": _STRING},
        run=_get_population,
        draw=lambda rng: (rng.choice(tuple(CITIES)),),
        finds="the population of {city}",
        answer="{city} has {population} people.",
        requests={
            "train": (
                "How many people live in {city}?",
                "What is the population of {city}?",
                "Tell me how many people there are in {city}.",
                "I need the population of {city}.",
                "Please count the people in {city}.",
            ),
            "test": (
                "Tell me the population of {city}.",
                "How many people are there in {city}?",
                "I need to know how many people live in {city}.",
            ),
        },
        missing=Missing(
            "city",
            "Which city do you mean?",
            ("{city}.", "I mean {city}."),
            {
                "train": (
                    "How many people live there?",
                    "What is the population?",
                    "I need the population of a city.",
                ),
                "test": (
                    "Tell me how many people live there.",
                    "What is the population of a city?",
                ),
            },
        ),
    ),
    "get_weather": Tool(
        description="Weather in a city on a date",
        properties={"city": _STRING, "date": _STRING},
        run=_get_weather,
        draw=lambda rng: (rng.choice(tuple(CITIES)), _date(rng)),
        finds="the weather in {city} on {date}",
        answer="In {city} there is {sky} on {date}, and it is {temperature} degrees.",
        requests={
            "train": (
                "What is the weather in {city} on {date}?",
                "How warm is it in {city} on {date}?",
                "I am in {city} on {date}. How warm will it be?",
                "Tell me the weather on {date} in {city}.",
                "Will there be rain in {city} on {date}?",
            ),
            "test": (
                "On {date} I am in {city}. What is the weather there?",
                "Tell me how warm it will be in {city} on {date}.",
                "How will the weather be on {date} in {city}?",
            ),
        },
        missing=Missing(
            "date",
            "On which date?",
            ("{date}.", "On {date}."),
            {
                "train": ("What will the weather be in {city}?", "How warm will it be in {city}?"),
                "test": (
                    "Tell me how warm it will be in {city}.",
                    "How will the weather be in {city}?",
                ),
            },
        ),
    ),
    "get_distance": Tool(
        description="Distance between two cities in km",
        properties={"from_city": _STRING, "to_city": _STRING},
        run=_get_distance,
        draw=lambda rng: tuple(rng.sample(tuple(CITIES), 2)),
        finds="the distance from {from_city} to {to_city}",
        answer="It is {km} km from {from_city} to {to_city}.",
        requests={
            "train": (
                "How far is it from {from_city} to {to_city}?",
                "What is the distance between {from_city} and {to_city}?",
                "How many km is it from {from_city} to {to_city}?",
                "I go from {from_city} to {to_city}. How far is that?",
                "Tell me the distance from {from_city} to {to_city}.",
            ),
            "test": (
                "Tell me how far it is from {from_city} to {to_city}.",
                "I go from {from_city} to {to_city}. How many km is that?",
            ),
        },
        missing=Missing(
            "from_city",
            "From which city?",
            ("{from_city}.", "From {from_city}."),
            {
                "train": ("How far is it to {to_city}?", "I go to {to_city}. How far is that?"),
                "test": (
                    "Tell me how far it is to {to_city}.",
                    "I go to {to_city}. How many km is that?",
                ),
            },
        ),
    ),
    "count_letter": Tool(
        description="How often a letter is in a word",
        properties={"word": _STRING, "letter": _STRING},
        run=_count_letter,
        draw=_letter_and_word,
        finds="the number of {letter} in {word}",
        answer="The letter {letter} is {count} times in {word}.",
        requests={
            "train": (
                "How many times is the letter {letter} in {word}?",
                "Count the letter {letter} in {word}.",
                "How often is there a {letter} in {word}?",
                "Tell me how many {letter} there are in {word}.",
                "I write {word}. How often do I write {letter}?",
            ),
            "test": (
                "How often is the letter {letter} in {word}?",
                "I write {word}. How many times do I write {letter}?",
            ),
        },
        missing=Missing(
            "letter",
            "Which letter?",
            ("{letter}.", "The letter {letter}."),
            {
                "train": ("Count a letter in {word}.", "How often is a letter in {word}?"),
                "test": ("How many times is a letter in {word}?",),
            },
        ),
    ),
}
