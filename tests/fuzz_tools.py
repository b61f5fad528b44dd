"""Calls every tool, and main.py, with odd values for each of its flags and with damaged inputs.

Each call must end with status 0, or with 1, 2 or 3 and exactly one line on stderr that begins with
"error:"; within the time limit, and never with a traceback.

python -m tests.fuzz_tools                          all cases: the failures, then tools x outcomes
python -m tests.fuzz_tools --tools generate,chat    some tools
python -m tests.fuzz_tools --sample 3               as many cases of each tool, drawn by --seed

Flags are asked of the tools themselves, so that a new one is tried too. One process imports what is
heavy and forks for each call. A call can write into its own folder alone, by Linux's Landlock: a tool
that is told to write into / would.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import runpy
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

# isort: split
from tests.conftest import ROOT  # first: it sets what jax reads when it is imported

# isort: split
import absl.app
import jax
from absl import flags

LIMIT = 120  # seconds a call; most take less than one
MEMORY = 24 * 2**30  # address space of a call, bytes
# fmt: off
# Heavy, and needed by most tools. None may start the backend of jax: a fork does not get its threads.
PRELOADED = (
    "matplotlib.pyplot", "nanollama_jax.curriculum", "nanollama_jax.corpus.estimate",
    "nanollama_jax.corpus.near_duplicates", "nanollama_jax.evals.verifiable",
    "nanollama_jax.export.compare", "nanollama_jax.export.gguf", "nanollama_jax.export.hf",
    "nanollama_jax.infer.attention_maps", "nanollama_jax.planning.compile_for",
    "nanollama_jax.planning.plan", "benchmarks.train", "benchmarks.decode", "benchmarks.data",
)

NUMBERS = (
    "-1", "0", "1", "2.5", "2147483648", "9223372036854775808", "1e308", "1e-320", "nan", "inf", "-inf",
)
WORDS = ("", " ", "x", "None", "[]", "é", "a\nb", "\x1b[2J", "-", "--", "a=b", ",", "[x]", "*")
PATHS = (
    "/", ".", "..", "/nonexistent", "/nonexistent/x.json", "/dev/null", "@folder", "@empty", "@binary",
    "@list.json", "@object.json", "@lines.jsonl", "@cut.model", "@" + "long/" * 60,
)
URLS = (
    "hf://", "hf://x", "file://", "file://.", "file:///nonexistent/*.jsonl", "file://@empty",
    "file://@binary", "file://@lines.jsonl", "file://@empty.jsonl", "file://@latin1.txt",
    "file://@cut.parquet", "file://@cut.jsonl.zst", "builtin://", "builtin://x",
    "builtin://math?rows=-1", "builtin://math?rows=nan", "builtin://math?x=1", "tfds://", "x://y",
    "://", "text=file://@empty", "text=",
)
ODD = (*NUMBERS, *WORDS, *PATHS, *URLS)

# Valid calls; @NAME is a fixture, copied into the folder of a call that damages it. A flag is changed
# in the first call that has it; one that no call has is added to the first.
DOCS = "file://@docs.jsonl"
SHORT = ["--max_new_tokens", "3"]
CALLS = {
    "generate": [
        ["--checkpoint", "@base", "--prompt", "abc", *SHORT, "--temperature", "1", "--seed", "1"],
        ["--checkpoint", "@base", "--prompts", "@prompts.jsonl", "--out", "out.jsonl", *SHORT],
        ["--checkpoint", "@base", "--prompt", "abc", "--json_schema", "@schema.json", *SHORT],
    ],
    "chat": [
        ["--checkpoint", "@tuned", "--ask", "abc", *SHORT, "--tools", "calculate", "--temperature", "1"],
    ],
    "evaluate": [
        ["--checkpoint", "@base", "--tasks", "perplexity", "--text", DOCS, "--max_tokens", "300",
         "--context", "32", "--out", "o.json"],
        ["--checkpoint", "@tuned", "--tasks", "reasoning", "--questions", "1", "--show", "1"],
    ],
    "visualize_attention": [
        ["--checkpoint", "@base", "--text_file", "@docs.jsonl", "--out", "o.png", "--max_tokens", "16",
         "--bins", "4"],
    ],
    "export_hf": [["--checkpoint", "@base", "--out", "hf"]],
    "export_gguf": [["--checkpoint", "@base", "--type", "f16", "--out", "x.gguf"]],
    "import_hf": [
        ["--folder", "@hf", "--workdir", "run"],
        ["--llama2c", "@binary", "--tokenizer", "@tokenizer.model", "--workdir", "run"],
    ],
    "compare_exports": [["--checkpoint", "@base", "--gguf", "@f16.gguf", *SHORT, "--prompt", "abc"]],
    "train_tokenizer": [
        ["--source", DOCS, "--vocab_size", "300", "--out", "t.model", "--max_bytes", "20000"],
    ],
    "near_duplicates": [[DOCS, "--out", "o.json", "--threshold", "0.8"]],
    "decontaminate": [
        [DOCS, "--benchmark", f"text={DOCS}", "--out", "o.json"],
        ["@docs", "--tokenizer", "@tokenizer.model", "--benchmark", f"text={DOCS}", "--out", "o.json"],
    ],
    "check_finetuning_data": [["file://@chats.jsonl"], ["file://@pairs.jsonl", "--strict"]],
    "benchmark": [
        ["decontaminate", "--source", DOCS, "--benchmark", f"text={DOCS}", "--rounds", "1"],
    ],
}
OF_RECIPES = {  # after the flags of a tiny recipe
    "plan": [["--target", "h100", "--devices", "2", "--mfu", "0.4"]],
    "inspect_data": [["--rows", "4", "--out", "o.png"]],
    "prepare_data": [["--dry_run"], ["--workers", "1", "--config.data.dir=data"]],
    "main": [["--workdir", "run"]],
}
# fmt: on
FOLDERS = ("@base", "@tuned", "@hf", "@docs")


@dataclasses.dataclass(frozen=True)
class Case:
    tool: str
    arguments: tuple[str, ...]
    damage: tuple[str, int] | None = None  # a fixture, and the seed of what is done to it

    def __str__(self) -> str:
        damage = f"   ({self.damage[0]} damaged, {self.damage[1]})" if self.damage else ""
        return f"{self.tool} {' '.join(map(repr, self.arguments))}{damage}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int | None  # None: over time
    out: str
    err: str
    seconds: float

    def fault(self, tool: str) -> str | None:
        """What is wrong with it: None where it is as it must be."""
        lines = self.err.splitlines()
        if self.status is None:
            return "hangs"
        if "Traceback (most recent call last)" in self.out + self.err:
            return "traceback"
        if self.status == 0:
            return None
        if self.status not in (1, 2, 3):
            return f"status {self.status}"
        if tool == "check_finetuning_data" and not lines and self.out:
            return None  # it found bad rows, which are its output
        return None if len(lines) == 1 and lines[0].startswith("error: ") else "not one line"


@dataclasses.dataclass(frozen=True)
class Call:
    """A script of the repository that runs in a fork, in a folder of its own."""

    pid: int
    ended: int  # a pidfd, which can be read when it is
    folder: pathlib.Path
    started: float
    until: float

    @classmethod
    def of(
        cls,
        script: str,
        arguments: list[str],
        folder: pathlib.Path,
        limit: float,
        before: Callable[[], None] = lambda: None,
    ) -> "Call":
        started = time.monotonic()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(script, arguments, folder, before)
        return cls(pid, os.pidfd_open(pid), folder, started, started + limit)

    def outcome(self) -> Outcome:
        in_time = bool(
            select.select([self.ended], [], [], max(0, self.until - time.monotonic()))[0]
        )
        seconds = time.monotonic() - self.started
        os.close(self.ended)
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its workers too, whether it has ended or not
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (
            (self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")
        )
        return Outcome(status if in_time else None, out, err, seconds)


def _child(
    script: str, arguments: list[str], folder: pathlib.Path, before: Callable[[], None]
) -> None:
    status = 99
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        _write_only_into(folder, pathlib.Path(tempfile.gettempdir()), pathlib.Path("/dev/shm"))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv, sys.path[0] = [str(ROOT / script), *arguments], str((ROOT / script).parent)
        before()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 255)


def _write_only_into(*folders: pathlib.Path) -> None:
    """Landlock for this process and its children: docs.kernel.org/userspace-api/landlock.html."""
    libc = ctypes.CDLL(None, use_errno=True)
    every = sum(1 << right for right in (1, *range(4, 14)))  # write, remove, make, refer
    ruleset = libc.syscall(444, struct.pack("Q", every), 8, 0)
    rules = {**dict.fromkeys(folders, every), pathlib.Path(os.devnull): 1 << 1}
    for path, rights in rules.items():
        rule = struct.pack("=Qi", rights, os.open(path, os.O_PATH))
        libc.syscall(445, ruleset, 1, rule, 0)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    if ruleset < 0 or libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock does not confine what the tools write")


def flags_of(script: str, folder: pathlib.Path) -> list[str]:
    """What it says itself."""

    def answer(names) -> None:
        pathlib.Path("flags.json").write_text(json.dumps(list(names)))
        os._exit(0)

    def of_argparse(parser, *_):
        answer(
            action.option_strings[-1]
            for action in parser._actions
            if action.option_strings and action.dest != "help"
        )

    def of_absl(main, flags_parser):
        name = pathlib.Path(script).stem
        module = script if name == "main" else f"nanollama_jax.commands.{name}"
        defined = flags.FLAGS.flags_by_module_dict()
        answer(f"--{flag.name}" for flag in defined.get(module) or defined[str(ROOT / module)])

    def instead() -> None:
        argparse.ArgumentParser.parse_args = of_argparse
        absl.app.run = of_absl

    Call.of(script, [], folder, LIMIT, instead).outcome()
    return sorted(
        {
            name
            for name in json.loads((folder / "flags.json").read_text())
            if not name.startswith("--config")
        }
    )


def cases(tool: str, calls: list[list[str]], names: list[str]) -> Iterator[Case]:
    """Each flag with each odd value; what is missing, given twice, unknown or too much; damaged inputs."""
    for arguments in calls:
        yield Case(tool, tuple(arguments))
    for name in [*names, "--config"][: len(names) + (tool in OF_RECIPES)]:
        base = next((arguments for arguments in calls if name in arguments), calls[0])
        at = base.index(name) if name in base else len(base)
        takes_value = name not in base or not (at + 1 == len(base) or base[at + 1].startswith("--"))
        rest = base[at + 1 + takes_value :]
        for value in ODD:
            yield Case(tool, (*base[:at], f"{name}={value}", *rest))
        yield Case(tool, (*base[:at], name, *rest))
        yield Case(tool, (*base[:at], *rest))
        yield Case(
            tool,
            (*base, *base[at : at + 1 + takes_value])
            if name in base
            else (*base, name, "1", name, "2"),
        )
    for arguments in calls:
        for i, argument in enumerate(arguments):
            if not argument.startswith("--") and (
                i == 0 or not arguments[i - 1].startswith("--")
            ):  # positional
                for value in ODD:
                    yield Case(tool, (*arguments[:i], value, *arguments[i + 1 :]))
        for extra in (["--nope"], ["--nope=1"], ["x"], ["--"], ["-x"], [""]):
            yield Case(tool, (*arguments, *extra))
        for fixture in sorted(
            {found for argument in arguments for found in re.findall(r"@[\w.]+", argument)}
        ):
            for seed in range(40 if fixture in FOLDERS else 12):
                yield Case(tool, tuple(arguments), (fixture, seed))


def damaged(path: pathlib.Path, seed: int) -> None:
    """Does one thing to a file, or to a file in a folder."""
    rng = random.Random(seed)
    if path.is_dir():
        path = rng.choice(
            sorted(one for one in path.glob("**/*") if one.is_file() and one.stat().st_size)
        )
    content = path.read_bytes()
    kind = seed % 8 if path.suffix in (".json", ".jsonl", "") else seed % 5
    if kind == 0:
        path.write_bytes(content[: len(content) // 2])
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        flipped = bytearray(content)
        for _ in range(3):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        path.write_bytes(
            rng.choice(
                [
                    b"[]",
                    b"{}",
                    b"null",
                    b"3",
                    b'"x"',
                    b'[{"a": 1}]',
                    b"\xef\xbb\xbf{}",
                    b"\x00" * 64,
                    b"{" * 5000,
                ]
            )
        )
    elif kind == 6:  # another number
        numbers = list(re.finditer(rb"\d+", content))
        if numbers:
            one = rng.choice(numbers)
            path.write_bytes(
                content[: one.start()]
                + rng.choice([b"-1", b"0", b"1e400", b"NaN", b'"x"', b"null"])
                + content[one.end() :]
            )
    else:
        path.write_bytes(content.replace(b'"', b"'", rng.randrange(1, 9)))


def recipe_flags(tool: str, root: pathlib.Path) -> list[str]:
    from tests.end_to_end.conftest import Lab

    if tool == "plan":  # looks for the largest batch that fits: slow for a tiny model
        return ["--config", f"{ROOT}/configs/phase1.py:1b"]
    made = Lab(root).flags(
        "phase1", pathlib.Path("x"), "--config.end_step=2", "--config.validation.every=2"
    )
    made[1] = f"{ROOT}/{made[1]}"
    return made[:2] + [
        flag for flag in made[4:] if tool != "prepare_data" or ".corpora." not in flag
    ]


def make_fixtures(root: pathlib.Path, lab: str | None) -> None:
    """Prepared corpora and data (a copy of `lab`), a base and a chat model with random weights,
    exports, odd files. In a fork, for it uses jax."""
    import flax
    import jax.numpy as jnp
    import pyarrow
    import pyarrow.parquet

    from nanollama_jax import checkpoint
    from nanollama_jax.export import gguf, hf
    from nanollama_jax.model import ModelConfig
    from nanollama_jax.model.llama import Llama
    from nanollama_jax.tokenizer import Tokenizer
    from tests.end_to_end.conftest import fill

    if lab:
        shutil.copytree(lab, root, dirs_exist_ok=True)
    else:
        fill(root)
    tokenizer = Tokenizer(root / "tokenizer.model")
    for name, own in (("base", tokenizer), ("tuned", Tokenizer("tuned", tokenizer.extended()))):
        model = ModelConfig(
            num_layers=1,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            ffn_dim=64,
            vocab_size=own.vocab_size,
            dtype="float32",
            scan_layers=False,
        )
        tokens = jnp.zeros((1, 8), jnp.int32)
        params = Llama(model).init(jax.random.key(0), tokens, tokens, tokens + 1, 10_000.0)[
            "params"
        ]
        params = jax.device_get(flax.core.meta.unbox(params))
        metadata = checkpoint.weights_metadata(
            model, own, 10_000.0, 1024, {"imported_from": "nowhere"}
        )
        loaded = checkpoint.Loaded(model, params, own, metadata, root / name)
        checkpoint.save_weights(loaded, root / name)
    loaded = checkpoint.load(root / "base")
    hf.export(loaded, root / "hf")
    gguf.export(loaded, root / "f16.gguf", "f16")
    text = (root / "docs.jsonl").read_bytes()
    (root / "docs.jsonl").write_bytes(b"".join(text.splitlines(keepends=True)[:40]))
    (root / "folder").mkdir()
    files = {
        "empty": b"",
        "empty.jsonl": b"",
        "binary": random.Random(0).randbytes(5000),
        "list.json": b'[1, "x", null]',
        "object.json": b'{"a": {"b": []}}',
        "lines.jsonl": b'{"text": "a"}\n3\n',
        "cut.model": (root / "tokenizer.model").read_bytes()[:-1000],
        "latin1.txt": b"na\xefve",
        "cut.jsonl.zst": b"\x28\xb5\x2f\xfd\x04",
        "prompts.jsonl": b'{"prompt": "abc"}\n{"prompt": "b"}\n',
        "schema.json": b'{"type": "object", "properties": {"n": {"type": "integer"}}}',
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), root / "cut.parquet")
    (root / "cut.parquet").write_bytes((root / "cut.parquet").read_bytes()[:-9])


def started(
    case: Case, root: pathlib.Path, folder: pathlib.Path, more: list[str], limit: float
) -> Call:
    folder.mkdir()
    if case.damage:
        name, seed = case.damage[0].removeprefix("@"), case.damage[1]
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
        damaged(folder / name, seed)

    def place(argument: str) -> str:
        own = case.damage and case.damage[0].removeprefix("@")
        return re.sub(
            r"@([\w./]+)",
            lambda found: str((folder if found[1] == own else root) / found[1]),
            argument,
        )

    script = "main.py" if case.tool == "main" else f"tools/{case.tool}.py"
    changed = [*map(place, case.arguments)]
    named = any(one.split("=")[0] == "--config" for one in changed)
    return Call.of(script, [*(more[2:] if named else more), *changed], folder, limit)


def outcomes(
    tools: list[str], sample: int | None, seed: int, jobs: int, limit: float, lab: str | None
) -> Iterator[tuple[Case, Outcome]]:
    """Each case with its outcome, as they end."""
    for module in PRELOADED:
        __import__(module)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        root, own, calls = (pathlib.Path(directory) / name for name in ("fixtures", "own", "calls"))
        for folder in (root, own, calls):
            folder.mkdir()
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HOME": f"{own}",
            "TMPDIR": f"{own}",
        }
        tempfile.tempdir = str(own)
        jax.config.update("jax_compilation_cache_dir", f"{own}/jax")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        pid = os.fork()
        if pid == 0:
            try:
                make_fixtures(root, lab)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0, "the fixtures cannot be made"
        rng, chosen = random.Random(seed), []
        for tool in tools:
            asked = calls / tool
            asked.mkdir()
            names = flags_of("main.py" if tool == "main" else f"tools/{tool}.py", asked)
            valid, *odd = dict.fromkeys(cases(tool, (CALLS | OF_RECIPES)[tool], names))
            chosen += [valid, *(odd if sample is None else rng.sample(odd, min(sample, len(odd))))]
        rng.shuffle(chosen)  # failures of every tool come early
        more = {tool: recipe_flags(tool, root) if tool in OF_RECIPES else [] for tool in tools}
        waiting, running = list(enumerate(chosen)), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                number, case = waiting.pop(0)
                call = started(case, root, calls / str(number), more[case.tool], limit)
                running[call.ended] = case, call
            until = min(call.until for _, call in running.values())
            ready = select.select(list(running), [], [], max(0, until - time.monotonic()))[0]
            for ended in ready or [
                ended for ended, (_, call) in running.items() if call.until == until
            ]:
                case, call = running.pop(ended)
                yield case, call.outcome()
                shutil.rmtree(call.folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", default=",".join((*CALLS, *OF_RECIPES)), metavar="NAME,NAME")
    parser.add_argument("--sample", type=int, help="cases of each tool, beside a valid call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="calls at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a call")
    parser.add_argument("--lab", metavar="DIR", help="what tests/end_to_end/conftest.py fills")
    parser.add_argument("--log", metavar="FILE", help="every case and outcome, as JSON lines")
    arguments = parser.parse_args()
    table, failures = collections.defaultdict(collections.Counter), []
    with open(arguments.log or os.devnull, "w") as log:
        for case, outcome in outcomes(
            arguments.tools.split(","),
            arguments.sample,
            arguments.seed,
            arguments.jobs,
            arguments.limit,
            arguments.lab,
        ):
            fault = outcome.fault(case.tool)
            if outcome.status and case == Case(
                case.tool, tuple((CALLS | OF_RECIPES)[case.tool][0])
            ):
                fault = "a valid call fails"
            table[case.tool][fault or ("ok" if outcome.status == 0 else "refused")] += 1
            if fault:
                failures.append(
                    f"{fault}: {case}\n    {(outcome.err or outcome.out)[-600:].strip()}"
                )
            print(
                json.dumps({"case": str(case), "fault": fault, **dataclasses.asdict(outcome)}),
                file=log,
                flush=True,
            )
    print("\n\n".join(sorted(failures)))
    for tool, counts in sorted(table.items()):
        print(
            f"{tool:22} {counts.total():6} calls: "
            + ", ".join(f"{count} {what}" for what, count in counts.most_common())
        )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
