"""The corpora that the recipes name, how much of each is read, and the benchmarks kept out of them.

Replace any by its URL: --config.corpora.fineweb_edu.url='file://texts/*.jsonl.zst', and set its
licence: --config.corpora.fineweb_edu.licence=CC0. nanollama_jax/corpus/sources.py lists the forms
of URLs, and the licences of the corpora named here.
"""


def corpus(
    url: str, billion_tokens: float = 0, *, keep: str = "", contaminated: str = "drop"
) -> dict:
    """A corpus whose licence is that of its URL, where that is known.

    Args:
      billion_tokens: the budget at scale 1b; 0: everything.
      keep: a filter of nanollama_jax/corpus/filters.py.
      contaminated: what happens to a document that quotes a benchmark: "drop" it, or "cut" the
        passage.
    """
    return dict(
        url=url,
        licence="",
        max_tokens=int(billion_tokens * 1e9),
        keep=keep,
        contaminated=contaminated,
        leave_out="",
    )


# Budgets: what the stages read (phase 1: 24.1B; phase 2: half of 3.0B each of books and code;
# phase 3: 50, 30 and 20 % of 3.0B) plus a few percent.
CORPORA = {
    "docs": corpus("builtin://docs"),
    "code": corpus("builtin://code"),
    "reasoning": corpus("builtin://reasoning"),
    "transcripts": corpus("builtin://transcripts?rows=3000"),
    "fineweb_edu": corpus("hf://HuggingFaceFW/fineweb-edu?name=sample-100BT", 25.0),
    # Benchmarks quote books, not the other way round: a passage is no reason to drop a novel.
    "pg19": corpus("hf://emozilla/pg19", 1.6, contaminated="cut"),
    "stack_python": corpus("hf://bigcode/the-stack-dedup?data_dir=data/python&text=content", 1.6),
    "open_web_math": corpus("hf://open-web-math/open-web-math", 1.6),
    "stackexchange": corpus("hf://common-pile/stackexchange_filtered", 1.0),
    "wikipedia": corpus("hf://wikimedia/wikipedia?name=20231101.en", 0.7, keep="stem"),
}


def _tuning(kind: str, url: str, bad_rows: str = "stop") -> dict:
    """`bad_rows`: "stop" at the first, or "skip" and count them, for sets that we cannot fix."""
    return dict(url=url, licence="", kind=kind, bad_rows=bad_rows)


# Conversations and preference pairs to fine-tune on. nanollama_jax/chat/conversations.py and
# preference.py list the formats.
TUNING = {
    "tools": _tuning("conversations", "builtin://tools?rows=6000"),
    "math": _tuning("conversations", "builtin://math?rows=6000"),
    "right_or_wrong": _tuning("preferences", "builtin://right_or_wrong?rows=800"),
    "oasst2": _tuning("conversations", "hf://OpenAssistant/oasst2?tree=oasst&lang=en", "skip"),
    "metamath": _tuning("conversations", "hf://meta-math/MetaMathQA", "skip"),
    "hermes": _tuning(
        "conversations", "hf://NousResearch/hermes-function-calling-v1?name=func_calling", "skip"
    ),
    "hh_rlhf": _tuning("preferences", "hf://Anthropic/hh-rlhf", "skip"),
}

_BFCL = "hf://gorilla-llm/Berkeley-Function-Calling-Leaderboard?file=BFCL_v3_"

# name -> URL. All prepared text, conversations and pairs are searched for them;
# nanollama_jax/corpus/decontaminate.py knows their fields by these names.
# To read a local copy: --config.data.benchmarks.gsm8k='file://gsm8k/test.jsonl'
BENCHMARKS = {
    "mmlu": "hf://cais/mmlu?name=all&split=test",
    "gsm8k": "hf://openai/gsm8k?name=main&split=test",
    "hellaswag": "hf://Rowan/hellaswag?split=validation",
    "arc_challenge": "hf://allenai/ai2_arc?name=ARC-Challenge&split=test",
    "truthfulqa": "hf://truthfulqa/truthful_qa?name=multiple_choice&split=validation",
    "mt_bench": "hf://HuggingFaceH4/mt_bench_prompts",
    "bfcl_simple": f"{_BFCL}simple.json",
    "bfcl_multiple": f"{_BFCL}multiple.json",
    "bfcl_irrelevance": f"{_BFCL}irrelevance.json",
}
