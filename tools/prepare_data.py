"""Prepares a recipe's corpora: trains the tokenizer if there is none, and tokenises every source into shards.

    python tools/prepare_data.py --config configs/phase1.py:nano
    python tools/prepare_data.py --config configs/phase1.py --config.corpora.fineweb_edu.url='file:///texts/*.jsonl.zst'

Run again, it goes on where it was stopped, and does nothing where there is nothing left to do. Source URLs: nanollama_jax/data/sources.py.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import app
from ml_collections import config_flags

from nanollama_jax.data.prepare import prepare_all
from nanollama_jax.errors import flags_parser, one_line_errors

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, as in configs/phase1.py:nano.", lock_config=True)


def main(_: list[str]) -> None:
    with one_line_errors():
        prepare_all(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=flags_parser(CONFIG))
