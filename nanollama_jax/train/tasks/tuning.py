"""What SFT and DPO share: rows of whole conversations, and a trained model to start from."""

from nanollama_jax.data import rows
from nanollama_jax.errors import BadInput
from nanollama_jax.train.feed import Feed, open_sources, packing, warn_of_repetition
from nanollama_jax.train.metrics import log
from nanollama_jax.train.tasks.base import Task


class Tuning(Task):
    """It counts its own steps and tokens; those of the base model are in `provenance`."""

    fine_tunes = True

    def open_data(self, config, tokenizer, windows):
        shares, sources, validated = open_sources(config.data, tokenizer, self.holds)
        train, validation = packing(config)
        shape = {key: train.pop(key) for key in ("seq_len", "max_segments")}
        opened, pairs = {}, 0
        splits = {(name, "train") for name in shares} | {(name, "validation") for name in validated}
        for name, split in sorted(splits):
            opened[name, split] = rows.Rows.of(sources[name], split, first_pair=pairs, **shape)
            pairs += len(opened[name, split].units)
        trained = {name: opened[name, "train"] for name in shares}
        rows_read = (config.end_step - config.start_step) * config.batch_size
        epochs = {
            name: rows_read * share / sum(shares.values()) / len(trained[name])
            for name, share in shares.items()
        }
        warn_of_repetition(epochs, config.name)
        for name, found in trained.items():
            log.info(
                "%s: %s: %d %s in %d rows, %.0f %% full",
                config.name,
                name,
                len(found.units),
                self.holds,
                len(found),
                100 * found.fill,
            )
        if empty := [name for name in validated if not len(opened[name, "validation"])]:
            raise BadInput(
                f"source {empty[0]!r} has no validation rows: raise "
                "data.tuning_validation_fraction and prepare it again"
            )
        batches = rows.train_batches(trained, shares, **train)
        limits = {key: validation[key] for key in ("batch_size", "max_rows")}
        found = {name: list(opened[name, "validation"].batches(**limits)) for name in validated}
        return Feed(sources, iter(batches), found, list(opened.values()))

    def hooks(self, config):
        sampling = config.samples.every and config.samples.prompts
        return {"samples": dict(config.samples)} if sampling else {}

    def bytes_per_token(self, vocab_size):
        return 4  # one bit marks the tokens that are learned
