"""Typed configuration: frozen dataclasses that gather all their problems, and the command line.

Hydra composes a config from `configs/` and the command line; `read` turns the composed node into
dataclasses made by `schema`; `entry_point` does both for every job of a command line before Hydra
creates a folder, so that a mistake costs a second and leaves nothing behind.
"""

import dataclasses
import difflib
import functools
import logging
import re
import sys
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml
from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from slm.jobs import Job, failure_lines, leave_error

log = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
HYDRA_VERSION_BASE = "1.3"
# What a shell reports for a process ended by Ctrl-C: 128 + SIGINT.
EXIT_INTERRUPTED = 130
# For one ended by SIGTERM, a scheduler's preemption; and by SIGUSR2, by which Slurm tells our jobs
# that their time is nearly over.
EXIT_PREEMPTED = 143
EXIT_OUT_OF_TIME = 140
EXIT_BAD_CONFIG = 2
EXIT_JOBS_FAILED = 1
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line per problem.

    A dataclass that finds several problems in `__post_init__` raises it with lines that begin with
    the field's name (`lr: must be below 1, got 3`); `read` puts the path before them.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field)
)
def schema(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that converts and checks its fields.

    Unknown fields, values of the wrong type, NaN and infinity are refused.
    """
    rules = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=rules)
    return made


def read(cls: type[T], node: DictConfig | Mapping[str, Any], path: str = "") -> T:
    """Build a dataclass from a composed node.

    `path` is the node's place in the config; problems are named with it. Raises ConfigError once,
    with every problem found.
    """
    try:
        values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise ConfigError([_omegaconf_problem(error, path)]) from None
    missing = _missing_fields(values)
    problems = [f"{_join(path, field)}: is missing, give it a value" for field in missing]
    try:
        result = pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        for detail in error.errors():
            if _join("", *detail["loc"]) not in missing:
                problems += _problems_of(cls, path, detail)
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return result


def compose(
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    config_dir: Path | None = None,
    multirun: bool = False,
) -> list[DictConfig]:
    """Compose the config of every job of a command line, without running or writing anything.

    `config_dir` is searched before `configs/`. Without `multirun` the list has one item. Each item
    still holds the `hydra` node. Raises ConfigError with one line per bad override.
    """
    with _hydra(config_dir) as hydra:
        configs, problems = _compose_jobs(hydra, config_name, list(overrides), multirun)
    if problems:
        raise ConfigError(problems)
    return configs


def entry_point(
    config_name: str, check: Callable[[DictConfig], object]
) -> Callable[[Callable[[DictConfig], T]], Callable[[], T | None]]:
    """Turn `main(config)` into a command-line program configured by `configs/<config_name>.yaml`.

    `check` builds the dataclasses of one composed config and raises what it finds. It is called on
    every job of the command line, those of a multirun too, before anything runs. A ConfigError
    (also one that `main` raises later) is printed as `error: ...`, one line per problem, and the
    program ends with exit code 2; Ctrl-C ends it with 130. Of a multirun all jobs are run, whatever
    becomes of some; if any failed, it ends with 1, and says which.
    """

    def decorate(main: Callable[[DictConfig], T]) -> Callable[[], T | None]:
        @functools.wraps(main)
        def program() -> T | None:
            try:
                arguments = get_args_parser().parse_args()
                jobs = _check_command_line(arguments, config_name, check)
                return _run(main, config_name, jobs)
            except ConfigError as error:
                for problem in error.problems:
                    print(f"error: {problem}", file=sys.stderr)
                sys.exit(EXIT_BAD_CONFIG)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(EXIT_INTERRUPTED)

        return program

    return decorate


def _run(main: Callable[[DictConfig], T], config_name: str, jobs: Sequence[Job]) -> T | None:
    """Run `main` under Hydra; the result of a single run, or None after a multirun of `jobs`."""
    import hydra

    results: list[T] = []
    errors: list[ConfigError] = []

    def task(config: DictConfig) -> T | None:
        hydra_config = HydraConfig.get()
        is_job = hydra_config.mode == RunMode.MULTIRUN
        try:
            result = main(config)
        except ConfigError as error:
            # Hydra would print a traceback.
            if is_job:
                leave_error(Path(hydra_config.runtime.output_dir), _one_line(str(error)))
            else:
                errors.append(error)
            return None
        except Exception as error:
            if not is_job:
                raise
            # Hydra would end the sweep, of which others may be at work.
            log.exception("job %s failed", hydra_config.job.num)
            reason = f"{type(error).__name__}: {_one_line(str(error))}"
            leave_error(Path(hydra_config.runtime.output_dir), reason)
            return None
        results.append(result)
        return result

    # Hydra names the job, and so its log file, after the task's module.
    task.__module__ = config_name
    for job in jobs:
        job.forget_error()
    hydra.main(
        config_path=str(CONFIG_DIR), config_name=config_name, version_base=HYDRA_VERSION_BASE
    )(task)()
    if errors:
        raise errors[0]
    if lines := failure_lines(jobs):
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_JOBS_FAILED)
    return results[0] if len(results) == 1 else None


def _check_command_line(
    arguments: Namespace, config_name: str, check: Callable[[DictConfig], object]
) -> list[Job]:
    """Compose every job and, unless the config is only to be shown, check it; a multirun's jobs."""
    if arguments.help or arguments.hydra_help or arguments.shell_completion:
        return []
    if arguments.experimental_rerun is not None:
        raise ConfigError(["--experimental-rerun: is refused, because it reads a pickle file"])
    if arguments.config_path is not None:
        raise ConfigError(["--config-path: use --config-dir to add a folder of configs"])
    config_dir = Path(arguments.config_dir) if arguments.config_dir is not None else None
    with _hydra(config_dir) as hydra:
        configs, problems = _compose_jobs(
            hydra, arguments.config_name or config_name, arguments.overrides, arguments.multirun
        )
    is_shown = arguments.cfg or arguments.info
    if not is_shown:
        problems += [problem for config in configs for problem in _check_problems(check, config)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if is_shown:
        return []
    return [Job.of(config) for config in configs if config.hydra.mode == RunMode.MULTIRUN]


def _check_problems(check: Callable[[DictConfig], object], config: DictConfig) -> list[str]:
    """Run `check` as Hydra would run the job: `${hydra:...}` resolves, the `hydra` node is gone."""
    HydraConfig.instance().set_config(config)
    task_config = config.copy()
    with open_dict(task_config):
        del task_config["hydra"]
    try:
        check(task_config)
    except ConfigError as error:
        return error.problems
    except OmegaConfBaseException as error:
        return [_omegaconf_problem(error)]
    except ValueError as error:
        return [_one_line(str(error))]
    finally:
        HydraConfig.instance().cfg = None
    return []


@contextmanager
def _hydra(config_dir: Path | None) -> Iterator[Hydra]:
    """Yield a Hydra that composes from `config_dir`, then CONFIG_DIR."""
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError([f"--config-dir: '{config_dir}' is not a folder"])
    GlobalHydra.instance().clear()
    hydra_version.setbase(HYDRA_VERSION_BASE)
    search_path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:
        search_path.prepend(
            provider="command-line",
            path=f"file://{config_dir.resolve()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    try:
        yield Hydra.create_main_hydra2(task_name="app", config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def _compose_jobs(
    hydra: Hydra, config_name: str, overrides: list[str], multirun: bool
) -> tuple[list[DictConfig], list[str]]:
    """Compose the config of each job, and say what could not be composed.

    A sweep is expanded as Hydra's basic sweeper expands it. The configs come without the overrides
    at fault, so that the caller can report what else is wrong.
    """
    if not multirun and hydra.get_mode(config_name, overrides) != RunMode.MULTIRUN:
        config, problems = _compose_one(hydra, config_name, overrides, RunMode.RUN)
        return [config] if config is not None else [], problems
    sweep, problems = _compose_one(hydra, config_name, overrides, RunMode.MULTIRUN)
    if sweep is None:
        return [], problems
    configs = []
    for number, job in enumerate(_sweep_jobs(hydra, sweep)):
        arguments = [*sweep.hydra.overrides.hydra, *job]
        config, job_problems = _compose_one(hydra, config_name, arguments, RunMode.RUN)
        problems += job_problems
        if config is not None:
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
                config.hydra.mode = RunMode.MULTIRUN
            configs.append(config)
    return configs, list(dict.fromkeys(problems))


def _sweep_jobs(hydra: Hydra, sweep: DictConfig) -> list[list[str]]:
    """Overrides of each job of a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parameters = [
        f"{key}={value}" for key, value in (sweep.hydra.sweeper.get("params") or {}).items()
    ]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    try:
        arguments = parser.parse_overrides([*parameters, *sweep.hydra.overrides.task])
        return BasicSweeper.split_arguments(arguments, max_batch_size=None)[0]
    except HydraException as error:
        raise ConfigError([_one_line(str(error))]) from None


def _compose_one(
    hydra: Hydra, config_name: str, overrides: list[str], mode: RunMode
) -> tuple[DictConfig | None, list[str]]:
    """Compose one config from the overrides that can be applied, with one line for each other."""

    def attempt(some: list[str]) -> DictConfig:
        return hydra.compose_config(
            config_name=config_name, overrides=some, run_mode=mode, with_log_configuration=False
        )

    try:
        return attempt(overrides), []
    except COMPOSITION_ERRORS:
        pass
    try:
        config = attempt([])
    except COMPOSITION_ERRORS as error:
        return None, [_one_line(str(error))]
    problems: list[str] = []
    accepted: list[str] = []
    # Groups first: `model.depth=3 model=llama_tiny` sets a field of the group chosen after it.
    for item in sorted(overrides, key=lambda item: not _is_group(hydra, item)):
        try:
            config = attempt([*accepted, item])
            accepted.append(item)
        except COMPOSITION_ERRORS as error:
            problems.append(_override_problem(hydra, item, error, config))
    return config, problems


def _is_group(hydra: Hydra, override: str) -> bool:
    return bool(hydra.config_loader.get_group_options(_override_key(override)))


def _override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _override_problem(hydra: Hydra, override: str, error: Exception, config: DictConfig) -> str:
    """One line for one refused override of `config`, with the nearest name that exists."""
    value = override.partition("=")[2]
    key = _override_key(override)
    message = f"{error} {error.__cause__}"
    if _is_group(hydra, override):
        options = hydra.config_loader.get_group_options(key)
        if value not in options:
            hint = _did_you_mean(value, options) or f"; there are: {', '.join(sorted(options))}"
            return f"{key}: no option '{value}'{hint}"
    if "Ambiguous value" in message or "requires --multirun" in message:
        return f"{key}: '{value}' is a sweep; add -m to run it, or write a list as [a,b]"
    if call := re.search(r"Unknown function '(\w+)'", message):
        # What stands before a parenthesis is a function of Hydra's, unless it is quoted.
        return f'{key}: put quotes around what has parentheses: ["{call[1]}(…)"]'
    if re.search(r"is not in struct|Key '.*' not in '|No match in the defaults", message):
        *parents, name = key.split(".")
        while parents and not isinstance(OmegaConf.select(config, ".".join(parents)), DictConfig):
            name = parents.pop()
        node = OmegaConf.select(config, ".".join(parents)) if parents else config
        return f"{key}: unknown field{_did_you_mean(name, [str(field) for field in node])}"
    return f"{override}: {_one_line(str(error.__cause__ or error))}"


def _problems_of(cls: type, path: str, detail: Any) -> list[str]:
    """Lines for one of pydantic's errors."""
    location, kind, message = detail["loc"], detail["type"], detail["msg"]
    where = _join(path, *location)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        names = _field_names(cls, location[:-1])
        return [f"{where}: unknown field{_did_you_mean(str(location[-1]), names)}"]
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return [f"{where}: is missing, give it a value"]
    if kind in ("value_error", "assertion_error"):
        error = detail["ctx"]["error"]
        found = error.problems if isinstance(error, ConfigError) else [_one_line(str(error))]
        return [_prefix(where, problem) for problem in found]
    message = message.replace("Input should be", "must be")
    return [f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"]


def _prefix(where: str, problem: str) -> str:
    """Put a place before a problem; one that names its field continues the path."""
    if not where:
        return problem
    return _join(where, problem) if re.match(r"[\w.\[\]]+: ", problem) else f"{where}: {problem}"


def _field_names(cls: Any, location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the dataclass found at `location` inside `cls`."""
    if typing.get_origin(cls) is typing.Annotated:
        return _field_names(typing.get_args(cls)[0], location)
    if isinstance(cls, types.UnionType) or typing.get_origin(cls) is typing.Union:
        return [name for part in typing.get_args(cls) for name in _field_names(part, location)]
    if dataclasses.is_dataclass(cls):
        if not location:
            return [field.name for field in dataclasses.fields(cls)]
        inner = typing.get_type_hints(cls).get(str(location[0]))
        return _field_names(inner, location[1:])
    # dict[str, X], tuple[X, ...], list[X]: the element's type comes last, an ellipsis aside.
    inner_types = [part for part in typing.get_args(cls) if part is not Ellipsis]
    return _field_names(inner_types[-1], location[1:]) if inner_types and location else []


def _missing_fields(values: Any, path: str = "") -> list[str]:
    """Paths of the values left as `???`."""
    if isinstance(values, Mapping):
        items = [(_join(path, str(key)), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(_join(path, number), value) for number, value in enumerate(values)]
    else:
        return [path] if values == "???" else []
    return [field for where, value in items for field in _missing_fields(value, where)]


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _join(path: str, *parts: int | str) -> str:
    """Append to a dotted path; a number becomes an index: `operators[1].ratio`."""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _omegaconf_problem(error: OmegaConfBaseException, path: str = "") -> str:
    where = _join(path, *([error.full_key] if error.full_key else []))
    message = _one_line((error.msg or str(error)).split("\n    full_key")[0])
    return f"{where}: {message}" if where else message


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
