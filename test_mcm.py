"""What the method guarantees, in the method's order: the name of each test is its claim.

"Eq." and "Algorithm" are those of MCM's paper. No internet and no GPU is needed. A few numbers
are those of the code of ECT, EDM and torch-fidelity. (All are in ../shared, which a clone lacks.)
"""
import argparse, contextlib, json, math, os, pickle
import re, shlex, shutil, signal, sys, zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed.run
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import ect, fid, mcm, sample, train_cifar
from fid import InputError
from mcm import alpha_sigma, cosine, edm, mean_per_sample, per_sample

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared/fixtures"
parametrize = pytest.mark.parametrize
torch.set_num_threads(1)            # for small tensors threads mostly wait for each other
train_cifar.DEVICE = torch.device("cpu")

@pytest.fixture(autouse=True)
def each_test_for_itself(tmp_path, monkeypatch):
    """In an empty folder. Also restores SIGINT, which shells ignore in background jobs."""
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)

def close(actual, expected, rtol=1e-6, atol=1e-8):
    """assert_close, also for arrays, lists and numbers, compared in float64."""
    __tracebackhide__ = True
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

def randn(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)

# ---- Schedules and steps -------------------------------------------------------------------------
# A schedule gives alpha and sigma at t. edm: alpha = 1, sigma = t. cosine: t in [0, 1]. DDIM moves
# a noisy image from t to s with a guess x of the clean one, and must be right for a right guess.
# aDDIM adds the variance that x lacks, no more.

# The papers' symbols, for the tests of the first three sections: all times t > s >= t_step that
# are multiples of 1/16, and for each of them data x and noise eps, [816, 2, 3].
TIMES = [(t, s, t_step) for t in range(17) for s in range(t) for t_step in range(s + 1)]
t, s, t_step = torch.tensor(TIMES).double().T / 16
x, eps = randn(2, len(t), 2, 3)
on_both_schedules = parametrize("schedule", [cosine, edm])

def noisy(t, schedule=cosine):
    """x at t, on its path to eps."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    return alpha * x + sigma * eps

def stand_in(z, sigma, w=0.7):
    """That of shared/fixtures for a network D(z, sigma). Here it also stands for any f(z, t)."""
    sigma = per_sample(sigma, z)
    c_in = (sigma**2 + 0.25).rsqrt()
    c_skip = 0.25 * c_in**2
    c_out = 0.5 * sigma * c_in
    return c_skip * z + c_out * torch.tanh(w * c_in * z)

def gaussian(z, sigma, variance=0.3):
    """The exact denoiser D(z, sigma) of Gaussian data."""
    return z * per_sample(variance / (variance + sigma**2), z)

def test_cosine_preserves_the_variance():
    alpha, sigma = cosine(torch.linspace(0, 1, 1001))
    close(alpha**2 + sigma**2, 1.0)

def test_cosine_has_edms_range_of_noise_levels():
    alpha, sigma = cosine(torch.tensor([0.0, 1.0]))
    close(sigma / alpha, [0.002, 80], rtol=1e-4)

def test_images_in_bfloat16_have_noise_levels_in_float32():
    """In bfloat16, sigma 80 would be 62."""
    alpha, sigma = alpha_sigma(cosine, 1.0, torch.zeros(1).bfloat16())
    close(sigma / alpha, 80, rtol=1e-4)

@on_both_schedules
def test_ddim_with_the_true_image_stays_on_its_path(schedule):
    """Eq. (4)."""
    z_s = mcm.ddim(x, noisy(t, schedule), t, s, schedule)
    close(z_s, noisy(s, schedule))

@on_both_schedules
def test_addim_is_ddim_where_no_variance_is_missing(schedule):
    z_s = mcm.addim(x, noisy(t, schedule), t, s, 0.0, schedule)
    close(z_s, noisy(s, schedule))

@on_both_schedules
def test_addim_lengthens_the_noise_by_the_missing_variance(schedule):
    """Algorithm 3 with eq. (14). The variance that x lacks is here t. eps keeps its direction."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, x)
    alpha_s, sigma_s = alpha_sigma(schedule, s, x)
    added = (alpha_s - alpha_t * sigma_s / sigma_t).flatten() ** 2 * t
    before = mean_per_sample((sigma_s * eps) ** 2)
    noise = mcm.addim(x, noisy(t, schedule), t, s, t, schedule) - alpha_s * x
    close(mean_per_sample(noise**2), before + added)
    close(torch.cosine_similarity(noise.flatten(1), eps.flatten(1)), 1.0)

# ---- Times and the loss --------------------------------------------------------------------------
# N segments of n teacher steps, about T in all. A step is from t down to s. f must learn the x
# whose jump from z_t ends where the reference's (f at s, without gradient) from z_s ends: at
# t_step, the edge. With s at the edge the target is the data. N = 1: consistency, n = 1: diffusion.

def test_teacher_steps_grow_log_linearly():
    close(mcm.teacher_steps(0), 64)
    close(mcm.teacher_steps(50_000), (64 * 1280) ** 0.5)
    close(mcm.teacher_steps(200_000), 1280)

@parametrize("N, T, n", [(1, 24, 24), (3, 25, 8), (8, 3, 1)])
def test_every_teacher_step_of_every_segment_is_drawn(N, T, n):
    t, s, t_step = mcm.draw_times(10_000, N, T)
    close(t.unique() * N * n, torch.arange(N * n) + 1)
    close(t - s, 1 / (N * n), rtol=1e-4)
    at_the_edge = s < t_step + 1e-4
    assert s[at_the_edge].equal(t_step[at_the_edge])    # to the last bit
    close(t_step * N, (s * N + 1e-4).floor())

@parametrize("N, T", [(1, 8192), (3, 64), (64, 8192)])
def test_the_network_is_told_the_segment_that_its_time_was_drawn_in(N, T):
    """Also where t is the segment's upper edge, and the noise level is rounded up."""
    t, s, t_step = mcm.draw_times(10_000, N, T)
    alpha, sigma = cosine(t)
    segment = mcm.segment_of(1.000001 * sigma / alpha, N)
    close(segment, t_step * N)

@on_both_schedules
def test_at_the_edge_the_target_is_the_data(schedule):
    """Eq. (8): what a diffusion model learns. Inverse DDIM of z_s, eq. (5), recovers x."""
    z_t = noisy(t, schedule)
    z_s = noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, s, schedule)
    close(target, x)

@on_both_schedules
def test_above_the_edge_the_target_lands_where_the_reference_lands(schedule):
    """For edm and t_step = 0, this is the target of a consistency model (Song et al.)."""
    z_t = noisy(t, schedule)
    z_s = noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, t_step, schedule)
    landed = mcm.ddim(target, z_t, t, t_step, schedule)
    reference = mcm.ddim(stand_in(z_s, s), z_s, s, t_step, schedule)
    above = s > t_step
    close(landed[above], reference[above])

@on_both_schedules
def test_the_loss_is_a_norm_with_snr_plus_1_as_weight(schedule):
    """The pseudo-Huber norm of the mean square of an image."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    error = stand_in(noisy(t, schedule), t) - x
    square = mean_per_sample(error**2 * (alpha**2 / sigma**2 + 1))
    loss = mcm.consistency_loss(stand_in, x, eps, t, s, s, schedule, huber_eps=0.1)
    close(loss, (square + 0.1**2) ** 0.5 - 0.1)

def test_only_f_at_t_has_a_gradient():
    """So the slope is the same with an f_ref that has the same w, as a constant."""
    def slope(f_ref):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        f = mcm.conditioned(stand_in, w=w)
        loss = mcm.consistency_loss(f, x, eps, t, s, t_step, f_ref=f_ref)
        return torch.autograd.grad(loss.sum(), w)[0]
    close(slope(f_ref=None), slope(f_ref=stand_in))

def test_the_reference_is_f_ref_if_it_is_given():
    """Such as an average of f."""
    f_ref = Mock(side_effect=stand_in)
    mcm.consistency_loss(stand_in, x, eps, t, s, t_step, f_ref=f_ref)
    assert f_ref.call_count == 1

def first_asked(**more):            # what f is asked first: z_s and a time
    f = Mock(side_effect=stand_in)
    mcm.consistency_loss(f, x, eps, t, s, t_step, **more)
    return f.call_args_list[0].args

def test_f_is_asked_at_s_or_where_no_jump_is_left_at_t():
    """So never at time 0, where a network would take the logarithm of 0."""
    time = first_asked()[1]
    assert time.equal(torch.where(s > t_step, s, t))

@parametrize("weight", [0.0, 2.0])
def test_a_teacher_steps_with_three_quarters_of_its_squared_error(weight):
    """x_var = 0.75 x error^2 of the conditional guess, x_hat. The step uses the guided one."""
    z_t = noisy(t)
    x_hat = stand_in(z_t, t)
    x_guided = x_hat + weight * (x_hat - gaussian(z_t, t))
    x_var = 0.75 * mean_per_sample((x_hat - x) ** 2)
    z_s, time = first_asked(teacher=mcm.guided(stand_in, gaussian, weight))
    close(z_s, mcm.addim(x_guided, z_t, t, s, x_var))

# ---- ECT -----------------------------------------------------------------------------------------
# r = t (1 - n(t) / q^(stage + 1)), at least 0, comes nearer to t stage by stage. The loss must be
# the authors' where theirs is finite, and finite everywhere. In segments, r stops at the edge.

def test_r_is_that_of_the_authors():
    """locuslab/ect at stage 3, with q = 2, k = 8 and b = 1."""
    sigma = torch.tensor([0.198757457, 1.15992856, 6.76922660]).double()
    close(ect.t_to_r(sigma, 3), [0.14156763, 0.94900700, 6.3422669], rtol=1e-7)

def test_ects_loss_is_the_distance_over_t_minus_r():
    """With n(t) = 1 + k sigmoid(-b t), and the square summed over an image."""
    n = 1 + 5 * torch.sigmoid(-2 * t)
    r = t * (1 - n / 3**2)
    D_t = stand_in(noisy(t, edm), t)
    D_r = stand_in(noisy(r, edm), r)
    square = (D_t - D_r).square().sum((1, 2))
    loss = ect.ect_loss(stand_in, x, eps, t, stage=1, q=3, k=5, b=2, c=0.06)
    close(loss * (t - r), (square + 0.06**2).sqrt() - 0.06)

def test_only_ects_guess_at_t_has_a_gradient():
    """So the slope is that of a loss whose guess at r has the same w, as a constant."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    r = ect.t_to_r(t, 3)
    D_t = stand_in(noisy(t, edm), t, w)
    D_r = stand_in(noisy(r, edm), r)
    right = (D_t - D_r).flatten(1).norm(dim=1) / (t - r)
    loss = ect.ect_loss(mcm.conditioned(stand_in, w=w), x, eps, t, stage=3)
    slope = torch.autograd.grad((loss - right).sum(), w)[0]
    close(slope, 0.0, atol=1e-6)

def test_the_weight_is_over_the_very_r_that_the_network_sees():
    """In float32 r is rounded, and 1 / (t - r) must be that of the rounded r. With D = ln sigma
    the loss is (ln t - ln r) / (t - r), which is 1 / t for a small t - r."""
    def D(x, sigma):
        return sigma.double().log()[:, None]
    sigma = torch.linspace(0.01, 80, 1000)
    zero = torch.zeros(1000, 1)
    loss = ect.ect_loss(D, zero, zero, sigma, stage=15)
    close(loss * sigma, 1.0, rtol=1e-4)

@parametrize("stage, q", [(0, 2), (7, 256)])
def test_ects_loss_and_gradient_are_finite_where_r_is_0_or_rounds_to_t(stage, q):
    """In float32. Where r rounds to t, the authors' is 0 / 0, and a bare root has the slope NaN."""
    w = torch.tensor(0.7, requires_grad=True)
    D = mcm.conditioned(stand_in, w=w)
    loss = ect.ect_loss(D, x.float(), eps.float(), t.float(), stage, q)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert w.grad.isfinite()

def test_where_r_is_0_ects_target_is_the_data():
    """With b = 0, n = 1 + 8 / 2 is more than q = 2, so r is cut to 0. D(z, 0) is not z."""
    def D(z, sigma):
        return stand_in(z, sigma + 1)
    loss = ect.ect_loss(D, x, eps, t, stage=0, b=0)
    error = D(noisy(t, edm), t) - x
    close(loss * t, error.flatten(1).norm(dim=1))

def test_in_segments_the_places_where_the_guesses_land_are_compared():
    """In two of them. The edge is at 0.99, and the noise levels lie on both sides of it."""
    def landing(sigma):
        z = noisy(sigma, edm)
        return mcm.ddim(stand_in(z, sigma), z, sigma, edge, edm)
    edges = ect.segment_edges(2).double()
    sigma = 4 * t
    edge = torch.where(sigma > edges, edges, 0.0)
    r = edge.maximum(ect.t_to_r(sigma, 3))
    distance = (landing(sigma) - landing(r)).flatten(1).norm(dim=1)
    loss = ect.ect_loss(stand_in, x, eps, sigma, 3, edges=edges)
    close(loss, distance / (sigma - r))

def test_just_above_an_edge_the_loss_of_segmented_ect_is_bounded():
    """Though its weight 1 / (t - r) is not: it is up to 1e12."""
    edges = ect.segment_edges(4).double()
    sigma = edges[0] * (1 + 10 ** (-11 * t - 1))
    loss = ect.ect_loss(stand_in, x, eps, sigma, 3, edges=edges)
    assert loss.max() < 10              # it is |difference| / t, here 5.7

# ---- Samplers ------------------------------------------------------------------------------------
# With an exact network a sampler must reach the right images: in one jump, or with its order of
# accuracy. It asks at the right noise levels. An image depends on its seed and number alone.
# multistep is DDIM. renoise guesses x, adds fresh noise of the next level, and guesses again.

def gaussian_jump(z, sigma, segment, N):
    """The exact jump of Gaussian data to the edge: on the flow, z goes as (0.3 + sigma^2)^1/2."""
    first = N * (N - 1) // 2                # row first + i is segment i of N
    alpha_edge, sigma_edge = cosine((segment.double() - first) / N)
    edge = sigma_edge / alpha_edge
    shrink = ((0.3 + edge**2) / (0.3 + sigma**2)) ** 0.5
    return mcm.inv_ddim(z * per_sample(shrink, z), z, sigma, edge, edm)

@parametrize("N", [1, 2, 4])
def test_multistep_with_the_exact_f_makes_the_data(N):
    """Algorithm 2. And make_f asks at the right noise level: else a jump would end elsewhere."""
    z = randn(1000, 3)
    f = mcm.make_f(gaussian_jump, steps=N, N=N)
    close(sample.multistep(f, z, N), 0.3**0.5 * z, rtol=1e-4)

def test_the_variance_that_addim_puts_back_is_the_papers():
    """Algorithm 3: 0.1 / (2 + SNR). Here the SNR is 9."""
    close(sample.paper_x_var(3.0, 1.0), 0.1 / 11)

def test_addim_keeps_a_small_variance_ten_times_better_than_ddim():
    """With the exact posterior variance, of Gaussian data of variance 1e-4."""
    def posterior(alpha, sigma):
        return 1e-4 * sigma**2 / (alpha**2 * 1e-4 + sigma**2)
    z = randn(64, 10_000)
    f = mcm.make_f(gaussian, variance=1e-4)
    right = 1e-4 + mcm.SIGMA_MIN**2
    error = sample.addim(f, z, 8, posterior).var() - right
    error_of_ddim = sample.multistep(f, z, 8).var() - right
    assert abs(error) < 0.1 * abs(error_of_ddim)

def test_heun_is_of_second_order():
    z = randn(100)
    truth = 80 * (0.3 / (0.3 + 80**2)) ** 0.5 * z
    error = (sample.heun(gaussian, z, 64) - truth).norm()
    error_of_twice = (sample.heun(gaussian, z, 128) - truth).norm()
    close(error / error_of_twice, 4, atol=1)

def test_renoise_gives_a_number_of_the_authors():
    """Of locuslab/ect's generator, in three steps."""
    latents = torch.tensor([0.33209962]).double()
    noise = torch.tensor([[0.85046473], [-0.12100735]])
    made = sample.renoise(stand_in, latents, [80, 5, 0.821], noise)
    close(made, 0.12394429, rtol=1e-7)

def test_of_a_samplers_steps_only_the_result_is_rounded():
    """Its state is float64. Here x is 0, so each step only shrinks the noise."""
    def black(z, t):
        return 0 * z
    z = randn(100).float()
    exact = sample.multistep(black, z.double(), 100)
    assert sample.multistep(black, z, 100).equal(exact.float())

def test_noise_in_bfloat16_is_asked_about_at_times_in_float32():
    f = Mock(side_effect=stand_in)
    sample.multistep(f, randn(2).bfloat16(), 2)
    z, time = f.call_args.args
    assert z.dtype == torch.bfloat16
    assert time.dtype == torch.float32

class Recorder(torch.nn.Module):
    """A network in float32, though a sampler's state is float64. It guesses x / 1000, with label 1
    twice that, and notes what it is asked."""
    image_shape = (3, 4, 4)

    def __init__(self, weight=0.001):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.asked = []

    def forward(self, x, sigma, labels, segment=torch.tensor([-1])):
        assert x.dtype == torch.float32
        self.asked.append([sigma[0].item(), segment[0].item()])
        return self.weight * x * per_sample(1 + labels, x)

def generated(net, numbers, sampler="ddim", steps=2, seed=0):
    numbers = torch.tensor(numbers)
    return sample.generate(net, sampler, steps, numbers, torch.zeros_like(numbers), seed)

each_sampler = parametrize("sampler", ["multistep", "ddim", "renoise", "heun"])

@parametrize("sampler, steps, asked", [
    ("multistep", 2, [[80, 2], [0.989555, 1]]),
    ("renoise", 2, [[80, 0], [0.821, 0]]),
    ("renoise", 3, [[80, 0], [1.701787, 0], [0.573579, 0]]),
    ("heun", 2, [[80, -1], [0.002, -1], [0.002, -1]])])         # -1: no segment
def test_a_sampler_asks_at_these_noise_levels_and_segments(sampler, steps, asked):
    """0.821 is ECT's, those in between are cosine's. Row N (N - 1) / 2 + i is segment i of N."""
    net = Recorder()
    generated(net, [0], sampler, steps)
    close(net.asked, asked, rtol=1e-5)

@each_sampler
def test_an_image_depends_on_its_seed_and_number_alone(sampler):
    """Not on the batch that it is made in: 60 images are two batches."""
    net = Recorder()
    images = generated(net, range(60), sampler)
    assert generated(net, [55, 3], sampler).equal(images[[55, 3]])
    assert generated(net, [3], sampler, seed=1).ne(images[3]).any()
    assert len(images.unique(dim=0)) == 60

def test_an_image_that_is_too_bright_is_white_and_not_black():
    """Here x is 80 times the noise, so half of it is more than 255."""
    images = generated(Recorder(weight=1.0), range(9), steps=1)
    close(images.eq(255).float().mean(), 0.5, atol=0.1)

@each_sampler
def test_each_image_is_made_with_its_own_label(sampler):
    net = Recorder()
    labels = (torch.arange(60) == 55).long()
    images = sample.generate(net, sampler, 2, torch.arange(60), labels)
    changed = images.ne(generated(net, range(60), sampler))
    assert changed.flatten(1).any(1).equal(labels == 1)

# ---- The network ---------------------------------------------------------------------------------
# It is EDM's to the last key, so that the published weights give the published denoiser. What is
# new in it begins without effect. Both passes of an iteration have the same dropout mask.

def give_weights(net):
    """By the rule of shared/fixtures for Inception: drawn by their keys. It also does for EDM."""
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

def small_net(side=8, **more):
    return give_weights(train_cifar.UNet(16, (1,), 1, side, attention=(), **more))

def test_the_network_is_edms_in_a_few_numbers():
    """Recorded from this code when it agreed with all numbers of EDM's own."""
    images = torch.arange(6144).double().sin().view(2, 3, 32, 32)
    net = give_weights(train_cifar.UNet(32, classes=10))
    x_hat = net(images, torch.tensor([0.3, 5.0]), torch.tensor([3, -1]))
    close(x_hat[0, 0, 5, 5:8], [0.879199, 0.620031, -0.038088], atol=1e-4)
    close(x_hat[1, 0, 5, 5:8], [0.224672, 1.059486, 0.830963], atol=1e-4)

def test_the_norm_adds_1e_6_to_the_variance():
    """EDM's choice. torch's own is 1e-5."""
    ramp = torch.tensor([-1e-3, 1e-3]).expand(1, 16, 2)
    close(train_cifar.group_norm(16)(ramp), ramp / 2e-6**0.5, rtol=1e-4)

def test_a_norm_has_at_most_32_groups():
    assert train_cifar.group_norm(384).num_groups == 32

def test_a_copy_with_classes_and_segments_gives_the_same_images():
    """New embeddings begin with zeros, so tuning begins at the trained network."""
    net = small_net()
    images = randn(2, 3, 8, 8)
    copied = train_cifar.extended(net, classes=3, segments=3)
    labels = torch.tensor([2, -1])
    segment = torch.tensor([0, 2])
    assert copied(images, 1.0, labels, segment).equal(net(images, 1.0))

def test_the_segment_matters():
    image = randn(1, 3, 8, 8).expand(2, 3, 8, 8)
    segment = torch.tensor([0, 2])
    first, third = small_net(segments=3)(image, 1.0, segment=segment)
    assert (third - first).abs().max() > 0.1

def test_two_passes_share_the_dropout_mask_of_a_seed():
    net = small_net(dropout=0.5)
    image = randn(1, 3, 8, 8)
    seeds = torch.tensor([5, 6])
    five, six = net(image.expand(2, 3, 8, 8), 1.0, seed=seeds)
    alone = net(image, 1.0, seed=seeds[1:])
    close(alone[0], six, atol=1e-5)
    assert (five - six).abs().max() > 0.1

def test_sampling_has_no_dropout():
    images = generated(small_net(), [0])
    assert generated(small_net(dropout=0.5), [0]).equal(images)

def test_dropout_masks_are_fair_and_unlike_each_other():
    ones = torch.ones(32, 4, 32, 32)
    seeds = torch.arange(32)
    third = train_cifar.dropout(ones, 0.2, seeds, layer=3)
    fourth = train_cifar.dropout(ones, 0.2, seeds, layer=4)
    kept = torch.cat([third, fourth]).flatten(1)
    close(kept.mean(1), 1.0, atol=0.03)
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.08

def test_half_precision_is_near():
    net = small_net()
    images = randn(2, 3, 8, 8)
    right = net(images, 1.0)
    net.dtype = torch.float16
    assert 0 < (net(images, 1.0) - right).abs().max() < 0.05

# ---- One iteration -------------------------------------------------------------------------------
# What it draws depends on (seed, method, iteration) alone. It mixes no devices, and reads no
# value, so nobody waits for a GPU.

def settings_of(line):
    return train_cifar.read_settings(argparse.ArgumentParser(), line.split())

SHORT = "--preset shapes --iters 10 --batch 8 --stages 4 --q 3 --c 7 --huber-eps 0.3 "

def drawn(line, step=3):
    """What one iteration, of a run of 10, draws from 64 images."""
    images, labels, names = fid.shapes(64, 16)
    data = SimpleNamespace(images=images, labels=labels)
    settings = settings_of(f"{SHORT} --method {line}")
    return SimpleNamespace(**train_cifar.draw(data, settings, settings.method, step))

def loss_of(line, d, net, teacher):
    settings = settings_of(f"{SHORT} --method {line}")
    return train_cifar.step_loss(net, teacher, settings, settings.method, **vars(d))

def test_the_preset_cifar10_is_the_recipe_of_ects_hour():
    """Whose authors have an FID of 2.73 in 2 steps."""
    recipe = dict(method="ect", q=256, stages=1, p_mean=-1.1, p_std=2, c=0, batch=128,
                  iters=8_000, lr=1e-4, ema=0.9993, dropout=0.2)
    settings = vars(settings_of("--preset cifar10"))
    assert {name: settings[name] for name in recipe} == recipe

def test_an_iteration_draws_its_own_noise():
    noise = drawn("mct").eps
    assert drawn("mct").eps.equal(noise)
    assert drawn("mct", step=4).eps.ne(noise).any()
    assert drawn("mct --seed 1").eps.ne(noise).any()
    assert drawn("diffusion").eps.ne(noise).any()

def test_a_drawn_label_is_that_of_its_image():
    images, labels, names = fid.shapes(64, 16)
    d = drawn("mct")
    same = d.x[:, None].eq(images).flatten(2).all(2)        # [8, 64]
    right = labels[same.int().argmax(1)]
    kept = d.labels >= 0
    assert d.labels[kept].equal(right[kept])

def test_one_label_in_ten_is_dropped():
    """So a teacher can be guided: it knows images without a label, too."""
    dropped = drawn("mct --batch 9000").labels.eq(-1)
    close(dropped.float().mean(), 0.1, atol=0.01)

@parametrize("step, T", [(0, 8), (5, 64), (9, 64)])
def test_mcm_draws_the_times_of_a_T_that_grows_until_mid_run(step, T):
    t = drawn("mct --steps 1 4 --T 8 64 --batch 9000", step).t
    close(t.unique() * T, torch.arange(T) + 1)

def test_mcm_draws_each_number_of_steps():
    assert drawn("mct --steps 1 4").N.unique().tolist() == [1, 4]

def test_ect_draws_log_normal_times():
    log_t = drawn("ect --p-mean -1 --p-std 0.5 --batch 9000").t.log()
    close(log_t.mean(), -1, atol=0.02)
    close(log_t.std(), 0.5, atol=0.02)

@parametrize("step, stage", [(2, 0), (3, 1), (9, 3)])
def test_ects_stages_are_equally_long(step, stage):
    assert drawn("ect", step).stage.eq(stage).all()

def tiny_net():
    return small_net(16, classes=15, segments=15, dropout=0.1)

def test_diffusion_is_trained_by_mcms_loss_with_the_image_as_target():
    net = tiny_net()
    d = drawn("diffusion")
    loss = loss_of("diffusion", d, net, None)
    D = mcm.conditioned(net, labels=d.labels, seed=d.seed)
    x = d.x / 127.5 - 1
    zero = torch.zeros(8)
    right = mcm.consistency_loss(D, x, d.eps, d.t, zero, zero, edm, huber_eps=1.0)
    close(loss, right, rtol=1e-4)                       # --huber-eps is not for it

@parametrize("line, N", [("ect", 1), ("ect-segmented --steps 4", 4)])
def test_ect_is_trained_by_its_loss(line, N):
    net = tiny_net()
    d = drawn(line)
    loss = loss_of(line, d, net, None)
    D = mcm.conditioned(net, N, labels=d.labels, seed=d.seed)
    x = d.x / 127.5 - 1
    edges = ect.segment_edges(N)
    right = ect.ect_loss(D, x, d.eps, d.t, d.stage, q=3, c=7, edges=edges)
    close(loss, right, rtol=1e-4, atol=1e-5)

@parametrize("line, weight", [
    ("mct --steps 1 2", None), ("mcd", 0), ("mcd --guidance 2", 2)])
def test_mcm_is_trained_by_its_loss(line, weight):
    """The teacher has no dropout, and other weights than the network."""
    net = tiny_net()
    teacher = tiny_net()
    teacher.model.map_layer0.bias += 1
    d = drawn(line)
    loss = loss_of(line, d, net, teacher)
    f = mcm.make_f(net, steps=d.N, labels=d.labels, seed=d.seed)
    x = d.x / 127.5 - 1
    f_teacher = None
    if weight is not None:
        f_labels = mcm.make_f(teacher, labels=d.labels)
        f_teacher = mcm.guided(f_labels, mcm.make_f(teacher), weight)
    more = dict(teacher=f_teacher, huber_eps=0.3)
    right = mcm.consistency_loss(f, x, d.eps, d.t, d.s, d.t_step, **more)
    close(loss, right, rtol=1e-4)

@parametrize("line", [
    "diffusion", "mct --steps 1 2", "mcd --guidance 2", "ect", "ect-segmented --steps 4"])
def test_an_iteration_mixes_no_devices_and_reads_no_value(line):
    """On the meta device a CPU tensor, an .item() or a shape that depends on data raises."""
    net = tiny_net().to("meta").requires_grad_(True)
    teacher = tiny_net().to("meta")
    d = drawn(line)
    for name, value in vars(d).items():
        setattr(d, name, value.to("meta"))
    loss_of(line, d, net, teacher).mean().backward()

# ---- FID -----------------------------------------------------------------------------------------
# A published FID has the Inception graph of 2015, TensorFlow 1's resize, the unbiased covariance
# and n = 50,000. Each must be right to about four digits, whatever precision the host has set.

IMAGE = (torch.arange(3072) * 37 % 256).byte().view(1, 3, 32, 32)

def test_inception_is_the_published_one_in_a_few_numbers():
    """Recorded from this code when it agreed with torch-fidelity's. It includes the resize."""
    net = give_weights(fid.InceptionFID())
    right = [0.062889, 0.145055, 5.975063]
    close(net(IMAGE)[0, ::800], right, atol=5e-4)
    close(net.fold()(IMAGE)[0, ::800], right, atol=5e-4)

def test_random_features_are_these_even_in_autocast():
    with torch.autocast("cpu"):
        features = fid.load_extractor("random", IMAGE)(IMAGE)
    close(features[0, [0, 23, 35]], [-0.01568627, -21.32518, -15.98173], rtol=1e-5)

def test_a_torchscript_network_is_in_eval_mode():
    torch.jit.script(torch.nn.Dropout()).save("net.pt")
    features = fid.load_extractor("net.pt", IMAGE)(IMAGE)
    close(features, IMAGE.flatten(1))

def test_all_images_are_measured():
    """Those of the last batch, which is smaller, too."""
    images = torch.arange(20).view(20, 1)
    assert fid.features_of(images, torch.clone).equal(images)

def test_frechet_distance_is_that_of_scipys_matrix_root():
    cov1 = torch.cov(randn(8, 30))
    cov2 = torch.cov(randn(8, 40))
    root = torch.tensor(scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real)
    right = 8 + (cov1 + cov2 - 2 * root).trace()        # 8: of the means
    close(fid.frechet_distance(torch.zeros(8), cov1, torch.ones(8), cov2), right)

def test_the_covariance_is_unbiased_and_exact_with_a_large_mean():
    features = randn(300, 5).float() + 1e4
    mean, covariance = fid.moments(features)
    close(covariance, np.cov(features.double().numpy().T), rtol=1e-9)

def test_the_floor_is_the_distance_of_n_real_images_from_n_others():
    features = randn(100, 3)
    some, others = features[fid.shuffled(100)[:20]].split(10)
    close(fid.floor_of(features, 10), fid.distance_of(some, others))

def test_only_what_papers_call_fid_is_called_so():
    assert fid.metric_name("inception", 50_000) == "FID"
    assert fid.metric_name("inception", 49_999) == "FD(inception)@49999"
    assert fid.metric_name("random", 50_000) == "FD(random)@50000"

def picture(name, grey=0, side=16, mode="L"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), grey).save(name)

def test_a_folder_is_read_whole_and_nothing_else():
    """A folder in it is a class, a link is followed, and what is hidden is passed over."""
    picture("data/a/1.png", 50)
    picture("other/c/2.GIF", 100)
    picture("data/.hidden/3.png", 150)
    Path("data/b").symlink_to("../other")
    Path("data/notes.txt").write_text("no image")
    images, labels, classes = fid.read_images("data")
    greys = fid.batch_of(images)[:, 0, 0, 0]
    assert greys.tolist() == [50, 100]
    assert labels.tolist() == [0, 1]

# ---- EDM's files ---------------------------------------------------------------------------------
# They are pickles: programs. Genuine ones load to the bit. Of any other, nothing may run, and one
# line says which file it was.

class Module:
    """An object of EDM's: it is pickled with its source code, which must not run."""
    def __init__(self, name, **state):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {}, **state}
        self.saved = dict(module_src="open('PWNED', 'w')", class_name=name, state=state)

    def __reduce__(self):
        return print, (self.saved,)             # a placeholder that edm_pickle renames

def edm_pickle(name="EDMPrecond", sigma_data=0.5):
    """A file like EDM's, with a single layer."""
    weight = torch.nn.Parameter(torch.arange(6.))
    layer = Module("Linear", _parameters={"weight": weight, "bias": None})
    settings = dict(model_channels=8, channel_mult=[1], dropout=0.1)
    settings.update(label_dim=0, img_resolution=8)
    unet = Module("SongUNet", _modules={"layer": layer}, _init_kwargs=settings)
    gain = np.float64(1)                                # to be read, and ignored
    ema = Module(name, _modules={"model": unet}, sigma_data=sigma_data, gain=gain)
    made = pickle.dumps({"ema": ema}, 3)
    return made.replace(b"cbuiltins\nprint\n",
                        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

def load_edm(content):
    Path("net.pkl").write_bytes(content)
    return train_cifar.load_edm("net.pkl")

def test_edms_pickle_loads_without_running_its_source():
    weights, arguments = load_edm(edm_pickle())
    assert weights["model.layer.weight"].equal(torch.arange(6.))
    assert os.listdir() == ["net.pkl"]

@pytest.mark.skipif(not FIXTURES.exists(), reason="../shared is absent")
@parametrize("file, numbers, x, sigma, D", [
    ("edm_uncond_small", "edm_uncond_ch32_io", "x", "sigma", "D"),
    ("ect_snapshot_tiny", "ect_loss_net", "precond_x", "precond_sigma", "D_train")])
def test_a_file_of_edm_or_ect_gives_their_denoiser(file, numbers, x, sigma, D):
    """To the last key: load_state_dict finds each, and no other."""
    weights, arguments = train_cifar.load_edm(FIXTURES / f"{file}.pkl")
    net = train_cifar.UNet(**arguments).requires_grad_(False)
    net.load_state_dict(weights)
    arrays = np.load(FIXTURES / f"{numbers}.npz")
    x_hat = net(torch.tensor(arrays[x]), torch.tensor(arrays[sigma]))
    close(x_hat, arrays[D], rtol=1e-5, atol=3e-5)

# Raw opcodes. c or \x93: look up a name. \x85: a tuple. R, i: call. \x81: make an object.
# The first five leave a file PWNED, if Python's own pickle.loads opens them.
RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85R"
REFUSED_PICKLES = {
    "calls system": RUN + b".",
    "by INST": b"(\x8c\x0btouch PWNEDiposix\nsystem\n.",
    "by name on the stack": b"\x8c\5posix\x8c\6system\x93\x8c\x0btouch PWNED\x85R.",
    "makes an object": b"cnumpy\nmemmap\n(\x8c\5PWNED\x8c\5uint8\x8c\2w+K\0K\1t\x81.",
    "in a storage": b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b".\x85R.",
    "is empty": b"",
    "is no dict": b"N.",
    "is a deep list": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "has another preconditioning": edm_pickle(name="VPPrecond"),
    "has another sigma_data": edm_pickle(sigma_data=1.0)}

@parametrize("attempt", REFUSED_PICKLES)
def test_a_pickle_that_is_not_edms_is_refused_and_runs_nothing(attempt):
    with pytest.raises(InputError, match="^net.pkl"):
        load_edm(REFUSED_PICKLES[attempt])
    assert os.listdir() == ["net.pkl"]

# ---- The programs --------------------------------------------------------------------------------
# One command does the whole job. A run that was stopped, killed or split over processes ends as one
# that was not. What a user can get wrong is one line, before any work.

TINY = ("--preset shapes --data few.npz --pretrain-iters 6 --iters 6 --batch 4 "
        "--fd-samples 16 --seed 2147483648 ")           # a seed beyond int32
NEW = TINY + "--init none --width 8 "
FIRST = NEW + "--method ect --steps 2 1 --classes --lr 0.6 --dropout 0.1 --out first "

def train(line):
    train_cifar.main(line.split())

@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder with 64 images of 16 pixels, and a run on them."""
    path = tmp_path_factory.mktemp("first_run")
    with contextlib.chdir(path):
        images = fid.shapes(64, 16)[0].permute(0, 2, 3, 1).numpy()
        np.savez("few.npz", images, 16 * ["cat", "dog", "dog", "dog"])
        train(FIRST)
    return path

@pytest.fixture
def folder(first_run, monkeypatch):
    """Where a program runs: with a copy of these, and without internet."""
    shutil.copytree(first_run, ".", dirs_exist_ok=True)
    no_internet = Mock(side_effect=OSError, url="u", filename="cifar")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    monkeypatch.setattr(fid, "CIFAR10", no_internet)
    monkeypatch.setenv("TORCH_HOME", "..")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")      # for the processes of torchrun

def vector(weights):
    return torch.cat([value.flatten() for value in weights.values()])

def state_of(out, name="tuned"):
    """The averaged weights that a run leaves, in a vector."""
    return vector(train_cifar.load_checkpoint(f"{out}/{name}.pt")["ema"])

def table_of(out, column):
    rows = json.loads(Path(out, "result.json").read_text())
    return [row[column] for row in rows]

def test_the_table_has_the_diffusion_model_beside_the_tuned_one(folder):
    assert table_of("first", "sampler") == ["ddim", "ddim", "renoise", "renoise", "heun"]
    assert table_of("first", "steps") == [1, 2, 1, 2, 18]
    assert table_of("first", "nfe") == [1, 2, 1, 2, 35]

def test_each_row_is_made_by_an_average_and_the_teacher_stays_as_it_was(folder, generate):
    """The diffusion model of the table is the teacher."""
    train(NEW + "--method mcd --out run")
    assert table_of("run", "method") == ["diffusion", "mcd", "diffusion"]
    for i, name in enumerate(["diffusion", "tuned", "diffusion"]):
        net = generate.call_args_list[i].args[0]
        assert vector(net.state_dict()).equal(state_of("run", name))

def test_samples_for_the_table_have_the_labels_of_real_images(folder, generate):
    train(NEW + "--classes --iters 0 --pretrain-iters 0 --out run")
    labels = fid.read_images("few.npz")[1]
    assert generate.call_args.args[4].equal(labels[fid.shuffled(64)[:16]])

def test_tuning_starts_from_the_averaged_diffusion_model(folder):
    """With a learning rate of 0 it stays there."""
    train(NEW + "--lr 0 --out run")
    begun = train_cifar.load_checkpoint("run/diffusion.pt")["ema"]
    tuned = train_cifar.load_checkpoint("run/tuned.pt")["net"]
    assert vector({key: tuned[key] for key in begun}).equal(vector(begun))

def test_without_classes_there_are_no_labels(folder):
    data = train_cifar.load_data(settings_of(NEW))
    assert data.labels.eq(-1).all()

def test_both_models_of_a_run_have_the_dropout_that_was_asked_for(folder):
    for name in ("diffusion", "tuned"):
        state = train_cifar.load_checkpoint(f"first/{name}.pt")
        assert state["arguments"]["dropout"] == 0.1

def test_the_learning_rate_falls_to_0(folder):
    state = train_cifar.load_checkpoint("first/tuned.pt")
    close(state["optimizer"]["param_groups"][0]["lr"], 0.6 / 6)

def test_the_average_is_a_mean_until_its_decay_is_ema(folder, monkeypatch):
    averages = Mock(return_value=Mock())
    monkeypatch.setattr(torch.optim.swa_utils, "get_ema_multi_avg_fn", averages)
    train(NEW + "--ema 0.7")
    decays = [call.args[0] for call in averages.call_args_list]
    close(decays[:5], [0, 1 / 2, 2 / 3, 0.7, 0.7])

@parametrize("method", ["mcd --classes", "ect-segmented"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, folder, monkeypatch):
    """To the bit, and with the same table. No iteration is made again that was saved."""
    def ctrl_c():
        signal.raise_signal(signal.SIGINT)
    kill = Mock(side_effect=MemoryError)                # after this, nothing can be saved
    tuning = method.split()[0]
    blows = {("diffusion", 2): ctrl_c, ("diffusion", 4): kill, (tuning, 3): ctrl_c}
    draw = train_cifar.draw
    steps = []
    def struck(data, settings, method, step):
        steps.append(step)
        if (method, step) in blows:
            blows.pop((method, step))()                 # each only once
        return draw(data, settings, method, step)
    line = NEW + f"--method {method} --dropout 0.2 --out "
    train(line + "straight")
    monkeypatch.setattr(train_cifar, "draw", struck)
    for error in (SystemExit, MemoryError, SystemExit):
        with pytest.raises(error):
            train(line + "torn")
    Path("torn/.part-tuned.pt").write_text("half")      # as a kill in saving leaves it
    for _ in range(2):
        train(line + "torn")
        assert state_of("torn").equal(state_of("straight"))
        assert table_of("torn", "distance") == table_of("straight", "distance")
    assert len(steps) == 6 + 6 + 2                      # 3 and 4 were lost by the kill

def torchrun(program, line):
    """Runs a program in two processes."""
    flags = ["--standalone", "--nproc-per-node", "2", str(program)]
    torch.distributed.run.main(flags + line.split())

def test_two_processes_give_what_one_gives(folder):
    """And 7 images a batch do not divide."""
    line = NEW + "--method mcd --classes --batch 7 --dropout 0.2 --out "
    train(line + "one")
    torchrun(HERE / "train_cifar.py", line + "two")
    close(state_of("two"), state_of("one"), rtol=1e-3, atol=1e-6)
    close(table_of("two", "distance"), table_of("one", "distance"), rtol=1e-2)

def test_a_ctrl_c_to_one_process_stops_both_and_they_go_on(folder):
    """To the very weights of a run that was not stopped. Iteration 3 comes only once."""
    Path("struck.py").write_text(f"""
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
    with pytest.raises(ChildFailedError):
        torchrun("struck.py", NEW + "--out torn")
    assert train_cifar.load_checkpoint("torn/tuned.pt")["step"] == 4
    torchrun("struck.py", NEW + "--out torn")
    torchrun(HERE / "train_cifar.py", NEW + "--out straight")
    assert state_of("torn").equal(state_of("straight"))

def test_a_file_is_replaced_only_by_a_whole_one():
    path = Path("model.pt")
    path.write_text("first")
    with pytest.raises(MemoryError), train_cifar.atomic(path) as part:
        part.write_text("half")
        raise MemoryError
    assert path.read_text() == "first"

def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(folder, monkeypatch):
    monkeypatch.setattr(mcm, "pseudo_huber", lambda square, c: math.nan * square)
    with pytest.raises(SystemExit, match="iteration 6: .*not finite"):
        train(NEW + "--out run")
    assert not Path("run/diffusion.pt").exists()

def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(train_cifar.UNet, "__init__", Mock(side_effect=NameError))
    with pytest.raises(NameError):
        train(NEW)

def refusal(command, capsys):
    """The one line that a program says before it ends with code 2."""
    program, _, line = command.partition(" ")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.modules[program].main(shlex.split(line))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    return error

@parametrize("setting, named", [("--steps 4", "--steps:"),
    ("--no-classes", "--classes:"), ("--data new.npz", "--data:")])
def test_a_run_does_not_go_on_with_other_settings_or_data(setting, named, folder, capsys):
    np.savez("new.npz", np.load("few.npz")["arr_0"], 32 * ["cat", "dog"])
    assert named in refusal("train_cifar " + FIRST + setting, capsys)

def test_a_model_of_init_is_known_by_its_content_not_its_path(folder, capsys):
    shutil.copy("first/diffusion.pt", "moved.pt")
    train(TINY + "--init first/diffusion.pt --out run")
    train(TINY + "--init moved.pt --out run")
    state = train_cifar.load_checkpoint("moved.pt")
    state["ema"]["model.map_layer0.bias"] += 1
    torch.save(state, "moved.pt")
    assert "--init:" in refusal(f"train_cifar {TINY} --init moved.pt --out run", capsys)

REFUSED = [
    ("train_cifar --method ect-segmented --steps 1 2", "ect-segmented"),
    ("train_cifar --guidance 1", "--guidance"),                 # needs mcd
    ("train_cifar --data few.npz --init shapes", "--init"),     # is for 32 pixels
    ("train_cifar --data three.npz --classes --init first/diffusion.pt", "2 classes"),
    ("train_cifar --data few.npz --init ''", "--init ."),
    ("train_cifar --data few.npz --init nowhere", "nowhere"),
    ("train_cifar --data few.npz --init text.pt", "text.pt"),
    ("train_cifar --data few.npz --features inception", "inception"),
    ("train_cifar --data cifar10", "cifar"),
    ("train_cifar --data odd.npz", "odd"),
    ("train_cifar --data mixed", "larger.png"),
    ("train_cifar --data deep", "deep.png"),                    # 16 bits
    ("sample --steps 3", "--steps 3"),                          # it is for 1, 2, 4, 8
    ("sample --out no/x.png", "no/x.png"),
    ("sample --prompt dog", "--prompt dog"),
    ("fid few.npz few.npz --n 1", "--n 1"),
    ("fid few.npz few.npz --features no", "--features no"),
    ("fid few.npz odd.npz --features random", "sizes")]

@parametrize("command, named", REFUSED)
def test_a_mistake_is_refused_in_one_line_before_any_work(
        command, named, folder, capsys, monkeypatch):
    for work in ("train_cifar.train", "sample.generate", "fid.features_of"):
        monkeypatch.setattr(work, Mock(side_effect=AssertionError))
    np.savez("odd.npz", np.zeros((8, 15, 15, 3), np.uint8))
    np.savez("three.npz", np.zeros((9, 16, 16, 3), np.uint8), 3 * ["cat", "dog", "owl"])
    picture("mixed/0.png")
    picture("mixed/larger.png", side=32)
    picture("deep/deep.png", mode="I;16")
    Path("text.pt").write_text("nothing of the kind")
    before = sorted(Path().rglob("*"))
    assert named in refusal(command, capsys)
    assert sorted(Path().rglob("*")) == before          # nothing was written

def test_a_download_is_checked_by_its_hash(folder):
    with pytest.raises(InputError, match="put https://site/net.pth there"):
        fid.download("https://site/net.pth", "its hash")
    assert torch.hub.download_url_to_file.call_args.args[2] == "its hash"

def test_fid_measures_n_images_from_all_over(folder, capsys):
    fid.main("few.npz few.npz --features random --n 50".split())
    found = re.match(r"FD\(random\)@50 (\d+\.\d+), floor", capsys.readouterr().out)
    features = fid.random_features(fid.read_images("few.npz")[0])
    some = features[fid.shuffled(64)[:50]]
    close(float(found[1]), fid.distance_of(some, features), rtol=1e-3)

@pytest.fixture
def generate(monkeypatch):
    """A sample.generate that makes black images and remembers what it was asked."""
    generate = Mock(return_value=torch.zeros(16, 3, 16, 16).byte())
    monkeypatch.setattr(sample, "generate", generate)
    return generate

@parametrize("line, told", [("", [0, 1, 0]), ("--prompt dog", [1, 1, 1])])
def test_sample_makes_all_classes_in_turn_or_the_prompt(line, told, folder, generate):
    sample.main(["first/tuned.pt", "--n", "3"] + shlex.split(line))
    net, sampler, steps, numbers, labels, seed = generate.call_args.args
    assert labels.tolist() == told

def judge(images):
    """Which class of shapes a picture shows: by colour, and by the share of its box it fills."""
    saturation = images.amax(1).float() - images.amin(1)
    half = saturation.flatten(1).quantile(0.95, 1) / 2
    inside = saturation > half[:, None, None]
    area = inside.sum((1, 2))
    colour = (images * inside[:, None]).sum((2, 3)) / area[:, None]
    hue = torch.cdist(colour, fid.RGB.float()).argmin(1)
    box = inside.any(2).sum(1) * inside.any(1).sum(1)
    filled = area / box
    fills = torch.tensor([math.pi / 4, 1, 1 / 2])       # disc, square, triangle
    form = (filled[:, None] - fills).abs().argmin(1)
    return 3 * hue + form

def test_the_labels_of_the_shapes_are_what_a_judge_sees():
    images, labels, names = fid.shapes(300)
    assert judge(images).eq(labels).float().mean() > 0.98

@parametrize("steps, least", [(2, 0.8), (8, 0.9)])
def test_the_model_that_comes_with_the_code_draws_what_it_is_told(steps, least):
    """In 2 and in 8 steps, colour and form are right in 92% and 97% of 500. (By chance: 7%.)"""
    net = train_cifar.load_network(train_cifar.load_checkpoint(HERE / "assets/dial.pt"))
    told = torch.arange(150) % 15
    seen = judge(sample.generate(net, "multistep", steps, torch.arange(150), told))
    right = seen.eq(told).float().mean()
    print(f"{steps} steps: colour and form right in {right:.0%} of 150")
    assert right > least

# ---- The README ----------------------------------------------------------------------------------
# Its snippets run, with loops of hundreds cut short. Its commands are parsed; nothing is trained.

README = (HERE / "README.md").read_text()
SNIPPETS = re.findall("```python\n(.*?)```", README, re.DOTALL)
COMMAND = r"(?:^|`)(?:python|torchrun .*?) (\w+)\.py ?([^`#\n]*)"
COMMANDS = re.findall(COMMAND, README, re.MULTILINE)

def test_snippets_and_commands_are_found():
    assert len(SNIPPETS) > 1
    assert len(COMMANDS) > 5

@parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    names = {}
    exec(re.sub(r"range\(\d{3,}\)", "range(20)", SNIPPETS[number]), names)
    assert torch.as_tensor(names.get("loss", 0)).isfinite().all()

@parametrize("program, line", COMMANDS)
def test_a_command_is_understood(program, line, generate, monkeypatch):
    dial = train_cifar.load_checkpoint(HERE / "assets/dial.pt")
    monkeypatch.setattr(train_cifar, "load_checkpoint", Mock(return_value=dial))
    monkeypatch.setattr(fid, "read_images", Mock(return_value=fid.shapes(15)))
    monkeypatch.setattr(fid, "load_extractor", Mock(return_value=fid.random_features))
    if program == "train_cifar":
        settings_of(line)
    else:
        sys.modules[program].main(shlex.split(line))
