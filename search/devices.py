"""Which GPU a worker of a search takes."""

from __future__ import annotations

import os


def visible_devices(index: int) -> str | None:
    """CUDA_VISIBLE_DEVICES for worker number `index`: one of those that this process may use.

    A scheduler (Slurm, say) names what it has given to a job in CUDA_VISIBLE_DEVICES; the workers
    take these in turn. None: no GPU to choose.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    return names[index % len(names)].strip()
