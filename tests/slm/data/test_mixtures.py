"""Mixtures: each component has its share of the text, wherever reading ends or goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.config import ConfigError, read
from slm.data import ComponentConfig, DataConfig, TokenizerConfig, prepare, spool
from slm.data.corpus import open_source
from slm.data.tokenizer import load_tokenizer

SIZES = {"web": (300, 40), "books": (60, 200), "notes": (50, 10)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Texts of several lengths; each begins with its file's name."""
    rng = np.random.default_rng(0)
    paths = {}
    for name, (number, words) in SIZES.items():
        rows = [
            f"{name} {index} " + "word " * rng.integers(words // 2, 2 * words)
            for index in range(number)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        paths[name] = str(path)
    return paths


def mixture(files: dict[str, str], weights: dict[str, Any], **options: Any) -> DataConfig:
    """Weights, or a component's fields."""
    components = {
        name: {"source": "text", "files": [files[name]]}
        | (fields if isinstance(fields, dict) else {"weight": fields})
        for name, fields in weights.items()
    }
    return read(DataConfig, {"source": "mixture", "components": components} | options)


def sizes_of(documents: list[str]) -> dict[str, int]:
    """Bytes of each component."""
    names = [document.partition(" ")[0] for document in documents]
    return {
        name: sum(
            len(document.encode())
            for document, owner in zip(documents, names, strict=True)
            if owner == name
        )
        for name in names
    }


def test_shares_hold_wherever_reading_ends(files: dict[str, str]) -> None:
    config = mixture(files, {"web": 3, "books": 1.5, "notes": 0.5}, max_bytes=40_000)
    documents = list(open_source(config).documents())
    total = sum(len(document.encode()) for document in documents)
    assert 36_000 < total <= 40_000
    longest = max(map(len, documents))
    for stop in (50, 100, len(documents)):
        sizes = sizes_of(documents[:stop])
        sum_of_sizes = sum(sizes.values())
        for name, share in {"web": 0.6, "books": 0.3, "notes": 0.1}.items():
            assert abs(sizes[name] - share * sum_of_sizes) <= longest
    # Each component in its own order, and nothing twice.
    for name in SIZES:
        numbers = [int(text.split()[1]) for text in documents if text.startswith(name)]
        assert numbers == list(range(len(numbers)))


def test_it_ends_with_the_first_component_that_has_no_more(
    files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    documents = list(open_source(mixture(files, {"web": 1, "notes": 1})).documents())
    assert sum(text.startswith("notes") for text in documents) == 50
    assert sum(text.startswith("web") for text in documents) < 300
    assert "data.components.notes: ends after 0.0 MB, and the mixture with it" in caplog.text
    sizes = sizes_of(documents)
    assert sizes["web"] == pytest.approx(sizes["notes"], abs=500)


def test_a_small_component_is_read_as_often_as_it_may(files: dict[str, str]) -> None:
    notes = {"weight": 1, "epochs": 3}
    documents = list(open_source(mixture(files, {"web": 1, "notes": notes})).documents())
    numbers = [int(text.split()[1]) for text in documents if text.startswith("notes")]
    assert numbers == 3 * list(range(50))
    # A text that is read twice lies on one side of the split.
    config = mixture(
        files,
        {"web": 1, "notes": notes},
        validation_fraction=0.3,
        cache_dir=str(Path(files["web"]).parent / "cache"),
    )
    corpus = prepare(config, TokenizerConfig(vocab_size=300))
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    train, validation = (
        [tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
        for split in (corpus.train, corpus.validation)
    )
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)


def test_reading_goes_on_anywhere(files: dict[str, str]) -> None:
    config = mixture(
        files,
        {
            "web": 1,
            "books": {"weight": 1, "max_documents": 20},
            "notes": {"weight": 1, "epochs": 2},
        },
        max_documents=150,
    )
    source = open_source(config)
    expected = list(source.documents())
    assert 100 < len(expected) <= 150
    for stop in range(0, len(expected) + 1, 23):
        reader = source.open_reader(None)
        read_before = [next(reader) for _ in range(stop)]
        state = json.loads(json.dumps(reader.state()))
        assert read_before + list(source.open_reader(state)) == expected


def test_a_mixture_that_was_cut_off_is_packed_alike(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "SHARD_BYTES", 4000)

    def config(cache: str) -> DataConfig:
        weights = {"web": 2, "books": 1}
        return mixture(files, weights, max_bytes=30_000, cache_dir=str(tmp_path / cache))

    expected = prepare(config("whole"), TokenizerConfig(vocab_size=300))
    write_shard = spool._write_shard

    def broken(journal: Any, number: int, reader: Any) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return write_shard(journal, number, reader)

    with monkeypatch.context() as patch:
        patch.setattr(spool, "_write_shard", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(config("cut"), TokenizerConfig(vocab_size=300))
    again = prepare(config("cut"), TokenizerConfig(vocab_size=300))
    assert np.array_equal(again.train.tokens, expected.train.tokens)
    assert np.array_equal(again.validation.document_starts, expected.validation.document_starts)


def test_what_decides_a_mixture_decides_its_identity(files: dict[str, str]) -> None:
    def identity(**fields: Any) -> str:
        config = mixture(files, {"web": {"weight": 1} | fields, "notes": 1})
        return json.dumps(open_source(config).identity, sort_keys=True)

    found = [identity(), identity(weight=2), identity(epochs=2), identity(max_bytes=1000)]
    assert len(set(found)) == 4
    assert identity() == found[0]


def test_an_empty_component_is_named(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    files["blank"] = str(tmp_path / "blank.jsonl")
    with pytest.raises(ConfigError, match=r"data\.components\.blank: there is no text in it"):
        list(open_source(mixture(files, {"web": 1, "blank": 1})).documents())


def test_every_problem_of_a_mixture_is_named(files: dict[str, str]) -> None:
    broken = {
        "source": "mixture",
        "components": {
            "a": {"source": "text", "weight": 0},
            "b": {"source": "hub", "weight": 1},
            "c": {"source": "mixture", "weight": 1, "epochs": 0},
            "d": {"source": "shakespeare", "weights": 1},
        },
    }
    with pytest.raises(ConfigError) as caught:
        read(DataConfig, broken, "data")
    named = {problem.partition(": ")[0] for problem in caught.value.problems}
    assert named >= {
        "data.components.a.weight",
        "data.components.c.epochs",
        "data.components.d.weights",
    }
    with pytest.raises(ValueError, match="components: source 'mixture' needs components"):
        DataConfig(source="mixture")
    hub = ComponentConfig(source="hub", repository="a/b", weight=1)
    with pytest.raises(ValueError, match=r"components\.web\.max_bytes: source 'hub' needs a limit"):
        DataConfig(source="mixture", components={"web": hub})
    with pytest.raises(ValueError, match="repository: source 'hub' needs the name"):
        ComponentConfig(source="hub", weight=1)
    with pytest.raises(ValueError, match="a component cannot be a mixture itself"):
        ComponentConfig(source="mixture", weight=1)
    with pytest.raises(ValueError, match="components: only source 'mixture' has components"):
        DataConfig(source="shakespeare", components={"web": hub})
