"""Which machines may share a study: of one in a file, no two at a time.

SQLite and Optuna's journal lock their files in ways that network file systems do not keep to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slm.config import ConfigError

if TYPE_CHECKING:
    from search.storage import StorageConfig
    from search.study import Study

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0


def refuse_second_machine(study: Study, storage: StorageConfig) -> None:
    """Raise ConfigError if the study is in a file that another machine works on at the moment.

    One that is only in the way because it died there is waited for until its leases are over.
    """
    if storage.kind == "postgresql":
        return
    first = found = study.foreign_leases()
    if first:
        log.warning("%s: waiting until it is silent for long enough", _hosts(first))
    while found:
        if alive := dict(found.items() - first.items()):
            raise ConfigError(
                [
                    f"storage.kind: {storage.kind} is for the processes of one machine, and "
                    f"{_hosts(alive)} is at work on the study now; take storage=postgresql for "
                    f"several, or end what runs there"
                ]
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
        study.refresh()
        found = study.foreign_leases()


def _hosts(leases: Mapping[int, tuple[str, float]]) -> str:
    return ", ".join(sorted({host for host, _ in leases.values()}))
