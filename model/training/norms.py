"""Norms of gradients, parameters and updates, for the journal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.training.distributed import whole


class Norms:
    """Those of one step: made when its gradients are there, asked when its update is done. Holds a copy of the parameters meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._gradients = _norms({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    def fields(self, per_layer: bool) -> dict[str, Any]:
        """`parameter_norm` and `update_norm` of all; with `per_layer` also `layers`: each parameter's [gradient, parameter, update]."""
        named = dict(self._model.named_parameters())
        parameters = _norms({name: parameter.detach() for name, parameter in named.items()})
        updates = _norms({name: parameter.detach() - self._before[name] for name, parameter in named.items()})
        fields: dict[str, Any] = {"parameter_norm": math.hypot(*parameters.values()), "update_norm": math.hypot(*updates.values())}
        if per_layer:
            fields["layers"] = {name: [self._gradients.get(name), parameters[name], updates[name]] for name in named}
        return fields


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    found = torch._foreach_norm(list(tensors.values()))
    return dict(zip(tensors, torch.stack([whole(norm) for norm in found]).tolist(), strict=True))
