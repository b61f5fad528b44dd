"""How the next token is chosen from logits: greedily, or drawn after filters.

The filters are applied in transformers' order, so a setting means the same there: repetition
penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nanollama_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample; the default is greedy.

    A prompt's draws depend on `seed` and on its index among the prompts, not on its batch.
    """

    temperature: float = 0.0  # 0: greedy; top_k, top_p and min_p need a temperature above 0
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that together reach p (arXiv:1904.09751); 1: all
    min_p: float = 0.0  # keep those with p >= min_p * max(p) (arXiv:2407.01082); 0: all
    # Divides positive logits of seen tokens, multiplies negative ones (arXiv:1909.05858); 1: off
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise BadInput(f"temperature={self.temperature} must be 0 (greedy) or at least 1e-6")
        if not 0 <= self.top_k < 2**31:
            raise BadInput(f"top_k={self.top_k} must be 0 (off) or more, and below 2**31")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p < 1:
            raise BadInput(f"min_p={self.min_p} must be at least 0 (off) and below 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise BadInput(
                f"repetition_penalty={self.repetition_penalty} must be above 0 (1 is off)"
            )
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise BadInput(f"seed={self.seed} must be a whole number from 0 to 2**32 - 1")
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise BadInput(
                "top_k, top_p and min_p filter what is drawn, but at temperature=0 nothing is "
                "drawn: set a temperature, such as 0.8"
            )

    @property
    def switches(self) -> frozenset[str]:
        """The options that are on: the part that a compiled program depends on."""
        off = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        return frozenset(name for name, value in off.items() if getattr(self, name) != value)

    @property
    def values(self) -> dict[str, jax.Array]:
        """The values, traced: changing them recompiles nothing."""
        numbers = {
            name: jnp.float32(getattr(self, name))
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        }
        return numbers | {"top_k": jnp.int32(self.top_k), "seed": jnp.uint32(self.seed)}


def choose(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    stream_B: jax.Array,
    position_B: jax.Array,
    values: dict[str, jax.Array],
    switches: frozenset[str],
) -> jax.Array:
    """The next token of each row, int32 (B,).

    `seen_BV` marks the tokens of prompt and continuation; `stream_B` numbers the random streams.
    """
    logits_BV = filter_logits(logits_BV, seen_BV, values, switches)
    if "temperature" not in switches:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(stream, position, logits_V):
        key = jax.random.fold_in(jax.random.key(values["seed"]), stream)
        return jax.random.categorical(jax.random.fold_in(key, position), logits_V)

    return jax.vmap(draw)(stream_B, position_B, logits_BV).astype(jnp.int32)


def filter_logits(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    values: dict[str, jax.Array],
    switches: frozenset[str],
) -> jax.Array:
    """Logits after penalty and temperature, -inf where a filter removes a token.

    Tokens that tie at a threshold all stay.
    """
    if "repetition_penalty" in switches:
        penalty = values["repetition_penalty"]
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    if "temperature" in switches:
        logits_BV = logits_BV / values["temperature"]
    lowest_B1 = jnp.full((len(logits_BV), 1), -jnp.inf)  # logits below this are removed
    if switches & {"top_k", "top_p"}:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        if "top_k" in switches:
            kth = jnp.minimum(values["top_k"], sorted_BV.shape[1]) - 1
            lowest_B1 = jax.lax.dynamic_slice_in_dim(sorted_BV, kth, 1, axis=1)
        if "top_p" in switches:
            top_k_BV = sorted_BV >= lowest_B1
            probability_BV = jax.nn.softmax(jnp.where(top_k_BV, sorted_BV, -jnp.inf), axis=-1)
            likelier_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
            kept_BV = (likelier_BV < values["top_p"]) & top_k_BV
            lowest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    if "min_p" in switches:
        likeliest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        lowest_B1 = jnp.maximum(lowest_B1, likeliest_B1 + jnp.log(values["min_p"]))
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
