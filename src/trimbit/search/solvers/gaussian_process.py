"""The Gaussian process of Bayesian optimisation and its acquisition, by BoTorch."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float64
from torch import Tensor

from trimbit.errors import NumericsError, RecipeError


def require_botorch() -> None:
    """Refuse early to search without the optional dependency.

    Raises:
        RecipeError: if BoTorch is missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".torch\.jit\.", DeprecationWarning)  # from the import
        try:
            import botorch  # noqa: F401
        except ImportError as err:
            raise RecipeError("search bayes needs botorch: pip install 'trimbit[bo]'") from err


@contextmanager
def _botorch(seed: int) -> Iterator[None]:
    """BoTorch with a local seed, and without its warnings about retries and jitter."""
    require_botorch()
    from botorch.exceptions import ModelFittingError, OptimizationWarning
    from linear_operator.utils.errors import NanError, NotPSDError
    from linear_operator.utils.warnings import NumericalWarning

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        for category in (OptimizationWarning, NumericalWarning):
            warnings.simplefilter("ignore", category)
        torch.manual_seed(seed)
        try:
            yield
        except (ModelFittingError, NanError, NotPSDError) as err:
            raise NumericsError(f"the Gaussian process of the search cannot be fitted to its results: {err}") from err


def _surrogate(x: Float64[Tensor, "points variables"], y: Float64[Tensor, " points"], steps: int) -> torch.nn.Module:
    """A Gaussian process with a constant mean and a scaled Matern-5/2 kernel, fitted by its marginal likelihood."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from gpytorch.kernels import ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    # code (botorch): length scales expected to grow with the square root of the number of variables
    matern = get_covar_module_with_dim_scaled_prior(ard_num_dims=x.shape[1], use_rbf_kernel=False)
    model: torch.nn.Module = SingleTaskGP(x, y[:, None], covar_module=ScaleKernel(matern), outcome_transform=None)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": steps}})
    return model


def _acquisition(
    model: torch.nn.Module, best: float, pending: Float64[Tensor, "pending variables"], samples: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """The log expected improvement over `best` of one point, alone or together with the pending points."""
    from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
    from botorch.sampling import SobolQMCNormalSampler

    if len(pending) == 0:
        alone: Callable[[Tensor], Tensor] = LogExpectedImprovement(model, best)
        return alone
    sampler = SobolQMCNormalSampler(torch.Size([samples]), seed=seed)
    together: Callable[[Tensor], Tensor] = qLogExpectedImprovement(model, best, sampler, X_pending=pending)
    return together


def _improvement(values: Sequence[float]) -> Float64[Tensor, " points"]:
    """How much better than the mean each damage is, in standard deviations."""
    damage = torch.tensor(values, dtype=torch.float64)
    return (damage.mean() - damage) / (damage.std(correction=0) or 1.0)
