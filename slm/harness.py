"""lm-evaluation-harness (lm-eval): its tasks, asked of this package's model or of an export.

lm-eval is an extra, imported where it is used. `answering` makes our model one of lm-eval's. Texts
become tokens as lm-eval's own `hf` model makes them of an export: the end of text comes first, as
in training; spaces at the end of a context belong to what follows it; and of a text tokenized with
its continuation, those tokens are scored that come after as many as the context has alone. So both
give the same scores.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from slm.config import ConfigError
from slm.evaluation import Z_95, Stretch, clustered_interval
from slm.evaluation_results import Figure, Result
from slm.generation import Decoder
from slm.model import LanguageModel
from slm.perplexity import windows
from slm.scoring import Score, score_stretches, track
from slm.tasks import TASKS

EXTRA = "lm-eval is not installed with all it needs: pip install slm-frontier[evaluation]"
# What lm-eval generates where a task does not say how much.
NEW_TOKENS = 256
# For the error of metrics that are no means.
BOOTSTRAP_SAMPLES = 1000
# What no text is longer than, in tokens.
UNBOUNDED = 2**31


class Answering:
    """Answers lm-eval's requests by a model and its tokenizer; mixed into lm-eval's `LM`.

    stops: tokens that end a text. batch_size: rows at a time. context_tokens: what is read before a
    token, at most; None: all.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        stops: Sequence[int],
        batch_size: int,
        context_tokens: int | None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.stops = model, tokenizer, stops
        self.batch_size, self.context_tokens = batch_size, context_tokens

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation): the latter's log-probability, and whether it is greedy's."""
        stretches = [self._stretch(*request.args) for request in requests]
        return [(score.log_probability, score.is_greedy) for score in self._scores(stretches)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, window by window."""
        pairs = [
            (place, window)
            for place, request in enumerate(requests)
            for window in windows(self._encode(request.args[0]), self.context_tokens, None)
        ]
        totals = [0.0] * len(requests)
        scores = self._scores([window for _, window in pairs])
        for (place, _), score in zip(pairs, scores, strict=True):
            totals[place] += score.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the strings that end it."""
        answers = [""] * len(requests)
        for batch in track(list(self._batches(requests)), "generating"):
            contexts = [requests[index].args[0] for index in batch]
            texts = self._generate(contexts, requests[batch[0]].args[1])
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
        return answers

    def _scores(self, stretches: Sequence[Stretch]) -> list[Score]:
        """The score of each stretch. Raises ConfigError if one is not finite."""
        scores = score_stretches(self.model, stretches, self.batch_size)
        found = [score for _, score in sorted(track(scores, "scoring", total=len(stretches)))]
        if not all(math.isfinite(score.log_probability) for score in found):
            raise ConfigError(["tasks: the model's log-probabilities are not finite"])
        return found

    def _stretch(self, context: str, continuation: str) -> Stretch:
        """The tokens of a text, those of its continuation to be scored."""
        read = self._encode(context.rstrip())
        tokens = read + self._encode(context + continuation)[len(read) :]
        # The last token is scored and not read.
        cut = 0 if self.context_tokens is None else max(0, len(tokens) - 1 - self.context_tokens)
        return Stretch(tokens[cut:], max(1, len(read) - cut))

    def _encode(self, text: str) -> list[int]:
        """Token ids, the end of text first."""
        return self.tokenizer.encode(text).ids

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests, by batches that are to be generated alike and of like length."""

        def wishes(index: int) -> str:
            return repr(requests[index].args[1])

        order = sorted(range(len(requests)), key=lambda index: len(requests[index].args[0]))
        for _, group in groupby(sorted(order, key=wishes), key=wishes):
            while batch := list(islice(group, self.batch_size)):
                yield batch

    def _generate(self, contexts: Sequence[str], wishes: Mapping[str, Any]) -> list[str]:
        """What follows each context; `wishes` as a task has them, with their many names."""
        from lm_eval.models.utils import normalize_gen_kwargs

        wishes = normalize_gen_kwargs(dict(wishes), NEW_TOKENS)
        new_tokens = wishes["max_gen_toks"]
        prompts = [self._encode(context) for context in contexts]
        if self.context_tokens is not None:
            room = max(1, self.context_tokens - new_tokens)
            prompts = [prompt[-room:] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        device = self.model.norm.weight.device
        decoder = Decoder(self.model, tokens.shape[1] + new_tokens, len(prompts))
        texts = [_Text(self.tokenizer, wishes["until"]) for _ in prompts]
        for following in decoder.generate(
            tokens.to(device),
            new_tokens,
            lengths=lengths.to(device),
            temperature=wishes.get("temperature", 1.0) if wishes["do_sample"] else 0.0,
            top_k=wishes.get("top_k"),
            top_p=wishes.get("top_p"),
            stop_tokens=self.stops,
        ):
            for text, token in zip(texts, following.tolist(), strict=True):
                text.add(token, is_end=token in self.stops)
            if all(text.is_done for text in texts):
                break
        return [text.text for text in texts]


class _Text:
    """A text that grows by tokens until it holds one of the strings that end it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.text, self.is_done = "", False
        self._tokens: list[int] = []
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]

    def add(self, token: int, is_end: bool) -> None:
        """Append a token, unless the text is done; what ends it is no part of it."""
        self.is_done |= is_end
        if self.is_done:
            return
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens)
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        self.text = self.text[: min(places, default=len(self.text))]
        self.is_done = bool(places)


def answering(
    model: LanguageModel,
    tokenizer: Tokenizer,
    stops: Sequence[int],
    batch_size: int,
    context_tokens: int | None,
) -> Any:
    """One of lm-eval's models that answers by ours; see `Answering`."""
    from lm_eval.api.model import LM

    class SLM(Answering, LM):
        pass

    return SLM(model, tokenizer, stops, batch_size, context_tokens)


def exported_model(folder: Path, device: str, batch_size: int, context_tokens: int | None) -> Any:
    """lm-eval's own `hf` model of an export, by transformers alone.

    But for one thing: before a text that is scored as a whole it puts the end of text itself, and
    the tokenizer does so again. Here it stands there once.
    Raises ConfigError if the export cannot be loaded.
    """
    from safetensors import SafetensorError

    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ConfigError([f"harness: {EXTRA}"]) from None

    class Exported(HFLM):
        def loglikelihood_rolling(self, *arguments: Any, **options: Any) -> list[float]:
            self.add_bos_token: bool | None = False
            try:
                return super().loglikelihood_rolling(*arguments, **options)
            finally:
                self.add_bos_token = None

    try:
        return Exported(
            pretrained=str(folder),
            trust_remote_code=True,
            device=device,
            batch_size=batch_size,
            # Without it, 2048.
            max_length=UNBOUNDED if context_tokens is None else context_tokens,
        )
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ConfigError([f"model: '{folder}' cannot be loaded: {_one_line(error)}"]) from None


def task_problems(names: Sequence[str], folder: Path | None) -> list[str]:
    """Why tasks cannot be run: lm-eval is not there, or does not know a name."""
    if find_spec("lm_eval") is None:
        return [f"tasks: {EXTRA}"]
    named = [name for name in names if name not in TASKS]
    manager = _task_manager(named, [] if folder is None else [folder])
    problems = []
    for name in named:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, [*TASKS, *manager.all_tasks], n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            problems.append(f"tasks: there is no '{name}'{hint}")
    return problems


def _task_manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Knows the tasks in the folders and, unless all the named are there, those of lm-eval."""
    here = _find_tasks(tuple(folders), with_theirs=False)
    if all(here.match_tasks([name]) for name in names):
        return here
    return _find_tasks(tuple(folders), with_theirs=True)


@functools.cache
def _find_tasks(folders: tuple[Path, ...], with_theirs: bool) -> Any:
    """lm-eval's own are thousands of files, which take seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*map(str, folders)], include_defaults=with_theirs)


def run_tasks(
    model: Any,
    names: Sequence[str],
    folders: Sequence[Path],
    settings: Mapping[str, Any],
    seed: int,
) -> dict[str, Result]:
    """Results by task, and by group of tasks, of one of lm-eval's models.

    folders: with further tasks. settings: recorded; `num_fewshot` and `limit` are lm-eval's.
    Raises ConfigError, naming each, if there are tasks that cannot be loaded.
    """
    import lm_eval

    load_tasks(names, folders)
    manager = _task_manager(names, folders)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=manager.match_tasks(list(names)),
        task_manager=manager,
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        bootstrap_iters=BOOTSTRAP_SAMPLES,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    versions = {"lm_eval": version("lm_eval")}
    return {
        name: Result(
            metrics=figures,
            n=_num_questions(name, found),
            settings=dict(settings),
            seed=seed,
            versions=versions | {"task": found["versions"].get(name)},
        )
        for name, values in found["results"].items()
        # A group may have no figures of its own.
        if (figures := _figures(name, values, found["samples"]))
    }


def load_tasks(names: Sequence[str], folders: Sequence[Path]) -> dict[str, list[str]]:
    """Load the data of tasks, which `datasets` keeps; the metrics of each task.

    Raises ConfigError, naming each that cannot be loaded.
    """
    from datasets.exceptions import DatasetsError

    manager = _task_manager(names, folders)
    metrics: dict[str, list[str]] = {}
    problems = []
    for name in manager.match_tasks(list(names)):
        try:
            loaded = manager.load([name])
        except (DatasetsError, ImportError, OSError, RuntimeError, ValueError) as error:
            problems.append(f"tasks: '{name}' cannot be loaded: {_one_line(error)}")
        else:
            metrics |= {task: [*each.aggregation()] for task, each in loaded["tasks"].items()}
    if problems:
        raise ConfigError(problems)
    return metrics


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _figures(
    name: str, values: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Figure]:
    """A task's figures by metric, from what lm-eval says: 'acc,none' and 'acc_stderr,none'."""
    figures = {}
    for key, value in values.items():
        metric, _, answers = key.partition(",")
        if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{answers}")
        interval: dict[str, float] = {}
        if isinstance(stderr, int | float) and math.isfinite(stderr):
            half = Z_95 * stderr
            interval = {"stderr": stderr, "low": value - half, "high": value + half}
        # 'none': answers as they are, not filtered.
        figures[metric if answers == "none" else key] = Figure(value, **interval)
    if name in TASKS:
        # Questions about one document are not independent, as lm-eval takes them to be.
        asked = samples[name]
        right = clustered_interval(
            [bool(each["acc"]) for each in asked], [each["doc"]["document"] for each in asked]
        )
        figures["acc"] = replace(figures["acc"], low=right.low, high=right.high)
    return figures


def _num_questions(name: str, found: Mapping[str, Any]) -> int:
    """Of a task, or of all tasks of a group."""
    counts = found["n-samples"]
    if name in counts:
        return counts[name]["effective"]
    return sum(_num_questions(each, found) for each in found["group_subtasks"][name])
