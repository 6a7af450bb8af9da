"""Loading exports with transformers where this package is installed, without the code in them.

from slm.hub.auto import register

register()
model = AutoModelForCausalLM.from_pretrained("runs/train/export")
"""

from __future__ import annotations


def register() -> None:
    """Have transformers' Auto classes know the model; calling it again changes nothing.

    From then on they take this package's classes for every export, whatever its
    `trust_remote_code` says. Operators of one's own have to be registered, too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from slm.hub.configuration import SLMConfig
    from slm.hub.modeling import SLMForCausalLM

    AutoConfig.register(SLMConfig.model_type, SLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(SLMConfig, SLMForCausalLM, exist_ok=True)
