"""timm's Muon, in a precision that the device multiplies fast."""

from functools import partial

import torch

from dynlib._vision import timm


class Muon(timm.optim.Muon):
    """Orthogonalises in `dtype`, where timm's own always takes bfloat16.

    A processor that had to emulate bfloat16 spent half of a training step on that.
    """

    def __init__(self, params, *args, dtype: torch.dtype, **options):
        super().__init__(params, *args, **options)
        self.dtype = dtype

    def step(self, closure=None):
        """As timm's."""
        timm_muon = timm.optim.muon
        given = timm_muon.zeropower_via_newtonschulz
        timm_muon.zeropower_via_newtonschulz = partial(given, dtype=self.dtype)
        try:
            return super().step(closure)
        finally:
            timm_muon.zeropower_via_newtonschulz = given
