"""Which GPUs a worker of a search takes."""

from __future__ import annotations

import os


def visible_devices(index: int, count: int = 1) -> str | None:
    """CUDA_VISIBLE_DEVICES for worker number `index`: `count` of those this process may use.

    The workers take these in turn. None: no GPU to choose.
    """
    names = device_names()
    if not names:
        return None
    return ",".join(names[(index * count + n) % len(names)] for n in range(count))


def device_names() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; none on a CPU.

    A scheduler (Slurm, say) names what it has given to a job in CUDA_VISIBLE_DEVICES.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(torch.cuda.device_count()))
    return [name.strip() for name in names]
