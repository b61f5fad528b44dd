"""Generates conversations that use tools; any number of rows. Each call is run, so that every
result and every answer is computed.

A conversation offers one to four tools (tools.py) and is of one of the `KINDS`. Requests of the
test split use wordings that train never uses, and ask for calls that train never draws (`_is_test`;
the second call of a chain follows from the first). Records depend only on the split and the index,
not on the process or the version of Python.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from nanollama_jax.synthetic.tools import CITIES, ITEMS, OPERATIONS, TOOLS, Call, execute, schema

# Of 20 conversations: one call; two calls in one message; a call whose result the next one needs; a question for what is missing, then
# a call; none, as no tool fits.
KINDS = {"call": 8, "parallel": 3, "chain": 3, "missing": 3, "none": 3}
OFFERED = (1, 1, 2, 2, 2, 3, 4)  # tools in a conversation, where not more are needed
THOUGHTS = 0.75  # of the assistant's messages that decide something


@dataclasses.dataclass(frozen=True)
class Chain:
    """A call of `first`, then one of `second`.

    Templates have the argument names of both calls, and {n}, a number from 2 to 9 in the request.
    """

    first: str
    second: str
    follows: Callable[
        [dict[str, Any]], dict[str, Any]
    ]  # the second's arguments from n and the first's arguments and result
    answer: str
    requests: dict[str, tuple[str, ...]]  # by split


CHAINS = (
    Chain(
        first="get_price",
        second="calculate",
        follows=lambda known: {"operation": "multiply", "a": known["price"], "b": known["n"]},
        answer="{n} {item}s cost {result} dollars in {city}.",
        requests={
            "train": (
                "What do {n} {item}s cost in {city}?",
                "I want to buy {n} {item}s in {city}. How much is that?",
                "Tell me the price of {n} {item}s in {city}.",
                "I am in {city}. How much are {n} {item}s?",
            ),
            "test": (
                "How much do {n} {item}s cost in {city}?",
                "I am in {city}, and I want to buy {n} {item}s. What do I need?",
            ),
        },
    ),
    Chain(
        first="get_population",
        second="calculate",
        follows=lambda known: {"operation": "divide", "a": known["population"], "b": known["n"]},
        answer="The population of {city} divided by {n} is {result}.",
        requests={
            "train": (
                "What is the population of {city} divided by {n}?",
                "Divide the people in {city} by {n}.",
                "Tell me the number of people in {city}, divided by {n}.",
            ),
            "test": (
                "Divide the population of {city} by {n}.",
                "What is the number of people in {city} divided by {n}?",
            ),
        },
    ),
    Chain(
        first="get_weather",
        second="calculate",
        follows=lambda known: {"operation": "add", "a": known["temperature"], "b": known["n"]},
        answer="The degrees in {city} on {date} plus {n} are {result}.",
        requests={
            "train": (
                "What are the degrees in {city} on {date} plus {n}?",
                "Add {n} to the degrees in {city} on {date}.",
                "On {date}, how many degrees are there in {city}, plus {n}?",
            ),
            "test": (
                "How many degrees are there in {city} on {date}, plus {n}?",
                "Tell me the degrees on {date} in {city} plus {n}.",
            ),
        },
    ),
    Chain(
        first="get_distance",
        second="convert_units",
        follows=lambda known: {"value": known["km"], "from_unit": "km", "to_unit": "m"},
        answer="It is {result} m from {from_city} to {to_city}.",
        requests={
            "train": (
                "How many m is it from {from_city} to {to_city}?",
                "What is the distance between {from_city} and {to_city} in m?",
                "I go from {from_city} to {to_city}. How far is that in m?",
            ),
            "test": (
                "Tell me the distance from {from_city} to {to_city} in m.",
                "I go from {from_city} to {to_city}. How many m is that?",
            ),
        },
    ),
    Chain(
        first="days_between",
        second="convert_units",
        follows=lambda known: {"value": known["days"], "from_unit": "days", "to_unit": "hours"},
        answer="It is {result} hours from {start} to {end}.",
        requests={
            "train": (
                "How many hours is it from {start} to {end}?",
                "Count the hours between {start} and {end}.",
                "Today is {start}. How many hours are left to {end}?",
            ),
            "test": (
                "Count the hours from {start} to {end}.",
                "How many hours are there between {start} and {end}?",
            ),
        },
    ),
    Chain(
        first="count_letter",
        second="calculate",
        follows=lambda known: {"operation": "multiply", "a": known["count"], "b": known["n"]},
        answer="In {n} times {word} the letter {letter} is {result} times.",
        requests={
            "train": (
                "I write {word} {n} times. How often do I write {letter}?",
                "How often is {letter} in {n} times {word}?",
                "Count the letter {letter} in {n} times {word}.",
            ),
            "test": (
                "How often do I write {letter} when I write {word} {n} times?",
                "How many times is the letter {letter} in {n} times {word}?",
            ),
        },
    ),
)

JOINED = {  # two requests
    "train": (
        "{0} {1}",
        "Two questions. {0} {1}",
        "First: {0} Second: {1}",
        "{0} And one more: {1}",
    ),
    "test": ("Two questions. First: {0} Second: {1}", "{0} And second: {1}"),
}
OUT_OF_REACH = {
    "train": (
        "Book a table in {city}.",
        "Play a song.",
        "Write a letter to my mother.",
        "Send a {item} to {city}.",
        "Who lives in {city}?",
        "Please play some music from {city}.",
        "Sell my {item}.",
    ),
    "test": (
        "Play a song from {city}.",
        "Send my mother a {item}.",
        "Please write a song.",
        "Tell me who lives in {city}.",
        "Sell my {item} in {city}.",
    ),
}
_STAND_INS = {
    "convert_units": "calculate"
}  # which could do its work, and is not offered where it is what is lacking


def conversations(split: str, index: int) -> dict[str, Any]:
    """Row `index` of "train" or "test" in OpenAI's form (chat/conversations.py): {"messages",
    "tools"}, with its "kind"; `index` has no limit."""
    rng = random.Random(f"tools {split} {index}")
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    messages, names = {
        "call": _call,
        "parallel": _parallel,
        "chain": _chain,
        "missing": _missing,
        "none": _none,
    }[kind](rng, split)
    return {"messages": messages, "tools": [schema(name) for name in names], "kind": kind}


def transcript(split: str, index: int) -> dict[str, str]:
    """{"text"} of another conversation, for pre-training: plain words and JSON without the chat
    tokens, so that a tokenizer is trained on such text too."""
    row = conversations(split, index + 10**9)
    lines = [json.dumps(tool) for tool in row["tools"]]
    for message in row["messages"]:
        calls = [json.dumps(call) for call in message.get("tool_calls", ())]
        said = (
            message["role"].capitalize() + ":",
            message.get("thought"),
            message.get("content"),
            *calls,
        )
        lines.append(" ".join(filter(None, said)))
    return {"text": "\n".join(lines)}


def _call(rng: random.Random, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    name, arguments = _draw(rng, split, rng.choice(tuple(TOOLS)))
    question = _user(rng, TOOLS[name].requests[split], arguments)
    messages, (result,) = _calling(
        rng,
        f"The user asks for {_fill(TOOLS[name].finds, arguments)}: I call {name}.",
        [(name, arguments)],
    )
    return [question, *messages, _answer(_fill(TOOLS[name].answer, arguments | result))], _offer(
        rng, [name]
    )


def _parallel(rng: random.Random, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    calls = [_draw(rng, split, rng.choice(tuple(TOOLS)))]
    while len(calls) < 2 or calls[0] == calls[1]:
        calls[1:] = [_draw(rng, split, rng.choice(tuple(TOOLS)))]
    asked = [
        _user(rng, TOOLS[name].requests[split], arguments)["content"] for name, arguments in calls
    ]
    finds = [_fill(TOOLS[name].finds, arguments) for name, arguments in calls]
    names = [name for name, _ in calls]
    messages, results = _calling(
        rng,
        f"The user asks for {finds[0]} and for {finds[1]}: I call {' and '.join(dict.fromkeys(names))}.",
        calls,
    )
    said = [
        _fill(TOOLS[name].answer, arguments | result)
        for (name, arguments), result in zip(calls, results)
    ]
    question = {"role": "user", "content": rng.choice(JOINED[split]).format(*asked)}
    return [question, *messages, _answer(" ".join(said))], _offer(rng, list(dict.fromkeys(names)))


def _chain(rng: random.Random, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    chain = rng.choice(CHAINS)
    name, arguments = _draw(rng, split, chain.first)
    known = arguments | {"n": rng.randint(2, 9)}
    question = _user(rng, chain.requests[split], known)
    finds = _fill(TOOLS[name].finds, arguments)
    first, (result,) = _calling(
        rng, f"I need {finds}, then {chain.second}: I call {name}.", [(name, arguments)]
    )
    found = ", ".join(f"{key} is {value}" for key, value in result.items())
    second, (last,) = _calling(
        rng, f"The {found}: I call {chain.second}.", [(chain.second, chain.follows(known | result))]
    )
    return [question, *first, *second, _answer(_fill(chain.answer, known | result | last))], _offer(
        rng, [name, chain.second]
    )


def _missing(rng: random.Random, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    name, arguments = _draw(
        rng, split, rng.choice([name for name, tool in TOOLS.items() if tool.missing])
    )
    missing = TOOLS[name].missing
    question = _user(rng, missing.requests[split], arguments)
    asks = _answer(
        missing.asks, _thought(rng, f"{name} needs {missing.argument}, which the user did not say.")
    )
    messages, (result,) = _calling(
        rng,
        f"The user asks for {_fill(TOOLS[name].finds, arguments)}: I call {name}.",
        [(name, arguments)],
    )
    answer = _answer(_fill(TOOLS[name].answer, arguments | result))
    return [question, asks, _user(rng, missing.replies, arguments), *messages, answer], _offer(
        rng, [name]
    )


def _none(rng: random.Random, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    if rng.random() < 0.3:
        offered = _offer(rng, [])
        question = _user(
            rng, OUT_OF_REACH[split], {"city": rng.choice(tuple(CITIES)), "item": rng.choice(ITEMS)}
        )
        finds, says = "something else", "None of my tools can do that."
    else:
        name, arguments = _draw(rng, split, rng.choice(tuple(TOOLS)))
        offered = _offer(rng, [], barred=[name, _STAND_INS.get(name)])
        question = _user(rng, TOOLS[name].requests[split], arguments)
        finds = _fill(TOOLS[name].finds, arguments)
        says = f"None of my tools can find {finds}."
    return [
        question,
        _answer(
            says, _thought(rng, f"The user asks for {finds}: {', '.join(offered)} cannot do that.")
        ),
    ], offered


def _draw(rng: random.Random, split: str, name: str) -> Call:
    """A call that is the split's."""
    while True:
        arguments = dict(zip(TOOLS[name].properties, TOOLS[name].draw(rng)))
        if _is_test(name, arguments) == (split == "test"):
            return name, arguments


def _is_test(name: str, arguments: dict[str, Any]) -> bool:
    return hashlib.blake2b(json.dumps([name, arguments]).encode()).digest()[0] % 8 == 0


def _offer(rng: random.Random, needed: list[str], barred: Iterable[str | None] = ()) -> list[str]:
    others = [name for name in TOOLS if name not in needed and name not in barred]
    offered = needed + rng.sample(others, max(rng.choice(OFFERED) - len(needed), 0))
    rng.shuffle(offered)
    return offered


def _calling(
    rng: random.Random, thought: str, calls: list[Call]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The message that calls with those that give the results, and the results."""
    results = [execute(name, arguments) for name, arguments in calls]
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    calling = {"role": "assistant"} | _thought(rng, thought) | {"tool_calls": listed}
    return [
        calling,
        *({"role": "tool", "content": json.dumps(result)} for result in results),
    ], results


def _thought(rng: random.Random, thought: str) -> dict[str, str]:
    return {"thought": thought} if rng.random() < THOUGHTS else {}


def _answer(content: str, thought: dict[str, str] | None = None) -> dict[str, str]:
    return {"role": "assistant"} | (thought or {}) | {"content": content}


def _user(rng: random.Random, templates: tuple[str, ...], values: dict[str, Any]) -> dict[str, str]:
    return {"role": "user", "content": _fill(rng.choice(templates), values)}


def _fill(template: str, values: dict[str, Any]) -> str:
    return template.format_map(
        values if "operation" not in values else values | {"sign": OPERATIONS[values["operation"]]}
    )
