"""Model sizes, and how long their curriculum is. Sources of the figures: docs/recipe.md."""

# 32,000 tokens except at nano scale. Widths are multiples of 256, as llama.cpp's K-quants require.
_KEYS = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
)
MODELS = {
    "nano": dict(zip(_KEYS, (4096, 4, 256, 8, 2, 32, 768), strict=True)),
    "60m": dict(zip(_KEYS, (32_000, 12, 512, 8, 2, 64, 1536), strict=True)),
    "300m": dict(zip(_KEYS, (32_000, 20, 1024, 16, 4, 64, 2816), strict=True)),
    "1b": dict(zip(_KEYS, (32_000, 22, 2048, 32, 4, 64, 5632), strict=True)),
}

# The global step at which each phase ends. Nano keeps the proportions.
PHASES = ("phase1", "phase2_8k", "phase2_16k", "phase3")
PHASE_ENDS = {
    "nano": (400, 422, 450, 500),
    "60m": (18_400, 19_400, 20_700, 23_000),
    "300m": (92_000, 97_000, 103_500, 115_000),
    "1b": (184_000, 194_000, 207_000, 230_000),
}
TOKENS_PER_STEP = {"nano": 2048, "60m": 131_072, "300m": 131_072, "1b": 131_072}
