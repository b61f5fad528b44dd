"""Generation under a grammar, by the engine, with an untrained model: the output is still valid."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import jsonschema
import pytest

from nanollama_jax.errors import BadInput
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.grammar import json_schema, regex, tool_call
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.recipes import MODELS
from nanollama_jax.tokenizer import Tokenizer

TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": None,
}  # BFCL's, as its own checker maps them
GENERATIONS = 500


@pytest.fixture(scope="module")
def untrained(trained) -> Engine:
    tokenizer = Tokenizer(trained.parent / "tokenizer.model")
    model = ModelConfig(**MODELS["nano"] | dict(vocab_size=tokenizer.vocab_size, scan_layers=False))
    dummy = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(
        jax.jit(Llama(model).init)(jax.random.key(0), dummy, dummy, dummy, jnp.float32(1e4))
    )["params"]
    return Engine(model, params, tokenizer, rope_theta=1e4, context_length=1024, max_batch=125)


def standard(schema):
    if isinstance(schema, list):
        return [standard(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    mapped = {key: standard(value) for key, value in schema.items()}
    if isinstance(schema.get("type"), str) and schema["type"] in TYPES:
        mapped["type"] = TYPES[schema["type"]]
        if mapped["type"] is None:
            del mapped["type"]
    return mapped


def test_tool_calls_of_an_untrained_model(untrained, real_data):
    """500 generations over real tools: all parse, name a tool of their set, fit its parameters."""
    lines = [
        json.loads(line)
        for name in ("simple_python", "multiple")
        for line in (real_data / f"eval/bfcl/{name}.jsonl").read_text().splitlines()
    ]
    sets = [line["function"] for line in lines][:125]
    assert len({function["name"] for tools in sets for function in tools}) >= 50
    sets = (sets * (GENERATIONS // len(sets) + 1))[:GENERATIONS]
    prompts = [[1]] * GENERATIONS
    found = untrained.generate(
        prompts,
        Sampling(temperature=1.0),
        max_new_tokens=120,
        grammar=[tool_call(tools) for tools in sets],
    )
    for tools, completion in zip(sets, found, strict=True):
        assert completion.finish_reason == "stop", completion
        call = json.loads(completion.text)
        assert call.keys() == {"name", "arguments"}
        (tool,) = (tool for tool in tools if tool["name"] == call["name"])
        jsonschema.validate(call["arguments"], standard(tool["parameters"]))
    assert len({completion.text for completion in found}) > GENERATIONS * 0.9, (
        "they are drawn, not one answer over and over"
    )


def test_greedy_streaming_and_regex(untrained):
    pieces = list(
        untrained.stream(
            "It is ", max_new_tokens=40, grammar=regex("(yes|no), because [a-z]{5,10}")
        )
    )
    assert "".join(pieces).split(",")[0] in ("yes", "no") and len(
        "".join(pieces).split(" ")[-1]
    ) in range(5, 11)


def test_a_budget_that_is_too_small(untrained):
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in ("first", "second")},
        "required": ["first", "second"],
    }
    with pytest.raises(BadInput, match="max_new_tokens is 3"):
        untrained.generate(["x"], max_new_tokens=3, grammar=json_schema(schema))
    with pytest.raises(BadInput, match="JSON schema"):
        untrained.generate(["x"], grammar=json_schema("{'type'"))
