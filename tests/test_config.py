"""Every setting of every recipe is declared with its allowed values, and `check` refuses all
others: no odd value hangs, raises another exception, or breaks the arithmetic behind it."""

import ast
import dataclasses
import importlib
import math
import random
import shlex
import sys

import grain
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import curriculum, dpo, phase1, sft
from nanollama_jax import checkpoint, config, sharding, tokenizer
from nanollama_jax.command_line import flags_parser
from nanollama_jax.config import (
    FIELDS,
    OWN_FIELDS,
    check,
    check_workdir,
    declared_name,
    defaults,
    did_you_mean,
    show,
)
from nanollama_jax.corpus import filters
from nanollama_jax.curriculum import stages_of
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.model.config import ATTENTION_BACKENDS, REMAT_POLICIES
from nanollama_jax.planning import plan
from nanollama_jax.train import optimizer, settle
from nanollama_jax.train.hooks import gates

RECIPES = ("phase1", "phase2_8k", "phase2_16k", "phase3", "sft", "dpo", "curriculum")
SCALES = ("nano", "60m", "300m", "1b")
ODD = (
    *(
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        -0.5,
        0.0,
        1e-320,
        1e-30,
        0.3,
        1e30,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        True,
        None,
    ),
    *(
        "",
        "5",
        "a\nb",
        "a\0b",
        ".",
        "..",
        "-rf",
        "/",
        "/dev/null",
        "x" * 5000,
        "\udcff",
        b"x",
        np.float64("nan"),
    ),
    *(
        (),
        [],
        {},
        (1,),
        ("",),
        (None,),
        ("a", "b/c"),
        ((1, "a", "b"),),
        ((5, 1.0),),
        ((2.5, 1.0, 2.0),),
        ((-5, 1.0, 2.0),),
        ((5, 2.0, 1.0),),
    ),
    *(((5, 1.0, math.nan),), ((2**31, 1.0, 2.0),), ((True, 1.0, 2.0),)),
)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Nano's longest stage has rows for fewer devices than the tests have."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def recipe(name, scale="nano"):
    return importlib.import_module(f"configs.{name}").get_config(scale)


def set_leaf(whole, path, value):
    """As a recipe file can, which no type holds back."""
    at = whole
    for key in path[:-1]:
        at = at[key]
    with whole.unlocked():
        if path[-1] in at:
            del at[path[-1]]
        at[path[-1]] = value


def refusal(function, whole):
    """The line in which a config is refused, or None."""
    try:
        function(whole)
    except BadInput as error:
        said = str(error)
    else:
        return None
    assert said and "\n" not in said
    return said


def leaves(whole):
    """(path in the config, path in the stage) of every setting."""
    for path, _ in config.leaves(whole.to_dict()):
        yield path, path[2:] if path[0] == "stages" else path


def downstream(stage):
    """What is reckoned from a stage's config, without its data and without compiling."""
    model = settle.settle(stage)
    gpu = plan.GPUS["h100"]
    planned, shape = plan.settle_for(stage, gpu, 2)
    assert plan.most_rows(planned, plan.usable_bytes(gpu), shape) >= 0
    assert plan.tokens_per_second(planned, stage.seq_len, gpu, 2, 0.4) > 0
    assert plan.nominal_flops(model, stage.seq_len) > 0
    assert plan.checkpoints_kept(stage) >= 1 and plan.bytes_per_token(stage) in (2, 4)
    weights = dict(stage.data.sources)
    pipeline.check_weights({name: AnyText() for name in weights}, weights)
    rows = (stage.end_step - stage.start_step) * stage.batch_size
    assert all(
        pipeline.shuffle_window(stage.seq_len, int(rows * w / sum(weights.values()))) >= 1
        for w in weights.values()
    )
    gates.thresholds(stage.gates.perplexity, stage.end_step)
    optimizer.make_optimizer(
        **{key: value for key, value in stage.optimizer.items() if key != "peak_lr"}
    )


def mixed(stage):
    """The first element of a mix of numbers by the stage's seed and shares."""
    weights, one = (
        dict(stage.data.sources),
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=1),
    )
    numbers = {
        name: grain.MapDataset.range(3).seed(pipeline.source_seed(stage.seed, name)).shuffle()
        for name in weights
    }
    return next(
        iter(
            grain.IterDataset.mix(
                {name: dataset.to_iter_dataset(one) for name, dataset in numbers.items()}, weights
            )
        )
    )


class AnyText:
    def tokens(self, split):
        return 1


def schedules(stage):
    start, end, rope = stage.start_step, stage.end_step, stage.rope
    for step in (np.int32(start), np.int32(end - 1)):
        lr = optimizer.wsd_schedule(step, stage.optimizer.peak_lr, **stage.schedule)
        theta = optimizer.rope_theta_schedule(
            step, rope.start_theta, rope.end_theta, start, end, rope.schedule
        )
        assert 0 < lr <= 1 and 0.99 <= theta < 1.01e12


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_every_recipe_is_declared_and_right(name):
    declared = set()
    for scale in SCALES:
        whole = recipe(name, scale)
        check(whole)
        for path, own in leaves(whole):
            declared.add(declared_name(own))
            assert declared_name(own), path
    missing = {key for key in FIELDS if key not in declared}
    assert missing == {
        key
        for key in FIELDS
        if key.startswith(
            {"sft": "corpora", "dpo": "corpora", "curriculum": "none"}.get(name, "tuning")
        )
    }


def test_declarations_hold_together():
    for name, field in FIELDS.items():
        assert field.meaning.endswith(".") and field.allowed, name
        assert field.required or field.accepts(field.default), name
        assert field.type is bool or field.form or field.choices or field.bounded, name
        if field.type in (int, float) and field.bounded:
            assert None in (field.ge, field.gt) and None in (field.le, field.lt), name
            for bound in (field.ge, field.gt, field.le, field.lt):
                assert bound is None or field.accepts(field.type(bound)) == (
                    bound in (field.ge, field.le)
                ), name
            assert (
                not field.accepts(-2) and not field.accepts(10**30) and not field.accepts(math.nan)
            ), name
    assert FIELDS["task"].choices == checkpoint.TASKS
    assert FIELDS["model.attention"].choices == ("auto", *ATTENTION_BACKENDS)
    assert FIELDS["model.remat"].choices == ("auto", *REMAT_POLICIES)
    for keep in FIELDS["corpora.*.keep"].choices:
        filters.filter_named(keep)
    assert set(defaults().to_dict()) <= {name.partition(".")[0] for name in FIELDS}


@pytest.mark.parametrize(
    ("name", "scale", "values"),
    [*((name, "nano", 5) for name in RECIPES[:-1]), ("phase1", "1b", 5), ("curriculum", "nano", 1)],
)
def test_no_odd_value_gets_past_the_check(name, scale, values):
    whole, random_values = recipe(name, scale), random.Random(f"{name}:{scale}")
    passed = 0
    for path, own in leaves(whole):
        field = FIELDS[declared_name(own)]
        before = whole
        for key in path:
            before = before[key]
        for value in random_values.sample(ODD, values):
            set_leaf(whole, path, value)
            said = refusal(check, whole)
            if said:
                assert ".".join(path) in said and len(said) < 5000
                assert field.allowed in said or isinstance(value, dict)
            else:
                passed += 1
                assert not isinstance(value, bool) or field.type is bool
                assert not isinstance(value, float) or (
                    math.isfinite(value) and (abs(value) > 1e-300 or field.accepts(0.0))
                )
                assert not isinstance(value, int) or -1 <= value <= 10**14
                assert not isinstance(value, str) or value.isprintable()
        set_leaf(whole, path, before)
    check(whole)  # all is as it was
    assert passed


@pytest.mark.parametrize("module", [phase1, dpo])
def test_what_passes_the_check_at_a_bound_breaks_nothing_behind_it(module):
    whole = module.get_config("nano")
    for path, own in leaves(whole):
        field, before = FIELDS[declared_name(own)], whole
        for key in path:
            before = before[key]
        for value in {
            field.type(bound) for bound in (field.ge, field.le) if bound is not None
        } | set(field.choices):
            set_leaf(whole, path, value)
            if refusal(downstream, whole):
                continue
            if path[0] in ("optimizer", "schedule", "rope"):
                schedules(whole)
            if path == ("seed",) or path[:2] == ("data", "sources"):
                assert mixed(whole) in range(3)
        set_leaf(whole, path, before)
    schedules(whole)
    mixed(whole)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("optimizer.peak_lr", math.nan, "optimizer.peak_lr=nan: must be a number from 1e-12 to 1"),
        ("optimizer.peak_lr", 50.0, "optimizer.peak_lr=50.0"),
        (
            "optimizer.clip_norm",
            -1.0,
            "optimizer.clip_norm=-1.0: must be 0 or a number from 1e-06 to 1e+06",
        ),
        ("optimizer.eps", 0.0, "from 1e-15"),
        ("optimizer.b2", 1.0, "from 0 to 0.99999"),
        ("loss.z_loss", math.inf, "loss.z_loss=inf"),
        ("loss.chunk_tokens", 10**30, "whole number from 1"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every=-1"),
        ("rope.start_theta", 0.0, "from 1 to 1e+12"),
        ("data.sources.code", 1e308, "data.sources.code=1e+308"),
        ("data.sources.code", 1e-320, "data.sources.code=1e-320"),
        ("data.sources.docs", 0.0, "from 1e-06 to 1e+06"),
        ("rope.schedule", "leap", "ramp or jump"),
        ("wandb.mode", "maybe", "online, offline or disabled"),
        ("model.num_kv_heads", 0, "a whole number from 1 to 1,024"),
        ("gates.perplexity", ((5, 1.0),), "go below"),
        ("data.validation", 5, "a tuple of names"),
        ("samples.prompts", (1,), "a tuple of texts"),
        ("samples.prompts", ("",), "none empty"),
        ("gates.perplexity", ((2.5, 1.0, 2.0),), "step a whole number"),
        ("data.max_segments", 2**31, "from 1 to 65,536"),
        ("schedule.total_steps", 2**31, "from 1 to 16,777,216"),
        ("seed", 2**32 + 1, "at least 0 and below 2,147,483,648"),
        ("seed", -1, "at least 0"),
        ("model.d_model", 2**31, "from 1 to 65,536"),
        ("mesh.data", 0, "from 1"),
        ("mesh.fsdp", 0, "must be -1 or a whole number from 1"),
        ("data.dir", "", "not empty"),
        ("data.dir", "docs/mine", "source folders"),
        ("wandb.project", "a/b", "a plain name"),
        ("corpora.docs.keep", "poems", "'' or stem"),
    ],
)
def test_the_line_says_what_is_wrong_and_what_is_allowed(name, value, says):
    whole = recipe("phase1")
    set_leaf(whole, name.split("."), value)
    with pytest.raises(BadInput) as caught:
        check(whole)
    assert says in str(caught.value) and str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.clip_norm", 0),
        ("optimizer.clip_norm", 1),
        ("mesh.fsdp", -1),
        ("seed", 2**31 - 1),
        ("samples.prompts", ("two\nlines", "二つ")),
    ]
    + [
        ("data.dir", "/data"),
        ("data.dir", "data/日本"),
        ("wandb.project", "nano-llama_2.0"),
        ("optimizer.weight_decay", 0),
    ],
)
def test_right_values_pass(name, value):
    whole = recipe("phase1")
    set_leaf(whole, name.split("."), value)
    check(whole)


def test_all_mistakes_are_named_and_a_stage_s_by_its_stage():
    whole = curriculum.get_config("nano")
    set_leaf(whole, ("stages", "sft", "batch_size"), 0)
    set_leaf(whole, ("optimizer", "b1"), 2.0)
    set_leaf(whole, ("data", "sources", "a/b"), 1.0)
    with whole.unlocked():
        whole.optimizer.peak_rl = 1.0
        del whole.stages.dpo["seq_len"]
        whole.stages["c/d"] = whole.stages.phase1
    with pytest.raises(BadInput) as caught:
        check(whole)
    for words in (
        "optimizer.b1=2.0: must be",
        "stages.sft.batch_size=0: must be",
        "'a/b' must be a plain name",
        "'c/d' must be a plain name",
        "optimizer.peak_rl=1.0: there is no such setting; did you mean optimizer.peak_lr?",
        "stages.dpo.seq_len is missing",
    ):
        assert words in str(caught.value)


def test_sizes_that_are_each_allowed_may_be_too_much_together():
    whole = recipe("phase1", "1b")
    whole.model.update(dict(d_model=65_536, num_layers=500))
    with pytest.raises(BadInput, match=r"7\.09e\+11 parameters, at most 1e\+11"):
        settle.settle(whole)
    whole.model.update(dict(d_model=65_536, num_layers=22))
    with pytest.raises(BadInput, match="parameters and optimizer need"):
        settle.settle(whole)


def test_values_that_follow_from_others():
    whole = recipe("phase1")
    whole.batch_size = 4
    resolved = settle.resolve(whole)
    assert (resolved.batch_size, resolved.tokens_per_step) == (4, 4 * 256)
    assert resolved.mesh.data * resolved.mesh.fsdp == jax.device_count()
    assert (resolved.model.dtype, resolved.model.attention) == ("float32", "xla")
    assert resolved.data.sources == dict(whole.data.sources)
    assert resolved.corpora["docs"].url == "builtin://docs"
    assert whole.model.dtype == "auto"  # the recipe's own stays
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.optimizer.peak_lr = 1.0

    whole.tokens_per_step = 1024  # agrees, as in a command line written when it had to be given
    assert settle.resolve(whole) == resolved
    whole.tokens_per_step = 2048
    with pytest.raises(BadInput, match="tokens_per_step=2048 is not batch_size=4 x seq_len=256"):
        settle.resolve(whole)
    with whole.unlocked():
        del whole["tokens_per_step"]
    assert settle.resolve(whole) == resolved

    stages = curriculum.get_config("nano")
    stages.stages.phase2_8k.batch_size = 2
    assert settle.resolve(stages_of(stages)["phase2_8k"]).tokens_per_step == 2 * 512


def test_a_resolved_config_has_every_setting_of_its_recipe():
    for module in (phase1, sft):
        whole = module.get_config("nano")
        found = {path for path, _ in config.leaves(settle.resolve(whole).to_dict())}
        assert found == {path for path, _ in config.leaves(whole.to_dict())}


def test_a_vocabulary_of_0_is_the_tokenizer_s(tmp_path):
    path = tmp_path / "t.model"
    whole, tuned = recipe("phase1"), recipe("sft")
    whole.model.vocab_size = 0
    whole.tokenizer.path = tuned.tokenizer.base = str(path)
    tuned.tokenizer.path = str(tmp_path / "chat.model")
    tuned.model.vocab_size = tuned.tokenizer.vocab_size = 0
    with pytest.raises(BadInput, match=r"follows the tokenizer, and .*t\.model is missing"):
        settle.resolve(whole)
    tokenizer.train(["some words, and some more of them " * 20], path, 300, 10**6)
    for stage, pieces in ((whole, 300), (tuned, 312)):  # 306, padded to a multiple of 8
        resolved = settle.resolve(stage)
        assert resolved.model.vocab_size == resolved.tokenizer.vocab_size == pieces
    (tmp_path / "chat.model").write_bytes(tokenizer.Tokenizer(path).extended())
    assert settle.resolve(tuned).model.vocab_size == 312


@pytest.mark.parametrize("scale", SCALES)
def test_the_recipe_for_any_text(scale):
    whole = recipe("own", scale)
    assert "text=''" in refusal(check, whole)
    whole.text = "a.txt"
    check(whole)
    names = {declared_name(path) for path, _ in config.leaves(whole.to_dict())}
    assert names >= OWN_FIELDS.keys()
    other = recipe("phase1")
    set_leaf(other, ("epochs",), 1.0)
    assert refusal(check, other) == "epochs is for configs/own.py"
    assert "end_step is missing" in refusal(settle.resolve, recipe_without(phase1, "end_step"))


def recipe_without(module, name):
    whole = module.get_config("nano")
    with whole.unlocked():
        del whole[name]
    return whole


def test_what_is_printed_is_a_command_line():
    """Every line sets what it shows, so that the printed values resolve to the same config."""
    whole = curriculum.get_config("nano")
    whole.optimizer.peak_lr = 1e-3
    stages = {name: settle.resolve(stage) for name, stage in stages_of(whole).items()}
    lines = list(show.lines(whole, stages))
    assert "optimizer.peak_lr=0.001" in lines and "model.attention=xla  # derived" in lines
    assert "stages.phase1.tokens_per_step=2048  # derived" in lines
    assert "tokenizer.sources=\"('docs', 'code', 'reasoning', 'transcripts')\"" in lines
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names))
    assert names == sorted(names, key=lambda n: (n.startswith("stages."), "." in n, n))

    again = curriculum.get_config("nano")
    for line in lines:
        (word,) = shlex.split(line, comments=True)
        name, _, value = word.partition("=")
        *sections, key = name.split(".")
        at = again
        for section in sections:
            at = at[section]
        kind = type(at[key])
        at[key] = ast.literal_eval(value) if kind in (tuple, bool) else kind(value)
    resolved_again = {name: settle.resolve(stage) for name, stage in stages_of(again).items()}
    assert resolved_again == stages

    lines = list(show.lines(recipe("own"), {}))
    assert "text=''" in lines and any("end_step" in line for line in lines)


def test_seeds_do_not_alias():
    top = FIELDS["seed"].lt - 1
    keys = {
        tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, top - 1, top)
    }
    assert len(keys) == 4
    assert len({pipeline.source_seed(seed, "docs") for seed in (0, 1, top - 1, top)}) == 4


def test_names_that_are_nearly_right():
    assert did_you_mean("optimizer.peak_lrr") == "; did you mean optimizer.peak_lr?"
    assert did_you_mean("peak_lr") == "; did you mean optimizer.peak_lr?"
    assert did_you_mean("checkpoint.evry") == "; did you mean checkpoint.every?"
    assert did_you_mean("nonsense") == ""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--config=configs/phase1.py:nano", "--config.optimizer.peak_lrr=1"],
            "config: optimizer.peak_lrr; did you mean optimizer.peak_lr?",
        ),
        (
            ["--config=configs/phase1.py:nano", "--config.data.sources.dcos=1"],
            "config: data.sources.dcos; did you mean docs?",
        ),
        (["--config=configs/phase1.py:nano", "--config.nonsense=1"], "config: nonsense"),
        (
            ["--config=configs/curriculum.py", "--config.stages.sft.optimizer.b1=1"],
            "stages.sft.optimizer.b1; did you mean optimizer.b1?",
        ),
        (
            ["--config=configs/phase1.py:nnao"],
            "unknown scale 'nnao': choose one of nano, 60m, 300m, 1b",
        ),
        (["--config=configs/sft.py:"], "unknown scale ''"),
        (["--config=README.md"], "README.md:5 is not Python, so not a recipe"),
        (["--config=nanollama_jax/recipes/sizes.py"], "the recipe does not load: "),
        (["--config=configs"], "Is a directory"),
        (
            ["--config=configs/phase1.py:nano", "--config.batch_size=0", "--config.accumulation=0"],
            "batch_size=0: must be a whole number from 1",
        ),
        (
            ["--config=configs/phase1.py:nano", "--config.end_step=-1"],
            "end_step=-1: must be a whole number from 1",
        ),
        (
            ["--config=configs/phase1.py:nano", "--config.gates.perplexity=((5, 1.0"],
            "gates.perplexity=",
        ),
        (["--config=configs/phase1.py:nano", "--config.seed=4294967297"], "seed=4294967297"),
    ],
)
def test_a_command_line_that_is_wrong(argv, says, monkeypatch, capsys):
    values = flags.FlagValues()
    monkeypatch.chdir(config.ROOT)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the recipe loaded before
    holder = config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, lock_config=True
    )
    with pytest.raises(SystemExit) as end:
        flags_parser(holder)(sys.argv)
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and says in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )


@pytest.mark.parametrize(
    "path", ["", "/", ".", "docs", "nanollama_jax/../docs/x", "runs/lr[3e-4]", "[a]/b"]
)
def test_a_workdir_that_cannot_be(path, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    with pytest.raises(BadInput, match="--workdir="):
        check_workdir(path)


def test_workdirs_that_can(tmp_path, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    for path in ("runs/a", "data", "a b*?{}", str(tmp_path), "docs_of_mine", "日本"):
        check_workdir(path)
    (tmp_path / "[x]").mkdir()
    monkeypatch.chdir(tmp_path / "[x]")
    with pytest.raises(BadInput, match=r"with '\[' in its path"):
        check_workdir("run")


@pytest.mark.parametrize(
    ("data", "fsdp", "devices", "shape"),
    [(1, -1, 2, (1, 2)), (2, -1, 4, (2, 2)), (4, 1, 4, (4, 1)), (2, 2, 4, (2, 2))],
)
def test_mesh_shapes(data, fsdp, devices, shape):
    assert sharding.mesh_shape(data, fsdp, devices) == shape
    with pytest.raises(BadInput, match="needs"):
        sharding.mesh_shape(data * 3, fsdp, devices)


def test_what_a_plan_counts():
    assert plan.bytes_per_token(recipe("phase1")) == 2 and plan.bytes_per_token(recipe("sft")) == 4
    whole = recipe("phase1")
    for vocabulary, size in ((65_536, 2), (65_537, 4), (128_256, 4)):
        whole.model.vocab_size = vocabulary
        assert plan.bytes_per_token(whole) == size
    for stage in stages_of(curriculum.get_config("1b")).values():
        kept = set(range(10_000, stage.end_step + 1, 10_000)) | set(
            sorted({*range(1000, stage.end_step, 1000), stage.end_step})[-2:]
        )
        assert plan.checkpoints_kept(stage) == 1 + len(
            {step for step in kept if step > stage.start_step}
        )
