import pathlib
import pickle

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from nanollama_jax import tokenizer
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import TURN_END, TURN_START, Tokenizer

PYTHON = "".join(
    path.read_text() for path in sorted(pathlib.Path(tokenizer.__file__).parent.rglob("*.py"))
)
# SentencePiece writes a space as U+2581 and decodes both to a space: the round trip's exception
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
    | st.sampled_from(" \n\t\r\0\u0301<s>/|"),
    max_size=80,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "ours.model"
    tokenizer.train([PYTHON], path, vocab_size=600, max_bytes=10**9)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def mistral(shared_data) -> Tokenizer:
    return Tokenizer(shared_data / "tokenizer/mistral_v1_32000.model")


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_ours_round_trips_any_text(ours, text):
    _check_round_trip(ours, text)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_a_model_with_a_dummy_prefix_round_trips_any_text(mistral, text):
    _check_round_trip(mistral, text)


def _check_round_trip(model: Tokenizer, text: str):
    ids = model.encode(text)
    assert ids == sentencepiece.SentencePieceProcessor(model_proto=model.model_bytes).encode(text)
    assert model.encode_batch([text, "x", text]) == [ids, model.encode("x"), ids]
    assert model.decode(ids) == text
    assert not {0, 1, 2} & set(ids), "text gave a control id"
    assert model.decode(model.encode(text, bos=True, eos=True)) == text


def test_u2581_decodes_to_a_space(ours):
    assert ours.decode(ours.encode("a\u2581b")) == "a b"


@pytest.mark.parametrize("character", ["\u2585", "\u2586", "\t", "\0"])
def test_text_around_a_character_that_sentencepiece_reserves_is_learned(tmp_path, character):
    common, rare = "alpha beta gamma delta omega kappa " * 500, "zyxwv " * 30
    tokenizer.train(
        [common, *[f"{rare}{character}{rare}"] * 20],
        tmp_path / "t.model",
        vocab_size=300,
        max_bytes=10**6,
    )
    model = Tokenizer(tmp_path / "t.model")
    assert len(model.encode("zyxwv")) == 1
    assert model.decode(model.encode(f"a{character}b")) == f"a{character}b"


def test_control_ids_come_only_when_asked(ours):
    plain = ours.encode("<s>hello</s><unk>")
    assert not {ours.bos_id, ours.eos_id, 0} & set(plain)
    assert ours.encode("<s>hello</s><unk>", bos=True, eos=True) == [
        ours.bos_id,
        *plain,
        ours.eos_id,
    ]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 600)
    chat = Tokenizer("chat", ours.extended())
    ids = [
        chat.bos_id,
        chat.control_id(TURN_START),
        *chat.encode("user\nä </s>"),
        chat.control_id(TURN_END),
        chat.control_id(TURN_END),
    ]
    assert (
        chat.decode(ids) == "user\nä </s>"
        and chat.show(ids) == "<s><|im_start|>user\nä </s><|im_end|><|im_end|>"
    )


def test_indentation_and_line_ends_are_pieces_of_their_own(ours):
    assert len(ours.encode("\n\n")) == 1
    assert len(ours.encode(" " * 8)) == 1
    assert len(ours.encode(")\n")) == 1


def test_digits_are_split(ours):
    assert len(ours.encode("1234567890")) == 10


def test_the_same_text_gives_the_same_file(ours, tmp_path):
    tokenizer.train([PYTHON], tmp_path / "again.model", vocab_size=600, max_bytes=10**9)
    assert (tmp_path / "again.model").read_bytes() == ours.model_bytes
    assert list(tmp_path.iterdir()) == [tmp_path / "again.model"], "a temporary file was left"


def test_a_document_longer_than_the_trainer_takes_is_learned_whole(tmp_path):
    text = "x" * 50_000 + " " + "quixotic zephyr " * 50_000
    tokenizer.train([text], tmp_path / "long.model", vocab_size=305, max_bytes=10**9)
    assert len(Tokenizer(tmp_path / "long.model").encode(" zephyr")) == 1


def test_max_bytes_bounds_what_is_read(tmp_path):
    def texts():
        for _ in range(20):
            yield PYTHON
        raise AssertionError("read on after max_bytes")

    tokenizer.train(texts(), tmp_path / "bounded.model", vocab_size=400, max_bytes=len(PYTHON))


def test_too_little_text_says_what_to_change(tmp_path):
    with pytest.raises(
        BadInput, match=r"at most \d+ pieces, not 4000: lower vocab_size or train on more text"
    ):
        tokenizer.train(["a few words"], tmp_path / "t.model", vocab_size=4000, max_bytes=1000)
    with pytest.raises(BadInput, match="raise vocab_size"):
        tokenizer.train(["a few words"], tmp_path / "t.model", vocab_size=100, max_bytes=1000)
    with pytest.raises(BadInput, match="no text"):
        tokenizer.train([], tmp_path / "t.model", vocab_size=400, max_bytes=1000)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_damaged_model_is_refused(ours, tmp_path):
    with pytest.raises(BadInput, match=r"absent\.model"):
        Tokenizer(tmp_path / "absent.model")
    damaged = tmp_path / "damaged.model"
    for content in (b"", b"no model at all", ours.model_bytes[: len(ours.model_bytes) // 2]):
        damaged.write_bytes(content)
        with pytest.raises(BadInput, match="not a SentencePiece model"):
            Tokenizer(damaged)


def test_a_model_without_eos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PYTHON.splitlines()),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=300,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(BadInput, match="no EOS"):
        Tokenizer(tmp_path / "no_eos.model")


def test_a_pickled_tokenizer_needs_no_file(ours):
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode("def f():\n    pass") == ours.encode("def f():\n    pass")
    assert (copy.sha256, copy.model_bytes) == (ours.sha256, ours.model_bytes)


@pytest.mark.parametrize(
    "error", [BadInput("a.jsonl:3: malformed"), ValueError("a bug"), KeyboardInterrupt()]
)
def test_what_the_texts_raise_comes_out_as_itself(tmp_path, error):
    for good in (
        [],
        [PYTHON],
    ):  # SentencePiece fails of too little text, or could train on what came before

        def texts(good=good):
            yield from good
            raise error

        with pytest.raises(type(error)) as raised:
            tokenizer.train(texts(), tmp_path / "t.model", vocab_size=400, max_bytes=10**9)
        assert raised.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["ours", "mistral"])
def test_long_texts_are_encoded_in_parts_that_make_no_difference(which, request, monkeypatch):
    cut = request.getfixturevalue(which)
    whole = sentencepiece.SentencePieceProcessor(model_proto=cut.model_bytes)
    monkeypatch.setattr(tokenizer, "_PART_CHARACTERS", 7)
    lengths = []

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(
            st.text(
                st.sampled_from("ab \u2581 \u6f22\n\U0001f600<s>x  "), min_size=30, max_size=80
            ),
            max_size=3,
        )
    )
    def same_ids(texts):
        assert cut.encode_batch(texts) == whole.encode(texts)
        lengths.extend(len(cut._parts(text)) for text in texts)

    same_ids()
    assert max(lengths) > 2


def test_a_vocabulary_with_pieces_over_spaces_is_not_cut(ours):
    assert len(ours._parts("word " * 5000)) > 3
    proto = sentencepiece_model_pb2.ModelProto.FromString(ours.model_bytes)
    proto.pieces[-1].piece = "e\u2581t"
    assert len(Tokenizer("changed", proto.SerializeToString())._parts("word " * 5000)) == 1
