"""The corpora: where they come from, how much of each a whole 1B curriculum reads, and the benchmarks kept out of them.

Any can be replaced by one's own: --config.corpora.fineweb_edu.url='file://texts/*.jsonl.zst' --config.corpora.fineweb_edu.licence=CC0. URLs:
nanollama_jax/corpus/sources.py, which also knows the licences of those named here.
"""


def _corpus(
    url: str, billion_tokens: float = 0, *, keep: str = "", contaminated: str = "drop"
) -> dict:
    """`billion_tokens` at scale 1b (0: all there is); `keep`: a filter of corpus/filters.py. `contaminated`: "drop" the document, "cut" the passage.
    `licence`, "": what is known of the URL, or "not stated"."""
    return dict(
        url=url,
        licence="",
        max_tokens=int(billion_tokens * 1e9),
        keep=keep,
        contaminated=contaminated,
        leave_out="",
    )


# Budgets are what the stages read (phase 1: 24.1B; half of 3.0B each of books and code; 50, 30 and 20 % of 3.0B) and a few percent.
CORPORA = {
    "docs": _corpus("builtin://docs"),
    "code": _corpus("builtin://code"),
    "reasoning": _corpus("builtin://reasoning"),
    "transcripts": _corpus("builtin://transcripts?rows=3000"),
    "fineweb_edu": _corpus("hf://HuggingFaceFW/fineweb-edu?name=sample-100BT", 25.0),
    # A benchmark quotes a book, and not the other way round: a novel is not dropped for a passage.
    "pg19": _corpus("hf://emozilla/pg19", 1.6, contaminated="cut"),
    "stack_python": _corpus("hf://bigcode/the-stack-dedup?data_dir=data/python&text=content", 1.6),
    "open_web_math": _corpus("hf://open-web-math/open-web-math", 1.6),
    "stackexchange": _corpus("hf://common-pile/stackexchange_filtered", 1.0),
    "wikipedia": _corpus("hf://wikimedia/wikipedia?name=20231101.en", 0.7, keep="stem"),
}


def _tuning(kind: str, url: str, bad_rows: str = "stop") -> dict:
    """`bad_rows`: "stop" at the first, or "skip" them, counted and named: of sets that are not ours to mend."""
    return dict(url=url, licence="", kind=kind, bad_rows=bad_rows)


# Conversations and preference pairs to fine-tune on (chat/conversations.py and chat/preference.py list the formats).
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

# Searched for in all text, conversations and pairs that are prepared; name -> URL. corpus/decontaminate.py knows their fields by these names.
# Local files: --config.data.benchmarks.gsm8k='file://gsm8k/test.jsonl'
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
