"""How rounding errors travel through inverses (section 4.1): closed forms, their experiments, whole chains.

The notion of Eqs. 15 and 16. A layer maps x to y; its inverse maps a noisy y back. With the energies of signal and
noise per element,

    snr = |signal|^2 / |noise|^2                 (Eq. 15; a ratio of energies, 10 log10 of it in dB)
    alpha = snr of the rebuilt x / snr of y      (Eq. 16; below 1 the inverse loses precision)
          = (E_x / E_y) / noise gain             noise gain: what white noise of energy 1 on y becomes on x

E_x, E_y are mean squares over all elements. "White" noise is independent of the signal and equally strong in every
element of y. Gains are ratios of energies and have no unit. docs/numerics.md shows theory beside experiment and says of
each draft equation whether it held.

    closed forms    alpha_batchnorm*, alpha_leakyrelu*, alpha_coupling and their noise gains
    rounding        rounding_noise, recomputed_sum_noise, snr_cap_of_unbiased_variance
    experiment      measure_alpha: white noise on y, the layer's own inverse, both sides of Eq. 16 measured
    chains          predict_chain_snr_db of a list of alphas; read_chain, predict_snr_db of a real network
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revtrain.core.chain import InvertibleChain, observe
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.layers import BatchPooling, ChannelPooling, CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU
from revtrain.numerics.snr import layer_names


def decibels(ratio: float) -> float:
    """10 log10 of a ratio of energies; infinite for infinity, minus infinity for 0."""
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else (math.inf if ratio > 0 else -math.inf)


def alpha_of(energy_in: float, energy_out: float, noise_gain: float) -> float:
    """alpha of any layer (Eq. 16): (E_x / E_y) / noise gain of its inverse. No unit."""
    return energy_in / energy_out / noise_gain


# ---------------------------------------------------------------- batch normalisation


def noise_gain_batchnorm(variance: Tensor, gamma: Tensor, epsilon_i: float = 0.0, eps: float = 1e-5) -> float:
    """Mean over channels of s_i^2 / gain_i^2 (Eq. 21), s_i^2 = var_i + eps, gain_i = |gamma_i| + epsilon_i (Eq. 23).

    The draft's Eqs. 21c-f multiply the noise by gamma / sigma, which is what the *forward* pass does to it; the
    inverse divides by gamma and multiplies by sigma.

    Args:
        variance: biased variance of each channel of x, (C,), squared units of x. gamma: (C,), units of y.
        epsilon_i: least gain, units of y. eps: added to the variance, squared units of x.
    """
    gain = gamma.double().abs() + epsilon_i
    return ((variance.double() + eps) / gain.square()).mean().item()


def alpha_batchnorm(
    mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon_i: float = 0.0, eps: float = 1e-5
) -> float:
    """alpha of batch normalisation with any parameters (Eq. 22c, corrected). All arguments (C,); see above for units.

        alpha = sum(mean^2 + var) / sum(gain^2 var / s^2 + beta^2) * C / sum(s^2 / gain^2)

    The draft prints 22c with the noise gain of 21c, gamma / sigma; it then does not reduce to its own 19c, this does.
    alpha exceeds 1 where |mean| >> sigma: the mean is kept apart, free of noise, and comes back as signal.
    """
    mean, variance, gamma, beta = (each.double() for each in (mean, variance, gamma, beta))
    gain = gamma.abs() + epsilon_i
    energy_in = (mean.square() + variance).mean().item()
    energy_out = (gain.square() * variance / (variance + eps) + beta.square()).mean().item()
    return alpha_of(energy_in, energy_out, noise_gain_batchnorm(variance, gamma, epsilon_i, eps))


def alpha_batchnorm_toy(rho: float) -> float:
    """alpha of two channels of zero mean and unit variance, beta = (0, 0), gamma = (1, rho) (Eq. 19c; it holds).

        alpha = 4 / ((1 + rho^2) (1 + 1 / rho^2))

    rho: ratio of the two channels' gains, no unit, either sign, not 0. 1 at |rho| = 1, symmetric in rho <-> 1 / rho.
    """
    _check_positive("rho", abs(rho), "The ratio of two gains that are both other than zero.")
    return 4 / ((1 + rho**2) * (1 + rho**-2))


def rho_with_epsilon(rho: float, epsilon_i: float) -> float:
    """What epsilon_i makes of the toy's rho (Eq. 23): (|rho| + epsilon_i) / (1 + epsilon_i). No unit.

    It replaces rho in Eq. 19c. The draft's |gamma + epsilon_i| gives |rho + epsilon_i| / (1 + epsilon_i), which is 0
    (and with it alpha) at rho = -epsilon_i.
    """
    return (abs(rho) + epsilon_i) / (1 + epsilon_i)


def least_alpha_batchnorm(gamma_max: float, epsilon_i: float) -> float:
    """The bound that epsilon_i gives (Eq. 23) where no |gamma| exceeds gamma_max: Eq. 19c at the extreme ratio.

        alpha >= 4 rho^2 / (1 + rho^2)^2,    rho = epsilon_i / (gamma_max + epsilon_i)

    For channels of zero mean and equal variance and beta = 0: Kantorovich's inequality says that no number of
    channels is worse than two, one at each end of the range.
    `largest_noise_gain_batchnorm` bounds alpha without these conditions.
    """
    _check_positive("epsilon_i", epsilon_i, "Without it there is no bound: a gain may come arbitrarily near zero.")
    return alpha_batchnorm_toy(epsilon_i / (gamma_max + epsilon_i))


def largest_noise_gain_batchnorm(variance: Tensor, epsilon_i: float, eps: float = 1e-5) -> float:
    """Bound of `noise_gain_batchnorm` by epsilon_i alone (Eq. 23), whatever gamma is: mean(s_i^2) / epsilon_i^2.

    alpha is then at least (E_x / E_y) / this bound, for any mean, variance and beta. Variance: (C,).
    """
    _check_positive("epsilon_i", epsilon_i, "Without it there is no bound: a gain may come arbitrarily near zero.")
    return (variance.double() + eps).mean().item() / epsilon_i**2


def snr_cap_of_unbiased_variance(count: int) -> float:
    """Best SNR of the inverse of BN if it uses the unbiased variance: 1 / (sqrt(N / (N-1)) - 1)^2, near (2 N)^2.

    Eq. 21 leaves open which variance is meant. The forward pass divides by the biased one; the other is larger by
    N / (N - 1), so that each channel comes back with the wrong contrast. A ratio of energies for channels of zero
    mean (multiply by 1 + mean^2 / var otherwise). count: N = B H W, elements a channel, 2 or more.
    """
    if count < 2:
        raise RevtrainError(f"count={count} elements have no unbiased variance.\nExpected B * H * W, 2 or more.")
    return (math.sqrt(count / (count - 1)) - 1) ** -2


# ---------------------------------------------------------------- LeakyReLU


def noise_gain_leakyrelu(positive_share: float, slope: float) -> float:
    """p + (1 - p) / n^2: noise on negative elements is divided by n (Eq. 24). p: share of positive elements."""
    _check_positive("slope", slope, "The factor n of negative elements.")
    return positive_share + (1 - positive_share) / slope**2


def alpha_leakyrelu(positive_share: float, energy_positive: float, energy_negative: float, slope: float) -> float:
    """alpha of LeakyReLU for any input (general form of Eq. 28c, which the draft gives for symmetric inputs only).

        alpha = (E+ + E-) / (E+ + n^2 E-) / (p + (1 - p) / n^2)

    Args:
        positive_share: p, share of the elements that are positive, 0 to 1.
        energy_positive, energy_negative: E+, E-, sums of squares over positive and negative elements, units of x^2.
        slope: n > 0, y = n x for x < 0, no unit.

    Holds while hardly an element of y changes its sign by the noise; else see `noise_gain_of_sign_changes`.
    """
    energy_out = energy_positive + slope**2 * energy_negative
    return alpha_of(energy_positive + energy_negative, energy_out, noise_gain_leakyrelu(positive_share, slope))


def alpha_leakyrelu_symmetric(slope: float) -> float:
    """alpha of LeakyReLU for an input symmetric about zero (Eq. 28c; it holds).

        alpha = 4 / ((1 + n^2) (1 + 1 / n^2))

    The same for n and 1 / n: the draft's Eq. 24, y = x / n, cannot be told from y = n x here. slope: n > 0, no unit.
    """
    return alpha_leakyrelu(0.5, 0.5, 0.5, slope)


def noise_gain_of_sign_changes(slope: float, noise: float, density: float) -> float:
    """What to add to `noise_gain_leakyrelu` where the noise changes signs of y, to first order; 0 or negative.

        -(2/3) sqrt(2/pi) sigma f(0) (1/n - 1)^2 (1/n + 1)

    A negative element that comes out positive is no longer divided by n, so strong noise is amplified less than weak
    noise. Not in the draft. This is small while sigma << n / f(0).

    Args:
        slope: n > 0. noise: sigma, standard deviation of the Gaussian noise on y, units of x. density: f(0), the
            probability density of x at 0, per unit of x; 0.4 for a Gaussian of unit variance.
    """
    _check_positive("slope", slope, "The factor n of negative elements.")
    return -2 / 3 * math.sqrt(2 / math.pi) * noise * density * (1 / slope - 1) ** 2 * (1 / slope + 1)


# ---------------------------------------------------------------- additive coupling


def noise_gain_coupling(gain_f: float, gain_g: float) -> float:
    """Noise gain of x2 = y2 - G(y1), x1 = y1 - F(x2) for white noise and linear F, G (section 4.1.3).

        noise gain = (1 + (1 + f) (1 + g)) / 2

    x2 carries 1 + g, its own noise and that of y1 through G; x1 carries 1 + f (1 + g). Draws of F and G are taken as
    independent, of zero mean (tr FG = 0); F and G of depth are meant by their linearisation.

    Args:
        gain_f, gain_g: f, g, energy of F's (G's) output per energy of a white input, no unit; see `conv_gain`.
    """
    return (1 + (1 + gain_f) * (1 + gain_g)) / 2


def alpha_coupling(gain_f: float, gain_g: float) -> float:
    """alpha of an additive coupling for white noise and a white signal (section 4.1.3; the draft has no formula).

    The forward pass amplifies a white signal as the inverse amplifies white noise, so alpha = 1 / noise gain^2.
    "Extremely stable" thus means small gains: -0.04 dB at f = g = 0.005, -2.9 dB at 1/3 (torch's initialisation of
    a convolution), -8 dB at 1, -36 dB at 10.
    """
    return noise_gain_coupling(gain_f, gain_g) ** -2


def conv_gain(conv: nn.Conv2d, height: int, width: int) -> float:
    """Energy of the convolution's output per energy of a white input (section 4.1.3), over images (height, width).

    sum of squared weights / output channels, each weight by the share of pixels that it reaches: at the border it
    meets the padding. For stride 1 and zero padding that keeps the image size.
    """
    shares = _reached(height, conv.kernel_size[0])[:, None] * _reached(width, conv.kernel_size[1])
    squares = conv.weight.detach().cpu().double().square()
    return (squares * shares).sum().item() / conv.out_channels


def _reached(size: int, kernel_size: int) -> Tensor:
    """Share of `size` positions in which a tap meets the image and not the padding, (kernel_size,)."""
    offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    return (1 - offsets.abs() / size).clamp(min=0)


# ---------------------------------------------------------------- rounding


def rounding_noise(dtype: torch.dtype) -> float:
    """Noise energy of one rounding relative to the signal's: eps^2 / (32 ln 2), eps = torch.finfo(dtype).eps.

    A rounding error is uniform over a unit in the last place, of variance ulp^2 / 12; with the mantissa m in [1, 2)
    of density 1 / (m ln 2), E[(ulp / x)^2] = eps^2 E[1 / m^2] = eps^2 * 3 / (8 ln 2). In dB of SNR: 326.5 for
    float64, 151.9 for float32, 73.7 for float16, 55.6 for bfloat16. Raises `RevtrainError` for an integer dtype.
    """
    if not dtype.is_floating_point:
        raise RevtrainError(f"{dtype} does not round.\nExpected a floating-point dtype such as torch.float32.")
    return torch.finfo(dtype).eps ** 2 / (32 * math.log(2))


# How fast two computations of a sum drift apart, see below. Measured 2.5 to 5 for sums of 1152 to 16 products.
SUM_DRIFT = 3.0


def recomputed_sum_noise(terms: int, noise: float, dtype: torch.dtype, independent_share: float = 1.0) -> float:
    """Noise energy, relative to that of the sum, that computing a sum of products from noisy operands again adds.

    A sum of K products, one after the other, makes K roundings of partial sums, K / 2 times the energy of a single
    one. Computed again from the same bits it makes the same errors, and the difference is nil; from bits that differ
    a little, some roundings differ: K / 2 becomes kappa, 1 / kappa = 2 / K + eps / (3 sqrt(K noise share)). A model,
    good to 2.5 dB for kernels that sum in sequence (docs/numerics.md); not for tensor cores or a wider type of sums.

    Args:
        terms: K. noise: relative noise energy of the operands, 0 or more. dtype: of the sums.
        independent_share: energy that the sum would have if its products were independent / energy that it has:
            below 1 for weights that have learned to add their inputs up.
    """
    drift = SUM_DRIFT * math.sqrt(terms * noise * independent_share) / torch.finfo(dtype).eps
    if drift == 0:
        return 0.0
    return 2 * rounding_noise(dtype) / (2 / terms + 1 / drift)


# ---------------------------------------------------------------- experiment


def measure_alpha(
    layer: InvertibleLayer, x: Tensor, noise: float = 1e-5, generator: torch.Generator | None = None
) -> float:
    """alpha by experiment (Eq. 16): white Gaussian noise on y, the layer's own inverse, both SNRs measured.

    Args:
        layer: any invertible layer, in training mode for batch statistics; its running statistics are updated once.
        x: (B, C, H, W), not changed. Give it a million elements for 0.3 %.
        noise: standard deviation of the noise, relative to the root mean square of y.
    """
    with torch.no_grad():
        y, saved = layer.forward_(x.clone())
        white = torch.empty_like(y).normal_(generator=generator)
        noisy = y + white * (noise * y.square().mean().sqrt())
        return _snr(x, layer.inverse(noisy, saved)) / _snr(y, noisy)


def measure_alpha_leakyrelu(
    x: Tensor, slope: float, noise: float = 1e-5, generator: torch.Generator | None = None
) -> float:
    """`measure_alpha` of LeakyReLU for any slope n > 0.

    `InvertibleLeakyReLU` refuses n > 1; such a layer is that of slope 1 / n, mirrored: f_n(x) = -n f_{1/n}(-x).
    """
    layer = InvertibleLeakyReLU(min(slope, 1 / slope))
    return measure_alpha(layer, x if slope <= 1 else -x, noise, generator)


def _snr(true: Tensor, rebuilt: Tensor) -> float:
    """Eq. 15 as a ratio, summed in float64; no ceiling, unlike `revtrain.numerics.snr.snr_db`."""
    true, rebuilt = true.double(), rebuilt.double()
    return (true.square().sum() / (true - rebuilt).square().sum()).item()


# ---------------------------------------------------------------- chains


def predict_chain_snr_db(
    alphas: Sequence[float],
    own_noise: Sequence[float | Callable[[float], float]] | float = 0.0,
    output_noise: float = 0.0,
) -> list[float]:
    """SNR in dB of the rebuilt input of every layer of a chain, by composing Eq. 16 from the last layer to the first.

        noise of x = noise of y / alpha + own noise        (relative energies: 1 / snr)

    Args:
        alphas: one a layer, first layer first.
        own_noise: what each layer's own rounding adds to its rebuilt x, relative energy: one number for all, or one
            a layer; a function is given the noise that arrives at its layer. `rounding_noise` has numbers.
        output_noise: relative noise energy of the chain's output; 0: it was kept.

    Returns dB in the order of `alphas`, first layer first: entry i belongs to the input of layer i.
    """
    own = [own_noise] * len(alphas) if isinstance(own_noise, int | float) else list(own_noise)
    if len(own) != len(alphas):
        raise RevtrainError(f"{len(own)} values of own noise for {len(alphas)} layers.\nExpected one a layer.")
    values, noise = [], output_noise
    for alpha, each in zip(reversed(alphas), reversed(own), strict=True):
        _check_positive("alpha", alpha, "A ratio of two SNRs.")
        noise = noise / alpha + (each(noise) if callable(each) else each)
        values.append(-decibels(noise))
    return values[::-1]


class LayerTheory:
    """Section 4.1 for one layer of a real network at its true input.

    alpha          closed form (Eq. 16), from the statistics of the true activations
    energy         sum of squares of x
    output_shape   of y
    device         of x
    """

    alpha: float = 1.0

    def __init__(self, layer: nn.Module, x: Tensor):
        self.layer: Any = layer  # each subclass has its own kind
        self.output_shape, self.device = x.shape, x.device
        self.energy = x.double().square().sum().item()
        self.once = rounding_noise(x.dtype)

    def own_noise(self, noise: float) -> float:
        """What the layer's rounding adds to the rebuilt x; both are relative noise energies, `noise` is that of y."""
        raise NotImplementedError

    def carry_back(self, variance: Tensor) -> Tensor:
        """Variance of the noise of every element of the rebuilt x, own rounding included, of that of y. float64."""
        raise NotImplementedError


class _Permutation(LayerTheory):
    def __init__(self, layer: ChannelPooling | BatchPooling, x: Tensor):
        super().__init__(layer, x)
        self.output_shape = layer(x).shape

    def own_noise(self, noise: float) -> float:
        return 0.0

    def carry_back(self, variance: Tensor) -> Tensor:
        return self.layer.inverse(variance)


class _BatchNorm(LayerTheory):
    ROUNDINGS = 4  # minus mean, times gain / s, and back: measured 2.8 to 4.5 at initialisation

    def __init__(self, layer: InvertibleBatchNorm2d, x: Tensor):
        super().__init__(layer, x)
        x = x.double()
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        gain, beta = layer.gain().detach().double(), layer.bias.detach()
        self.alpha = alpha_batchnorm(mean, variance, gain, beta, eps=layer.eps)
        self.noise_gains = ((variance + layer.eps) / gain.square()).view(1, -1, 1, 1)
        self.rounding = self.ROUNDINGS * self.once * x.square()

    def own_noise(self, noise: float) -> float:
        return self.ROUNDINGS * self.once

    def carry_back(self, variance: Tensor) -> Tensor:
        return variance * self.noise_gains + self.rounding


class _LeakyReLU(LayerTheory):
    ROUNDINGS = 2  # times n and by n, where x < 0; none if n is a power of two

    def __init__(self, layer: InvertibleLeakyReLU, x: Tensor):
        super().__init__(layer, x)
        x = x.double()
        self.negative = x < 0
        self.relative = 0.0 if math.frexp(layer.slope)[0] == 0.5 else self.ROUNDINGS * self.once
        self.rounding = self.relative * x.square()
        negative, share = x[self.negative].square().sum().item(), 1 - self.negative.double().mean().item()
        self.alpha = alpha_leakyrelu(share, self.energy - negative, negative, layer.slope)
        self.negative_energy_share = negative / self.energy

    def own_noise(self, noise: float) -> float:
        return self.relative * self.negative_energy_share

    def carry_back(self, variance: Tensor) -> Tensor:
        return torch.where(self.negative, variance / self.layer.slope**2 + self.rounding, variance)


class _Sums:
    """One convolution of a coupling, at its true source and result: every output is a sum of `terms` products."""

    def __init__(self, conv: nn.Conv2d, source: Tensor, result: Tensor, dtype: torch.dtype):
        self.padding, self.dtype, self.terms = conv.padding, dtype, conv.weight[0].numel()
        self.squares = conv.weight.detach().double().square()
        self.gain = conv_gain(conv, *source.shape[2:])
        self.source_energy, self.energy = source.square().sum().item(), result.square().sum().item()
        # Of independent products, and where they are: the rounding of a sum follows the size of its products.
        self.independent = F.conv2d(source.square(), self.squares, padding=self.padding)
        self.independent_energy = self.independent.sum().item()

    def again(self, noise: float) -> float:
        """Noise energy that recomputation adds, given the relative noise energy of the source."""
        share = self.independent_energy / self.energy
        return recomputed_sum_noise(self.terms, noise, self.dtype, share) * self.energy

    def carry(self, variance: Tensor) -> Tensor:
        """Variance of conv(noisy source) - conv(source), of that of the source: independent noises add up."""
        again = self.again(variance.sum().item() / self.source_energy)
        passed = F.conv2d(variance, self.squares, padding=self.padding)
        return passed + again / self.independent_energy * self.independent


class _CouplingConv(LayerTheory):
    ROUNDINGS = 2  # the sum and the difference; the convolutions' own sums come on top

    def __init__(self, layer: CouplingConv2d, x: Tensor):
        super().__init__(layer, x)
        y = layer(x).double()
        (x1, x2), (y1, y2) = x.double().chunk(2, dim=1), y.chunk(2, dim=1)
        self.f, self.g = (
            _Sums(cast(nn.Conv2d, layer.f), x2, y1 - x1, x.dtype),
            _Sums(cast(nn.Conv2d, layer.g), y1, y2 - x2, x.dtype),
        )
        noise_gain = noise_gain_coupling(self.f.gain, self.g.gain)
        self.alpha = alpha_of(self.energy, y.square().sum().item(), noise_gain)
        self.rounding = self.ROUNDINGS * self.once * x.double().square()

    def own_noise(self, noise: float) -> float:
        on_x2 = self.g.again(noise)
        on_x1 = self.f.again(noise) + self.f.gain * on_x2
        return self.ROUNDINGS * self.once + (on_x1 + on_x2) / self.energy

    def carry_back(self, variance: Tensor) -> Tensor:
        v1, v2 = variance.chunk(2, dim=1)
        v2 = v2 + self.g.carry(v1)
        v1 = v1 + self.f.carry(v2)
        return torch.cat([v1, v2], dim=1) + self.rounding


# the layers of a layer-wise network (section 4.1); a row for a layer to come
THEORY_OF = {
    InvertibleBatchNorm2d: _BatchNorm,
    InvertibleLeakyReLU: _LeakyReLU,
    CouplingConv2d: _CouplingConv,
    ChannelPooling: _Permutation,
    BatchPooling: _Permutation,
}


def read_chain(model: nn.Module, images: Tensor) -> dict[str, LayerTheory]:
    """The closed forms at the true activations of a layer-wise network in training mode.

    Args:
        model: one chain of the layers in THEORY_OF; not changed. Its `backward` mode does not
            matter. images: (B, 3, H, W), normalised, on the model's device.

    Returns layer name -> its theory, in forward order, with the names of `probe_snr`. Takes about three times the
    memory of all activations. Raises `RevtrainError` for a layer without a closed form, such as a coupling block.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, InvertibleChain):
            module.backward_mode = "invert"  # a storing chain shows its inputs to nobody
    names, reader = layer_names(model), _Reader()
    with torch.no_grad(), observe(model, reader):
        model(images)
    return {names[layer]: theory for layer, theory in reader.layers}


class _Reader:
    """The observer behind `read_chain`."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, LayerTheory]] = []

    def on_input(self, layer: nn.Module, x: Tensor) -> None:
        if type(layer) not in THEORY_OF:
            raise RevtrainError(
                f"{type(layer).__name__} has no closed form of its noise.\n"
                f"Expected a chain of: {', '.join(kind.__name__ for kind in THEORY_OF)}.\n"
                "`revtrain.numerics.snr.probe_snr` measures any chain."
            )
        self.layers.append((layer, THEORY_OF[type(layer)](layer, x.detach())))

    def on_reconstructed(self, layer: nn.Module, x: Tensor) -> None:
        """A forward pass rebuilds nothing."""


def predict_snr_db(model: nn.Module, images: Tensor, white: bool = True) -> dict[str, float]:
    """Theory's counterpart of `probe_snr`: SNR in dB of every rebuilt input, without inverting anything.

    Args:
        model, images: as for `read_chain`.
        white: True: the noise is taken as white at every layer and the alphas are composed (section 4.1). False: the
            variance of the noise of every single element is followed down the chain, so that a layer knows what the
            layers above it did to the noise. Correlation between elements is left out in both.

    Returns layer name -> dB in backward order, with the names of `probe_snr`. For streams of float32 or float64, not
    under autocast. Raises as `read_chain`.
    """
    layers = read_chain(model, images)
    if white:
        theory = layers.values()
        values = predict_chain_snr_db([each.alpha for each in theory], [each.own_noise for each in theory])
    else:
        values = _follow_variances(list(layers.values()))
    return dict(reversed(list(zip(layers, values, strict=True))))


def _follow_variances(layers: list[LayerTheory]) -> list[float]:
    """SNR in dB of the rebuilt input of each layer, first layer first."""
    last, values = layers[-1], []
    variance = torch.zeros(last.output_shape, dtype=torch.float64, device=last.device)
    for layer in reversed(layers):
        variance = layer.carry_back(variance)
        values.append(-decibels(variance.sum().item() / layer.energy))
    return values[::-1]


def _check_positive(name: str, value: float, meaning: str) -> None:
    if not value > 0:
        raise RevtrainError(f"{name}={value} is not positive.\nExpected a number above 0. {meaning}")
