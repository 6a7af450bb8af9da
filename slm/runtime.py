"""What every program has in common: operators of the user's own, and which kernels run.

Configs derive from the dataclasses here, so that both are settled before anything else is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import pydantic
import torch
from pydantic_core import ArgsKwargs

from slm.config import ConfigError, schema
from slm.kernels.backend import Backend, check_backend, current_backend, set_backend
from slm.plugins import load_plugins, loaded_plugins, plugin_digests


@schema
class PluginsConfig:
    """Operators of the user's own; see `docs/own_operator.md`.

    plugins: paths of Python files, or names of importable modules.
    """

    plugins: tuple[str, ...] = ()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _import_plugins(cls, given: Any) -> Any:
        """Import them before the other fields, which may name their operators, are read."""
        values = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        plugins = values.get("plugins", ()) if isinstance(values, Mapping) else ()
        if not isinstance(plugins, list | tuple):
            raise ConfigError([f"plugins: must be a list, [my_operator.py], got {plugins!r}"])
        load_plugins([str(plugin) for plugin in plugins])
        return given


@schema
class RuntimeConfig(PluginsConfig):
    """The user's own operators, and the kernels of all.

    backend: 'auto' runs the kernels of flash-linear-attention (fla) on CUDA and this package's
        torch forms elsewhere; 'torch' insists on the latter, 'fla' on fla's wherever fla has one.
        Mamba's scan is torch's everywhere, attention but for single tokens in compiled steps and
        on CUDA.
    """

    backend: Backend = "auto"

    @pydantic.model_validator(mode="after")
    def _check_backend(self) -> Self:
        check_backend(self.backend, self.device_type)
        return self

    @property
    def device_type(self) -> str:
        """'cuda' or 'cpu': where the model runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def runtime(self) -> Runtime:
        """The same for another process."""
        return Runtime(self.plugins, self.backend, plugin_digests())


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """So many of torch's CPU threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Runtime:
    """What a further process has to set up to compute what this one would.

    digests: of the plugins' sources, by module.
    """

    plugins: tuple[str, ...]
    backend: Backend
    digests: dict[str, str]

    @classmethod
    def current(cls) -> Runtime:
        """What this process has set up."""
        return cls(loaded_plugins(), current_backend(), plugin_digests())

    def apply(self) -> None:
        """Import the plugins and choose the kernels.

        Raises ConfigError if a plugin is not what it was when this was made.
        """
        load_plugins(self.plugins)
        here = plugin_digests()
        changed = [name for name, digest in self.digests.items() if here.get(name) != digest]
        if changed:
            raise ConfigError([f"plugins: {', '.join(changed)} has changed since the start"])
        set_backend(self.backend)
