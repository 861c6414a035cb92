"""What the method guarantees, in the method's order: the name of each test is its claim.

"eq." and "Algorithm" are those of MCM's paper. No network and no GPU is needed. What needs a GPU,
or ../shared (arrays that the authors' own code computed), is skipped where there is none. A few of
those numbers stand here, so that a clone guards itself.
"""
import argparse, collections, copy, hashlib, json, math, os, pickle, re, shlex, shutil, signal
import struct, sys, threading, zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch, torch.distributed.run
from PIL import Image

import ect, fid, mcm, sample, train_cifar
from fid import InputError
from mcm import alpha_sigma, cosine, edm, mean_per_sample, per_sample

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared/fixtures"
parametrize = pytest.mark.parametrize
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared is absent")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
torch.set_num_threads(1)                # for small tensors threads mostly wait for each other
train_cifar.DEVICE = torch.device("cpu")            # the tests that want a GPU say so

def close(actual, expected, rtol=1e-6, atol=1e-8):
    """torch.testing.assert_close, also for arrays, lists and numbers, compared in float64."""
    __tracebackhide__ = True
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64).broadcast_to(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)

def load(name):
    """A fixture's arrays, as tensors."""
    arrays = np.load(FIXTURES / name)
    return {key: torch.tensor(arrays[key]) for key in arrays if arrays[key].dtype.kind != "U"}

# ---- Schedules and steps -------------------------------------------------------------------------
# A schedule gives alpha and sigma at t. DDIM moves a noisy image from t to s with a guess x of the
# clean one. It must be right for a right guess, and invertible. aDDIM adds the variance that x
# lacks, and nothing else. All is computed sample by sample.

# The papers' symbols, for the tests of the first three sections. The times are all t > s >= t_step
# that are multiples of 1/16, and x and eps are data and noise, [816, 2, 3].
TIMES = (torch.combinations(torch.arange(18), 3) - torch.tensor([0, 1, 1])).double() / 16
t_step, s, t = TIMES.T.contiguous()
x, eps = randn(2, len(t), 2, 3)
on_both_schedules = parametrize("schedule", [cosine, edm])

def noisy(t, schedule=cosine):
    """x at t, on its straight path to eps."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    return alpha * x + sigma * eps

def stand_in(x, sigma, w=0.7):
    """The fixtures' stand-in for a network D(x, sigma). Here it also stands for any f(z, t)."""
    scale = per_sample((sigma**2 + 0.25).rsqrt(), x)
    out = torch.tanh(w * scale * x)
    return 0.25 * scale**2 * x + 0.5 * per_sample(sigma, x) * scale * out

def test_cosine_preserves_the_variance():
    alpha, sigma = cosine(torch.linspace(0, 1, 1001))
    close(alpha**2 + sigma**2, 1.0)

def test_the_noise_level_of_cosine_rises_from_0002_to_80():
    alpha, sigma = cosine(torch.linspace(0, 1, 10_001))
    ratio = sigma / alpha
    close(ratio[[0, -1]], [0.002, 80], rtol=1e-4)
    assert ratio.diff().min() > 0

@on_both_schedules
def test_ddim_with_the_true_image_stays_on_its_path(schedule):
    """Eq. (4)."""
    z_s = mcm.ddim(x, noisy(t, schedule), t, s, schedule)
    close(z_s, noisy(s, schedule))

@on_both_schedules
def test_inverse_ddim_finds_the_x_of_a_step(schedule):
    """Eq. (5)."""
    found = mcm.inv_ddim(noisy(s, schedule), noisy(t, schedule), t, s, schedule)
    close(found, x)

@on_both_schedules
def test_addim_is_ddim_if_no_variance_is_missing(schedule):
    z_s = mcm.addim(x, noisy(t, schedule), t, s, 0.0, schedule)
    close(z_s, noisy(s, schedule))

@on_both_schedules
def test_addim_lengthens_the_noise_by_the_missing_variance(schedule):
    """Algorithm 3 with eq. (14). Here t is also the variance that is missing."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, x)
    alpha_s, sigma_s = alpha_sigma(schedule, s, x)
    missing = (alpha_s - alpha_t * sigma_s / sigma_t).flatten() ** 2 * t
    before = mean_per_sample((sigma_s * eps) ** 2)
    noise = mcm.addim(x, noisy(t, schedule), t, s, t, schedule) - alpha_s * x
    close(mean_per_sample(noise**2), before + missing)

def test_addim_is_finite_where_there_is_no_noise():
    alpha, sigma = alpha_sigma(cosine, t, x)
    assert mcm.addim(x, alpha * x, t, s, 1.0).isfinite().all()

def test_a_batch_of_two_is_two_batches_of_one():
    def run(rows):
        part = [value[rows] for value in (x, eps, t, s, t_step)]
        mcd = mcm.consistency_loss(stand_in, *part, teacher=gaussian)
        segmented = ect.ect_loss(stand_in, *part[:3], 1, c=0.06, edges=ect.segment_edges(3))
        return torch.stack([mcd, segmented])
    close(run([100, 700]), torch.cat([run([100]), run([700])], 1), rtol=1e-12)

def test_a_batch_may_be_empty():
    assert mean_per_sample(torch.zeros(0, 3, 8, 8)).shape == (0,)

def test_times_are_exact_for_images_in_bfloat16():
    """In bfloat16, cosine's last noise level would be 62."""
    alpha, sigma = alpha_sigma(cosine, 1.0, torch.zeros(2, 3).bfloat16())
    close(sigma / alpha, 80.0, rtol=1e-4)

# ---- Times and the loss --------------------------------------------------------------------------
# A segment has n whole teacher steps. t is the upper end of one of them, s its lower end. f must
# learn the x that jumps from z_t to where the reference's jump from z_s ends, at t_step. At the
# edge this is the data itself, with one segment a consistency model, with n = 1 a diffusion model.

def test_teacher_steps_grow_log_linearly():
    T = [mcm.teacher_steps(i) for i in (-1, 0, 50_000, 200_000)]
    close(T, [64, 64, (64 * 1280) ** 0.5, 1280])

@parametrize("N, T, n", [(1, 24, 24), (2, 25, 12), (8, 22, 3), (8, 3, 1)])
def test_every_teacher_step_of_every_segment_is_drawn(N, T, n):
    """And where s is an edge, it is t_step to the last bit."""
    k = torch.arange(N * n)
    u = torch.stack([(k // n) / N, (k % n) / n]) + 1e-4
    u[:, 0] = 0
    t, s, t_step = mcm.draw_times(N * n, torch.full_like(k, N), T, u=u)
    close(t * N * n, k + 1)
    close(s * N * n, k)
    close(t_step * N, k // n)
    assert s.eq(t_step).equal(k % n == 0)

def test_times_do_not_depend_on_the_default_dtype():
    """In bfloat16, s would often be t."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        t, s, t_step = mcm.draw_times(1000, 2, 1280)
        sigma = ect.draw_t(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (s < t).all()
    assert sigma.dtype == torch.float32

@parametrize("N, T", [(1, 8192), (3, 64), (8, 1280), (64, 8192)])
def test_the_network_is_told_the_segment_that_its_time_was_drawn_in(N, T):
    """Also where t is the segment's upper edge, and the noise level is rounded up."""
    t, s, t_step = mcm.draw_times(10_000, N, T)
    alpha, sigma = cosine(t)
    segment = mcm.segment_of(1.000001 * sigma / alpha, N)
    assert segment.equal((t_step * N).round().long())

def test_a_row_stands_for_the_number_of_segments_and_the_segment():
    """N = 1 has row 0, N = 2 has 1 and 2, N = 3 has 3 to 5."""
    assert mcm.segment_row(torch.tensor([0.0, 1.0, 1e9]), 3).tolist() == [3, 4, 5]

def test_f_is_the_denoiser_at_the_same_noise_level():
    alpha, sigma = alpha_sigma(cosine, t, x)
    f = mcm.make_f(stand_in)
    close(f(eps, t), stand_in(eps / alpha, (sigma / alpha).flatten()))

@on_both_schedules
def test_at_the_edge_the_target_is_the_data(schedule):
    """Eq. (8): what a diffusion model learns."""
    z_t, z_s = noisy(t, schedule), noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, s, schedule)
    close(target, x)

@on_both_schedules
def test_above_the_edge_the_target_lands_where_the_reference_lands(schedule):
    above = s > t_step
    z_t, z_s = noisy(t, schedule), noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, t_step, schedule)
    landed = mcm.ddim(target, z_t, t, t_step, schedule)
    reference = mcm.ddim(stand_in(z_s, s), z_s, s, t_step, schedule)
    close(landed[above], reference[above])

def test_with_one_segment_the_target_is_that_of_a_consistency_model():
    """Song et al.: f at s, on the same path."""
    z_t, z_s = noisy(t, edm), noisy(s, edm)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, 0 * t, edm)
    close(target[s > 0], stand_in(z_s, s)[s > 0])

def test_with_as_many_segments_as_teacher_steps_it_is_a_diffusion_model():
    t, s, t_step = mcm.draw_times(1000, 8, 8)
    assert s.equal(t_step)

@on_both_schedules
def test_the_loss_is_a_norm_with_snr_plus_1_as_weight(schedule):
    alpha, sigma = alpha_sigma(schedule, t, x)
    error = stand_in(noisy(t, schedule), t) - x
    square = mean_per_sample(error**2 * (alpha**2 / sigma**2 + 1))
    loss = mcm.consistency_loss(stand_in, x, eps, t, s, s, schedule, huber_eps=0.1)
    close(loss, (square + 0.1**2) ** 0.5 - 0.1)

def test_the_norm_has_a_slope_of_0_at_0():
    zero = torch.zeros(1, requires_grad=True)
    mcm.pseudo_huber(zero**2, 0.0).sum().backward()
    assert zero.grad == 0

def test_only_f_at_t_has_a_gradient():
    """So the slope is that of a loss whose reference is held fixed."""
    def loss(w, **more):
        f = mcm.conditioned(stand_in, w=w)
        return mcm.consistency_loss(f, x, eps, t, s, t_step, **more).sum()
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    rise = loss(0.7 + 1e-6, f_ref=stand_in) - loss(0.7 - 1e-6, f_ref=stand_in)
    close(torch.autograd.grad(loss(w), w)[0], rise / 2e-6)

def asked_of_f(**more):
    """What a loss asks of f: (z, time, whether gradients are on) of each call."""
    asked = []
    def f(z, time):
        asked.append((z, time, torch.is_grad_enabled()))
        return stand_in(z, time)
    mcm.consistency_loss(f, x, eps, t, s, t_step, **more)
    return asked

def test_f_is_asked_at_s_without_gradient_then_at_t_with():
    """And never at time 0, where a network would take the logarithm of 0."""
    (z_s, at_s, gradient_at_s), (z_t, at_t, gradient_at_t) = asked_of_f()
    close(at_s, torch.where(s > t_step, s, t), rtol=0, atol=0)
    close(at_t, t, rtol=0, atol=0)
    assert [gradient_at_s, gradient_at_t] == [False, True]

def test_a_teacher_steps_with_three_quarters_of_its_squared_error():
    """And without gradient."""
    def teacher(z, t):
        assert not torch.is_grad_enabled()
        return stand_in(z, t)
    z_s = asked_of_f(teacher=teacher)[0][0]
    x_hat = stand_in(noisy(t), t)
    x_var = 0.75 * mean_per_sample((x_hat - x) ** 2)
    close(z_s, mcm.addim(x_hat, noisy(t), t, s, x_var))

def test_a_guided_teacher_takes_the_variance_from_its_unguided_guess():
    z_s = asked_of_f(teacher=mcm.guided(stand_in, gaussian, weight=2.0))[0][0]
    x_hat = stand_in(noisy(t), t)
    x_var = 0.75 * mean_per_sample((x_hat - x) ** 2)
    x_guided = 3 * x_hat - 2 * gaussian(noisy(t), t)
    close(z_s, mcm.addim(x_guided, noisy(t), t, s, x_var))

def gaussian(x, sigma, variance=0.3):
    """The exact denoiser D(x, sigma) of Gaussian data."""
    return x * per_sample(variance / (variance + sigma**2), x)

# ---- ECT -----------------------------------------------------------------------------------------
# r follows t by a fixed map, which tightens stage by stage. The loss is a norm of the difference of
# the guesses at t and r, over t - r. It must be the authors' where theirs is finite, and finite
# everywhere. In segments (ours), r stops at the edge, and one segment is ECT.

def test_r_is_that_of_the_authors():
    sigma = torch.tensor([0.198757457, 1.15992856, 6.76922660]).double()
    close(ect.t_to_r(sigma, 0), [0, 0, 3.3535489], rtol=1e-7)
    close(ect.t_to_r(sigma, 3), [0.14156763, 0.94900700, 6.3422669], rtol=1e-7)
    close(ect.t_to_r(sigma, 0, q=256), [0.19518309, 1.1467460, 6.7425416], rtol=1e-7)

def test_ects_loss_is_its_formula():
    n = 1 + 5 / (1 + (2 * t).exp())
    r = t * (1 - n / 3**2)
    difference = stand_in(noisy(t, edm), t) - stand_in(noisy(r, edm), r)
    square = (difference**2).flatten(1).sum(1)
    loss = ect.ect_loss(stand_in, x, eps, t, stage=1, q=3, k=5, b=2, c=0.06)
    close(loss, ((square + 0.06**2) ** 0.5 - 0.06) / (t - r))

@needs_fixtures
@parametrize("q, stage, c", [(2, 0, "0"), (2, 8, "0.06"), (4, 3, "0.06"), (256, 1, "0")])
def test_ects_loss_is_the_authors(q, stage, c):
    data = load("ect_loss_standin.npz")
    images, noise, sigma = [data[name].double() for name in ("x", "eps", "t_f64")]
    loss = ect.ect_loss(stand_in, images, noise, sigma, stage, q, c=float(c))
    close(loss, data[f"loss_q{q}_sigmoid_s{stage}_c{c}_f64"], rtol=1e-9)

def test_the_weight_is_over_the_very_r_that_the_network_sees():
    """D = ln sigma, so the loss is (ln t - ln r) / (t - r), which is 1 / t for a small t - r."""
    sigma = torch.linspace(0.01, 80, 1000)
    zero = torch.zeros(1000, 1)
    loss = ect.ect_loss(lambda x, sigma: sigma.double().log()[:, None], zero, zero, sigma, 15)
    close(loss * sigma, 1.0, rtol=1e-4)

def test_ects_loss_is_finite_where_r_rounds_to_t():
    loss = ect.ect_loss(stand_in, x.float(), eps.float(), t.float(), stage=7, q=256)
    assert loss.isfinite().all()

def test_where_r_is_0_ects_target_is_the_data():
    loss = ect.ect_loss(stand_in, x, eps, t, stage=0, b=0)      # n = 5, and q = 2
    close(loss * t, (stand_in(noisy(t, edm), t) - x).flatten(1).norm(dim=1))

def test_ects_segments_are_equal_in_cosines_time():
    alpha, sigma = cosine(torch.tensor([0.25, 0.5, 0.75]))
    close(ect.segment_edges(4), sigma / alpha)

def test_in_segments_the_places_where_the_guesses_land_are_compared():
    edges = ect.segment_edges(4).double()
    edge = torch.cat([torch.zeros(1), edges])[torch.searchsorted(edges, t)]
    r = edge.maximum(ect.t_to_r(t, 3))
    landed = []
    for sigma in (t, r):
        z = noisy(sigma, edm)
        landed.append(mcm.ddim(stand_in(z, sigma), z, sigma, edge, edm))
    distance = (landed[0] - landed[1]).flatten(1).norm(dim=1)
    loss = ect.ect_loss(stand_in, x, eps, t, 3, edges=edges)
    close(loss, distance / (t - r))

def test_just_above_an_edge_ects_loss_is_bounded():
    """Though its weight 1 / (t - r) is not."""
    edges = ect.segment_edges(4).double()
    sigma = edges[0] * (1 + 10 ** (-11 * t - 1))
    assert ect.ect_loss(stand_in, x, eps, sigma, 3, edges=edges).max() < 50

# ---- Samplers ------------------------------------------------------------------------------------
# With an exact network a sampler must reach the right images: in one jump, or with its order of
# accuracy. It asks at the right noise levels, in the noise's dtype, and an image depends on its
# seed and number alone.

def gaussian_jump(x, sigma, segment, N, variance=0.3):
    """Its consistency function: a jump ends where the flow ends, x ~ (variance + sigma^2)^1/2."""
    alpha, edge = cosine((segment.double() - N * (N - 1) // 2) / N)
    edge = edge / alpha
    shrink = ((variance + edge**2) / (variance + sigma**2)) ** 0.5
    return mcm.inv_ddim(x * per_sample(shrink, x), x, sigma, edge, edm)

@parametrize("N", [1, 2, 4])
def test_multistep_with_the_exact_f_makes_the_data(N):
    """Algorithm 2."""
    z = randn(1000, 3)
    f = mcm.make_f(gaussian_jump, steps=N, N=N)
    close(sample.multistep(f, z, N), 0.3**0.5 * z, rtol=1e-4)

def stable_diffusion(timestep):
    """The schedule of a network with alphas of its own: its timesteps 0 .. 1000 as t in [0, 1]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2
    alphas_cumprod = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])
    square = alphas_cumprod[(timestep * 1000).round().long()]
    return square.sqrt(), (1 - square).sqrt()

@parametrize("N", [1, 2, 8])
def test_ddim_on_stable_diffusions_alphas_keeps_what_its_closed_form_says(N):
    """An exact network that predicts the noise of Gaussian data with variance 0.3."""
    def f(z, t):
        alpha, sigma = alpha_sigma(stable_diffusion, t, z)
        predicted_noise = sigma * z / (0.3 * alpha**2 + sigma**2)
        return (z - sigma * predicted_noise) / alpha
    alpha, sigma = stable_diffusion(torch.arange(N, -1, -1) / N)
    spread = 0.3 * alpha**2 + sigma**2
    kept = (0.3 * alpha[:-1] * alpha[1:] + sigma[:-1] * sigma[1:]) / spread[:-1]
    z = randn(100, 4)
    close(sample.multistep(f, z, N, stable_diffusion), kept.prod() * z, rtol=1e-5)

def test_addim_keeps_a_small_variance_ten_times_better_than_ddim():
    """With the exact posterior variance, of Gaussian data of variance 1e-4."""
    z = randn(64, 10_000)
    f = mcm.make_f(gaussian, variance=1e-4)
    def posterior(alpha, sigma):
        return 1e-4 * sigma**2 / (alpha**2 * 1e-4 + sigma**2)
    right = 1e-4 + mcm.SIGMA_MIN**2
    error = sample.addim(f, z, 8, posterior).var() - right
    assert abs(error) < 0.1 * abs(sample.multistep(f, z, 8).var() - right)

def test_addims_variance_is_the_papers():
    close(sample.paper_x_var(torch.tensor(2.0), 1.0), 0.1 / 6)

def test_heun_is_of_second_order():
    z = randn(100)
    truth = 80 * (0.3 / (0.3 + 80**2)) ** 0.5 * z
    errors = [abs(sample.heun(gaussian, z, steps) - truth).max() for steps in (32, 64, 128)]
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5

def test_renoise_makes_the_authors_images():
    """Three numbers of locuslab/ect's generator, in three steps."""
    latents = torch.tensor([[0.33209962, 0.6448609, 0.01571346]]).double()
    noise = torch.tensor([[[0.85046473, -0.04251268, 0.72315282]],
                          [[-0.12100735, -0.21589041, 0.46453619]]])
    made = sample.renoise(stand_in, latents, [80, 5, 0.821], noise)
    close(made, [[0.12394429, -0.10272411, 0.36355834]])

class Recorder(torch.nn.Module):
    """A network that guesses x / 1000, with label 1 twice that, and notes what it is asked."""
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.001))
        self.image_shape = (3, 4, 4)
        self.sigmas, self.segments, self.dtypes = [], [], set()

    def forward(self, x, sigma, labels=None, segment=None):
        self.sigmas.append(sigma[0].item())
        self.dtypes.add(x.dtype)
        if segment is not None:
            self.segments.append(segment[0].item())
        if labels is not None:
            x = x * per_sample(1 + labels, x)
        return self.weight.to(x) * x

@parametrize("sampler, steps, sigmas, segments", [
    ("multistep", 2, [80, 1], [2, 1]),
    ("ddim", 2, [80, 1], []),
    ("renoise", 1, [80], [0]),
    ("renoise", 2, [80, 0.821], [0, 0]),
    ("renoise", 3, [80, 3**0.5, 3**-0.5], [0, 0, 0]),
    ("heun", 3, [80, 2.515, 2.515, 0.002, 0.002], [])])
def test_a_sampler_asks_at_these_noise_levels_and_segments(sampler, steps, sigmas, segments):
    net = Recorder()
    sample.sample_batch(net, sampler, steps, randn(3, 2, 3, 4, 4))
    close(net.sigmas, sigmas, rtol=0.02)
    assert net.segments == segments

@parametrize("dtype", [torch.float64, torch.float32])
@parametrize("sampler", ["multistep", "ddim", "renoise", "heun"])
def test_the_network_and_the_result_have_the_noises_dtype(sampler, dtype):
    net = Recorder()
    images = sample.sample_batch(net, sampler, 2, randn(2, 2, 3, 4, 4).to(dtype))
    assert net.dtypes == {images.dtype} == {dtype}

def test_an_unknown_sampler_is_an_error():
    with pytest.raises(ValueError, match="euler"):
        sample.sample_batch(Recorder(), "euler", 2, randn(1, 2, 3, 4, 4))

def test_the_number_of_steps_may_be_numpys():
    z = randn(5, 3)
    assert sample.multistep(stand_in, z, np.int64(4)).equal(sample.multistep(stand_in, z, 4))

def generated(numbers, sampler="ddim", seed=0, labels=None):
    return sample.generate(Recorder(), sampler, 2, torch.tensor(numbers), seed, labels)

def test_an_image_depends_on_its_seed_and_number_alone():
    """Not on the batch that it is made in: 60 images are two batches."""
    images = generated(range(60))
    assert generated([55, 3]).equal(images[[55, 3]])
    assert generated([3], seed=1).ne(images[3]).any()
    assert len(images.unique(dim=0)) == 60

@parametrize("sampler", ["multistep", "ddim", "renoise", "heun"])
def test_each_image_is_made_with_its_own_label(sampler):
    labels = torch.arange(60) == 55
    changed = generated(range(60), sampler, labels=0 * labels)
    changed = changed.ne(generated(range(60), sampler, labels=1 * labels))
    assert changed.flatten(1).any(1).equal(labels)

def test_images_are_rounded_to_grey_levels(monkeypatch):
    x = torch.linspace(-1.5, 1.5, 48).view(1, 3, 4, 4)
    monkeypatch.setattr(sample, "sample_batch", lambda *given: x)
    close(generated([0]), (127.5 + 127.5 * x).clamp(0, 255), rtol=0, atol=0.5)

# ---- The network ---------------------------------------------------------------------------------
# It is EDM's to the last key, so that the published weights give the published denoiser. What is
# new in it begins without effect. Both passes of an iteration have the same dropout mask.

def give_weights(net):
    """By the fixtures' rule for Inception, which will do for EDM's network: drawn by their keys."""
    state = net.requires_grad_(False).state_dict()
    for key, value in state.items():
        rng = np.random.default_rng([11, zlib.crc32(key.encode())])
        if re.search(r"(bn|norm\d?)\.weight|running_var", key):
            drawn = rng.uniform(0.5, 1.5, value.shape)
        elif value.ndim > 1:
            drawn = rng.standard_normal(value.shape) * (2 / value[0].numel()) ** 0.5
        else:
            drawn = rng.standard_normal(value.shape) * 0.1
        if "resample_filter" not in key:
            value.copy_(torch.as_tensor(drawn))
    return net

def small_net(**more):
    size = {"resolution": 8, "attention": (), **more}
    return give_weights(train_cifar.UNet(16, (1,), 1, **size))

def test_the_network_is_edms_in_a_few_numbers():
    """Computed when it gave all of the fixtures' numbers, see the next test."""
    images = torch.arange(6144).double().sin().view(2, 3, 32, 32)
    net = give_weights(train_cifar.UNet(32, classes=10))
    x_hat = net(images, torch.tensor([0.3, 5.0]), torch.tensor([3, -1]))
    close(x_hat[:, 0, 5, 5:9], [[0.879199, 0.620031, -0.038088, -0.380589],
                                 [0.224672, 1.059486, 0.830963, 0.658010]], rtol=0, atol=1e-4)

@needs_fixtures
@parametrize("kind, classes", [("uncond", 0), ("cond", 10)])
def test_the_network_is_edms(kind, classes):
    io = load(f"edm_{kind}_ch32_io.npz")
    net = train_cifar.UNet(32, classes=classes, augment_dim=9).requires_grad_(False)
    net.load_state_dict(load(f"edm_{kind}_ch32_state.npz"))
    labels = io["class_labels"].argmax(1) if classes else None
    raw = net.model(io["x"] * per_sample((io["sigma"] ** 2 + 0.25).rsqrt(), io["x"]),
                    io["sigma"].log() / 4, labels)
    close(raw, io["F"], rtol=0, atol=3e-5)

def test_the_network_is_as_large_as_edms():
    with torch.device("meta"):
        net = train_cifar.UNet(augment_dim=9)
    assert sum(weight.numel() for weight in net.parameters()) == 55_733_891
    assert len(net.state_dict()) == 425

@parametrize("channels, groups", [(32, 8), (96, 24), (128, 32), (512, 32)])
def test_a_group_has_4_channels_or_more_and_there_are_32_at_most(channels, groups):
    assert train_cifar.group_norm(channels).num_groups == groups

def test_the_norm_adds_1e_6_to_the_variance():
    ramp = torch.tensor([-1e-3, 1e-3]).expand(1, 16, 2)
    close(train_cifar.group_norm(16)(ramp), ramp / 2e-6**0.5, rtol=1e-4)

def test_new_embeddings_begin_with_zeros():
    """Of labels and segments, so that they can be added to a trained network."""
    model = train_cifar.UNet(16, (1,), 1, 8, classes=3, segments=3).model
    assert not model.map_segment.weight.any()
    assert not model.map_label.weight.any()

def test_the_label_minus_1_is_no_label():
    net, x = small_net(classes=3), randn(2, 3, 8, 8)
    assert net(x, 1.0, torch.tensor([-1, -1])).equal(net(x, 1.0))

def test_the_segment_matters():
    net, x = small_net(segments=3), randn(1, 3, 8, 8)
    assert net(x, 1.0, segment=torch.tensor([0])).ne(net(x, 1.0, segment=torch.tensor([2]))).any()

@parametrize("device, backend", [        # inductor is slow on a CPU
    ("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=needs_gpu)])
def test_the_dropout_mask_is_a_function_of_the_seed(device, backend):
    """Compiled or not, alone or in a batch."""
    net, x = small_net(dropout=0.5).to(device), randn(2, 3, 8, 8).to(device)
    compiled = torch.compile(net, backend=backend)
    seed = torch.tensor([5, 6], device=device)
    once = compiled(x, 1.0, seed=seed)
    assert once.equal(compiled(x, 1.0, seed=seed))
    assert once.ne(compiled(x, 1.0, seed=seed + 1)).any()
    close(once[1:], net(x[1:], 1.0, seed=seed[1:]), atol=1e-3)

def test_each_block_has_a_dropout_mask_of_its_own():
    layers = [part.layer for part in small_net().modules() if hasattr(part, "layer")]
    assert layers == list(range(len(layers)))

def test_dropout_masks_are_fair_and_unlike_each_other():
    """Of 32 samples in 2 layers."""
    ones = torch.ones(32, 4, 32, 32)
    layers = [train_cifar.dropout(ones, 0.2, torch.arange(32), layer) for layer in (3, 4)]
    kept = torch.cat(layers).flatten(1)
    assert kept.unique().tolist() == [0.0, 1.25]
    close(kept.mean(1), 1.0, atol=0.03)
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.08

@needs_gpu
def test_half_precision_is_near():
    net, x = small_net().cuda(), randn(2, 3, 8, 8).cuda()
    right = net(x, 1.0)
    net.fp16 = True
    assert 0 < (net(x, 1.0) - right).abs().max() < 0.05

# ---- One iteration -------------------------------------------------------------------------------
# What it draws depends on (seed, method, iteration) alone. The loss is the one that the settings
# name. It compiles once, mixes no devices, and does not wait for the GPU.

def settings_of(line):
    return train_cifar.read_settings(argparse.ArgumentParser(), line.split())

class Iterations:
    """The iterations of train_cifar.train, small, on any device."""
    def __init__(self, line, device="cpu"):
        self.settings = settings_of("--preset shapes --batch 8 --iters 10 --stages 4 " + line)
        self.method, self.device = self.settings.method, torch.device(device)
        images, labels, names = train_cifar.shapes(64, 16)
        if not self.settings.classes:
            names = []
        self.data = SimpleNamespace(images=images, labels=labels, class_names=names)
        with self.device:
            self.net = small_net(resolution=16, classes=len(names), segments=15, dropout=0.1)
        self.teacher = copy.deepcopy(self.net)
        self.net.requires_grad_(True)

    def draw(self, step, **changes):
        settings = SimpleNamespace(**{**vars(self.settings), **changes})
        drawn = train_cifar.draw(self.data, settings, self.method, step)
        return {name: value.to(self.device) for name, value in drawn.items()}

    def run(self, step, loss_of=train_cifar.step_loss, **changes):
        drawn = {**self.draw(step), **changes}
        loss = loss_of(self.net, self.teacher, self.settings, self.method, **drawn)
        loss.mean().backward()
        return loss

each_method = parametrize("line", [
    "--method diffusion --classes", "--method mct --steps 1 2 4 --no-classes",
    "--method mcd", "--method ect", "--method ect-segmented --steps 4"])

def test_each_iteration_draws_its_own_noise():
    """From (seed, method, iteration) alone."""
    its = Iterations("--seed 5")
    draws = [its.draw(3), its.draw(3), its.draw(4), its.draw(3, seed=6),
             Iterations("--seed 5 --method diffusion").draw(3)]
    assert len({drawn["eps"].sum().item() for drawn in draws}) == 4

def test_one_label_in_ten_is_dropped():
    drawn = Iterations("--classes").draw(0, batch=9000)
    close(drawn["labels"].eq(-1).float().mean(), 0.1, atol=0.01)

def test_mcm_draws_each_number_of_steps_and_T_that_grows_until_mid_run():
    its = Iterations("--steps 1 4 --T 8 64")
    for step, T in [(0, 8), (5, 64), (9, 64)]:
        drawn = its.draw(step, batch=9000)
        close(drawn["t"].unique() * T, torch.arange(T) + 1)
    assert drawn["N"].unique().tolist() == [1, 4]

def test_ect_draws_log_normal_times_and_the_stage():
    its = Iterations("--method ect --p-mean -1 --p-std 0.5")
    assert [its.draw(step)["stage"][0].item() for step in (0, 2, 3, 9)] == [0, 0, 1, 3]
    times = its.draw(0, batch=9000)["t"].log()
    close(torch.stack(torch.std_mean(times)), [0.5, -1], atol=0.02)

def right_loss(its, x, eps, seed, t, labels=None, stage=None, N=None, s=None, t_step=None):
    """What step_loss should be, without dropout."""
    x = x / 127.5 - 1
    f = mcm.make_f(its.net, steps=N, labels=labels)
    if its.method == "diffusion":
        return mcm.consistency_loss(f, x, eps, t, 0 * t, 0 * t, huber_eps=1.0)
    if "ect" in its.method:                         # one segment is ECT itself
        N = 4 if "segmented" in its.method else 1
        D = mcm.conditioned(its.net, N, labels=labels)
        return ect.ect_loss(D, x, eps, t, stage, 3, c=7, edges=ect.segment_edges(N))
    teacher = None
    if its.method == "mcd":
        teacher = mcm.make_f(its.teacher, labels=labels)
    return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=teacher, huber_eps=0.3)

@each_method
def test_the_loss_is_the_one_that_the_settings_name(line):
    its = Iterations(line + " --q 3 --c 7 --huber-eps 0.3")
    its.teacher.model.map_layer0.bias += 1
    close(its.run(3, seed=None), right_loss(its, **its.draw(3)), rtol=1e-4, atol=1e-5)

@each_method
def test_an_iteration_mixes_no_devices_and_reads_no_value(line):
    """On the meta device a CPU tensor, an .item() or a shape that depends on data raises."""
    Iterations(line, "meta").run(0)

@parametrize("line", ["--method mct --steps 1 2 4", "--method ect-segmented --steps 4"])
def test_iterations_compile_once(line):
    """Each has another T and stage. A number that changes would compile again."""
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    its = Iterations(line)
    compiled = torch.compile(train_cifar.step_loss, fullgraph=True, backend=backend)
    for step in (0, 3, 6, 9):
        its.run(step, compiled)
    assert len(graphs) == 1

@needs_gpu
@each_method
def test_an_iteration_does_not_wait_for_the_gpu(line):
    its = Iterations(line + " --precision fp16", "cuda")
    its.data.images, its.data.labels = its.data.images.cuda(), its.data.labels.cuda()
    its.run(0)                                      # the first one may load kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        its.run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")

# ---- FID -----------------------------------------------------------------------------------------
# A published FID has the Inception graph of 2015, TensorFlow 1's resize, the unbiased covariance
# and n = 50,000. Each must be right to the digit, whatever precision the host has set. Images are
# read as they are: all that is in a folder, nothing else, and what cannot be used is named.

def test_tensorflow_reads_at_i_times_size_over_299():
    """On a ramp, whose last pixel is repeated."""
    ramp = torch.arange(32.0).expand(1, 3, 16, 32)
    places = (torch.arange(299) * 32 / 299).clamp(max=31)
    close(fid.resize_tf1(ramp), places, atol=1e-4)
    close(fid.resize_tf1(ramp.mT), places[:, None], atol=1e-4)

def test_the_resize_is_tensorflows_in_a_few_numbers():
    """Those of torch-fidelity, at the lower right corner of an image."""
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 30:, 30:] = torch.tensor([[97, 117], [107, 108]])
    resized = fid.resize_tf1(image)[0, 0]
    close(resized[[287, 287, 292], [287, 293, 292]], [108.738754, 110.558525, 108], atol=2e-3)

def test_inception_is_the_published_one_in_a_few_numbers():
    """Computed when it gave all of the fixtures' numbers. Folding BatchNorm changes nothing."""
    image = (torch.arange(3072) * 37 % 256).byte().view(1, 3, 32, 32)
    net = give_weights(fid.InceptionFID())
    features = net(image)
    close(net.fold()(image), features, rtol=0, atol=5e-4)
    right = [0.062889, 0.108475, 0.145055, 7.567828, 5.975063, 0.026454]
    close(features[0, ::400], right, rtol=0, atol=5e-4)

@needs_fixtures
def test_inception_is_the_published_one():
    data = load("fid_inception.npz")
    features = give_weights(fid.InceptionFID())(data["img64x48"])
    close(features, data["tfid_img64x48_2048"], rtol=0, atol=5e-4)

def test_random_features_are_these():
    """All distances in the README depend on them."""
    image = (torch.arange(3072) * 37 % 256).byte().view(1, 3, 32, 32)
    features = fid.random_features(image)[0, [0, 23, 35]]
    close(features, [-0.01568627, -21.32518, -15.98173], rtol=1e-5)

def test_frechet_distance_of_independent_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    s1, s2, m = randn(3, 20).abs()
    distance = fid.frechet_distance(0 * m, s1.square().diag(), m, s2.square().diag())
    close(distance, (m**2 + (s1 - s2) ** 2).sum())

def test_frechet_distance_is_that_of_scipys_matrix_root():
    one, other = randn(2, 30, 8) * torch.arange(1, 9)
    (mean1, cov1), (mean2, cov2) = fid.moments(one), fid.moments(other.roll(1, 1))
    root = torch.tensor(scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real)
    right = (mean1 - mean2).square().sum() + (cov1 + cov2 - 2 * root).trace()
    close(fid.frechet_distance(mean1, cov1, mean2, cov2), right)

def test_frechet_distance_of_fewer_images_than_features():
    mean, cov = fid.moments(randn(20, 50))
    close(fid.frechet_distance(mean, cov, mean + 3, cov), 50 * 3**2)

def test_moments_are_numpys_with_a_large_mean():
    features = randn(300, 5).float() + 1e4
    mean, cov = fid.moments(features)
    close(mean, features.double().numpy().mean(0), rtol=1e-12)
    close(cov, np.cov(features.double().numpy().T), rtol=1e-9)

def test_the_floor_is_the_distance_of_n_real_images_from_n_others():
    features = randn(100, 3)
    one, other = features[fid.shuffled(100)[:20]].split(10)
    right = fid.frechet_distance(*fid.moments(one), *fid.moments(other))
    close(fid.floor_of(features, 10), right)

@parametrize("features, n, name", [
    ("inception", 50_000, "FID"), ("inception", 49_999, "FD(inception)@49999"),
    ("random", 50_000, "FD(random)@50000")])
def test_only_what_papers_call_fid_is_called_so(features, n, name):
    assert fid.metric_name(features, n) == name

def test_features_are_those_of_the_rows_asked_for(monkeypatch):
    """In batches, and where a notebook has no stderr."""
    monkeypatch.setattr(sys, "stderr", None)
    images, rows = randn(100, 3, 2, 2), torch.arange(90, 10, -1)
    features = fid.features_of(images, lambda batch: batch.flatten(1), rows)
    assert features.equal(images[rows].flatten(1))

def picture(path, red=0, size=(16, 16), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, red).save(path)

def red(folder):
    """The upper left pixels of the images in a folder."""
    images = fid.read_images(str(folder))[0]
    return fid.features_of(images, lambda batch: batch[:, 0, 0, :1]).flatten().tolist()

def test_a_folder_is_read_whole_and_nothing_else(tmp_path, capsys):
    """Each folder is a class. Hidden ones are passed over, links followed, but not in circles."""
    names = ["cat/.checkpoints/1.png", "__MACOSX/2.png", "cat/3.png", "dog/4.gif", "dog/5.jfif"]
    for i, name in enumerate(names):
        picture(tmp_path / "data" / name, 50 * i)
    picture(tmp_path / "other/6.PNG", 250)
    (tmp_path / "data/link").symlink_to(tmp_path / "other")
    (tmp_path / "other/circle").symlink_to(tmp_path / "data")
    (tmp_path / "data/notes.txt").write_text("no image")
    images, labels, classes = fid.read_images(str(tmp_path / "data"))
    assert classes == ["cat", "dog", "link"]
    assert labels.tolist() == [0, 1, 1, 2]
    assert red(tmp_path / "data") == [100, 150, 200, 250]
    assert "1 files are no images" in capsys.readouterr().out

@parametrize("name, size, mode", [("larger.png", 32, "L"), ("deep.png", 16, "I;16")])
def test_an_image_that_cannot_be_used_is_named(name, size, mode, tmp_path):
    picture(tmp_path / "0.png")
    picture(tmp_path / name, 0, (size, size), mode)
    with pytest.raises(InputError, match=name):
        red(tmp_path)

def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")
    monkeypatch.setattr(Image, "open", Mock(side_effect=struct.error("bad metadata")))
    with pytest.raises(InputError, match="0.png.*bad metadata"):
        red(tmp_path)

@parametrize("content", [b"stihgew", b"weig"], ids=["wrong", "cut off"])
def test_a_bad_download_is_named_with_its_address_and_not_kept(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    source, right = tmp_path / "file.pth", hashlib.sha256(b"weights").hexdigest()
    source.write_bytes(content)
    with pytest.raises(InputError, match=f"file.pth.*{source.as_uri()}"):
        fid.download(source.as_uri(), right)
    source.write_bytes(b"weights")
    assert fid.download(source.as_uri(), right).read_bytes() == b"weights"

# ---- EDM's files ---------------------------------------------------------------------------------
# They are pickles: programs. Genuine ones load to the bit, only as what they say they are. Of any
# other, nothing may run, and one line says which file it was.

def asks(function, *given):
    """An object that, pickled, asks that function(*given) be called."""
    return SimpleNamespace(__reduce_ex__=lambda protocol: (function, given))

def edm_pickle(offset=0, name="EDMPrecond", sigma_data=0.5, **changes):
    """A file like EDM's, with one convolution, and with source code that must not run."""
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {}, **state}
        return asks(print, dict(module_src="open('PWNED', 'w')", class_name=name, state=state))
    storage = torch.arange(576.)._typed_storage()
    weight = asks(torch._utils._rebuild_tensor_v2, storage, offset, (8, 8, 3, 3), (72, 9, 3, 1),
                  False, {})
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    given = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0, img_resolution=8)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs={**given, **changes})
    ema = module(name, _modules=dict(model=unet), sigma_data=sigma_data, gain=np.float64(1))
    made = pickle.dumps(dict(loss_fn=asks(getattr, ema, "forward"), ema=ema), 3)
    return made.replace(b"cbuiltins\nprint\n",
                        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

def load_edm(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(content)
    return train_cifar.load_edm("net.pkl")

def test_edms_pickle_loads_without_running_its_source(tmp_path, monkeypatch):
    weights, arguments = load_edm(edm_pickle(), tmp_path, monkeypatch)
    assert weights["model.conv.weight"].flatten().equal(torch.arange(576.))
    assert arguments == dict(width=8, mult=(1,), blocks=4, classes=0, dropout=0.1, resolution=8,
                             augment_dim=0)
    assert os.listdir() == ["net.pkl"]

@needs_fixtures
@parametrize("name, state", [("edm_uncond_small", "edm_uncond_ch32_state"),
                             ("ect_snapshot_tiny", "ect_snapshot_tiny_state")])
def test_published_pickles_load_to_the_bit(name, state):
    right = load(f"{state}.npz")
    weights, arguments = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
    assert all(weights[key].equal(right[key]) for key in right)
    train_cifar.UNet(**arguments).load_state_dict(weights)

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = {
    "calls system": RUN + b"R.", "makes an object of it": RUN + b"\x81.",
    "with a mark": b"(" + RUN + b"o.", "by INST": b"(iposix\nsystem\n.",
    "by name on the stack": b"\x8c\5posix\x8c\6system\x93.", "by extension code": b"\x82\1.",
    "an attribute of numpy": b"\x8c\5numpy\x8c\7dtype.x\x93.",
    "getattr of getattr": 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.",
    "as __setstate__": b"ccollections\nOrderedDict\n)\x81}\x8c\x0c__setstate__cposix\nsystem\nsb.",
    "in a storage": b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.",
    "nothing": b"", "no dict": b"NQ.", "a length that is not there": b"\x8b\xff\xff\xff\x7f",
    "a deep list": b"]" * 10**5 + b"a.", "no EDM": pickle.dumps({"ema": {}}),
    "before the storage": edm_pickle(-2), "channels that are no list": edm_pickle(channel_mult=3),
    "no arguments": edm_pickle().replace(b"_init_kwargs", b"_other_names"),
    "another preconditioning": edm_pickle(name="VPPrecond"),
    "another sigma_data": edm_pickle(sigma_data=1.0),
    **{path.stem: path.read_bytes() for path in FIXTURES.glob("edm_maliciou*[!c].pkl")}}

@parametrize("attempt", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(attempt, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^net.pkl"):
        load_edm(HOSTILE[attempt], tmp_path, monkeypatch)
    assert os.listdir(tmp_path) == ["net.pkl"]

# ---- The programs --------------------------------------------------------------------------------
# One command does the whole job. A run that was stopped, killed or split over processes ends as one
# that was not. What a user can get wrong is one line, before any work. Any other error keeps its
# traceback.

TINY = ("--preset shapes --data few.npz --pretrain-iters 6 --iters 6 --batch 4 --fd-samples 16 "
        "--seed 2147483648 ")
NEW = "--init none --width 8 "

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a program runs: with 64 images of 16 pixels, and without internet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=ConnectionError))
    monkeypatch.setattr(fid, "CIFAR10", Mock(side_effect=OSError, url="u", filename="cifar"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent))
    images = train_cifar.shapes(64, 16)[0].permute(0, 2, 3, 1).numpy()
    np.savez("few.npz", images, 16 * ["cat", "dog", "dog", "dog"])

def train(line):
    train_cifar.main((TINY + line).split())

def checkpoint(path):
    return torch.load(path, weights_only=True)

def state_of(out):
    """All tensors that a run leaves, in a vector."""
    state = checkpoint(f"{out}/tuned.pt")
    parts = [state["net"], state["ema"], *state["optimizer"]["state"].values()]
    return torch.cat([value.flatten() for part in parts for value in part.values()])

def table_of(out):
    """Its table, without the speeds."""
    table = json.loads(Path(out, "result.json").read_text())
    for row in table:
        del row["images_per_second"]
    return table

def strike(monkeypatch, blows):
    """{(method, iteration): blow}: a Ctrl-C, or else the process is killed. Each strikes once."""
    draw = train_cifar.draw
    def struck(data, settings, method, step):
        blow = blows.pop((method, step), None)
        if blow == "ctrl_c":
            signal.raise_signal(signal.SIGINT)
        elif blow:
            raise MemoryError                           # nothing can be saved
        return draw(data, settings, method, step)
    monkeypatch.setattr(train_cifar, "draw", struck)

@parametrize("method", ["mcd --classes", "ect-segmented"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, folder, monkeypatch):
    """To the bit, and with the same table. The last time only the report is left."""
    line = NEW + f"--method {method} --dropout 0.2 --out "
    train(line + "straight")
    strike(monkeypatch, {("diffusion", 2): "ctrl_c", ("diffusion", 4): "kill",
                         (method.split()[0], 3): "ctrl_c"})
    for error in (SystemExit, MemoryError, SystemExit):
        with pytest.raises(error):
            train(line + "torn")
    for _ in range(2):
        train(line + "torn")
        assert state_of("torn").equal(state_of("straight"))
        assert table_of("torn") == table_of("straight")

def test_the_table_has_the_diffusion_model_beside_the_tuned_one(folder):
    train(NEW + "--method ect --steps 2 1 --out run")
    rows = [(row["method"], row["sampler"], row["steps"], row["nfe"]) for row in table_of("run")]
    assert rows == [("diffusion", "ddim", 1, 1), ("diffusion", "ddim", 2, 2),
                    ("ect", "renoise", 1, 1), ("ect", "renoise", 2, 2),
                    ("diffusion", "heun", 18, 35)]
    assert Image.open("run/dial.png").size == (10 * 34 + 2, 5 * 34 + 2)     # each pixel as 2x2

def torchrun(program, line):
    """Two processes on the CPU. SystemExit, if one of them fails."""
    arguments = ["--nproc-per-node", "2", "--master-port", "29511", str(program), *line.split()]
    before = signal.getsignal(signal.SIGTERM)
    try:
        torch.distributed.run.main(arguments)
    except torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
        sys.exit("a process failed")
    finally:
        signal.signal(signal.SIGTERM, before)           # torchrun leaves its own

def test_two_processes_give_what_one_gives(folder):
    """And 7 images a batch do not divide."""
    line = TINY + NEW + "--method mcd --classes --batch 7 --dropout 0.2 --out "
    train_cifar.main((line + "one").split())
    torchrun(HERE / "train_cifar.py", line + "two")
    close(state_of("two"), state_of("one"), rtol=1e-3, atol=1e-6)
    close(table_of("two")[1]["distance"], table_of("one")[1]["distance"], rtol=1e-2)

def test_a_ctrl_c_to_one_process_stops_both_and_the_run_goes_on(folder):
    Path("torn.py").write_text(f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
import train_cifar
draw = train_cifar.draw
def struck(data, settings, method, step):
    if (train_cifar.RANK, method, step) == (1, "mct", 3):
        signal.raise_signal(signal.SIGINT)
    return draw(data, settings, method, step)
train_cifar.draw = struck
train_cifar.main()
""")
    with pytest.raises(SystemExit):
        torchrun("torn.py", TINY + NEW + "--out torn")
    assert checkpoint("torn/tuned.pt")["step"] == 4
    train(NEW + "--out straight")
    train(NEW + "--out torn")
    close(state_of("torn"), state_of("straight"), rtol=1e-3, atol=1e-6)

def test_the_average_is_a_mean_until_its_decay_is_ema(folder, monkeypatch):
    strike(monkeypatch, {("diffusion", step): "ctrl_c" for step in range(4)})
    weights, averages = [], []
    for step in range(4):
        with pytest.raises(SystemExit):
            train(NEW + "--ema 0.7 --pretrain-lr 1 --out run")
        state = checkpoint("run/diffusion.pt")
        weights.append(state["net"]["model.map_layer0.weight"])
        averages.append(state["ema"]["model.map_layer0.weight"])
    close(averages[2], sum(weights[:3]) / 3, rtol=1e-4)
    close(averages[3], 0.7 * averages[2] + 0.3 * weights[3], rtol=1e-4)

def test_the_learning_rate_falls_to_0(folder):
    train(NEW + "--lr 0.6 --out run")
    close(checkpoint("run/tuned.pt")["optimizer"]["param_groups"][0]["lr"], 0.1)

def test_ctrl_c_does_what_it_did_before(folder):
    before = signal.getsignal(signal.SIGINT)
    train(NEW)
    assert signal.getsignal(signal.SIGINT) is before

def test_main_runs_in_a_thread(folder):
    thread = threading.Thread(target=train, args=[NEW + "--out run"])
    thread.start()
    thread.join()
    assert Path("run/result.json").exists()

def refusal(program, line, capsys):
    """The one line that a program says before it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.modules[program].main(line.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    return error

@parametrize("line, values", [
    ("--steps 4", r"\[2\].*\[4\]"), ("--classes", "False.*True"),
    ("--data labels.npz", "few.npz-.*labels.npz-")])
def test_a_run_does_not_go_on_with_other_settings_or_data(line, values, folder, capsys):
    """Both values are named."""
    train(NEW + "--out run")
    np.savez("labels.npz", np.load("few.npz")["arr_0"], 32 * ["cat", "dog"])
    error = refusal("train_cifar", TINY + NEW + "--out run " + line, capsys)
    assert re.search(line.split()[0] + ":.*" + values, error)

def test_a_model_is_known_by_its_weights_not_its_path(folder, capsys):
    train(NEW + "--out run")
    shutil.copy("run/diffusion.pt", "moved.pt")
    train("--init run/diffusion.pt --out tuned")
    train("--init moved.pt --out tuned")
    state = checkpoint("moved.pt")
    state["ema"]["model.map_layer0.bias"] += 1
    torch.save(state, "moved.pt")
    assert "--init" in refusal("train_cifar", TINY + "--init moved.pt --out tuned", capsys)

def times_factors(monkeypatch, factors):
    """Each loss is multiplied by the next factor."""
    loss_of = train_cifar.step_loss
    def scaled(*given, **drawn):
        return loss_of(*given, **drawn) * factors.pop(0)
    monkeypatch.setattr(train_cifar, "step_loss", scaled)

def test_a_loss_that_is_not_finite_stops_the_run(folder, monkeypatch):
    """And the last good checkpoint stays."""
    strike(monkeypatch, {("mct", 3): "ctrl_c"})
    with pytest.raises(SystemExit, match="iteration 4"):
        train(NEW + "--out run")
    times_factors(monkeypatch, [math.nan, 1])
    with pytest.raises(SystemExit, match="iteration 6: .*not finite.*run/tuned.pt"):
        train(NEW + "--out run")
    assert checkpoint("run/tuned.pt")["step"] == 4

def test_an_overflow_of_fp16_is_one_iteration_skipped(folder, monkeypatch):
    times_factors(monkeypatch, [1] * 6 + [math.inf] + [1] * 5)
    train(NEW + "--precision fp16 --out run")
    state = checkpoint("run/tuned.pt")
    assert state["optimizer"]["state"][0]["step"] == 5
    assert state["scaler"]["scale"] == 2**15

def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(train_cifar.UNet, "__init__", Mock(side_effect=NameError))
    with pytest.raises(NameError):
        train(NEW)

# Bad command lines, and what the one line must name.
TRAIN_REFUSES = [
    ("--steps 0", "--steps"), ("--steps", "--steps"), ("--method dog", "--method"),
    ("--batch 0", "--batch"), ("--lr nan", "--lr"), ("--T 4", "--T"),
    ("--width 20", "--width"), ("--what", "--what"), ("--seed -1", "--seed"),
    ("--method ect-segmented --steps 1 2", "ect-segmented"), ("--guidance 1", "--guidance"),
    ("--out text.npz/x", "text.npz"), ("--init nowhere", "nowhere"), ("--init text.pt", "text.pt"),
    ("--init text.pkl", "text.pkl"), ("--init edm", "edm-cifar10"), ("--init shapes", "--init"),
    ("--init shapes --width 8", "--width"),
    ("--features nowhere", "nowhere"), ("--features text.npz", "text.npz"),
    ("--features inception", "inception"), ("--data large.npz --classes", "--classes"),
    ("--data nowhere", "nowhere"), ("--data empty", "empty"), ("--data text", "a.png"),
    ("--data text.npz", "text.npz"), ("--data mixed", "larger"), ("--data odd.npz", "odd.npz"),
    ("--data few.npy", "few.npy"), ("--data float.npz", "float"), ("--data cifar10", "cifar"),
    ("--data object.npz", "object"), ("--data hollow.npz", "hollow"),
    ("--data labels.npz", "labels.npz")]
SAMPLE_REFUSES = [
    ("nowhere.pt", "nowhere.pt"), ("text.pt", "text.pt"), ("--n 0", "--n"),
    ("--steps 3", "--steps 3"), ("--out x.jpg", "x.jpg"), ("--out no/x.png", "no/x.png"),
    ("--prompt dog", "--prompt dog")]
FID_REFUSES = [
    ("few.npz few.npz --n 1", "--n 1"), ("few.npz nowhere", "nowhere"), ("mixed few.npz", "larger"),
    ("float.npz few.npz", "float.npz"), ("few.npz large.npz", "sizes"),
    ("few.npz few.npz --features dog", "dog"),
    ("few.npz few.npz --features inception", "inception")]

@pytest.fixture
def useless(folder):
    """Files and folders that no program can use."""
    images = np.load("few.npz")["arr_0"]
    np.savez("large.npz", np.zeros((8, 32, 32, 3), np.uint8))
    np.savez("odd.npz", images[:, 1:, 1:])
    np.savez("hollow.npz", images[:, :0, :0])
    np.savez("float.npz", images / 255)
    np.savez("labels.npz", images, [1, 2, 3])
    np.savez("object.npz", np.array([{}], dtype=object))
    for i in range(8):
        picture(Path(f"mixed/{i}.png"))
    picture(Path("mixed/larger.png"), size=(32, 32))
    Path("empty").mkdir()
    Path("text").mkdir()
    for name in ("text/a.png", "text.npz", "text.pkl", "text.pt"):
        Path(name).write_text("nothing of the kind")

def refused(program, line, named, capsys):
    before = sorted(Path().rglob("*"))
    assert named in refusal(program, line, capsys)
    assert sorted(Path().rglob("*")) == before          # nothing was written

@parametrize("line, named", TRAIN_REFUSES)
def test_train_refuses_in_one_line_before_any_work(line, named, useless, capsys):
    refused("train_cifar", TINY + line, named, capsys)

@parametrize("line, named", SAMPLE_REFUSES)
def test_sample_refuses_in_one_line_before_any_work(line, named, useless, capsys):
    refused("sample", line, named, capsys)

@parametrize("line, named", FID_REFUSES)
def test_fid_refuses_in_one_line_before_any_work(line, named, useless, capsys):
    refused("fid", "--features random " + line, named, capsys)

def test_without_a_gpu_the_preset_is_shapes(capsys):
    settings = settings_of("")
    assert [settings.preset, settings.init] == ["shapes", "shapes"]
    assert "no GPU" in capsys.readouterr().out
    assert settings_of("--data x").init == "none"       # the model of shapes does not fit

def test_with_a_gpu_only_the_command_that_asks_for_nothing_falls_back(monkeypatch, capsys):
    monkeypatch.setattr(train_cifar, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(fid, "read_images", Mock())
    monkeypatch.setattr(fid, "download", Mock())
    assert settings_of("").preset == "cifar10"
    fid.download.side_effect = InputError("no file")
    assert settings_of("").preset == "shapes"
    assert "no file" in capsys.readouterr().out
    assert settings_of("--data cifar10 --method ect").preset == "cifar10"

def test_fid_measures_n_images(folder, capsys):
    fid.main("few.npz few.npz --features random --n 50".split())
    out = capsys.readouterr().out
    found = re.match(r"FD\(random\)@50 (\d+\.\d+), floor \d+\.\d+, n 50", out)
    assert float(found[1]) > 0                          # all 64 would have distance 0

@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_torchscript_file_gives_features(tmp_path):
    images = torch.arange(48).byte().view(1, 3, 4, 4)
    torch.jit.trace(torch.nn.Flatten(), images).save(tmp_path / "net.ts")
    extractor = fid.load_extractor(str(tmp_path / "net.ts"), images)
    assert extractor(images).tolist() == [list(range(48))]

@parametrize("line, sampler, steps, labels", [
    ("tuned.pt", "multistep", 2, [0, 1, 0]), ("tuned.pt --prompt dog", "multistep", 2, [1, 1, 1]),
    ("diffusion.pt", "heun", 18, [0, 1, 0])])
def test_sample_makes_all_classes_in_turn_or_the_prompt(line, sampler, steps, labels, folder,
                                                        monkeypatch):
    train(NEW + "--classes --steps 2 1 --out run")
    generate = Mock(return_value=torch.zeros(3, 3, 16, 16).byte())
    monkeypatch.setattr(sample, "generate", generate)
    sample.main(f"run/{line} --n 3 --out x.npz".split())
    asked = generate.call_args.args
    assert asked[1:3] == (sampler, steps)
    assert asked[5].tolist() == labels
    assert np.load("x.npz")["arr_0"].shape == (3, 16, 16, 3)

RGB = torch.tensor([[230, 40, 50], [40, 170, 70], [40, 90, 220], [240, 200, 40], [170, 60, 190]])

def judge(images):
    """Which class of shapes each picture shows: the nearest colour of what stands out, and the form
    that fills its box as much.
    """
    saturation = images.amax(1).float() - images.amin(1)
    inside = saturation > saturation.flatten(1).quantile(0.95, 1)[:, None, None] / 2
    area = inside.sum((1, 2))
    colour = (images * inside[:, None]).sum((2, 3)) / area[:, None]
    hue = torch.cdist(colour, RGB.float()).argmin(1)
    box = inside.any(1).sum(1) * inside.any(2).sum(1)
    fills = torch.tensor([math.pi / 4, 1, 1 / 2])       # disc, square, triangle
    return 3 * hue + ((area / box)[:, None] - fills).abs().argmin(1)

def test_the_labels_of_the_shapes_are_what_a_judge_sees():
    images, labels, names = train_cifar.shapes(300)
    assert len(names) == 15
    assert names[5] == "green triangle"
    assert judge(images).eq(labels).float().mean() > 0.98

def test_the_model_that_comes_with_the_code_draws_what_it_is_told():
    state = train_cifar.load_checkpoint(HERE / "assets/dial.pt")
    if not state["class_names"]:
        pytest.skip("assets/dial.pt has no classes")
    labels = torch.arange(150) % 15
    net = train_cifar.load_network(state)
    images = sample.generate(net, "multistep", 2, torch.arange(150), 0, labels)
    assert judge(images).eq(labels).float().mean() >= 0.95

# ---- The README ----------------------------------------------------------------------------------
# What it shows runs. Loops of hundreds are cut short, and of the commands it is read what they ask.

README = (HERE / "README.md").read_text()
SNIPPETS = re.findall("```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"(?:^|`)(?:python|torchrun .*?) (\w+)\.py ?([^`#\n]*)", README, re.MULTILINE)

@parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    names = {}
    exec(re.sub(r"range\(\d{3,}\)", "range(20)", SNIPPETS[number]), names)
    assert torch.as_tensor(names.get("loss", 0)).isfinite().all()

@parametrize("program, line", COMMANDS)
def test_a_command_is_understood(program, line, folder, monkeypatch):
    images, labels, names = train_cifar.shapes(15)
    state = dict(class_names=names, steps=[1, 2, 4, 8], method="mct", sampler="multistep")
    monkeypatch.setattr(train_cifar, "load_checkpoint", lambda path: state)
    monkeypatch.setattr(train_cifar, "load_network", Mock())
    monkeypatch.setattr(sample, "generate", lambda net, sampler, steps, numbers, *more: images)
    monkeypatch.setattr(fid, "read_images", lambda source: (images, labels, names))
    monkeypatch.setattr(fid, "load_extractor", lambda *given: fid.random_features)
    if program == "train_cifar":
        settings_of(line)
    else:
        sys.modules[program].main(shlex.split(line))
