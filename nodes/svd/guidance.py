"""CFG that rises over the frames, also inside windows and over chunks, and with functions of other nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .job import Run

_TAKES_TENSOR = ("RescaleCFG.",)  # functions of other nodes that take one CFG for each latent


def let_rise(model_options: dict[str, Any], min_cfg: float, run: Run) -> None:
    """Make the CFG of this run rise from `min_cfg` to the sampler's, as `run.rise` says. In place.

    Raises ValueError where another node changes the CFG over the frames, too.
    """
    before = model_options.get("sampler_cfg_function")
    if before is not None and not getattr(before, "__qualname__", "").startswith(_TAKES_TENSOR):
        raise ValueError(
            f"min_cfg is {min_cfg}, and another node of the model, such as Video Linear CFG Guidance, changes the CFG, "
            "too. Set min_cfg to 0, or remove that node. RescaleCFG can stay."
        )

    def rising(arguments: dict[str, Any]) -> Tensor:
        positive, negative = arguments["cond"], arguments["uncond"]
        rise = torch.linspace(0, 1, positive.shape[0]) if run.rise is None else run.rise
        scale = min_cfg + (arguments["cond_scale"] - min_cfg) * rise.to(positive).reshape(-1, 1, 1, 1)
        if before is not None:
            return before({**arguments, "cond_scale": scale})
        return negative + scale * (positive - negative)

    model_options["sampler_cfg_function"] = rising
    model_options["disable_cfg1_optimization"] = True  # at CFG 1 ComfyUI would not run the negative at all


def check_conditions(conds: list[Any], min_cfg: float) -> None:
    """Raise ValueError for guiders whose CFG cannot rise. conds: of one call of the model, None for those left out."""
    if min_cfg and (len(conds) != 2 or None in conds):
        count = sum(cond is not None for cond in conds)
        raise ValueError(
            f"min_cfg is {min_cfg} and the guider has {count} condition{'s' * (count != 1)}; the ramp of the CFG is "
            "defined for one positive and one negative. Set min_cfg to 0, or use KSampler or CFGGuider."
        )
