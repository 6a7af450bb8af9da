"""How deep and how wide within a latency budget, and how far the law of both extrapolates.

Nemotron-Flash (Fu et al. 2025) fits perplexity = L0 + a·depth^-α + b·width^-β to a grid of Llama
models of up to billions of parameters, extrapolates it to larger ones within 5.3 %, and finds that
the best depth grows with the latency budget. Here are thirteen transformers of one to eight million
parameters, each trained on Shakespeare with two seeds: the study that `python -m
search.depth_width experiment=depth_width_small` makes for anybody. Latencies are measured under the
exclusive device lock before anything is trained; training holds it shared, step by step.

extrapolation_error: the largest of the relative errors at the largest quarter of the sizes, which a
fit without them predicts; the mean is among `environment`. best_depth_by_budget: blocks of the best
size within a latency, in ms; by the law, which also knows sizes that were not trained, or, where it
is not to be trusted, of those trained. trusted: whether nothing speaks against the law; `doubts`
say what does.

The folder holds every measurement and every training; the same command goes on from there. The
results file holds what the fit needs.

python benchmarks/depth_width.py            less than an hour on two CPU cores
python benchmarks/depth_width.py --refit    the fit once more, from the results file
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from search.depth_width_config import DepthWidthConfig, read_config
from search.depth_width_results import Findings, not_converged
from search.depth_width_run import DepthWidthStudy
from search.run_folder import write_json
from slm.config import compose

RESULTS = Path(__file__).parent / "results" / "depth_width.json"
FOLDER = Path("runs") / "depth_width_benchmark"


def main() -> None:
    arguments = parse_arguments()
    if not arguments.refit:
        config = read(arguments.threads, arguments.overrides)
        DepthWidthStudy(config, arguments.folder).run()
        stored = json.loads((arguments.folder / "depth_width.json").read_text(encoding="utf-8"))
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.results, stored)
    print(json.dumps(report(json.loads(arguments.results.read_text(encoding="utf-8")))))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of a training, and of what is timed"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="to go on in")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    parser.add_argument("--refit", action="store_true", help="measure and train nothing")
    parser.add_argument("overrides", nargs="*", help="of the experiment, as Hydra has them")
    return parser.parse_args()


def read(threads: int, overrides: list[str]) -> DepthWidthConfig:
    """The study's config."""
    counts = [f"latency_threads={threads}", f"training_threads={threads}"]
    (config,) = compose("depth_width", ["experiment=depth_width_small", *counts, *overrides])
    with open_dict(config):
        del config["hydra"]
    return read_config(config)


def report(stored: dict[str, Any]) -> dict[str, Any]:
    """The last line, from what the results file holds: the fit is made anew."""
    findings = Findings(stored["rows"], stored["trainings"], stored["budgets_ms"])
    summary = findings.summary()
    law = summary["law"]
    extrapolation = law["extrapolation"] or {"largest_error": None, "mean_error": None}
    results = {
        "extrapolation_error": extrapolation["largest_error"],
        "best_depth_by_budget": {
            f"{choice['budget_ms']:g}": choice["depth"] for choice in findings.choices
        },
        "trusted": findings.is_trusted,
    }
    percent = stored["config"]["protocol"]["max_interval_percent"]
    environment = {
        **stored["device"],
        "tokens": law["tokens"],
        "seeds": stored["config"]["seeds"],
        "sizes_trained": len({each["size"] for each in findings.trainings}),
        "extrapolation_error_mean": extrapolation["mean_error"],
        "constants": law["constants"],
        "doubts": law["doubts"],
        "finding": summary["finding"],
        "latencies": not_converged(findings.rows, percent) or f"all known to {percent:g} %",
    }
    return {"benchmark": "depth_width", "results": results, "environment": environment}


if __name__ == "__main__":
    main()
