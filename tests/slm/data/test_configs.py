"""Every corpus that is shipped can be trained on, offline: two steps by its own config.

What comes from elsewhere lies in local folders of the same layout, read by the same code: data sets
of the Hub as folders with a card and Parquet files, Debian packages as if they had been fetched.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import open_dict
from test_prose import BOOK, NOVEL, write_rdb, write_sword

from slm.config import CONFIG_DIR, ConfigError, compose
from slm.data import PackedCorpus
from slm.data.prose import AUSTEN, BIBLES
from slm.data.tokenizer import load_tokenizer
from slm.training.config import TrainConfig, read_config
from slm.training.fit import fit

SMALL = [
    *("model.depth=1", "model.width=64", "trainer=cpu_small", "trainer.max_steps=2"),
    *("trainer.batch_tokens=64", "trainer.sequence_tokens=32", "trainer.validation_tokens=64"),
    *("tokenizer.vocab_size=300", "data.validation_fraction=0.2"),
]


def write_hub(folder: Path, subset: str, rows: int = 60) -> Path:
    """A data set of one subset in two files, as the Hub's viewer would lay it out."""
    data = folder / subset
    data.mkdir(parents=True)
    for number in range(2):
        pages = [f"{subset}, page {number}.{row}: a page of text." for row in range(rows)]
        table = pa.table({"text": pages, "token_length": [9] * rows})
        pq.write_table(table, data / f"train-{number:05d}-of-00002.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: train\n"
        f"    path: {subset}/train-*\n---\n"
    )
    return folder


def overrides(name: str, folder: Path) -> list[str]:
    """Where the config finds here what it names."""
    if name in ("hub", "fineweb_edu", "climbmix"):
        subset = {"fineweb_edu": "sample-10BT"}.get(name, "default")
        return [f"data.repository={write_hub(folder / 'hub', subset)}"]
    if name == "smollm_corpus":
        subsets = {"web": "fineweb-edu-dedup", "textbooks": "cosmopedia-v2"}
        return [
            f"data.components.{key}.repository={write_hub(folder / key, subset)}"
            for key, subset in subsets.items()
        ]
    if name in ("text", "mixture"):
        path = folder / "mine.jsonl"
        rows = [{"text": f"note {row}: something of my own."} for row in range(80)]
        path.write_text("\n".join(map(json.dumps, rows)))
        field = "data.files" if name == "text" else "data.components.mine.files"
        return [f"{field}=[{path}]"]
    if name == "prose":
        packages = folder / "cache" / "debian"
        novels = packages / f"{AUSTEN}_1.0_all/usr/lib/R/janeaustenr/data/Rdata.rdb"
        write_rdb(novels, [NOVEL])
        for bible in BIBLES:
            module = packages / f"{bible}_1.0_all/usr/share/sword/modules/texts/ztext/module"
            write_sword(module, {"ot": [BOOK]})
        return []
    assert name == "shakespeare"
    return ["data.max_documents=40"]


def config_of(name: str, folder: Path, *others: str) -> TrainConfig:
    """A small training on a corpus that is shipped."""
    arguments = [f"data={name}", f"data.cache_dir={folder / 'cache'}"]
    (composed,) = compose("train", [*arguments, *overrides(name, folder), *SMALL, *others])
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml")))
def test_it_trains_two_steps(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    result = fit(config, tmp_path / "run")
    assert result.steps == 2
    assert result.validation_loss < 7
    (folder,) = (tmp_path / "cache").glob(f"{config.data.source}-*")
    corpus = PackedCorpus.open(folder)
    corpus.verify()
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    begun = {
        tokenizer.decode(corpus.train.document(index).tolist()).split()[0]
        for index in range(corpus.train.num_documents)
    }
    if name == "smollm_corpus":
        assert begun == {"fineweb-edu-dedup,", "cosmopedia-v2,"}
    if name == "mixture":
        assert {"note", "A"} <= begun


def test_a_model_that_cannot_hold_the_vocabulary_is_refused(tmp_path: Path) -> None:
    config = config_of("text", tmp_path, "model.vocab_size=299")
    with pytest.raises(ConfigError) as caught:
        fit(config, tmp_path / "run")
    assert caught.value.problems == [
        "model.vocab_size: 299 is too small for the tokenizer's 300 tokens"
    ]
