"""Datasets read through other libraries: from the Hugging Face hub, and of TensorFlow Datasets."""

import logging
import os
from collections.abc import Iterator

from nanollama_jax.corpus.formats import Records, deal, read_jsonl, without_inner_nulls
from nanollama_jax.errors import BadInput


def read_hub(
    path: str,
    rank: int,
    ranks: int,
    columns: list[str] | None,
    name: str | None = None,
    split: str = "train",
    data_dir: str | None = None,
    file: str | None = None,
) -> Records:
    """This rank's records of a dataset on the hub, or in a local folder if `path` is absolute."""
    import datasets
    import httpx
    import huggingface_hub
    import huggingface_hub.errors
    import pyarrow

    huggingface_hub.utils.logging.set_verbosity_error()  # it would log every retry
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it would log what it also raises
    local = path.startswith("/")
    if local and not os.path.isdir(path):
        raise BadInput(
            f"hf://{path} is no folder: check the path, or write hf://OWNER/NAME for a dataset on "
            "the hub"
        )
    if local and "[" in path and not file:
        raise BadInput(
            f"hf://{path}: datasets takes brackets for a pattern: rename the folder, or name its "
            f"files as file://{path}/..."
        )
    last = None
    try:
        if file:  # the types of its records' fields may differ, which datasets does not support
            if local:
                downloaded = os.path.join(path, file)
            else:
                downloaded = huggingface_hub.hf_hub_download(path, file, repo_type="dataset")
            yield from read_jsonl(downloaded, columns, rank, ranks)
            return
        dataset = datasets.load_dataset(
            path, name=name, data_dir=data_dir, split=split, streaming=True
        )
        shards = dataset.num_shards
        for shard, first, step in deal(shards, rank, ranks):
            records = dataset.shard(num_shards=shards, index=shard)
            for number, record in enumerate(records):
                last = f"hf://{path}/{split}/{shard}:{number + 1}"
                if number % step == first:
                    yield last, without_inner_nulls(record)
    except BadInput:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        httpx.HTTPError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
        huggingface_hub.errors.HfHubHTTPError,
    ) as error:
        # datasets infers the types of fields from the first rows, and reads many rows at once.
        typed = TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError
        raise _unreadable(path, last, error, isinstance(error, typed)) from error


def _unreadable(path: str, last: str | None, error: Exception, row: bool) -> BadInput:
    local, reason = path.startswith("/"), _first_line(error)
    if row:
        after = f"after {last}" if last else "from its first row"
        lines = f"file://{path}/**/*.jsonl" if local else f"hf://{path}?file=NAME.jsonl"
        return BadInput(
            f"hf://{path} cannot be read {after} ({reason}): a row is damaged, or a field changes "
            f"its type; of JSON Lines, {lines} reads rows whatever their types, and names a "
            "damaged one"
        )
    hint = "it must hold .jsonl, .parquet or .txt files in the hub's layout"
    if not local:
        hint = (
            "check the name and the network; for a gated dataset accept its terms on "
            f"https://huggingface.co/datasets/{path} and set HF_TOKEN"
        )
    return BadInput(f"hf://{path} cannot be read ({reason}): {hint}")


def read_tfds(
    path: str,
    rank: int,
    ranks: int,
    columns: list[str] | None,
    split: str = "train",
    data_dir: str | None = None,
) -> Iterator[tuple[str, dict]]:
    """This rank's records of a TensorFlow Datasets set that was prepared as array_record."""
    # Without a network it would wait for Google's metadata server.
    os.environ.setdefault("NO_GCE_CHECK", "true")
    import tensorflow_datasets as tfds

    try:
        dataset = tfds.data_source(path, split=split, data_dir=data_dir, download=False)
    except (
        OSError,
        ValueError,
        AssertionError,
        NotImplementedError,
        tfds.core.DatasetNotFoundError,
    ) as error:
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise BadInput(
            f"tfds://{path} cannot be read ({_first_line(error)}): check name and split, and "
            'prepare it once with python -c "import tensorflow_datasets as tfds; '
            f'tfds.data_source({path!r}{where})"'
        ) from error
    for number in range(rank, len(dataset), ranks):
        where, record = f"tfds://{path}/{split}:{number + 1}", dataset[number]
        # Only fields that are wanted: others may be bytes that are not text.
        texts = [name for name in columns or record if isinstance(record.get(name), bytes)]
        try:
            yield where, record | {name: record[name].decode() for name in texts}
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: invalid UTF-8") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
