"""High dynamic range and wide gamuts brought to ordinary video: BT.709 colours, a white of 203 cd/m2.

PQ and HLG become light (ITU-R BT.2100; HLG as on a display of 1000 cd/m2), BT.2020 and P3 primaries become those of
BT.709, and what is brighter than SDR shows is compressed by the curve of ITU-R BT.2390 (the EETF) from 1000 to 203
cd/m2, the white of BT.2408, on the largest of the three channels, so that hues stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

PQ, HLG = 16, 18  # AVCOL_TRC_...
BT2020, P3 = 9, 12  # AVCOL_PRI_...
TRANSFERS = {PQ: "PQ", HLG: "HLG"}
GAMUTS = {BT2020: "BT.2020", P3: "P3"}
_TO_709 = {  # linear light
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
_PEAK, _WHITE = 1000.0, 203.0  # cd/m2, of the source and of SDR
_M1, _M2 = 2610 / 16384, 2523 / 32
_C1, _C2, _C3 = 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_GAMMA = 2.4


def to_sdr(rgb: Tensor, transfer: int, primaries: int) -> Tensor:
    """(3, h, w) in [-1, 1] as coded to (3, h, w) in [-1, 1] as BT.709.

    transfer: PQ, HLG, or another for ordinary video, of which only the primaries are changed.
    """
    code = rgb.add(1).div_(2)
    if transfer == PQ:
        light = _pq_light(code).div_(_WHITE)
    elif transfer == HLG:
        light = _hlg_light(code).div_(_WHITE)
    else:
        light = code.pow_(_GAMMA)
    if primaries in _TO_709:
        light = torch.einsum("ij,jhw->ihw", torch.tensor(_TO_709[primaries]).to(light), light)
    light.clamp_(min=0)
    if transfer in TRANSFERS:
        light = _compressed(light)
    return light.clamp_(0, 1).pow_(1 / _GAMMA).mul_(2).sub_(1)


def _pq_light(code: Tensor) -> Tensor:
    """cd/m2."""
    root = code.clamp(0, 1).pow_(1 / _M2)
    return (root - _C1).clamp_(min=0).div_(_C2 - _C3 * root).pow_(1 / _M1).mul_(10000)


def _pq_code(light: Tensor) -> Tensor:
    root = light.div(10000).clamp_(min=0).pow_(_M1)
    return (_C1 + _C2 * root).div_(1 + _C3 * root).pow_(_M2)


def _hlg_light(code: Tensor) -> Tensor:
    """cd/m2 on a display of 1000: the scene's light through the system gamma of 1.2."""
    code = code.clamp(0, 1)
    scene = torch.where(code <= 0.5, code.square().div(3), ((code - _C) / _A).exp().add(_B).div(12))
    luma = 0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]
    return scene * luma.clamp_(min=1e-6).pow_(0.2) * _PEAK


def _compressed(light: Tensor) -> Tensor:
    """Light in units of the SDR white, from a peak of 1000 cd/m2 to one."""
    top = _pq_code(torch.tensor(_PEAK))
    brightest = light.amax(0).clamp_(min=1e-6)
    level = (_pq_code(brightest * _WHITE) / top).clamp_(max=1)
    most = _pq_code(torch.tensor(_WHITE)) / top
    knee = 1.5 * most - 0.5
    t = ((level - knee) / (1 - knee)).clamp_(min=0)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    wanted = torch.where(level < knee, level, curve)
    return light * (_pq_light(wanted * top) / _WHITE / brightest)
