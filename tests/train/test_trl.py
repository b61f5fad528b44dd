"""SFT and DPO against TRL's own trainers, from rows of real files to gradients: the same ids and masks, losses, rewards and gradients."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import datasets
import jax
import numpy as np
import pytest
import torch
import transformers
import trl
from trl.chat_template_utils import is_chat_template_stop_token_trained

from nanollama_jax import checkpoint, sharding
from nanollama_jax.chat.conversations import parse_conversation
from nanollama_jax.chat.preference import parse_preference
from nanollama_jax.checkpoint.origin import extend_vocabulary
from nanollama_jax.corpus import finetuning
from nanollama_jax.corpus.rows import read_rows
from nanollama_jax.data import pipeline
from nanollama_jax.data.rows import Rows
from nanollama_jax.export import hf
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.synthetic import reasoning, tool_conversations
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import objectives, reference
from nanollama_jax.train.losses import preference_loss
from tests.chat.test_chatml import as_openai, wrapped
from tests.model.oracle import hf_names

ROWS = 20
LONGEST = 416  # tokens of a conversation or a pair
BATCH = 3
CHUNK = 256


@pytest.fixture(autouse=True, scope="module")
def one_device_and_thread():
    """For fixtures too. Two of torch's threads wait for each other where cores are few: 20 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        yield
    torch.set_num_threads(before)


class Models(NamedTuple):
    config: ModelConfig
    tokenizer: Tokenizer
    rope_theta: np.float32
    policy: dict[str, Any]  # parameters
    reference: dict[str, Any]
    folder: pathlib.Path  # has their exports in float32, policy and reference


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory) -> Models:
    """The trained model with a chat vocabulary as the reference, and moved a little in every weight as the policy."""
    base, folder = checkpoint.load(trained), tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer("chat", base.tokenizer.extended())
    config = dataclasses.replace(base.model, vocab_size=tokenizer.vocab_size)
    start = checkpoint.Loaded(
        config,
        extend_vocabulary(base.params, config.vocab_size),
        tokenizer,
        base.metadata,
        base.path,
    )
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + rng.normal(0, 0.5 * x.std(), x.shape).astype(np.float32), start.params
    )
    for name, params in (("policy", moved), ("reference", start.params)):
        hf.export(dataclasses.replace(start, params=params), folder / name, "float32")
    return Models(config, tokenizer, np.float32(start.rope_theta), moved, start.params, folder)


def test_new_rows_are_the_mean_of_the_old(models, trained):
    base = checkpoint.load(trained)
    new, old = (
        (p["embedding"]["kernel"], p["head"]["kernel"].T) for p in (models.reference, base.params)
    )
    for ours, before in zip(new, old, strict=True):
        assert len(ours) == len(before) + 8 and np.array_equal(ours[: len(before)], before)
        np.testing.assert_allclose(
            ours[len(before) :], np.repeat(np.mean(before, 0, np.float64)[None], 8, 0), atol=1e-6
        )
        assert np.abs(ours[-1]).max() > 1e-4


def write_rows(path: pathlib.Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"file://{path}"


def prepared(url: str, kind: str, tokenizer: Tokenizer, folder: pathlib.Path) -> pipeline.Source:
    settings = dict(kind=kind, bad_rows="stop", max_tokens=LONGEST, validation_fraction=0.0)
    manifest = finetuning.prepare(
        "rows", url, "none", **settings, out_dir=folder / "rows", tokenizer=tokenizer
    )
    assert not any(manifest["left_out"].values())
    return pipeline.open_source(folder, "rows", tokenizer, kind)


def records_of(url: str, kind: str, tokenizer: Tokenizer) -> list[tuple[dict, Any]]:
    """Good rows of a file, the record and what we read in it: of those with few characters, the ones of the fewest learned tokens first (of a pair's
    longer answer: a float32 sum over hundreds is rounded by what the test allows)."""
    lines, found = pathlib.Path(url.removeprefix("file://")).read_text().splitlines(), []
    for row in read_rows(url, finetuning.PARSERS[kind], lambda where, mistake: None):
        at = int(row.where.rsplit(":", 1)[1])
        answers = row.chosen + row.rejected if kind == "preferences" else row.messages
        found.append(
            (sum(len(message.content) for message in answers), json.loads(lines[at - 1]), row)
        )
    short = []
    for _, record, row in sorted(found, key=lambda each: each[0])[: 10 * ROWS]:
        encoded, _, length = finetuning._record(row, tokenizer)
        if length <= LONGEST:
            parts = np.split(encoded[1:], encoded[:1]) if kind == "preferences" else [encoded]
            short.append((max(int((ids >> 31).sum()) for ids in parts), record, row))
    return [(record, row) for _, record, row in sorted(short, key=lambda each: each[0])]


def sides(unit: list[np.ndarray]) -> list[tuple[list[int], list[bool]]]:
    """The ids of each, and which are learned."""
    return [((side & ~finetuning.SAID).tolist(), (side >> 31 == 1).tolist()) for side in unit]


def load_hf(folder: pathlib.Path) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_gradients(model, models: Models, grads, rtol: float) -> None:
    """Of every tensor, relative to its largest."""
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    ours = hf_names(models.config, stack_layers(grads, models.config.num_layers))
    assert ours.keys() == theirs.keys()
    errors = {
        name: np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in ours
    }
    assert max(errors.values()) < rtol, errors


# ---- SFT


@pytest.fixture(scope="module")
def conversations(real_data, models, tmp_path_factory) -> tuple[pipeline.Source, list]:
    """20 chats, and some with tools, several calls, and thoughts: prepared, and as TRL is given them."""
    folder, tokenizer = tmp_path_factory.mktemp("conversations"), models.tokenizer
    chats = [
        record
        for record, _ in records_of(
            f"file://{real_data}/sft/chat_oasst.jsonl", "conversations", tokenizer
        )
    ]
    tools, thoughts = (
        [made.conversations("train", index) for index in range(60)]
        for made in (tool_conversations, reasoning)
    )

    def fits(record):
        return finetuning._record(parse_conversation(record, "row"), tokenizer)[2] <= LONGEST

    records = chats[:ROWS] + [*filter(fits, tools)][:4] + [*filter(fits, thoughts)][:2]
    rows = [parse_conversation(record, "row") for record in records]
    messages = [message for row in rows for message in row.messages]
    assert any(message.tool_calls for message in messages) and any(
        message.thought for message in messages
    )
    theirs = []
    for row in rows:
        messages = as_openai(row.messages)
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            # JSON's text, as OpenAI sends it: Arrow would give every call the arguments of all others, null
            call["function"]["arguments"] = json.dumps(
                call["function"]["arguments"], ensure_ascii=False
            )
        theirs.append({"messages": messages, "tools": json.dumps(wrapped(row.tools) or [])})
    source = prepared(
        write_rows(folder / "rows.jsonl", records), "conversations", tokenizer, folder
    )
    return source, theirs


def sft_trainer(models: Models, rows: list, folder: pathlib.Path, **settings) -> trl.SFTTrainer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.folder / "policy")
    assert is_chat_template_stop_token_trained(tokenizer)
    config = trl.SFTConfig(
        output_dir=folder,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    return trl.SFTTrainer(
        load_hf(models.folder / "policy"),
        config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@functools.partial(jax.jit, static_argnames="model")
def sft_step(params, batch, rope_theta, model):
    objective = functools.partial(
        objectives.next_token, model=model, z_loss=0.0, chunk_tokens=CHUNK
    )
    (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, rope_theta)
    return sums, grads


@pytest.mark.parametrize("packed", [False, True])
def test_sft(packed, models, conversations, tmp_path):
    """Both pack, each in its own way, or neither does. TRL adds up over micro-batches as its training does: over all learned tokens, not by rows."""
    source, theirs = conversations
    rows = Rows.of(source, "train", seq_len=LONGEST, max_segments=16 if packed else 1)
    assert len(rows) < 0.8 * len(theirs) if packed else len(rows) == len(theirs)
    settings = (
        dict(packing=True, max_length=LONGEST, per_device_train_batch_size=1)
        if packed
        else dict(max_length=None)
    )
    trainer = sft_trainer(models, theirs, tmp_path, **settings)
    if not packed:
        theirs = zip(trainer.train_dataset["input_ids"], trainer.train_dataset["labels"])
        assert sorted(sides(unit)[0] for unit in rows.units) == sorted(
            (ids, [label >= 0 for label in labels]) for ids, labels in theirs
        )
    loader = trainer.get_train_dataloader()
    batches, count = trainer.get_batch_samples(
        iter(loader), len(loader), trainer.accelerator.device
    )
    losses = [
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches
    ]
    sum(losses).backward()
    found = [
        sft_step(models.policy, batch, models.rope_theta, models.config)
        for batch in rows.batches(BATCH)
    ]
    sums, grads = jax.tree.map(lambda *each: np.sum(each, 0), *found)
    assert sums["weight"] == sums["learnt_tokens"] == count
    loss, expected = float(sums["loss"] / sums["weight"]), sum(loss.item() for loss in losses)
    assert loss == pytest.approx(expected, rel=1e-6)
    check_gradients(trainer.model, models, jax.tree.map(lambda x: x / sums["weight"], grads), 1e-5)


# ---- DPO


class Pairs(NamedTuple):
    source: pipeline.Source
    theirs: datasets.Dataset  # prompt, chosen, rejected: lists of messages


@pytest.fixture(scope="module")
def pairs(real_data, models, tmp_path_factory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    oasst, ultrafeedback = (
        records_of(f"file://{real_data}/preference/{name}.jsonl", "preferences", models.tokenizer)
        for name in ("oasst", "ultrafeedback_train")
    )
    dialogues = [record for record, row in oasst if len(row.prompt) > 1][:1]
    records = (
        dialogues
        + [record for record, row in oasst if len(row.prompt) == 1][:4]
        + [record for record, _ in ultrafeedback]
    )
    records = records[:ROWS]
    url = write_rows(folder / "rows.jsonl", records)
    rows = list(read_rows(url, parse_preference, on_bad=None))
    assert len(rows) == ROWS and max(len(row.prompt) for row in rows) >= 3
    theirs = [
        {name: as_openai(getattr(row, name)) for name in ("prompt", "chosen", "rejected")}
        for row in rows
    ]
    return Pairs(
        prepared(url, "preferences", models.tokenizer, folder), datasets.Dataset.from_list(theirs)
    )


def dpo_trainer(models: Models, pairs: Pairs, folder: pathlib.Path, **settings) -> trl.DPOTrainer:
    """Of batches of one pair each, so that its metrics are of pairs. The reference is a model of its own: TRL patches the policy's forward."""
    config = trl.DPOConfig(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.folder / "policy")
    models_of = (load_hf(models.folder / "policy"), load_hf(models.folder / "reference"))
    return trl.DPOTrainer(
        *models_of, args=config, train_dataset=pairs.theirs, processing_class=tokenizer
    )


def without_newline(trainer: trl.DPOTrainer, newline: list[int]) -> list[dict]:
    """The rows of its dataset without what its template writes after <|im_end|>, which TRL counts as said."""

    def cut(ids: list[int]) -> list[int]:
        assert ids[-len(newline) :] == newline
        return ids[: -len(newline)]

    return [
        row | {name: cut(row[name]) for name in ("chosen_ids", "rejected_ids")}
        for row in trainer.train_dataset
    ]


def units_of(trainer: trl.DPOTrainer, rows: Rows) -> list[int]:
    """Which of our pairs each row of its dataset is: ours are shuffled."""
    ours = [[ids for ids, _ in sides(unit)] for unit in rows.units]
    return [
        ours.index([row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")])
        for row in trainer.train_dataset
    ]


def trl_loss(trainer: trl.DPOTrainer, rows: list[dict]) -> tuple[float, dict[str, list[float]]]:
    """The mean over pairs, its gradients in the model, and what is logged of each pair."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer.model.train()  # what is logged goes by that; there is no dropout
    total = 0.0
    for row in rows:
        loss = trainer.compute_loss(
            trainer.model, trainer.data_collator([{name: row[name] for name in names}])
        ) / len(rows)
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total, trainer._metrics["train"]


def our_logprobs(params, models: Models, rows: Rows) -> np.ndarray:
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        settings = dict(
            model=models.config,
            rope_theta=models.rope_theta,
            mesh=mesh,
            batch_size=BATCH,
            chunk_tokens=CHUNK,
        )
        return reference.pair_logprobs(params, [rows], **settings)


@functools.partial(jax.jit, static_argnames="model")
def preference_step(params, batch, rope_theta, beta, label_smoothing, model):
    settings = dict(
        model=model,
        chunk_tokens=CHUNK,
        beta=beta,
        label_smoothing=label_smoothing,
        length_normalised=False,
    )
    (_, sums), grads = jax.value_and_grad(
        functools.partial(objectives.preference, **settings), has_aux=True
    )(params, batch, rope_theta)
    return sums, grads


@pytest.fixture(scope="module")
def packed_pairs(pairs) -> Rows:
    rows = Rows.of(pairs.source, "train", seq_len=LONGEST, max_segments=16)
    assert max(map(len, rows.bins)) > 1
    return rows


@pytest.fixture(scope="module")
def logprobs(models, packed_pairs) -> tuple[np.ndarray, np.ndarray]:
    """Of the policy and of the reference."""
    return our_logprobs(models.policy, models, packed_pairs), our_logprobs(
        models.reference, models, packed_pairs
    )


def test_dpo_ids_and_masks(models, pairs, packed_pairs, tmp_path):
    """TRL's are ours and the newline after <|im_end|>, which it learns and we do not."""
    newline = models.tokenizer.encode("\n")
    trainer = dpo_trainer(models, pairs, tmp_path)
    order = units_of(trainer, packed_pairs)
    assert sorted(order) == list(range(ROWS))
    for theirs, number in zip(trainer.train_dataset, order):
        for name, (_, learned) in zip(
            ("chosen_ids", "rejected_ids"), sides(packed_pairs.units[number]), strict=True
        ):
            said = len(theirs[name]) - len(newline)
            assert learned == [False] * len(theirs["prompt_ids"]) + [True] * said + [False] * len(
                newline
            )


# TRL's sigmoid takes no label smoothing; its `aot` of one pair, in which there is nothing to sort, is DPO with it.
@pytest.mark.parametrize(
    ("loss_type", "beta", "label_smoothing"), [("sigmoid", 0.1, 0.0), ("aot", 0.05, 0.1)]
)
def test_dpo(loss_type, beta, label_smoothing, models, pairs, packed_pairs, logprobs, tmp_path):
    trainer = dpo_trainer(
        models, pairs, tmp_path, loss_type=[loss_type], beta=beta, label_smoothing=label_smoothing
    )
    expected, metrics = trl_loss(trainer, without_newline(trainer, models.tokenizer.encode("\n")))
    batches = map(reference.Reference(logprobs[1], "").attach, packed_pairs.batches(BATCH))
    found = [
        preference_step(
            models.policy, batch, models.rope_theta, beta, label_smoothing, models.config
        )
        for batch in batches
    ]
    sums, grads = jax.tree.map(lambda *each: np.sum(each, 0), *found)
    means = {name: float(value) for name, value in objectives.means(sums).items()}
    assert sums["weight"] == ROWS
    assert means["loss"] == pytest.approx(expected, rel=1e-5)
    check_gradients(trainer.model, models, jax.tree.map(lambda x: x / ROWS, grads), 1e-5)

    of_policy, of_reference = (each[units_of(trainer, packed_pairs)] for each in logprobs)
    rewards, theirs = (
        beta * (of_policy - of_reference),
        np.stack([metrics["rewards/chosen"], metrics["rewards/rejected"]], 1),
    )
    assert np.abs(theirs[:, 0] - theirs[:, 1]).max() > 0.1
    last_bit = beta * np.spacing(np.abs(of_policy).max())  # TRL's sums are rounded too
    np.testing.assert_allclose(rewards, theirs, atol=1e-5 + last_bit, rtol=0)
    np.testing.assert_allclose(
        of_policy, np.stack([metrics["logps/chosen"], metrics["logps/rejected"]], 1), rtol=1e-6
    )
    names = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
    }
    for ours, name in (
        names | {"logprob_chosen": "logps/chosen", "logprob_rejected": "logps/rejected"}
    ).items():
        assert means[ours] == pytest.approx(np.mean(metrics[name]), rel=1e-5, abs=1e-5), ours


def test_length_normalised_dpo(models, pairs, packed_pairs, logprobs, tmp_path):
    """The loss; tests/train/test_preference.py has its derivative. (TRL logs rewards as if it did not divide them by the answers' lengths.)"""
    trainer = dpo_trainer(models, pairs, tmp_path, loss_type=["sigmoid_norm"], beta=2.0)
    with torch.no_grad():
        expected, _ = trl_loss(trainer, without_newline(trainer, models.tokenizer.encode("\n")))
    counts = np.array(
        [[(ids >> 31).sum() for ids in unit] for unit in packed_pairs.units], np.float32
    )
    loss, _, sums = preference_loss(*logprobs, counts, 2.0, 0.0, length_normalised=True)
    assert sums["weight"] == ROWS
    assert float(loss) / ROWS == pytest.approx(expected, rel=1e-5)


def test_dpo_differs_from_trl_by_the_newline_alone(models, pairs, packed_pairs, logprobs, tmp_path):
    """With it learned, ours are the log-probabilities that TRL's dataset gives as it stands; and it does make a difference."""
    trainer = dpo_trainer(models, pairs, tmp_path)
    with torch.no_grad():
        metrics = trl_loss(trainer, list(trainer.train_dataset))[1]
    theirs = np.stack([metrics["logps/chosen"], metrics["logps/rejected"]], 1)
    count = len(models.tokenizer.encode("\n"))
    learned = [
        [np.concatenate([side[:-count], side[-count:] | finetuning.SAID]) for side in unit]
        for unit in packed_pairs.units
    ]
    order = units_of(trainer, packed_pairs)
    found = our_logprobs(models.policy, models, dataclasses.replace(packed_pairs, units=learned))[
        order
    ]
    np.testing.assert_allclose(found, theirs, rtol=1e-5)
    assert (logprobs[0][order] - theirs > 0.1).all()
