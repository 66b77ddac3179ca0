"""The baseline of the paper: a plain VAE, whose generator maps z to all pixels at once."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor, nn

from cryo_svae.models.coordinate import CoordinateConfig, CoordinateEngine
from cryo_svae.models.coordinate_generator import mlp


class VanillaEngine(CoordinateEngine):
    """z to image by an MLP; no pose, so psi and origin are 0."""

    def __init__(self, box_px: int, z_dim: int, config: CoordinateConfig) -> None:
        super().__init__(box_px, z_dim, dataclasses.replace(config, rotate=False, translate=False))

    @property
    def gains_by_bfloat16_on_cpu(self) -> bool:
        """Its matrices are multiplied once an image."""
        return False

    def build_generator(self) -> nn.Module:
        """z to the outputs of all pixels."""
        config, n_out = self.config, len(self.inside) * self.pixels.outputs
        return mlp(self.z_dim, config.hidden, n_out, config.layers, config.activation)

    def generate(
        self, z: Float[Tensor, "b d"], psi_rad: Float[Tensor, "b"], origin_px: Float[Tensor, "b 2"]
    ) -> Float[Tensor, "b p out"]:
        """Generator's output at the pixels within the mask; the pose plays no part."""
        output: Tensor = self.generator(z).to(z.dtype)  # there is no Fourier transform of bfloat16
        return output.reshape(len(z), len(self.inside), self.pixels.outputs)
