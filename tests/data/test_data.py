"""Corpus, tokens and samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.parity.corpus import write_corpus
from xtrain.base.errors import DataError
from xtrain.data.corpus import documents, find_files, standard_library_files
from xtrain.data.infilling import InfillingSampler, Sample, infill
from xtrain.data.random import CounterRandom
from xtrain.data.tokens import END, END_OF_TEXT, GMASK, MASK, START, TokenFile, prepare
from xtrain.models.glm import IGNORE_INDEX


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    folder = tmp_path_factory.mktemp("corpus")
    return prepare([write_corpus(folder, 300)], 400, folder)


def test_the_default_corpus_is_real_text() -> None:
    files = standard_library_files()
    assert len(files) > 100
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts[:-1] for path in files)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three"}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("four")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    everything = find_files([str(tmp_path)])
    assert list(documents(everything)) == ["one", "two", "three", "four"]
    assert find_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]) == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"txt": "no"}', "line 1"),
        ("x.jsonl", b'{"text": "yes"}\nrubbish', "line 2"),
        ("x.jsonl", b'{"text": 3}', "not a string"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.txt", b" \n ", "corpus is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        prepare([path], 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("corpus/*"))


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_files([str(tmp_path / "none*")])
    with pytest.raises(DataError, match="holds no"):
        find_files([str(tmp_path)])


def test_tokens_decode_to_the_text(tmp_path: Path) -> None:
    text = "def f(x):\n    return 'ünïcode' + x\n"
    path = tmp_path / "t.txt"
    path.write_text(text)
    tokens = prepare([path], 300, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokens.path / "tokenizer.json"))
    assert tokens.tokens[-1] == tokens.special[END_OF_TEXT]
    assert tokenizer.decode(tokens.tokens[:-1].tolist()) == text


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some text " * 50)
    first = prepare([path], 300, tmp_path)
    stamp = (first.path / "tokens.bin").stat().st_mtime_ns
    assert (prepare([path], 300, tmp_path).path / "tokens.bin").stat().st_mtime_ns == stamp
    path.write_text("other text " * 50)
    assert prepare([path], 300, tmp_path).path != first.path
    assert prepare([path], 310, tmp_path).path != prepare([path], 300, tmp_path).path


def test_a_vocabulary_below_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="261"):
        prepare([tmp_path], 260, tmp_path)


def test_philox_against_its_published_vector() -> None:
    """Random123's known answer for philox4x64-10 with counter and key zero, after numpy's first increment."""
    numbers = np.random.Philox(counter=[2**64 - 1] * 4, key=[0, 0]).random_raw(4)
    assert numbers.tolist() == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


def test_numbers_depend_on_where_not_when() -> None:
    def draw(*coordinates: int) -> list[int]:
        random = CounterRandom(7, *coordinates)
        return [random.integer(1000) for _ in range(20)]

    assert draw(3, 5) == draw(3, 5)
    assert len({tuple(draw(a, b)) for a in range(4) for b in range(4)}) == 16


def test_distributions() -> None:
    random = CounterRandom(1, 2)
    uniform = np.array([random.uniform() for _ in range(4000)])
    assert abs(uniform.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    poisson = np.array([random.poisson(3.0) for _ in range(4000)])
    assert abs(poisson.mean() - 3) < 4 * math.sqrt(3 / 4000)
    assert abs(poisson.var() - 3) < 0.5
    items = list(range(10))
    random.shuffle(items)
    assert sorted(items) == list(range(10))


def _uncorrupt(sample: Sample, mask_ids: set[int], start: int) -> list[int]:
    """Put part B's spans back where their masks are; independent of how infill builds them."""
    spans: dict[int, list[int]] = {}
    for index in range(sample.context_length, len(sample.input_ids)):
        position = int(sample.position_ids[0, index])
        if sample.input_ids[index] == start:
            spans[position] = []
        else:
            spans[position].append(int(sample.input_ids[index]))
    text: list[int] = []
    for index in range(sample.context_length):
        token = int(sample.input_ids[index])
        text += spans[index + 1] if token in mask_ids else [token]
    return text


@given(st.data())
def test_infilling_loses_nothing(data: st.DataObject) -> None:
    text = data.draw(st.lists(st.integers(0, 99), min_size=2, max_size=40))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    order = data.draw(st.permutations(range(len(spans))))
    sample = infill(text, spans, order, 100, 101, 102)
    assert _uncorrupt(sample, {100}, 101) == text
    targets = [token for token in sample.labels.tolist() if token != IGNORE_INDEX]
    assert targets == [t for n in order for t in [*text[slice(*spans[n])], 102]]


@given(step=st.integers(0, 10**6), index=st.integers(0, 10**4), length=st.integers(16, 200))
def test_samples_are_full_and_valid(corpus: TokenFile, step: int, index: int, length: int) -> None:
    sampler = InfillingSampler(corpus, length, seed=3)
    sample = sampler.sample(step, index)
    assert len(sample.input_ids) == len(sample.labels) == sample.position_ids.shape[1] == length
    assert 0 < sample.context_length < length
    text = _uncorrupt(sample, {corpus.special[MASK], corpus.special[GMASK]}, corpus.special[START])
    windows = np.lib.stride_tricks.sliding_window_view(corpus.tokens, len(text))
    assert (windows == np.array(text)).all(axis=1).any()
    assert (sample.labels == corpus.special[END]).sum() == (sample.input_ids == corpus.special[START]).sum()


def test_the_split_of_a_batch_does_not_matter(corpus: TokenFile) -> None:
    sampler = InfillingSampler(corpus, 32, seed=3)
    whole = sampler.batch(5, 0, 8)
    parts = [sampler.batch(5, slot, 2) for slot in range(4)]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts]))
    other = InfillingSampler(corpus, 32, seed=4).batch(5, 0, 8)
    assert not np.array_equal(whole["input_ids"], other["input_ids"])


def test_the_mixture_is_as_stated(corpus: TokenFile) -> None:
    sampler = InfillingSampler(corpus, 128, seed=3)
    samples = [sampler.sample(0, index) for index in range(400)]
    spans = [s for s in samples if corpus.special[GMASK] not in s.input_ids[: s.context_length]]
    assert abs(len(spans) / 400 - 0.3) < 0.1
    hidden = [(s.labels != IGNORE_INDEX).sum() - (s.labels == corpus.special[END]).sum() for s in spans]
    assert 0.12 < np.mean(hidden) / 128 < 0.2


@pytest.mark.parametrize(("length", "said"), [(8, "too short"), (10**6, "add text")])
def test_impossible_lengths(corpus: TokenFile, length: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        InfillingSampler(corpus, length, seed=0)
