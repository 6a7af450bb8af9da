"""The model as transformers and accelerate run it: layers computed anew, weights kept elsewhere.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from slm.model import LanguageModel, Layer, ModelState
from slm.operators import Sequence, State

Result = TypeVar("Result")


def with_weights(modules: Iterable[nn.Module], run: Callable[[], Result]) -> Result:
    """What `run` gives, with the weights of these modules in place, wherever accelerate keeps them.

    accelerate fetches weights when their module is called; ours also read them without a call.
    """
    hooks: list[tuple[nn.Module, Any]] = [
        (module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")
    ]
    for module, hook in hooks:
        hook.pre_forward(module)
    result = run()
    for module, hook in hooks:
        hook.post_forward(module, None)
    return result


class SLMLayer(GradientCheckpointingLayer, Layer):
    """A layer that the backward pass may compute anew, and whose weights accelerate may move.

    Where accelerate has a hand in it, whatever the layer does is a call of the module: that is when
    its inputs are moved and its weights fetched.
    """

    def forward(self, x: Any, *arguments: Any, run: Callable[..., Any] = Layer.forward) -> Any:
        """What `run`, a method of `Layer`, gives."""
        modules = self.modules() if "_hf_hook" in vars(self) else ()
        return with_weights(modules, lambda: run(self, x, *arguments))

    def append(self, x: Tensor, sequence: Sequence, state: State) -> Tensor:
        """See `Layer.append`."""
        return self._run(Layer.append, x, sequence, state)

    def step(self, x: Tensor, state: State) -> Tensor:
        """See `Layer.step`."""
        return self._run(Layer.step, x, state)

    def init_state(self, batch_size: int, max_tokens: int) -> State:
        """See `Layer.init_state`."""
        return self._run(Layer.init_state, batch_size, max_tokens)

    def _run(self, run: Callable[..., Any], *arguments: Any) -> Any:
        # Decoding passes here for every token, and a call costs more than this question.
        if "_hf_hook" in vars(self):
            return self(*arguments, run=run)
        return run(self, *arguments)


class SLMLanguageModel(LanguageModel):
    """A language model of such layers."""

    layer_class: ClassVar[type[Layer]] = SLMLayer

    def scan(self, x: Tensor, sequence: Sequence, streams: list[Tensor] | None = None) -> Tensor:
        """See `LanguageModel.scan`."""
        return with_weights([self], lambda: LanguageModel.scan(self, x, sequence, streams))

    def init_state(self, batch_size: int, max_tokens: int) -> ModelState:
        """See `LanguageModel.init_state`."""
        return with_weights([self], lambda: LanguageModel.init_state(self, batch_size, max_tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `LanguageModel.logits`."""
        head = self.embedding if self.architecture.tie_embeddings else self.head
        return with_weights(
            [head], lambda: LanguageModel.logits(self, hidden.to(self.head_weight.device))
        )
