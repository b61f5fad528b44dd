"""Pre-training: next-token prediction on packed documents."""

import numpy as np

from nanollama_jax.data import mix, pipeline
from nanollama_jax.data.shards import dtype_for
from nanollama_jax.train.feed import Feed, open_sources, packing, warn_of_repetition
from nanollama_jax.train.tasks.base import Task


class Pretrain(Task):
    """Its stages pass the optimizer's state and the position in each source on to the next one."""

    holds, fine_tunes = "documents", False

    def open_data(self, config, tokenizer, windows):
        shares, sources, validated = open_sources(config.data, tokenizer, self.holds)
        steps = config.end_step - config.start_step
        tokens = steps * config.batch_size * config.seq_len
        warn_of_repetition(mix.epochs(sources, shares, tokens), config.name)
        if windows is None or windows.keys() != shares.keys():
            windows = pipeline.shuffle_windows(shares, config.seq_len, steps * config.batch_size)
        train, validation = packing(config)
        batches = pipeline.train_batches(sources, shares, tokenizer, windows=windows, **train)
        found = {
            name: pipeline.validation_batches(sources[name], tokenizer, **validation)
            for name in validated
        }
        return Feed(sources, iter(batches), found, [], windows)

    def position(self, feed, earlier, seed):
        batches = feed.batches.get_state()
        positions = earlier | pipeline.positions(batches, feed.sources, seed)
        return {"batches": batches, "positions": positions}

    def bytes_per_token(self, vocab_size):
        return np.dtype(dtype_for(vocab_size)).itemsize
