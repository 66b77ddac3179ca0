"""Each particle's own scale: how strong its content is beside that of the set's usual particle.

Thickness of ice, contrast and the normalisation of images make one content appear stronger or weaker from
particle to particle. Without a scale that is the strongest variation of many sets, and z is spent on it.
The scale has a Gaussian prior about 1, whose variance is learned; its posterior, given content and pose, is
Gaussian as well. RELION has such a scale for each group of micrographs (Scheres 2012, J. Struct. Biol. 180,
519).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

BOUNDS = (0.2, 3.0)  # of a scale; beyond them an image is no particle
FIRST_STD = 0.3  # of scales, before anything is known of them: too small, and z takes what they should
LEAST_VARIANCE = 1e-4  # of scales


class OwnScale(nn.Module):
    """The prior of scales and what follows from it for b particles.

    variance: of the prior (); a running average of the posterior's second moments about 1.
    """

    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("variance", torch.tensor(FIRST_STD**2))

    def found(
        self, agreement: Float[Tensor, "b"], energy: Float[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Mean and variance of the scale's posterior.

        agreement: <h y / sigma², c>, in which content of scale 1 is compared with the image.
        energy:    <h² c / sigma², c>.
        """
        precision = energy + 1.0 / self.variance
        mean = (agreement + 1.0 / self.variance) / precision
        return mean.clamp(*BOUNDS), 1.0 / precision

    def log_prior(
        self, scale: Float[Tensor, "b"], posterior_variance: Float[Tensor, "b"]
    ) -> Float[Tensor, "b"]:
        """What is to be added to the log likelihood at the posterior's mean: the scale summed out, nats."""
        square = (scale - 1.0).square() / self.variance
        return 0.5 * (torch.log(posterior_variance / self.variance) - square)

    def learn(self, second_moment: Float[Tensor, ""], share: float) -> None:
        """Takes a share of what batches now show into the prior's variance."""
        self.variance.lerp_(second_moment.clamp(min=LEAST_VARIANCE), share)
