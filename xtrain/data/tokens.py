"""Tokenizer and token file: trained and written once per corpus, cached, memory-mapped.

The cache folder is named by the corpus' content and the tokenizer's settings, and appears complete or
not at all, so that runs may share it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from xtrain.base.errors import DataError
from xtrain.base.log import log_dist
from xtrain.data.corpus import documents

MASK, GMASK, START, END, END_OF_TEXT = "[MASK]", "[gMASK]", "[sop]", "[eop]", "[eot]"
SPECIAL_TOKENS = (MASK, GMASK, START, END, END_OF_TEXT)
_FORMAT = 1  # part of the cache key: raise it when the files below change


@dataclass(frozen=True)
class TokenFile:
    """A tokenized corpus.

    Attributes:
        tokens: (n,) unsigned integers, documents separated by END_OF_TEXT; memory-mapped.
        special: id of each special token.
        vocab_size: number of ids.
        path: folder with `tokenizer.json`, `tokens.bin` and `meta.json`.
    """

    tokens: NDArray[np.unsignedinteger]
    special: dict[str, int]
    vocab_size: int
    path: Path


def default_cache() -> Path:
    """XTRAIN_CACHE, else the user's cache folder."""
    if "XTRAIN_CACHE" in os.environ:
        return Path(os.environ["XTRAIN_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xtrain"


def _key(files: list[Path], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {vocab_size} {importlib.metadata.version('tokenizers')}".encode())
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"data file {path} cannot be read: {error}") from None
        digest.update(hashlib.sha256(content).digest())
        digest.update(path.suffix.encode())
    return digest.hexdigest()[:20]


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_tokens(tokenizer: tokenizers.Tokenizer, texts: Iterable[str], path: Path, dtype: type) -> int:
    end, count, texts = tokenizer.token_to_id(END_OF_TEXT), 0, iter(texts)
    with path.open("wb") as file:
        while batch := list(islice(texts, 64)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids: NDArray[np.unsignedinteger] = np.asarray([*encoding.ids, end], dtype=dtype)
                count += ids.size
                ids.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return count


def _build(files: list[Path], vocab_size: int, target: Path) -> None:
    texts = documents(files)
    first = next(texts, None)
    if first is None:
        raise DataError(f"the corpus is empty: none of its {len(files)} files has text")
    log_dist(f"training a tokenizer of {vocab_size} tokens on {len(files)} files", ranks=[0])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building-"))
        temporary.chmod(0o755)  # mkdtemp makes private folders; a cache may be shared
    except OSError as error:
        raise DataError(
            f"the cache folder {target.parent} cannot be written: {error}; set XTRAIN_CACHE"
        ) from None
    try:
        tokenizer = _train_tokenizer(chain([first], texts), vocab_size)
        tokenizer.save(str(temporary / "tokenizer.json"))
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        count = _write_tokens(tokenizer, documents(files), temporary / "tokens.bin", dtype)
        meta = {
            "tokens": count,
            "dtype": np.dtype(dtype).name,
            "vocab_size": vocab_size,
            "special": {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS},
        }
        (temporary / "meta.json").write_text(json.dumps(meta))
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "meta.json").is_file():
                raise  # otherwise another run has built the same corpus meanwhile
        log_dist(f"tokenized corpus: {count:,} tokens in {target}", ranks=[0])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(files: list[Path], vocab_size: int, cache: Path | None = None) -> TokenFile:
    """The tokenized corpus of `files`, from the cache or built now.

    Only one rank of a host should build; see examples/pretrain_glm.py.

    Raises:
        DataError: the corpus is empty or unreadable, or the vocabulary is too small for bytes.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(f"vocab_size {vocab_size} is too small: bytes and special tokens need {smallest}")
    target = (cache or default_cache()) / "corpus" / _key(files, vocab_size)
    if not (target / "meta.json").is_file():
        _build(files, vocab_size, target)
    meta = json.loads((target / "meta.json").read_text())
    if (target / "tokens.bin").stat().st_size != meta["tokens"] * np.dtype(meta["dtype"]).itemsize:
        raise DataError(f"the cached corpus {target} is damaged: delete this folder, and it is built again")
    tokens = np.memmap(target / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
    return TokenFile(tokens, meta["special"], meta["vocab_size"], target)
