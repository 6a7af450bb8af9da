"""Our model under lm-evaluation-harness: what it answers is what lm-eval's own `hf` answers."""

import copy
import functools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.cloze import build_cloze
from slm.data.continuation import build_continuations
from slm.data.tokenizer import end_of_text_id, load_tokenizer
from slm.evaluation import cloze_accuracy, continuation_accuracy
from slm.generation import Decoder
from slm.harness import answering, exported_model, run_tasks, task_problems
from slm.hub.formats import FormatConfig, special_tokens, write_model, write_tokenizer
from slm.model import LanguageModel
from slm.tasks import write_tasks

pytest.importorskip("lm_eval")

NUM_ITEMS = 24
OPERATORS = (
    "attention(head_dim=8) ffn(ratio=2.0) mamba2(head_dim=16,state_size=8) deltanet(head_dim=8)"
)
SETTINGS = {"num_fewshot": None, "limit": None}


@dataclass(frozen=True)
class Exported:
    """A model, its tokenizer's corpus, and the folder that it is exported to."""

    model: LanguageModel
    corpus: PackedCorpus
    folder: Path

    def ours(self, batch_size: int = 5, context_tokens: int | None = 256) -> Any:
        tokenizer = load_tokenizer(self.corpus.tokenizer_path)
        return answering(
            self.model, tokenizer, [end_of_text_id(tokenizer)], batch_size, context_tokens
        )

    def theirs(self, batch_size: int = 3, context_tokens: int | None = 256) -> Any:
        return exported_model(self.folder, "cpu", batch_size, context_tokens)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Not trained, but with weights large enough that tokens matter."""
    folder: Path = tmp_path_factory.mktemp("harness")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeéfgh", k=rng.randint(3, 7))) for _ in range(60)]
    rows = [
        {"text": "\n\n".join(" ".join(rng.choices(words, k=8)) + "." for _ in range(20))}
        for _ in range(80)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(
        source="text",
        files=(str(folder / "rows.jsonl"),),
        validation_fraction=0.2,
        cache_dir=folder / "cache",
    )
    corpus = prepare(data, TokenizerConfig(vocab_size=300))
    torch.manual_seed(0)
    text = f"width=32 vocab_size={corpus.vocab_size} meta_tokens=2 | {OPERATORS}"
    model = LanguageModel(Architecture.parse(text)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    export = folder / "export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "code"))
        end_of_text = write_tokenizer(corpus.tokenizer_path, export)
        write_model(model, FormatConfig(), special_tokens(end_of_text), export)
        yield Exported(model, corpus, export)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


PAIRS = [
    # No text twice, cut in different places: those lm-eval 0.4.13 takes for each other.
    ("", "ghi abc."),
    ("abc", " def."),
    ("abc ", "dab."),
    ("abc.\n\n", "Def ghi"),
    ("  ", "abc"),
    ("abc", "d"),
    ("é", "é — 日本"),
    ("abc def. " * 40, "ghi abc."),
    ("abc def. " * 40, "abc def. " * 20),
]


def test_pairs_are_scored_as_by_hf(exported: Exported) -> None:
    """Contexts that are empty, end in spaces, share a token with what follows, or are too long."""
    pairs = requests(*PAIRS)
    ours = exported.ours().loglikelihood(pairs)
    theirs = exported.theirs().loglikelihood(pairs)
    assert [each for each, _ in ours] == pytest.approx([each for each, _ in theirs], abs=1e-4)
    assert [each for _, each in ours] == [each for _, each in theirs]


def test_texts_longer_than_the_window_are_scored_as_by_hf(exported: Exported) -> None:
    from lm_eval.models.huggingface import HFLM

    texts = requests(*((text,) for text in ("abc", "abc def. " * 30, "é ghi. " * 7)))
    ours = exported.ours(context_tokens=16).loglikelihood_rolling(texts)
    theirs = exported.theirs(context_tokens=16)
    assert ours == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    # Afterwards it tokenizes as before; and this is what it says if told to add nothing itself.
    assert theirs.tok_encode("abc")[0] == exported.corpus.end_of_text
    plain = HFLM(
        pretrained=str(exported.folder),
        trust_remote_code=True,
        device="cpu",
        max_length=16,
        add_bos_token=False,
    )
    assert ours == pytest.approx(plain.loglikelihood_rolling(texts), abs=1e-3)


def test_texts_go_on_as_by_hf(exported: Exported) -> None:
    """Prompts of several lengths, in batches, cut at the strings that end them."""
    ours, theirs = exported.ours(batch_size=2), exported.theirs(batch_size=1)
    prompts = ["abc", "abc def. ghi abc def.", "é", "gh ab. " * 9]
    free = requests(*((each, {"until": [], "max_gen_toks": 24}) for each in prompts))
    said = ours.generate_until(free)
    assert said == theirs.generate_until(free)
    # A string that comes up in the middle of what is said ends it there.
    stops = [text[len(text) // 3 :][:2] for text in said]
    stopped = requests(
        *(
            (prompt, {"until": stop, "max_new_tokens": 24, "do_sample": False})
            for prompt, stop in zip(prompts, stops, strict=True)
        )
    )
    cut = ours.generate_until(stopped)
    assert cut == theirs.generate_until(stopped)
    assert cut == [text.partition(stop)[0] for text, stop in zip(said, stops, strict=True)]
    # So does a token that ends a text for the model, whatever its tokenizer begins one with.
    for prompt, request in zip(prompts, free, strict=True):
        ids = torch.tensor([ours.tokenizer.encode(prompt).ids])
        decoder = Decoder(ours.model, ids.shape[1] + 24)
        following = [int(token) for token in decoder.generate(ids, 24)]
        ours.stops = [following[5]]
        spoken = following[: following.index(following[5])]
        assert ours.generate_until([request]) == [ours.tokenizer.decode(spoken)]
    ours.stops = exported.ours().stops
    sampled = requests(*((each, {"temperature": 0.9, "max_gen_toks": 24}) for each in prompts))
    assert ours.generate_until(sampled) != said


@pytest.fixture
def task_folder(exported: Exported, tmp_path: Path) -> Path:
    return write_tasks(exported.corpus, ["cloze", "continuation"], tmp_path, NUM_ITEMS, seed=0)


def run_both(exported: Exported, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """lm-eval's own results, of our model and of its `hf`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    evaluate = functools.partial(lm_eval.simple_evaluate, tasks=names, task_manager=manager)
    return [evaluate(model=model) for model in (exported.ours(), exported.theirs())]


def test_every_question_is_scored_as_by_hf(exported: Exported, task_folder: Path) -> None:
    ours, theirs = run_both(exported, task_folder, ["cloze", "continuation"])
    for name in ("cloze", "continuation"):
        scores, expected = (
            [
                log_likelihood
                for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
                for ((log_likelihood, _),) in sample["resps"]
            ]
            for found in (ours, theirs)
        )
        assert len(scores) >= 4 * (NUM_ITEMS - 4)
        assert scores == pytest.approx(expected, abs=1e-4)
        assert ours["results"][name]["acc,none"] == theirs["results"][name]["acc,none"]


def test_tasks_count_what_a_search_counts(exported: Exported, task_folder: Path) -> None:
    found = run_tasks(exported.ours(), ["cloze", "continuation"], [task_folder], SETTINGS, 0)
    corpus, model = exported.corpus, exported.model
    items = build_cloze(corpus, NUM_ITEMS, 0)
    expected = cloze_accuracy(model, load_tokenizer(corpus.tokenizer_path), items, 8)
    figure = found["cloze"].metrics["acc"]
    assert (figure.value, figure.low, figure.high) == pytest.approx(
        (expected.accuracy, expected.low, expected.high)
    )
    assert found["cloze"].n == expected.n == NUM_ITEMS

    continuations = build_continuations(corpus, NUM_ITEMS, 0)
    rows = (task_folder / "continuation.jsonl").read_text().splitlines()
    # None is left out: every text comes out as the tokens that it was cut from.
    assert [json.loads(row)["document"] for row in rows] == [e.document for e in continuations]
    expected = continuation_accuracy(model, continuations, 8)
    figure = found["continuation"].metrics["acc"]
    assert (figure.value, figure.low, figure.high) == pytest.approx(
        (expected.accuracy, expected.low, expected.high)
    )


def test_the_right_choice_is_the_text_that_was_there(exported: Exported, task_folder: Path) -> None:
    split = exported.corpus.validation
    tokenizer = load_tokenizer(exported.corpus.tokenizer_path)
    documents = [tokenizer.decode(split.document(n).tolist()) for n in range(split.num_documents)]
    for name in ("cloze", "continuation"):
        for line in (task_folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            texts = [row["context"] + choice for choice in row["choices"]]
            assert len(set(texts)) == 4
            assert texts[row["answer"]] in documents[row["document"]]
            assert not row["context"][-1:].isspace()


def test_questions_are_kept(exported: Exported, tmp_path: Path) -> None:
    folder = write_tasks(exported.corpus, ["cloze"], tmp_path, 5, seed=0)
    before = (folder / "cloze.jsonl").stat()
    assert len((folder / "cloze.jsonl").read_text().splitlines()) == 5
    assert write_tasks(exported.corpus, ["cloze"], tmp_path, 5, seed=0) == folder
    assert (folder / "cloze.jsonl").stat() == before
    other = write_tasks(exported.corpus, ["cloze"], tmp_path, 5, seed=1)
    assert (other / "cloze.jsonl").read_text() != (folder / "cloze.jsonl").read_text()


def test_limits_and_groups(exported: Exported, task_folder: Path) -> None:
    (task_folder / "both.yaml").write_text("group: both\ntask: [cloze, continuation]\n")
    settings = {"num_fewshot": 1, "limit": 4}
    found = run_tasks(exported.ours(), ["both"], [task_folder], settings, 0)
    assert [found[name].n for name in ("cloze", "continuation")] == [4, 4]
    assert found["cloze"].settings == settings


def test_tasks_whose_data_cannot_be_had_are_named(exported: Exported, task_folder: Path) -> None:
    description = (task_folder / "cloze.yaml").read_text()
    for name in ("first", "second"):
        lines = description.replace("task: cloze", f"task: {name}")
        (task_folder / f"{name}.yaml").write_text(lines.replace("cloze.jsonl", "nothing.jsonl"))
    with pytest.raises(ConfigError) as caught:
        run_tasks(exported.ours(), ["first", "cloze", "second"], [task_folder], SETTINGS, 0)
    assert [problem.partition(" cannot be loaded: ")[0] for problem in caught.value.problems] == [
        "tasks: 'first'",
        "tasks: 'second'",
    ]
    assert all("\n" not in problem for problem in caught.value.problems)


def test_scores_that_mean_nothing_are_refused(exported: Exported) -> None:
    ours = exported.ours()
    ours.model = copy.deepcopy(ours.model)
    torch.nn.init.constant_(ours.model.norm.weight, math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        ours.loglikelihood(requests(*PAIRS))


def test_a_damaged_export_is_named(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported.folder, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(
        ConfigError, match=r"model: '.*export' cannot be loaded: OSError: .*cannot be read"
    ):
        exported_model(folder, "cpu", 1, None)


def test_unknown_tasks_are_named_with_those_near_them(task_folder: Path) -> None:
    (problem,) = task_problems(["piqq", "arc_easy", "cloze"], None)
    assert problem.startswith("tasks: there is no 'piqq'; near it: piqa")
    (task_folder / "mine.yaml").write_text((task_folder / "cloze.yaml").read_text())
    assert task_problems(["mmlu_*"], None) == []


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.harness.find_spec", lambda name: None)
    (problem,) = task_problems(["piqa"], None)
    assert "pip install slm-frontier[evaluation]" in problem
