"""Your text in one command: trains a tokenizer, prepares the text, trains a model, and says where
it lies.

    python main.py --config configs/own.py:60m --config.text='texts/**/*.txt'
    python main.py --config configs/own.py:nano --config.text=book.txt --config.epochs=4
    python main.py --config configs/own.py:60m --config.text='hf://OWNER/NAME?text=content'

`text` is a file, a glob (.txt, .jsonl, .jsonl.gz, .xz, .zst, .parquet) or any source URL of
nanollama_jax/corpus/sources.py. The number of steps follows from the text's tokens and `epochs`,
the vocabulary from the text's size; the learning rate warms up over `warmup_fraction` of the steps
and falls to 0 over the last `decay_fraction`. The prepared text and the tokenizer lie in a folder
of `data.dir` that is named after the text. Rerun the command to resume.

The text is not searched for benchmarks unless you name some:
    --config.data.benchmarks.gsm8k='hf://openai/gsm8k?name=main&split=test'

Scales: configs/own.py:nano (the default; a book of 1 MB takes minutes on a CPU), :60m, :300m and
:1b (a GPU).
"""

from nanollama_jax.recipes import own


def get_config(scale: str = "nano"):
    return own(scale)
