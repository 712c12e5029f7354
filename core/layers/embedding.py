"""Token embedding and the head that turns hidden states into logits; the two may share one weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.linear import Linear, Loader, fill_weight, on_device


class Embedding(nn.Module):
    """ids [tokens] -> [tokens, size]."""

    def __init__(self, count: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size, dtype=dtype), requires_grad=False)

    def loaders(self, name: str) -> dict[str, Loader]:
        return {f"{name}.weight": fill_weight(f"{name}.weight", self)}

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Head(Linear):
    """The linear onto the vocabulary."""

    def tie(self, embedding: Embedding) -> None:
        """Share the embedding's weight."""
        self.weight = embedding.weight


def make_room(model: nn.Module, device: torch.device) -> None:
    """Give memory to what was made without (on "meta"), but not to the weights of linears and embeddings.

    Those come as they are loaded, quantized ones in their own size.
    """
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            if name != "weight" or not isinstance(part, (Linear, Embedding)):
                setattr(part, name, on_device(weight, device))
