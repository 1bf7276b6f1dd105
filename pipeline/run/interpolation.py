"""Paths through latents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_FINE = 64  # points per arc at which its length is measured


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation (White 2016): a, b [n, d] and t [k] → [n, k, d], from a at t = 0 to b at t = 1.

    A straight line between normal latents passes closer to 0 than the latents that G was trained on.
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None, None]
    a, b, t = a[:, None], b[:, None], t[None, :, None]
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-4, arc, (1 - t) * a + t * b)  # (anti)parallel: no unique arc


def loop(keys: Tensor, frames: int) -> Tensor:
    """A closed path of arcs through keys [k, d] in their order, and back to the first: float32 [frames, d].

    Neighbours, the last and the first among them, are equally far apart along it: it moves at one speed, and
    shown again and again it never jumps. It starts at the first key, and passes the others between frames.
    """
    keys = keys.double()
    following = keys.roll(-1, dims=0)
    fine = slerp(keys, following, torch.arange(_FINE, dtype=torch.float64) / _FINE).flatten(0, 1)
    closed = torch.cat([fine, keys[:1]])
    length = np.concatenate([[0.0], closed.diff(dim=0).norm(dim=1).cumsum(0).numpy()])
    places = np.arange(len(length)) / _FINE  # arc and, after the point, how far along it
    wanted = np.interp(np.linspace(0, length[-1], frames, endpoint=False), length, places)
    arcs = torch.from_numpy(wanted.astype(int)).clamp(max=len(keys) - 1)
    along = torch.from_numpy(wanted) - arcs
    pairs = zip(arcs.tolist(), along, strict=True)
    return torch.cat([slerp(keys[[i]], following[[i]], t[None])[0] for i, t in pairs]).float()
