"""The pages of docs/: the operator that they show is right, and their commands run."""

import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import relative_rms
from omegaconf import open_dict
from pages import page_blocks, page_commands
from programs import run_program
from torch import Tensor

from search.config import read_config
from search.storage import StorageConfig
from slm.architecture import Architecture
from slm.config import compose, read
from slm.data import DataConfig
from slm.evaluate import as_hydra_wants
from slm.generation import Decoder
from slm.harness import task_problems
from slm.model import LanguageModel
from slm.operators import OPERATORS, Sequence, parse_operator
from slm.plugins import load_plugins
from tests.slm.hub.conftest import write_run

WIDTH, T = 16, 90

# What is added to each command, so that it takes seconds.
TEXT = ["data=text", "data.files=[text.txt]", "data.cache_dir=cache", "tokenizer.vocab_size=300"]
PROTOCOL = [
    *("protocol.max_seconds=0.01", "protocol.warmup_rounds=1", "protocol.max_rounds=6"),
    *("protocol.max_repeats=0", "protocol.compile_unit=eager"),
]
WORKLOAD = ["workload.prompt_tokens=4", "workload.new_tokens=16"]
TINY = {
    "train.py": [
        *(*TEXT, "trainer=cpu_small", "trainer.max_steps=2", "trainer.validation_tokens=128"),
        *("trainer.batch_tokens=32", "trainer.sequence_tokens=16"),
    ],
    "latency": [
        *(*PROTOCOL, *WORKLOAD, "device=cpu", "vocab_size=64", "memory_limit_gib=0.1"),
    ],
    "latency.show": [],
    "slm.data": ["data.cache_dir=cache", "tokenizer.vocab_size=300"],
    "search": [
        *(*TEXT, *PROTOCOL, *WORKLOAD, "target_ms=1e6", "num_candidates=3", "accuracy_items=5"),
        *("audit.candidates=0", "evolution.initial_candidates=3", "evolution.population_size=3"),
        *("evolution.sample_size=2", "proxy.rung_tokens=[64]", "proxy.batch_size=4"),
        *("proxy.sequence_tokens=8", "proxy.validation_tokens=128", "training_threads=1"),
    ],
    "search.report": [],
    "search.operator_study": [
        *(*TEXT, *PROTOCOL, *WORKLOAD, "parameters=40000", "processes=1", "accuracy_items=5"),
        *("space.num_operators=2", "space.max_width=96", "proxy.rung_tokens=[64]"),
        *("proxy.batch_size=4", "proxy.sequence_tokens=8", "proxy.validation_tokens=128"),
    ],
    "search.depth_width": [
        *(*TEXT, *PROTOCOL, *WORKLOAD, "processes=1", "grid.depths=[1,2]", "grid.widths=[32,64]"),
        *("grid.further_depths=[]", "grid.further_widths=[96]", "grid.min_parameters=null"),
        *("proxy.rung_tokens=[64]", "proxy.batch_size=4", "proxy.sequence_tokens=8"),
        "proxy.validation_tokens=128",
    ],
    "slm.generate": ["new_tokens=4", "device=cpu"],
    "slm.evaluate": [
        *("data.cache_dir=cache", "tokenizer.vocab_size=300", "task_items=20", "limit=5"),
        "device=cpu",
    ],
    "slm.hub.export": ["new_tokens=4"],
    "slm.hub.convert": ["new_tokens=4"],
}


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    return root / "docs" / "own_operator.md"


@pytest.fixture(scope="module")
def folder(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a person has saved the files that the page shows, and a text."""
    folder = tmp_path_factory.mktemp("docs")
    (source,), (space,) = page_blocks(page, "python"), page_blocks(page, "yaml")
    (folder / "moving_average.py").write_text(source)
    (folder / "mine" / "space").mkdir(parents=True)
    (folder / "mine" / "space" / "averages.yaml").write_text(space)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(60)]
    sentences = [" ".join(rng.choices(words, k=8)) + "." for _ in range(3000)]
    documents = [" ".join(sentences[i : i + 30]) for i in range(0, 3000, 30)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    return folder


@pytest.fixture
def _plugin(folder: Path, _no_plugins: None) -> None:
    load_plugins([str(folder / "moving_average.py")])


@torch.no_grad()
def build(meta_tokens: int = 5) -> LanguageModel:
    text = f"width={WIDTH} vocab_size=60 meta_tokens={meta_tokens} | moving_average ffn"
    model = LanguageModel(Architecture.parse(f"{text} moving_average")).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6.0)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(60, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("_plugin")
def test_the_operator_computes_what_the_page_says() -> None:
    """Against the sum that the recurrence stands for, in float64."""
    config = parse_operator("moving_average")
    operator = OPERATORS["moving_average"](config, WIDTH).double()
    x = torch.randn(2, T, WIDTH, dtype=torch.float64)
    value, rate, gate = operator.in_proj(x).chunk(3, dim=-1)
    rate = torch.nn.functional.softplus(rate - 2.0)
    total = rate.cumsum(1)
    between = (total.unsqueeze(2) - total.unsqueeze(1)).exp()  # [B, from, to, D]
    causal = torch.ones(T, T, dtype=torch.float64).triu()
    h = torch.einsum("bstd,st,bsd->btd", between, causal, rate * value)
    expected = operator.out_proj(h * torch.nn.functional.silu(gate))
    y, memory = operator.scan(x, Sequence(), None)
    assert relative_rms(y, expected) < 1e-6
    assert relative_rms(memory.matrix.squeeze(-1), h[:, -1]) < 1e-6


@pytest.mark.usefixtures("_plugin")
def test_the_operator_costs_what_the_page_says() -> None:
    model = build()
    assert model.architecture.parameters() == sum(p.numel() for p in model.parameters())
    operator = model.layers[0].operator
    buffers = operator.init_state(batch_size=1, max_tokens=T).tensors()
    size = sum(tensor.numel() * tensor.element_size() for tensor in buffers)
    assert operator.config.state_bytes(WIDTH, T, bytes_per_value=2) == size


@pytest.mark.usefixtures("_plugin")
@pytest.mark.parametrize("meta_tokens", [0, 5])
@pytest.mark.parametrize("prompt", [1, 70])
@torch.no_grad()
def test_prefill_and_steps_equal_forward(tokens: Tensor, meta_tokens: int, prompt: int) -> None:
    model = build(meta_tokens)
    expected = model(tokens)
    state = model.init_state(batch_size=2, max_tokens=T)
    assert relative_rms(model.prefill(tokens[:, :prompt], state), expected[:, prompt - 1]) < 1e-5
    for t in range(prompt, T):
        assert relative_rms(model.step(tokens[:, t], state), expected[:, t]) < 1e-5


@pytest.mark.usefixtures("_plugin")
def test_compiled_steps_equal_eager(tokens: Tensor) -> None:
    model = build()
    eager, compiled = Decoder(model, T, 2), Decoder(model, T, 2, "step")
    for decoder in (eager, compiled):
        decoder.prefill(tokens[:, :3])
    for t in range(3, T):
        assert relative_rms(compiled.step(tokens[:, t]), eager.step(tokens[:, t])) < 1e-5


@pytest.mark.usefixtures("_plugin")
@pytest.mark.parametrize("meta_tokens", [0, 5])
@torch.no_grad()
def test_packed_equals_separate(tokens: Tensor, meta_tokens: int) -> None:
    model = build(meta_tokens)
    cuts = [0, 1, 33, 64, 65, T]
    lengths = torch.tensor(cuts).diff()
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).expand(2, -1)
    separate = [model(tokens[:, start:end]) for start, end in itertools.pairwise(cuts)]
    assert relative_rms(model(tokens, documents), torch.cat(separate, dim=1)) < 1e-5


@pytest.mark.usefixtures("_plugin")
@torch.no_grad()
def test_padding_is_not_remembered(tokens: Tensor) -> None:
    model = build()
    lengths = torch.tensor([40, 70])
    state = model.init_state(batch_size=2, max_tokens=T)
    model.prefill(tokens[:, :70], state, lengths)
    following = model.step(tokens[:, -1], state)
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens[row, :length], tokens[row, -1:]])
        assert relative_rms(following[row], model(alone[None])[0, -1]) < 1e-5


@pytest.fixture(scope="module")
def outputs(root: Path, page: Path, folder: Path) -> list[tuple[str, str]]:
    """Every command of the page, with what it printed."""
    return run_page(root, page, folder)


def run_page(root: Path, page: Path, folder: Path, *added: str) -> list[tuple[str, str]]:
    """Run every command of a page; programs, and what they printed."""
    found = []
    for command in page_commands(page):
        words = shlex.split(command)
        if "<digest>" in command:
            chosen = folder / words[words.index("--config-dir") + 1] / "chosen"
            words = [word.replace("<digest>", chosen.read_text().strip()) for word in words]
        program = "train.py" if "train.py" in words else words[2]
        if program == "train.py":
            # Perhaps by torchrun.
            words[words.index("train.py")] = str(root / "train.py")
        done = run(root, folder, *words[1:], *TINY[program], *added)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        found.append((program, done.stdout))
    return found


def run(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A lock of its own: the command does not wait for what else runs on this machine.
    environment = {"PYTHONPATH": str(root), "TMPDIR": str(folder)}
    return run_program(*arguments, folder=folder, environment=environment)


def test_the_operator_study_gives_what_its_page_says(
    root: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    page = root / "docs" / "operator_study.md"
    few = ['space.operators=[short_convolution,"gla(head_dim=16)"]', "space.partners=[gla]"]
    # The second command names its own operators, and its seed.
    run_page(root, page, tmp_path, *few, "seeds=[0]")
    columns = set(re.findall(r"`(\w+)`", page.read_text().partition("## Columns")[2]))
    for name in ("operator_study_small", "mine"):
        study = tmp_path / "runs" / name
        for ending in ("html", "json", "parquet", "csv"):
            assert (study / f"operators.{ending}").stat().st_size > 0
        rows = json.loads((study / "operators.json").read_text())["rows"]
        assert {row["name"] for row in rows} == {
            "short_convolution",
            "gla",
            "short_convolution + gla",
        }
        assert all(row["error"] is None for row in rows)
        assert columns - {"latency", "parameters"} <= set(rows[0])


def test_depth_and_width_give_what_their_page_says(
    root: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    page = root / "docs" / "depth_width.md"
    for _, printed in run_page(root, page, tmp_path):
        assert "the law is not to be trusted, and no size is chosen by it:" in printed
        assert "- too few points for 5 constants: 4, where 10 would do" in printed
    columns = set(re.findall(r"`(\w+)`", page.read_text().partition("## Columns")[2]))
    for name in ("depth_width_small", "mine"):
        study = tmp_path / "runs" / name
        for file in ("report.html", *(f"depth_width.{each}" for each in ("parquet", "csv"))):
            assert (study / file).stat().st_size > 0
        found = json.loads((study / "depth_width.json").read_text())
        assert len(found["rows"]) == 6
        assert all(row["error"] is None for row in found["rows"])
        assert columns <= set(found["rows"][0])
        assert found["choices"]
        assert {path.stem for path in (study / "frontier" / "model").iterdir()} == {
            choice["digest"] for choice in found["choices"]
        }


def test_a_search_leaves_what_its_page_says(root: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    page = root / "docs" / "search.md"
    (_, searched), (_, reported) = run_page(root, page, tmp_path)
    assert "3 candidates scored, 0 failed, 0 too slow, 0 too large" in searched
    assert "report    runs/mine/report.html" in reported
    run_folder = tmp_path / "runs" / "mine"
    table = page.read_text().partition("| in `runs/<name>/` | |")[2].partition("##")[0]
    named = re.findall(r"`([\w./<>]+)`", "".join(re.findall(r"^\|([^|]*)\|", table, flags=re.M)))
    assert "report.html" in named
    digest = (run_folder / "frontier" / "chosen").read_text().strip()
    for name in set(named) - {"journal.log"}:
        assert (run_folder / name.replace("<digest>", digest)).exists(), name


def test_other_searches_of_the_page_can_be_composed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take hours; that their configs are whole is what can be said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    for block in page_blocks(root / "docs" / "search.md", "bash"):
        for line in block.splitlines():
            if not line.startswith("#"):
                python, _, module, *overrides = shlex.split(line)
                assert (python, module) == ("python", "search")
                config = compose("search", overrides)[0]
                with open_dict(config):
                    del config["hydra"]
                assert read_config(config).name == config.name


def test_a_corpus_is_what_its_page_says(root: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "text.txt", tmp_path / "mine.txt")
    shutil.copy(folder / "text.txt", tmp_path)
    page = root / "docs" / "data.md"
    (_, trained), (_, made), (_, verified), (_, mixed) = run_page(root, page, tmp_path)
    assert "validation loss" in trained
    summary = made.splitlines()[-3:]
    assert re.match(r"cache/text-\w+: vocabulary 300$", summary[0])
    assert re.match(r"train: \d+ documents, [\d.]+ MB, [\d,]+ tokens in 1 shards$", summary[1])
    # It was there.
    assert verified.splitlines() == summary
    assert "cache/mixture-" in mixed
    corpus = tmp_path / summary[0].partition(":")[0]
    table = page.read_text().partition("| in `cache/<source>-<digest>/` | |")[2].partition("##")[0]
    named = re.findall(r"`([\w.-]+\.\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, flags=re.M)))
    files = {path.name for path in corpus.iterdir()}
    assert set(named) <= files
    assert files <= {*named, *(name.replace("train", "validation") for name in named)}


def test_corpora_of_the_hub_can_be_composed(root: Path) -> None:
    (block,) = page_blocks(root / "docs" / "data.md", "bash")
    for line in block.splitlines():
        python, _, module, *overrides = shlex.split(line)
        assert (python, module) == ("python", "slm.data")
        data = read(DataConfig, compose("prepare", overrides)[0].data, "data")
        assert data.max_bytes == int(overrides[-1].partition("=")[2])
        assert {data.source, *(part.source for part in data.components.values())} <= {
            "hub",
            "mixture",
        }


def test_evaluation_does_what_its_page_says(root: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("mine.txt", "other.txt", "text.txt"):
        shutil.copy(folder / "text.txt", tmp_path / name)
    page = root / "docs" / "evaluation.md"
    _, _, _, (_, asked), _, (_, exported) = run_page(root, page, tmp_path)
    run_folder = tmp_path / "runs" / "mine"
    results, by_hf = (
        json.loads((each / "evaluation.json").read_text())
        for each in (run_folder, run_folder / "export")
    )
    assert set(results["tasks"]) == {
        *("mine.txt (validation)", "other.txt (all)", "cloze", "continuation")
    }
    assert set(by_hf["tasks"]) == {"cloze", "continuation"}
    (block,) = page_blocks(page, "json")
    said = json.loads(block)
    assert set(said) == set(results)
    for name, result in by_hf["tasks"].items():
        assert result["value"] == results["tasks"][name]["value"]
        assert set(result) == set(said["tasks"]["piqa"])
    assert "cloze" in asked
    assert "cloze" in exported


def test_tasks_of_the_hub_are_known(root: Path) -> None:
    first, *_ = page_blocks(root / "docs" / "evaluation.md", "bash")
    for line in first.splitlines():
        python, _, module, *arguments = shlex.split(line)
        assert (python, module) == ("python", "slm.evaluate")
        composed = compose("evaluate", [as_hydra_wants(each) for each in arguments])[0]
        assert composed.checkpoint == "runs/mine"
        assert task_problems(composed.tasks, None) == []


def test_measuring_does_what_its_page_says(root: Path, tmp_path: Path) -> None:
    found = run_page(root, root / "docs" / "latency.md", tmp_path)
    whole, breakdown, largest, shown = (printed for _, printed in found)
    assert "share of the memory roofline" in whole
    assert "from the latency table" in breakdown
    batch = re.search(r"throughput of a batch of (\d+)", largest)
    assert batch is not None
    assert int(batch[1]) > 1
    assert f"b{batch[1]}-p4-n16-float32" in shown
    assert "peaks:" in shown


def test_exports_are_what_their_page_says(root: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "train")
    write_run(tmp_path / "runs" / "llama", "", "attention(head_dim=8) ffn " * 2)
    shutil.copytree(root / "tests/slm/hub/nemotron_flash/untied", tmp_path / "flash")
    page = root / "docs" / "export.md"
    found = run_page(root, page, tmp_path)
    (_, written), (_, rehearsed), _, _ = found
    assert "written and checked" in written
    assert rehearsed.splitlines()[-1].endswith("bytes would go to user/name")
    kinds = {
        "runs/train/export": "slm_frontier",
        "runs/llama/export_native": "llama",
        "models/flash": "slm_frontier",
    }
    for folder, kind in kinds.items():
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["model_type"] == kind
    shown = "\n".join([*page_blocks(page, "python"), "print(type(model).__module__)"])
    (tmp_path / "shown.py").write_text(shown)
    done = run(root, tmp_path, "shown.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "slm.hub.modeling"


def test_a_gpu_node_is_used_as_its_page_says(root: Path, folder: Path, tmp_path: Path) -> None:
    """Its devices are CPUs here, and two where the page has eight."""
    shutil.copy(folder / "text.txt", tmp_path / "mine.txt")
    shutil.copy(folder / "text.txt", tmp_path)
    page = tmp_path / "gpu_node.md"
    text = (root / "docs" / "gpu_node.md").read_text()
    page.write_text(
        text.replace("--nproc-per-node=8", "--nproc-per-node=2")
        .replace("trainer.devices=8", "trainer.devices=2")
        .replace("workers=8", "workers=2")
    )
    found = run_page(root, page, tmp_path)
    assert [program for program, _ in found] == [
        *("latency", "search", "search.report", "train.py", "slm.hub.export"),
        *("search", "train.py", "slm.hub.export"),
    ]
    for searched, trained in (("mine", "winner"), ("node", "large")):
        result = json.loads((tmp_path / "runs" / trained / "result.json").read_text())
        chosen = tmp_path / "runs" / searched / "frontier" / "chosen"
        assert result["digest"] == chosen.read_text().strip()
        assert (tmp_path / "runs" / trained / "export" / "config.json").exists()
    assert (tmp_path / "runs" / "large" / "checkpoints" / "last.ckpt").is_dir()


def test_the_job_with_all_gpus_of_a_node_runs_a_search(root: Path, tmp_path: Path) -> None:
    """Its options are asked of Slurm in tests/cluster."""
    (block,) = page_blocks(root / "docs" / "slurm.md", "bash")
    (wrapped,) = [word for word in shlex.split(block) if word.startswith("--wrap=")]
    python, _, module, *overrides = shlex.split(wrapped.partition("=")[2])
    assert (python, module) == ("python", "search")
    (config,) = compose("search", overrides)
    with open_dict(config):
        del config["hydra"]
    assert read_config(config).workers == 8


def test_training_does_what_its_page_says(root: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    page = root / "docs" / "training.md"
    run_page(root, page, tmp_path)
    results = {path.parent.name for path in tmp_path.glob("runs/*/result.json")}
    assert results == {"first", "normalised", "muon", "long", "shared"}
    (block,) = page_blocks(page, "bash")
    done = run(root, tmp_path, *shlex.split(block)[1:])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.ckpt").stat().st_size > 0


def test_the_page_on_training_says_what_weight_normalization_projects(root: Path) -> None:
    text = (root / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \| (.*) \|$", text.partition("## Several")[0], flags=re.M
    )
    said = {
        name: tuple(
            tuple(f"{each}.weight" for each in re.findall(r"`(\w+)`", cell)) for cell in cells
        )
        for name, *cells in rows
    }
    assert said == {
        name: (operator.reads, operator.writes)
        for name, operator in OPERATORS.items()
        if operator.__module__.startswith("slm.operators")
    }


def test_commands_for_many_machines_name_one_database(root: Path) -> None:
    commands = page_commands(root / "docs" / "postgresql.md")
    assert len(commands) == 2
    for command in commands:
        composed = compose("search", shlex.split(command)[3:])[0]
        storage = read(StorageConfig, composed.storage, "storage")
        assert storage.url == "postgresql+psycopg://me@db.example.org/searches"


def test_the_commands_do_what_the_page_says(
    root: Path, folder: Path, outputs: list[tuple[str, str]]
) -> None:
    assert [program for program, _ in outputs] == [
        *("train.py", "latency", "search", "train.py", "slm.generate", "slm.hub.export")
    ]
    printed = dict(outputs)
    runs = folder / "runs"
    assert "moving_average" in json.loads((runs / "mine/result.json").read_text())["architecture"]
    breakdown = json.loads((runs / "latency/latency.json").read_text())["breakdown"]
    assert any("moving_average" in row["name"] for row in breakdown)
    candidates = json.loads((runs / "averages/candidates.json").read_text())
    assert [row["state"] for row in candidates] == ["scored"] * 3
    assert any("moving_average" in row["architecture"] for row in candidates)
    assert "'plugins=[moving_average.py]'" in printed["search"]
    chosen = (runs / "averages/frontier/chosen").read_text().strip()
    assert json.loads((runs / "winner/result.json").read_text())["digest"] == chosen
    assert printed["slm.generate"].startswith("ROMEO")
    first = (runs / f"averages/frontier/model/{chosen}.yaml").read_text().splitlines()[0]
    assert first.endswith("'plugins=[moving_average.py]'")
    # The export has been loaded where this package cannot be imported.
    assert json.loads((runs / "mine/export.json").read_text())["cached_equals_uncached"]
    copied = (runs / "mine/export/moving_average.py").read_text()
    assert "from .slm_operators_base import" in copied

    # "change the file, and the same command says that it is another run"
    (folder / "moving_average.py").write_text((folder / "moving_average.py").read_text() + "\n")
    again = run(
        root,
        folder,
        str(root / "train.py"),
        *("plugins=[moving_average.py]", "model.blocks.A.operators=[moving_average,ffn]"),
        *("name=mine", *TINY["train.py"]),
    )
    assert again.returncode == 2
    assert re.match(
        r"error: plugins.moving_average: '.*' was begun with '\w+', not '", again.stderr
    )
