"""Knows how a vision tower's weights pass through memory while tiles pass through it.

The modules are the library's, built on the meta device: they have shapes and no memory. The
weights of a layer are read when the tiles come to it, and dropped behind them. So the tower costs
nothing while it is not used, and never more than its largest part, on whatever device.
Legend of the shapes: n tiles, S pixels of a tile's side, H hidden size of the text decoder.
"""

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moecli.errors import MoecliError

_BODY, _PROJECTOR = "vision_model.", "multi_modal_projector."
_LANDMARK = _BODY + "class_embedding"

Read = Callable[[str], Tensor]


class Tower:
    """Llama 4's vision tower and projector over the tensors of a checkpoint."""

    def __init__(
        self,
        config: Mapping[str, Any],
        text_hidden: int,
        names: Collection[str],
        read: Read,
        device: torch.device,
        dtype: torch.dtype,
        before_part: Callable[[], None],
    ) -> None:
        """`config` is the tower's own part of config.json, `text_hidden` is H.

        `read` takes one of `names`; computes in `dtype` on `device`. `before_part` is called before
        each part of the tower; what it raises goes through. Raises MoecliError where the checkpoint
        lacks the tower.
        """
        self._device, self._dtype = device, dtype
        prefix = _prefix(names)

        def load(name: str, shape: torch.Size) -> Tensor:
            return self._load(read, names, prefix + name, shape)

        def passing(part: nn.Module, name: str) -> nn.Module:
            return _Passing(part, lambda own, shape: load(name + own, shape), before_part)

        self._body, self._projector = _build(config, text_hidden)
        for name, part in self._body.named_children():
            if name == "model":
                for index, layer in enumerate(part.layers):
                    part.layers[index] = passing(layer, f"{_BODY}model.layers.{index}.")
            elif any(True for _ in part.parameters()):
                setattr(self._body, name, passing(part, f"{_BODY}{name}."))
        self._projector = passing(self._projector, _PROJECTOR)
        self._own = {
            name: (lambda name=name, shape=parameter.shape: load(_BODY + name, shape))
            for name, parameter in self._body.named_parameters(recurse=False)
        }

    def _load(self, read: Read, names: Collection[str], name: str, shape: torch.Size) -> Tensor:
        if name not in names:
            raise MoecliError(f"the checkpoint lacks `{name}` of its vision tower", _AGAIN)
        found = read(name)
        if found.shape != shape:
            raise MoecliError(
                f"tensor `{name}` has shape {list(found.shape)}; config.json makes it "
                f"{list(shape)}",
                _AGAIN,
            )
        return found.to(self._device, self._dtype)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, S, S] -> embeddings [n * tokens of a tile, H], in order."""
        own = {name: make() for name, make in self._own.items()}
        tiles = pixels.to(self._device, self._dtype)
        seen = functional_call(self._body, own, (tiles,)).last_hidden_state  # [n, tokens, -]
        return self._projector(seen).flatten(0, 1)


_AGAIN = "quantize the whole model again, from the multimodal checkpoint"


class _Passing(nn.Module):
    """A part of the tower: its weights come, each tile passes through alone, they go."""

    def __init__(
        self,
        part: nn.Module,
        load: Callable[[str, torch.Size], Tensor],
        before: Callable[[], None],
    ) -> None:
        super().__init__()
        # Not registered: it shall have no parameters in the eyes of the modules around it.
        self._part, self._load, self._before = [part], load, before

    def forward(self, hidden_state: Tensor, **settings: Any) -> Any:
        """[n, ...] -> [n, ...]; where the shape stays the same, in its place."""
        self._before()
        part = self._part[0]
        weights = {name: self._load(name, own.shape) for name, own in part.named_parameters()}
        made: list[Tensor] = []
        bare = True
        for tile in hidden_state.split(1):
            found = functional_call(part, weights, (tile,), settings)
            bare = isinstance(found, Tensor)
            new = found if isinstance(found, Tensor) else found[0]
            if new.shape == tile.shape:
                tile.copy_(new)
            else:
                made.append(new)
        whole = torch.cat(made) if made else hidden_state
        return whole if bare else (whole,)


def _prefix(names: Collection[str]) -> str:
    """What stands before the names of the tower."""
    found = [name for name in names if name.endswith(_LANDMARK)]
    if not found:
        raise MoecliError("the checkpoint has no vision tower", _AGAIN)
    return min(found, key=len).removesuffix(_LANDMARK)


def _build(config: Mapping[str, Any], text_hidden: int) -> tuple[Any, nn.Module]:
    """The library's vision model and projector, without memory for weights."""
    from accelerate import init_empty_weights
    from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
    from transformers.models.llama4.modeling_llama4 import (
        Llama4MultiModalProjector,
        Llama4VisionModel,
    )

    # Not the config of the whole: it complains on stderr of what the text decoder's part says.
    vision = Llama4VisionConfig(**config)
    whole = SimpleNamespace(
        vision_config=vision, text_config=SimpleNamespace(hidden_size=text_hidden)
    )
    with init_empty_weights(include_buffers=False):  # the angles of its RoPE are buffers
        return Llama4VisionModel(vision).eval(), Llama4MultiModalProjector(whole)
