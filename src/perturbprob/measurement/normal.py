"""V for continuous values: a normal law around the state, with known noise, learnt noise, or both."""

from typing import ClassVar, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from perturbprob.measurement.log_normal import LogNormal


@final
class Normal(nn.Module):
    """Values y of each row and gene, y ~ Normal(location, s² + σ_g²), s the known standard error and σ_g learnt noise.

    For pseudobulk means s is the standard error of the mean, zero where it is not known. With ``learnt=False`` there is no σ: the
    standard errors are then all the noise there is. σ_g ~ LogNormal(log 0.1, 1), in the unit of the values.
    """

    sites: ClassVar[tuple[str, ...]] = ("noise",)
    zero: Tensor

    def __init__(self, n_genes: int, *, learnt: bool = True) -> None:
        """Keep the number of genes."""
        super().__init__()
        self.learnt = learnt
        self.register_buffer("zero", torch.zeros(n_genes), persistent=False)

    def globals(self) -> dict[str, Float[Tensor, " gene"]]:
        """Sample the learnt noise of each gene."""
        if not self.learnt:
            return {}
        return {"noise": pyro.sample("noise", LogNormal(self.zero - 2.3, 1.0).to_event(1))}

    def forward(
        self,
        location: Float[Tensor, "*plate gene"],
        noise: Float[Tensor, " gene"] | None = None,
        standard_error: Float[Tensor, "*#plate gene"] | None = None,
    ) -> dist.Distribution:
        """Return the law of the values.

        >>> float(Normal(1)(torch.zeros(1), torch.tensor([3.0]), torch.tensor([4.0])).scale)
        5.0
        """
        parts = [part.square() for part in (noise, standard_error) if part is not None]
        scale = sum(parts, location.new_zeros(location.shape[-1])).clamp(min=1e-12).sqrt()
        return dist.Normal(location, scale.expand_as(location), validate_args=False)
