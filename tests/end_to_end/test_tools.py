"""The commands that use a checkpoint, run as a user runs them. Other tests cover their results."""

import importlib
import json
import shutil
import sys

import pytest
from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax import checkpoint
from nanollama_jax.export import gguf, hf
from nanollama_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.export import test_tokenizer
from tests.export.tiny import tiny


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a tool in this process, for speed: its exit status, stdout and stderr."""

    def call(tool: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, flags)])
        try:
            importlib.import_module(f"nanollama_jax.commands.{tool}").main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


def test_from_a_checkpoint_to_everywhere_and_back(run, trained, tmp_path):
    assert run("export_hf", "--checkpoint", trained, "--out", tmp_path / "hf")[0] == 0
    assert (
        run(
            "export_gguf",
            "--checkpoint",
            trained,
            "--type",
            "q8_0",
            "--out",
            tmp_path / "q8_0.gguf",
        )[0]
        == 0
    )
    status, out, _ = run(
        "compare_exports",
        "--checkpoint",
        trained,
        "--hf",
        tmp_path / "hf",
        "--gguf",
        tmp_path / "q8_0.gguf",
        "--max_new_tokens",
        20,
    )
    assert status == 0 and out.count("prompt's ids the same") == 2 and "q8_0.gguf: The" in out
    status, out, _ = run("import_hf", "--folder", tmp_path / "hf", "--workdir", tmp_path / "run")
    assert status == 0 and "2,032,896 parameters, context 128" in out
    assert (
        run(
            "generate",
            "--checkpoint",
            tmp_path / "run",
            "--prompt",
            "def f(",
            "--max_new_tokens",
            5,
        )[0]
        == 0
    )


def test_generate(run, trained, tmp_path, monkeypatch):
    status, out, err = run(
        "generate",
        "--checkpoint",
        trained,
        "--prompt",
        "def f(",
        "--max_new_tokens",
        20,
        "--temperature",
        0.8,
        "--top_k",
        20,
    )
    assert status == 0 and out.startswith("def f(") and "tokens/s" in err
    (tmp_path / "prompts.txt").write_text("def f(\n\nclass A\n")
    flags = ["--checkpoint", trained, "--prompts", tmp_path / "prompts.txt", "--max_new_tokens", 8]
    assert run("generate", *flags, "--out", tmp_path / "out.jsonl")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["def f(", "class A"] and all(
        row["tokens"] <= 8 for row in rows
    )
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    )
    out = run(
        "generate",
        "--checkpoint",
        trained,
        "--prompt",
        "Answer: ",
        "--json_schema",
        tmp_path / "schema.json",
        "--max_new_tokens",
        30,
    )[1]
    assert isinstance(json.loads(out.removeprefix("Answer: "))["n"], int)
    lines = iter(["def f(", "x " * 200, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, out, err = run("generate", "--checkpoint", trained, "--max_new_tokens", 5)
    assert status == 0 and out.startswith("def f(") and "the model's context is 128" in err, (
        "a prompt that is too long does not end the session"
    )


def test_evaluate_and_visualize(run, trained, tmp_path):
    (tmp_path / "text.txt").write_text((ROOT / "main.py").read_text())
    flags = [
        "--checkpoint",
        trained,
        "--tasks",
        "perplexity",
        "--text",
        f"file://{tmp_path}/text.txt",
    ]
    status, out, _ = run("evaluate", *flags, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())["perplexity"]["texts"][flags[-1]]
    assert status == 0 and f"{scores['perplexity']:,.3f}" in out and 2 < scores["perplexity"] < 1000
    status, out, _ = run(
        "visualize_attention",
        "--checkpoint",
        trained,
        "--text_file",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "maps.png",
    )
    assert (
        status == 0
        and (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
        and "cut to the first 128" in out
    )


def test_a_tuned_model_talks_and_is_questioned(run, undisturbed, tmp_path, monkeypatch):
    status, out, _ = run(
        "chat", "--checkpoint", undisturbed, "--ask", "abc", "--ask", "a [b]", "--max_new_tokens", 5
    )
    assert (
        status == 0
        and out.startswith("   you: abc\n")
        and "\n   you: a [b]\n" in out
        and out.count("  says: ") == 2
    )
    said = iter(["abc", "x" * 300, "/new", "abc", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    status, again, err = run("chat", "--checkpoint", undisturbed, "--max_new_tokens", 5)
    first = out.split("\n   you: ")[0].removeprefix("   you: abc\n")
    assert (
        status == 0
        and again.rstrip() == f"{first}\n{first}"
        and "/new starts a new conversation" in err
        and "context is 256" in err
    )
    flags = ["--checkpoint", undisturbed, "--tasks", "reasoning", "--questions", 1, "--show", 1]
    status, out, _ = run("evaluate", *flags, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and "[chain_sum, wrong] 'State the final answer" in out
    assert scores["reasoning"]["all"] == dict(count=1, right=0.0, standard_error=0.0)


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        (
            "generate",
            ["--checkpoint", "CHECKPOINT", "--prompt", "x " * 200],
            "tokens and the model's context is 128",
        ),
        (
            "generate",
            ["--checkpoint", "CHECKPOINT", "--prompt", "x", "--top_p", "0.9"],
            "set a temperature",
        ),
        (
            "generate",
            ["--checkpoint", "CHECKPOINT", "--prompt", "x", "--json_schema", "nothing.json"],
            "No such file or directory (nothing.json)",
        ),
        ("generate", ["--checkpoint", "configs", "--prompt", "x"], "configs holds no checkpoint"),
        ("export_hf", ["--checkpoint", "nowhere", "--out", "OUT"], "there is no such folder"),
        (
            "export_gguf",
            ["--checkpoint", "CHECKPOINT", "--type", "f16", "--out", "README.md"],
            "README.md exists",
        ),
        ("import_hf", ["--folder", "configs", "--workdir", "OUT"], "config.json"),
        (
            "generate",
            ["--checkpoint", "CHECKPOINT", "--prompts", "main.py", "--out", "nowhere/x.jsonl"],
            "nowhere: there is no such folder",
        ),
        (
            "generate",
            ["--checkpoint", "CHECKPOINT", "--prompts", "docs/quickstart_curves.png"],
            "is not UTF-8",
        ),
        (
            "compare_exports",
            ["--checkpoint", "CHECKPOINT", "--hf", "nowhere"],
            "nowhere is not a Hugging Face export",
        ),
        (
            "compare_exports",
            ["--checkpoint", "CHECKPOINT", "--gguf", "README.md"],
            "README.md is not a GGUF file",
        ),
        (
            "compare_exports",
            ["--checkpoint", "CHECKPOINT", "--gguf", "nowhere.gguf"],
            "nowhere.gguf is not a GGUF file",
        ),
        ("evaluate", ["--checkpoint", "CHECKPOINT", "--tasks", "mmlu"], "'mmlu' is unknown"),
        (
            "evaluate",
            ["--checkpoint", "CHECKPOINT", "--tasks", "perplexity", "--text", "file://README.txt"],
            "README.txt",
        ),
        (
            "evaluate",
            ["--checkpoint", "CHECKPOINT", "--tasks", "reasoning"],
            "it is a base model's",
        ),
        (
            "evaluate",
            ["--checkpoint", "TUNED", "--tasks", "tools", "--questions", "1"],
            "the model's context is 256",
        ),
        (
            "evaluate",
            ["--checkpoint", "TUNED", "--tasks", "tools", "--questions", "0"],
            "--questions=0: give a number from 1 to",
        ),
        ("chat", ["--checkpoint", "CHECKPOINT", "--ask", "Hello"], "it is a base model's"),
        ("chat", ["--checkpoint", "TUNED", "--ask", "Hello", "--ask", " "], "--ask is empty"),
        (
            "chat",
            ["--checkpoint", "TUNED", "--ask", "Hello", "--tools", "fly"],
            "there is no tool 'fly'",
        ),
        ("chat", ["--checkpoint", "TUNED", "--ask", "x " * 200], "the model's context is 256"),
        (
            "visualize_attention",
            ["--checkpoint", "CHECKPOINT", "--text_file", "nothing.txt", "--out", "OUT"],
            "nothing.txt cannot be read",
        ),
    ],
)
def test_bad_input_is_one_line(request, run, trained, tmp_path, tool, flags, message):
    named = {
        "CHECKPOINT": trained,
        "TUNED": request.getfixturevalue("undisturbed") if "TUNED" in flags else None,
        "OUT": tmp_path / "out",
    }
    status, _, err = run(tool, *(named.get(flag, flag) for flag in flags))
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, (
        err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", "README.md/x", "/dev/null", "tests", "/", "."])
@pytest.mark.parametrize(
    "tool",
    [
        "decontaminate builtin://docs",
        "evaluate --checkpoint nowhere --tasks reasoning",
        "export_gguf --checkpoint nowhere --type f16",
        "export_hf --checkpoint nowhere",
        "generate --checkpoint nowhere --prompts README.md",
        "import_hf --folder nowhere",
        "near_duplicates builtin://docs",
        "train_tokenizer --source builtin://docs",
        "visualize_attention --checkpoint nowhere --text_file README.md",
    ],
)
def test_where_nothing_can_be_written(run, tool, out, monkeypatch):
    """Said before any work: none of these checkpoints exists."""
    monkeypatch.chdir(ROOT)
    if tool.startswith(("export_hf", "import_hf")) and out in ("tests", "/", "."):
        pytest.skip("it writes folders")
    flag = "--workdir" if tool.startswith("import_hf") else "--out"
    status, _, err = run(*tool.split(), flag, out)
    assert status == 2 and err.startswith(f"error: {flag} ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", 2**31], "vocab_size=2147483648 must be from 1 to"),
        (["--vocab_size", 2**24 + 1], "vocab_size=16777217 must be from 1 to"),
        (["--vocab_size", 0], "vocab_size=0 must be from 1 to"),
        (["--vocab_size", -5], "vocab_size=-5 must be from 1 to"),
        (["--vocab_size", 2**24], "lower vocab_size or train on more text"),
        (["--vocab_size", 1], "raise vocab_size"),
        (["--max_bytes", 0], "max_bytes=0 must be at least 1"),
        (["--max_bytes", -1], "max_bytes=-1 must be at least 1"),
        (["--max_bytes", 1], "lower vocab_size or train on more text"),
    ],
)
def test_odd_sizes_of_a_tokenizer(run, tmp_path, flags, message):
    (tmp_path / "text.txt").write_text("some words " * 100)
    out = ["--source", f"file://{tmp_path}/text.txt", "--out", tmp_path / "t.model"]
    status, _, err = run(
        "train_tokenizer", *out, "--vocab_size", 300, "--max_bytes", 10_000, *flags
    )
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, (
        err
    )
    assert not (tmp_path / "t.model").exists()


def test_exports_of_another_model_are_not_compared(run, trained, tmp_path):
    other = tiny(Tokenizer("chat", checkpoint.load(trained).tokenizer.extended()))
    hf.export(other, tmp_path / "hf")
    gguf.export(other, tmp_path / "f16.gguf", "f16")
    shutil.copytree(tmp_path / "hf", tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    for flags, message in (
        (["--hf", tmp_path / "hf"], "it is another model's export"),
        (["--gguf", tmp_path / "f16.gguf"], "it is another model's export"),
        (["--hf", tmp_path / "damaged"], "transformers cannot read"),
        (["--hf", trained], "is not a Hugging Face export"),
        (["--hf", tmp_path / "run"], "is not a Hugging Face export"),
        (["--gguf", tmp_path], "is not a GGUF file"),
        ([], "there is nothing to compare with"),
    ):
        status, _, err = run(
            "compare_exports", "--checkpoint", trained, "--max_new_tokens", 4, *flags
        )
        assert status == 2 and message in err and "Traceback" not in err, err
        assert err.count("\n") == 1 or not flags, err


def test_an_import_that_cannot_be_exported_says_so(run, tmp_path):
    """An import is of use without: it can be generated with and trained on."""
    base = test_tokenizer.model()
    hf.export(tiny(base), tmp_path / "hf")
    proto = spm.ModelProto.FromString(base.model_bytes)
    proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "hf/tokenizer.model").write_bytes(proto.SerializeToString())
    status, out, err = run("import_hf", "--folder", tmp_path / "hf", "--workdir", tmp_path / "run")
    assert (
        status == 0
        and "-> " in out
        and "note: GGUF cannot be exported from it: its tokenizer removes extra whitespace" in err
    )


@pytest.mark.parametrize(
    "tool",
    [
        "generate",
        "export_hf",
        "export_gguf",
        "import_hf",
        "evaluate",
        "visualize_attention",
        "compare_exports",
        "chat",
    ],
)
def test_help_has_examples(run, tool):
    status, out, _ = run(tool, "--help")
    assert status == 0 and f"\n    nanollama {tool.replace('_', '-')} --" in out
