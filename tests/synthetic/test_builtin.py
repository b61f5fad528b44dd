import itertools
import os
import subprocess
import sys

import pytest

from nanollama_jax.errors import BadInput
from nanollama_jax.synthetic import builtin

RANKS = {
    "docs": 4,
    "code": 1,
    "reasoning": 1,
}  # all the docs take 17 s; the first of four ranks stands for them


@pytest.fixture(scope="module")
def corpora() -> dict[str, list[tuple[str, str]]]:
    return {name: list(builtin.read(name, 0, RANKS[name])) for name in builtin.NAMES}


def test_there_is_enough_of_each(corpora):
    megabytes = {
        name: RANKS[name] * sum(len(text.encode()) for _, text in documents) / 1e6
        for name, documents in corpora.items()
    }
    assert megabytes["docs"] > 6 and megabytes["code"] > 10 and megabytes["reasoning"] > 2, (
        megabytes
    )


def test_ids_are_unique_and_texts_clean(corpora):
    for name, documents in corpora.items():
        assert len({document_id for document_id, _ in documents}) == len(documents), name
        for document_id, text in documents:
            assert "\0" not in text and text.strip(), document_id
            text.encode()


def test_a_long_context_phase_has_long_documents(corpora):
    assert sum(len(text) for _, text in corpora["code"] if len(text) > 50_000) > 3e6


@pytest.mark.parametrize("name", builtin.NAMES)
def test_ranks_partition_the_set_and_share_the_work(corpora, name):
    ranks = [list(builtin.read(name, part * RANKS[name], 3 * RANKS[name])) for part in range(3)]
    assert sorted(itertools.chain(*ranks)) == sorted(corpora[name])
    sizes = [sum(len(text) for _, text in rank) for rank in ranks]
    assert max(sizes) < 2 * min(sizes)


def test_another_process_with_another_hash_seed_builds_the_same():
    script = (
        "import hashlib, sys; from nanollama_jax.synthetic import builtin; digest = hashlib.sha256()\n"
        "for name, world in (('docs', 100), ('code', 4), ('reasoning', 4)):\n"
        "    for pair in builtin.read(name, 1, world): digest.update(repr(pair).encode())\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules, 'a package was imported instead of read'\n"
        "print(digest.hexdigest())"
    )
    outputs = set()
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", script],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(outputs) == 1


def test_an_unknown_name_is_refused():
    with pytest.raises(
        BadInput, match=r"builtin://nothing .* builtin://docs, builtin://code, builtin://reasoning"
    ):
        builtin.read("nothing", 0, 1)


def test_a_module_has_one_key_in_docs_and_code():
    assert (
        builtin.split_key("docs/numpy.linalg")
        == builtin.split_key("code/numpy.linalg")
        == "numpy.linalg"
    )
    assert builtin.split_key("topic/if") is builtin.split_key("description/numpy") is None


def test_a_beginning_is_a_fair_sample_and_nothing_is_this_machines():
    modules = [module for module, _ in builtin._modules(builtin.DOCS_PACKAGES)]
    assert (
        len(
            {
                module.split(".")[0]
                for module in modules
                if module.startswith(("jax.", "numpy.", "optax.", "orbax."))
            }
        )
        == 4
    )
    assert {"jax", "matplotlib", "numpy"} <= {module.split(".")[0] for module in modules[:100]}
    assert not [
        module
        for module in modules
        if "_sysconfigdata" in module or "config-" in module or "__config__" in module
    ]


def test_only_pinned_packages_are_read():
    with open("requirements.txt") as file:
        pinned = {
            line.split("==")[0].split("[")[0].replace("_", "-") for line in file if "==" in line
        }
    read = {
        package.replace(".", "-") for package in builtin.DOCS_PACKAGES + builtin.CODE_PACKAGES
    } - {builtin.STANDARD_LIBRARY}
    assert read | set(builtin.DESCRIBED) <= pinned
