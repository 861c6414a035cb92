"""What the method guarantees, in the method's order: the name of each test is its claim.

"Eq." and "Algorithm" are those of MCM's paper. No internet and no GPU is needed. A few numbers are
those of the code of ECT, EDM and torch-fidelity. (All are in ../shared, which a clone lacks.)"""
import argparse, contextlib, functools, json, math, os, pickle
import re, shlex, shutil, signal, sys, zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed.run
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.testing import assert_close

import ect, fid, mcm, sample, train_cifar
from fid import InputError
from mcm import alpha_sigma, cosine, edm, mean_per_sample, per_sample

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared/fixtures"
parametrize = pytest.mark.parametrize
assert_same = functools.partial(assert_close, rtol=0, atol=0)
torch.set_num_threads(1)            # for small tensors threads mostly wait for each other
train_cifar.DEVICE = torch.device("cpu")

@pytest.fixture(autouse=True)
def each_test_for_itself(tmp_path, monkeypatch):
    """In an empty folder. Also restores SIGINT, which shells ignore in background jobs."""
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)

def close(actual, expected, rtol=1e-5, atol=1e-6):
    """assert_close, also for arrays, lists and numbers, compared in float64."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    assert_close(actual, expected, rtol=rtol, atol=atol)

def randn(*shape):
    return torch.tensor(np.random.default_rng(0).standard_normal(shape))

# ---- Schedules and steps -------------------------------------------------------------------------
# A schedule gives alpha and sigma at t. edm: alpha = 1, sigma = t. cosine: t in [0, 1]. DDIM moves
# a noisy image from t to s with a guess x of the clean one, and must be right for a right guess.
# aDDIM adds the variance that x lacks, no more.

# The papers' symbols, for the tests of the first three sections: all times t > s >= t_step that
# are multiples of 1/16, and for each of them data x and noise eps, [816, 2, 3].
TIMES = [(t, s, t_step)
         for t in range(17) for s in range(t) for t_step in range(s + 1)]
t, s, t_step = torch.tensor(TIMES).double().T / 16
x, eps = randn(2, len(t), 2, 3)

@pytest.fixture(params=[cosine, edm])
def schedule(request):
    return request.param

def noisy(t, schedule=cosine):
    """x at t, on its path to eps."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    return alpha * x + sigma * eps

# Three networks. Each stands for a denoiser D(z, sigma), and for any f(z, t).
def stand_in(z, sigma):
    """That of shared/fixtures."""
    sigma = per_sample(sigma, z)
    c_in = (sigma**2 + 0.25).rsqrt()
    c_skip = 0.25 * c_in**2
    c_out = 0.5 * sigma * c_in
    return c_skip * z + c_out * torch.tanh(0.7 * c_in * z)

def gaussian(z, sigma, variance=0.3):
    """The exact denoiser of Gaussian data."""
    return z * per_sample(variance / (variance + sigma**2), z)

def black(z, sigma):
    return 0 * z

def test_cosine_preserves_the_variance_between_edms_noise_levels():
    alpha, sigma = cosine(torch.linspace(0, 1, 101))
    close(alpha**2 + sigma**2, 1.0)
    close((sigma / alpha)[[0, 100]], [0.002, 80])

def test_ddim_and_addim_with_the_true_image_stay_on_its_path(schedule):
    """Eq. (4). aDDIM is DDIM where no variance is missing."""
    z_t = noisy(t, schedule)
    z_s = noisy(s, schedule)
    close(mcm.ddim(x, z_t, t, s, schedule), z_s)
    close(mcm.addim(x, z_t, t, s, 0.0, schedule), z_s)

def test_addim_lengthens_the_noise_by_the_missing_variance(schedule):
    """Algorithm 3 with eq. (14). The variance that x lacks is here t. eps keeps its direction."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, x)
    alpha_s, sigma_s = alpha_sigma(schedule, s, x)
    added = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * per_sample(t, x)
    square = eps.square().mean((1, 2), True)
    z_s = mcm.addim(x, noisy(t, schedule), t, s, t, schedule)
    close(z_s, alpha_s * x + (sigma_s**2 + added / square) ** 0.5 * eps)

def test_inverse_ddim_finds_the_image():
    """Eq. (5)."""
    close(mcm.inv_ddim(noisy(s), noisy(t), t, s), x)

# ---- Times and the loss --------------------------------------------------------------------------
# N segments of n teacher steps, about T in all. A step is from t down to s. f must learn the x
# whose jump from z_t ends where the reference's (f at s, without gradient) from z_s ends: at
# t_step, the edge. With s at the edge the target is the data. N = 1: consistency, n = 1: diffusion.
def test_teacher_steps_grow_log_linearly():
    T = [mcm.teacher_steps(i) for i in (0, 50_000, 200_000)]
    close(T, [64, (64 * 1280) ** 0.5, 1280])

@parametrize("N, T, steps", [(3, 25, 24), (8, 3, 8)])
def test_every_teacher_step_of_every_segment_is_drawn(N, T, steps):
    """T is rounded to a whole number of steps in each of the N segments."""
    t, s, t_step = mcm.draw_times(10_000, N, T)
    close(t.unique() * steps, torch.arange(steps) + 1)
    close(t - s, 1 / steps)
    close(t_step * N, (s * N + 1e-4).floor())
    at_the_edge = s < t_step + 1e-4
    assert s[at_the_edge].equal(t_step[at_the_edge])    # to the last bit

@parametrize("N, T", [(3, 64), (64, 8192)])
def test_the_network_is_told_the_segment_that_its_time_was_drawn_in(N, T):
    """Also at its upper edge, if that is rounded up, and above 80, where ECT draws levels."""
    t, s, t_step = mcm.draw_times(10_000, N, T)
    alpha, sigma = cosine(t)
    segment = mcm.segment_of(1.000001 * sigma / alpha, N)
    close(segment, t_step * N)
    assert mcm.segment_of(torch.tensor(100.0), N) == N - 1

def test_at_the_edge_the_loss_is_a_norm_of_the_error_times_snr_plus_1(schedule):
    """There the target is x, eq. (8): what a diffusion model learns. A pseudo-Huber norm."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    error = stand_in(noisy(t, schedule), t) - x
    square = mean_per_sample(error**2 * (alpha**2 / sigma**2 + 1))
    loss = mcm.consistency_loss(stand_in, x, eps, t, s, s, schedule, huber_eps=0.1)
    close(loss, (square + 0.1**2) ** 0.5 - 0.1)

def test_above_the_edge_the_target_lands_where_the_reference_lands(schedule):
    """For edm and t_step = 0, this is the target of a consistency model (Song et al.)."""
    z_t = noisy(t, schedule)
    z_s = noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, t_step, schedule)
    landed = mcm.ddim(target, z_t, t, t_step, schedule)
    reference = mcm.ddim(stand_in(z_s, s), z_s, s, t_step, schedule)
    above = s > t_step
    close(landed[above], reference[above])

def test_only_the_guess_at_t_has_a_gradient():
    """In MCM's loss and in ECT's. The guess before it is the reference."""
    has_gradient = []
    def f(z, time):
        has_gradient.append(torch.is_grad_enabled())
        return stand_in(z, time)
    mcm.consistency_loss(f, x, eps, t, s, t_step)
    ect.ect_loss(f, x, eps, t, stage=3)
    assert has_gradient == [False, True, False, True]

def reference_asked(**more):
    """What the reference is asked: z_s and a time. It may be another network than f."""
    f_ref = Mock(side_effect=stand_in)
    mcm.consistency_loss(stand_in, x, eps, t, s, t_step, f_ref=f_ref, **more)
    return f_ref.call_args.args

def test_the_reference_is_asked_at_s_or_where_no_jump_is_left_at_t():
    """So never at time 0, where a network would take the logarithm of 0."""
    z_s, time = reference_asked()
    assert time.equal(torch.where(s > t_step, s, t))

def test_a_teacher_steps_with_three_quarters_of_its_squared_error():
    """x_var: 0.75 x error^2 of the conditional guess, 0 at s = 0. The step uses the guided one."""
    z_t = noisy(t)
    x_hat = stand_in(z_t, t)
    x_guided = x_hat + 2 * (x_hat - gaussian(z_t, t))
    x_var = (s > 0) * 0.75 * mean_per_sample((x_hat - x) ** 2)
    z_s, time = reference_asked(teacher=mcm.guided(stand_in, gaussian, 2))
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

def test_the_weight_is_over_the_very_r_that_the_network_sees():
    """In float32 r is rounded, and 1 / (t - r) must be that of the rounded r. With D = ln sigma
    the loss is (ln t - ln r) / (t - r), which is 1 / t for a small t - r."""
    def D(z, sigma):
        return sigma.double().log()
    sigma = torch.linspace(0.01, 80, 1000)
    zero = torch.zeros(1000)
    loss = ect.ect_loss(D, zero, zero, sigma, stage=15)
    close(loss * sigma, 1.0, rtol=1e-4)

@parametrize("stage, q", [(0, 2), (7, 256)])
def test_ects_loss_and_gradient_are_finite_where_r_is_0_or_rounds_to_t(stage, q):
    """In float32. Where r rounds to t, the authors' is 0 / 0, and a bare root has the slope NaN."""
    image = x.float().requires_grad_()
    loss = ect.ect_loss(stand_in, image, eps.float(), t.float(), stage, q)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert image.grad.isfinite().all()

@parametrize("sigma", [4 * t, 0.9898 + 0.001 * t])
def test_in_segments_the_places_where_the_guesses_land_are_compared(sigma):
    """In two of them. A black guess lands at edge / sigma z. Just above the edge, 0.9896, the
    weight 1 / (t - r) is up to 3000, but the loss is bounded."""
    edges = ect.segment_edges(2).double()
    edge = torch.where(sigma > edges, edges, 0.0)
    r = edge.maximum(ect.t_to_r(sigma, 3))
    loss = ect.ect_loss(black, x, eps, sigma, 3, edges=edges)
    close(loss, edge / (r * sigma) * x.norm(dim=(1, 2)))

# ---- Samplers ------------------------------------------------------------------------------------
# With an exact network a sampler must reach the right images: in one jump, or with its order of
# accuracy. It asks at the right noise levels. An image depends on its seed, number and label alone.
# multistep is DDIM. renoise guesses x, adds fresh noise of the next level, and guesses again.
def gaussian_jump(z, sigma, N):
    """The exact jump of Gaussian data to the edge: on the flow, z goes as (0.3 + sigma^2)^1/2."""
    edges = torch.cat([torch.zeros(1), ect.segment_edges(N)])       # 0: of the image
    edge = edges[mcm.segment_of(sigma, N)]
    shrink = ((0.3 + edge**2) / (0.3 + sigma**2)) ** 0.5
    return mcm.inv_ddim(z * per_sample(shrink, z), z, sigma, edge, edm)

@parametrize("N", [1, 4])
def test_multistep_with_the_exact_f_makes_the_data(N):
    """Algorithm 2. And make_f asks at the right noise level: else a jump would end elsewhere."""
    z = randn(1000, 3)
    f = mcm.make_f(gaussian_jump, N=N)
    close(sample.multistep(f, z, N), 0.3**0.5 * z, rtol=1e-4)

def test_addim_puts_back_the_variance_that_the_paper_guesses():
    """Algorithm 3: 0.1 / (2 + SNR)."""
    alpha, sigma = cosine(0.7)
    x_var = 0.1 / (2 + (alpha / sigma) ** 2)
    right = mcm.addim(stand_in(x, 0.7), x, 0.7, 0.1, x_var)
    close(sample.addim(stand_in, x, [0.7, 0.1]), stand_in(right, 0.1))

def test_heun_is_of_second_order():
    z = randn(100)
    truth = 80 * (0.3 / 6400.3) ** 0.5 * z
    def error(steps):
        return (sample.heun(gaussian, z, steps) - truth).norm()
    close(error(64) / error(128), 4, atol=1)

def test_renoise_gives_a_number_of_the_authors():
    latents = torch.tensor([0.33209962]).double()
    noise = torch.tensor([[0.85046473], [-0.12100735]])
    made = sample.renoise(stand_in, latents, [80, 5, 0.821], noise)
    close(made, 0.12394429, rtol=1e-7)

def test_of_a_samplers_steps_only_the_result_is_rounded():
    """Its state is float64. Guesses of 0 shrink the noise, step by step. The last one shows it."""
    z = randn(100).float()
    def f(z, time):
        return z * (time < 0.015)
    exact = sample.multistep(f, z.double(), 100)
    assert sample.multistep(f, z, 100).equal(exact.float())

def test_a_sampler_gives_f_the_noises_dtype_but_times_in_float32():
    f = Mock(side_effect=stand_in)
    sample.multistep(f, randn(2).bfloat16(), 2)
    z, time = f.call_args.args
    assert z.dtype == torch.bfloat16
    assert time.dtype == torch.float32

def test_noise_in_bfloat16_has_its_level_in_float32():
    """In bfloat16, sigma 80 would be 62. D gets float32 from f, too."""
    D = Mock()
    mcm.make_f(D)(randn(2).bfloat16(), 1.0)
    z, sigma = D.call_args.args
    close(sigma, 80)
    assert z.dtype == torch.float32

@parametrize("sampler, steps, levels, row", [
    ("multistep", 3, [80, 1.701787, 0.573579], 5),
    ("renoise", 3, [80, 1.701787, 0.573579], 0),
    ("renoise", 2, [80, 0.821], 0),
    ("heun", 2, [80, 0.002, 0.002], None)])                     # it tells no segment
def test_a_sampler_asks_at_these_noise_levels_and_segments(sampler, steps, levels, row):
    """0.821 is ECT's, those in between are cosine's. Row N (N - 1) / 2 + i is segment i of N."""
    noise = torch.ones(steps, 1)
    net = Mock(return_value=noise[0])
    sample.sample_batch(net, sampler, steps, noise, labels=None)
    calls = net.call_args_list
    close(torch.cat([call.args[1] for call in calls]), levels)
    assert calls[0].kwargs.get("segment") == row

class Dim(torch.nn.Linear):
    """A network that guesses x / 1000, with label 1 twice that, with label 2 three times, ..."""
    image_shape = (3, 4, 4)
    def forward(self, x, sigma, labels, segment=None):
        assert x.dtype == torch.float32                 # a sampler's state is float64
        return x * per_sample(0.001 * (1 + labels), x)

def generated(sampler, numbers, labels, seed=0):
    return sample.generate(Dim(1, 1), sampler, 2, numbers, labels, seed)

@parametrize("sampler", ["multistep", "ddim", "renoise", "heun"])
def test_an_image_depends_on_its_seed_number_and_label_alone(sampler):
    """Not on the batch that it is made in: 60 images are two batches."""
    numbers = torch.arange(60)
    images = generated(sampler, numbers, numbers % 3)
    some = torch.tensor([55, 3])
    labels = some % 3
    assert generated(sampler, some, labels).equal(images[some])
    assert not generated(sampler, some, labels + 1).equal(images[some])
    assert not generated(sampler, some, labels, seed=1).equal(images[some])
    assert not images[0].equal(images[3])

def test_an_image_that_is_too_bright_is_white_and_not_black():
    """Here x is about as large as the noise of sigma = 80, so half of it is more than 255."""
    labels = 999 * torch.ones(9)
    images = generated("renoise", torch.arange(9), labels)
    close(images.eq(255).float().mean(), 0.5, atol=0.1)

# ---- The network ---------------------------------------------------------------------------------
# It is EDM's to the last key, so that the published weights give the published denoiser. What is
# new in it begins without effect. Both passes of an iteration have the same dropout mask.
image = randn(1, 3, 8, 8)
twins = image.expand(2, 3, 8, 8)

def give_weights(net):
    """They are drawn by their keys. A matrix keeps the size of what it maps (before a ReLU)."""
    state = net.requires_grad_(False).state_dict()
    for key, value in state.items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        drawn = rng.uniform(0.5, 1.5, value.shape)
        if value.ndim > 1:
            drawn = rng.standard_normal(value.shape) * (2 / value[0].numel()) ** 0.5
        value.copy_(torch.as_tensor(drawn))
    return net

def small_net(side=8, **more):
    net = train_cifar.UNet(16, (1,), 1, side, attention=(), **more)
    return give_weights(net)

def test_the_network_is_edms_in_a_few_numbers():
    """Recorded from this code when it agreed with all numbers of EDM's own."""
    images = torch.arange(6144).double().sin().view(2, 3, 32, 32)
    net = give_weights(train_cifar.UNet(32, classes=10))
    sigma = torch.tensor([0.3, 5.0])
    labels = torch.tensor([3, -1])
    x_hat = net(images, sigma, labels)
    right = [[1.409036, 1.175469, 0.338598],
             [1.255795, 1.378371, 1.309454]]
    close(x_hat[:, 0, 5, 5:8], right, atol=1e-4)
    assert train_cifar.group_norm(384).eps == 1e-6      # torch's own is 1e-5

def test_a_copy_with_classes_and_segments_gives_the_same_images():
    """New embeddings begin with zeros, so tuning begins at the trained network."""
    net = small_net()
    copied = train_cifar.extended(net, classes=3, segments=3)
    labels = torch.tensor([2, -1])
    segment = torch.tensor([0, 2])
    assert copied(twins, 1.0, labels, segment).equal(net(twins, 1.0))

def test_the_segment_matters():
    segment = torch.tensor([0, 2])
    first, third = small_net(segments=3)(twins, 1.0, segment=segment)
    assert not third.allclose(first, atol=0.01)

def test_two_passes_share_the_dropout_mask_of_a_seed():
    net = small_net(dropout=0.5)
    seeds = torch.tensor([5, 6])
    five, six = net(twins, 1.0, seed=seeds)
    alone = net(image, 1.0, seed=seeds[1:])
    assert_close(alone[0], six)
    assert not five.allclose(six, atol=0.1)
    assert net(image, 1.0).equal(small_net()(image, 1.0))       # no seed, as in sampling

def test_dropout_masks_are_fair_and_unlike_each_other():
    ones = torch.ones(32, 4, 32, 32)
    seeds = torch.arange(32)
    masks = [train_cifar.dropout(ones, 0.2, seeds, layer) for layer in (3, 4)]
    kept = torch.cat(masks).flatten(1)
    close(kept.mean(1), 1.0, atol=0.03)
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.08

def test_half_precision_is_near():
    net = small_net()
    right = net(image, 1.0)
    net.dtype = torch.float16
    assert 0 < (net(image, 1.0) - right).abs().max() < 0.05

# ---- One iteration -------------------------------------------------------------------------------
# What it draws depends on (seed, method, iteration) alone. It mixes no devices, and reads no
# value, so nobody waits for a GPU.
SHORT = ("--preset shapes --iters 10 --batch 8 --stages 4 --q 3 --c 7 --huber-eps 0.3 "
         "--method ")

def settings_of(line):
    return train_cifar.read_settings(argparse.ArgumentParser(), line.split())

def drawn(line, step=3):
    """What one iteration, of a run of 10, draws from 64 images. A corner tells an image's label."""
    images = fid.shapes(64, 16)[0]
    labels = images[:, 0, 0, 0].long() % 15
    data = SimpleNamespace(images=images, labels=labels)
    settings = settings_of(SHORT + line)
    return SimpleNamespace(**train_cifar.draw(data, settings, settings.method, step))

def test_the_preset_cifar10_is_the_recipe_of_ects_hour():
    recipe = ("--method ect --q 256 --stages 1 --p-mean -1.1 --p-std 2 --c 0 --batch 128 "
              "--iters 8000 --lr 1e-4 --ema 0.9993 --dropout 0.2")
    assert settings_of("--preset cifar10") == settings_of("--preset cifar10 " + recipe)

def test_an_iteration_draws_its_own_noise():
    noise = drawn("mct").eps
    assert drawn("mct").eps.equal(noise)
    for other in (drawn("mct", step=4), drawn("mct --seed 1"), drawn("diffusion")):
        assert other.eps.ne(noise).any()

def test_nine_in_ten_images_keep_their_label():
    d = drawn("mct --batch 9000")
    kept = d.labels >= 0
    right = d.x[:, 0, 0, 0] % 15
    close(d.labels[kept], right[kept])
    close(kept.float().mean(), 0.9, atol=0.01)

@parametrize("step, T", [(0, 8), (5, 64)])
def test_mcm_draws_each_N_and_times_of_a_T_that_grows_until_mid_run(step, T):
    d = drawn("mct --steps 1 4 --T 8 64 --batch 9000", step)
    close(d.t.unique() * T, torch.arange(T) + 1)
    close(d.N.unique(), [1, 4])

def test_ect_draws_log_normal_times():
    log_t = drawn("ect --p-mean -1 --p-std 0.5 --batch 9000").t.log()
    close(log_t.mean(), -1, atol=0.02)
    close(log_t.std(), 0.5, atol=0.02)

def test_ects_stages_are_equally_long():
    stages = [drawn("ect", step).stage[0] for step in (2, 3, 9)]
    assert stages == [0, 1, 3]

def tiny_net(bias=0.0):
    net = small_net(16, classes=15, segments=15, dropout=0.1)
    net.model.map_layer0.bias += bias
    return net

def iteration(line, device="cpu"):
    """What an iteration draws, and its loss. The teacher has other weights than the network."""
    d = drawn(line)
    for name, value in vars(d).items():
        setattr(d, name, value.to(device))
    net = tiny_net().to(device).requires_grad_()
    teacher = tiny_net(bias=1).to(device)
    settings = settings_of(SHORT + line)
    loss = train_cifar.step_loss(net, teacher, settings, settings.method, **vars(d))
    d.x = d.x / 127.5 - 1                               # as the formulas have it
    return d, loss

def test_diffusion_is_trained_by_mcms_loss_with_the_image_as_target():
    d, loss = iteration("diffusion")
    D = mcm.conditioned(tiny_net(), labels=d.labels, seed=d.seed)
    zero = torch.zeros(8)
    right = mcm.consistency_loss(D, d.x, d.eps, d.t, zero, zero, edm, huber_eps=1.0)
    close(loss, right)                                  # --huber-eps is not for it

@parametrize("line, N", [("ect", 1), ("ect-segmented --steps 4", 4)])
def test_ect_is_trained_by_its_loss(line, N):
    d, loss = iteration(line)
    D = mcm.conditioned(tiny_net(), N, labels=d.labels, seed=d.seed)
    edges = ect.segment_edges(N)
    right = ect.ect_loss(D, d.x, d.eps, d.t, d.stage, q=3, c=7, edges=edges)
    close(loss, right)

@parametrize("line, weight", [
    ("mct --steps 1 2", None), ("mcd", 0), ("mcd --guidance 2", 2)])
def test_mct_and_mcd_are_trained_by_mcms_loss(line, weight):
    d, loss = iteration(line)
    f = mcm.make_f(tiny_net(), steps=d.N, labels=d.labels, seed=d.seed)
    teacher = None
    if weight is not None:
        net = tiny_net(bias=1)                          # without seed: no dropout
        cond = mcm.make_f(net, labels=d.labels)
        uncond = mcm.make_f(net)
        teacher = mcm.guided(cond, uncond, weight)
    right = mcm.consistency_loss(f, d.x, d.eps, d.t, d.s, d.t_step,
                                 teacher=teacher, huber_eps=0.3)
    close(loss, right)

@parametrize("line", [
    "diffusion", "mct --steps 1 2", "mcd --guidance 2", "ect", "ect-segmented --steps 4"])
def test_an_iteration_mixes_no_devices_and_reads_no_value(line):
    """On the meta device a CPU tensor, an .item() or a shape that depends on data raises."""
    d, loss = iteration(line, "meta")
    loss.mean().backward()

# ---- FID -----------------------------------------------------------------------------------------
# A published FID has the Inception graph of 2015, TensorFlow 1's resize, the unbiased covariance
# and n = 50,000. Each must be right to about four digits, whatever precision the host has set.
IMAGE = (torch.arange(3072) * 37 % 256).byte().view(1, 3, 32, 32)

def test_inception_is_the_published_one_in_a_few_numbers():
    """Recorded from this code when it agreed with torch-fidelity's. It includes the resize."""
    net = give_weights(fid.InceptionFID())
    right = [3.884275, 6.404632, 8.126444, 3.206826]
    some = [0, 800, 1600, 1862]
    close(net(IMAGE)[0, some], right, atol=5e-4)
    close(net.fold()(IMAGE)[0, some], right, atol=5e-4)

def test_random_features_are_these_even_in_autocast():
    with torch.autocast("cpu"):
        features = fid.load_extractor("random", IMAGE)(IMAGE)
    close(features[0, [0, 23, 35]], [-0.01568627, -21.32518, -15.98173])

def test_a_torchscript_network_is_in_eval_mode():
    torch.jit.script(torch.nn.Dropout()).save("net.pt")
    features = fid.load_extractor("net.pt", IMAGE)(IMAGE)
    close(features, IMAGE.flatten(1))

def test_frechet_distance_is_that_of_scipys_matrix_root():
    cov1 = np.cov(randn(8, 30))
    cov2 = np.cov(randn(8, 40))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    right = 8 + np.trace(cov1 + cov2 - 2 * root)        # 8: of the means
    distance = fid.frechet_distance(torch.zeros(8), cov1, torch.ones(8), cov2)
    close(distance, right)

def test_the_covariance_is_unbiased_and_exact_with_a_large_mean():
    features = randn(300, 5).float() + 1e4
    mean, covariance = fid.moments(features)
    close(covariance, np.cov(features.double().T))

def test_the_floor_is_the_distance_of_n_real_images_from_n_others():
    features = randn(100, 3)
    drawn = fid.shuffled(100)[:20]
    some, others = features[drawn].split(10)
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
    assert classes == ["a", "b/c"]

# ---- EDM's files ---------------------------------------------------------------------------------
# They are pickles: programs. Genuine ones load to the bit. Of any other, nothing may run, and one
# line says which file it was.
class Module:
    """An object of EDM's: a function (here print) is to be called with its source code and state,
    but must not be, nor may the code run."""
    def __init__(self, name, **state):
        self.saved = dict(module_src="open('PWNED', 'w')", class_name=name, state=state)
    def __reduce__(self):
        return print, (self.saved,)

def edm_pickle(name="EDMPrecond", sigma_data=0.5):
    weight = torch.nn.Parameter(torch.arange(6.))
    settings = dict(model_channels=8, channel_mult=[1], dropout=0.1,
                    label_dim=0, img_resolution=8)
    unet = Module("SongUNet", _parameters={"weight": weight}, _init_kwargs=settings)
    gain = np.float64(1)                                # to be read, and ignored
    ema = Module(name, _modules={"model": unet}, sigma_data=sigma_data, gain=gain)
    return pickle.dumps({"ema": ema}, 3)

def load_edm(content):
    Path("net.pkl").write_bytes(content)
    return train_cifar.load_edm("net.pkl")

def test_edms_pickle_loads_without_running_its_source():
    weights, arguments = load_edm(edm_pickle())
    assert weights["model.weight"].equal(torch.arange(6.))
    assert os.listdir() == ["net.pkl"]

@pytest.mark.skipif(not FIXTURES.exists(), reason="../shared is absent")
@parametrize("file, numbers, names", [
    ("edm_uncond_small", "edm_uncond_ch32_io", "x sigma D"),
    ("ect_snapshot_tiny", "ect_loss_net", "precond_x precond_sigma D_train")])
def test_a_file_of_edm_or_ect_gives_their_denoiser(file, numbers, names):
    weights, arguments = train_cifar.load_edm(FIXTURES / f"{file}.pkl")
    net = train_cifar.UNet(**arguments).requires_grad_(False)
    net.load_state_dict(weights)                        # finds each key, and no other
    arrays = np.load(FIXTURES / f"{numbers}.npz")
    x, sigma, D = [torch.tensor(arrays[name]) for name in names.split()]
    close(net(x, sigma), D, atol=3e-5)

# Raw opcodes: c looks up a name, \x85 makes a tuple, R calls. With pickle.loads, RUN makes PWNED.
RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85R"
REFUSED_PICKLES = {
    "calls system": RUN + b".",
    "in a storage": b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b".\x85R.",
    "is damaged": edm_pickle()[:-9],
    "is no dict": b"N.",
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
        images = fid.shapes(64, 16)[0].permute(0, 2, 3, 1)
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

def state_of(out, name="tuned"):
    """The averaged weights that a run leaves."""
    return train_cifar.load_checkpoint(f"{out}/{name}.pt")["ema"]

def table_of(out, column):
    rows = json.loads(Path(out, "result.json").read_text())
    return [row[column] for row in rows]

def test_the_table_has_the_diffusion_model_beside_the_tuned_one(folder):
    assert table_of("first", "sampler") == ["ddim", "ddim", "renoise", "renoise", "heun"]
    assert table_of("first", "nfe") == [1, 2, 1, 2, 35]

def test_each_row_is_made_by_an_average_with_labels_of_real_images(folder, generate):
    """The diffusion model of the table is the teacher, which stayed as it was."""
    train(NEW + "--method mcd --classes --out run")
    assert table_of("run", "method") == ["diffusion", "mcd", "diffusion"]
    images, labels, names = fid.read_images("few.npz")
    drawn = labels[fid.shuffled(64)[:16]]
    for call, name in zip(generate.call_args_list, ["diffusion", "tuned", "diffusion"]):
        net = call.args[0]
        assert_same(net.state_dict(), state_of("run", name))
        assert call.args[4].equal(drawn)

def test_tuning_starts_from_the_averaged_diffusion_model(folder):
    """With a learning rate of 0 it stays there, so both make the same images by DDIM."""
    train(NEW + "--lr 0 --out run")
    before, after, by_heun = table_of("run", "distance")
    assert after == before

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
    averages = Mock()
    monkeypatch.setattr(torch.optim.swa_utils, "get_ema_multi_avg_fn", averages)
    train(NEW + "--ema 0.7")
    decays = [call.args[0] for call in averages.call_args_list]
    close(decays[:4], [0, 0.5, 2 / 3, 0.7])

@pytest.fixture
def struck(monkeypatch):
    """The function that draws. Its calls 3 and 12 are struck by Ctrl-C, its call 5 by a kill."""
    draw = Mock(wraps=train_cifar.draw)
    def strike(*given):
        if draw.call_count in (3, 12):
            signal.raise_signal(signal.SIGINT)
        if draw.call_count == 5:
            raise MemoryError                           # so nothing can be saved
        return DEFAULT
    draw.side_effect = strike
    monkeypatch.setattr(train_cifar, "draw", draw)
    return draw

@parametrize("method", ["mcd --classes", "ect-segmented"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, folder, struck):
    """To the bit, and with the same table. No iteration is made again that was saved."""
    line = NEW + f"--method {method} --dropout 0.2 --out "
    for error in (SystemExit, MemoryError, SystemExit):
        with pytest.raises(error):
            train(line + "torn")
    Path("torn/.part-tuned.pt").write_text("half")      # as a kill in saving leaves it
    train(line + "torn")
    train(line + "torn --precision fp16")               # for a GPU. No iteration is left.
    assert struck.call_count == 6 + 6 + 2               # 2 were lost by the kill
    train(line + "straight")
    assert_same(state_of("torn"), state_of("straight"))
    assert table_of("torn", "distance") == table_of("straight", "distance")

def torchrun(program, line):
    flags = ["--standalone", "--nproc-per-node", "2", str(program)]
    torch.distributed.run.main(flags + line.split())

def test_two_processes_give_what_one_gives_even_if_one_of_them_is_struck(folder):
    """A Ctrl-C to one of two stops both. They go on to the weights of one that was not struck."""
    line = NEW + "--method mcd --classes --dropout 0.2 --batch 7 --out "    # 4 + 3
    train(line + "one")
    Path("struck.py").write_text(f"""
import signal, sys
sys.path.insert(0, "{HERE}")
import train_cifar
draw = train_cifar.draw
def struck(data, settings, method, step):
    if (train_cifar.RANK, method, step) == (1, "mcd", 3):
        signal.raise_signal(signal.SIGINT)
    return draw(data, settings, method, step)
train_cifar.draw = struck
train_cifar.main()
""")
    with pytest.raises(ChildFailedError):
        torchrun("struck.py", line + "two")
    assert train_cifar.load_checkpoint("two/tuned.pt")["step"] == 4
    torchrun(HERE / "train_cifar.py", line + "two")
    assert_close(state_of("two"), state_of("one"), rtol=1e-3, atol=1e-6)
    close(table_of("two", "distance"), table_of("one", "distance"), rtol=1e-2)

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
    program, arguments = command.split(" ", 1)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        sys.modules[program].main(arguments.split())
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error

def test_a_run_does_not_go_on_with_other_settings_or_data(folder, capsys):
    assert "--steps:" in refusal(f"train_cifar {FIRST} --steps 4", capsys)
    images = np.load("few.npz")["arr_0"]
    np.savez("few.npz", images, 32 * ["cat", "dog"])    # the same name
    assert "--data:" in refusal(f"train_cifar {FIRST}", capsys)

def test_a_model_of_init_is_known_by_its_content_not_its_path(folder, capsys):
    line = TINY + "--method diffusion --out run --init "
    shutil.copy("first/diffusion.pt", "moved.pt")
    train(line + "first/diffusion.pt")
    train(line + "moved.pt")
    state = train_cifar.load_checkpoint("moved.pt")
    state["ema"]["model.map_layer0.bias"] += 1
    torch.save(state, "moved.pt")
    assert "--init:" in refusal(f"train_cifar {line} moved.pt", capsys)

REFUSED = {
    "train_cifar --method ect-segmented --steps 1 2": "ect-segmented",
    "train_cifar --guidance 1": "--guidance",                 # needs mcd
    "train_cifar --stages 21": "q^stages",
    "train_cifar --data few.npz --init shapes": "--init",     # is for 32 pixels
    "train_cifar --data four.npz --classes --init first/diffusion.pt": "2 classes",
    "train_cifar --data few.npz --init nowhere": "nowhere",
    "train_cifar --data few.npz --init other.pt": "other.pt: damaged",
    "train_cifar --data few.npz --features inception": "inception",
    "train_cifar --data few.npz --features net.pt": "net.pt",   # is for 3 numbers
    "train_cifar --data cifar10": "cifar",
    "train_cifar --data odd.npz": "odd",
    "train_cifar --data damaged.npz": "damaged.npz",
    "train_cifar --data mixed": "larger.png",
    "train_cifar --data deep": "deep.png",                    # 16 bits
    "sample --steps 3": "--steps 3",                          # it is for 1, 2, 4, 8
    "sample --out no/x.png": "no/x.png",
    "sample --prompt dog": "--prompt dog",
    "fid few.npz few.npz --n 1": "--n 1",
    "fid few.npz few.npz --features no": "--features no",
    "fid few.npz odd.npz --features random": "sizes"}

@parametrize("command, named", REFUSED.items())
def test_a_mistake_is_refused_in_one_line_before_any_work(
        command, named, folder, capsys, monkeypatch):
    for work in ("train_cifar.train", "sample.generate", "fid.features_of"):
        monkeypatch.setattr(work, None)
    images = np.load("few.npz")["arr_0"]
    np.savez("odd.npz", images[:, 1:, 1:])
    np.savez("four.npz", images, 16 * ["cat", "cow", "dog", "owl"])
    torch.save({}, "other.pt")
    torch.jit.script(torch.nn.Linear(3, 3)).save("net.pt")
    Path("damaged.npz").write_bytes(b"PK\3\4")
    picture("mixed/0.png")
    picture("mixed/larger.png", side=32)
    picture("deep/deep.png", mode="I;16")
    assert named in refusal(command, capsys)
    assert not Path("runs").exists()

def test_a_download_is_checked_by_its_hash(folder):
    with pytest.raises(InputError, match="put https://site/net.pth there"):
        fid.download("https://site/net.pth", "its hash")
    assert torch.hub.download_url_to_file.call_args.args[2] == "its hash"

@parametrize("asked, n", [(50, 50), (99, 64)])
def test_fid_measures_n_images_from_all_over_or_all(asked, n, folder, capsys):
    fid.main(f"few.npz few.npz --features random --n {asked}".split())
    features = fid.random_features(fid.read_images("few.npz")[0])
    some = features[fid.shuffled(64)[:n]]
    distance = fid.distance_of(some, features)
    assert f"FD(random)@{n} {distance:.4f}, floor" in capsys.readouterr().out

@pytest.fixture
def generate(monkeypatch):
    """A sample.generate that returns these images and remembers what it was asked."""
    generate = Mock(return_value=fid.shapes(16, 16)[0])
    monkeypatch.setattr(sample, "generate", generate)
    return generate

def test_an_npz_of_samples_holds_them_as_they_were_made(folder, generate):
    generate.return_value = fid.read_images("few.npz")[0]
    sample.main("first/tuned.pt --out made.npz".split())
    assert fid.read_images("made.npz")[0].equal(generate.return_value)
    assert generate.call_args.args[2] == 2              # the most steps it was tuned for

@parametrize("line, told", [("", [0, 1, 0]), ("--prompt dog", [1, 1, 1])])
def test_sample_makes_all_classes_in_turn_or_the_prompt(line, told, folder, generate):
    sample.main(f"first/tuned.pt --n 3 {line}".split())
    assert generate.call_args.args[4].tolist() == told

def judge(image):
    """Which class a picture of shapes shows: the nearest colour, the form whose mask fits best."""
    saturation = image.amax(0).float() - image.amin(0)
    inside = saturation > saturation.quantile(0.95) / 2         # [H, W]
    colour = image[:, inside].float().mean(1)
    hue = (fid.RGB - colour).norm(dim=1).argmin()
    box = inside[inside.any(1)][:, inside.any(0)]
    y = torch.linspace(-0.9, 0.9, len(box))[:, None]
    x = torch.linspace(-0.9, 0.9, len(box.T))
    disc = x.hypot(y) < 1
    triangle = x.abs() < (y + 1) / 2
    masks = torch.stack([disc, disc | True, triangle])          # a square fills its box
    form = masks.eq(box).sum((1, 2)).argmax()
    return 3 * hue + form

def share_right(images, labels):
    return torch.stack([judge(image) for image in images]).eq(labels).float().mean()

def test_the_labels_of_the_shapes_are_what_a_judge_sees():
    images, labels, names = fid.shapes(300)
    assert share_right(images, labels) > 0.98

@parametrize("steps", [2, 8])
def test_the_model_that_comes_with_the_code_draws_what_it_is_told(steps):
    """In 2 and in 8 steps, colour and form are right in 97% and 98% of 500. (By chance: 7%.)"""
    net = train_cifar.load_network(train_cifar.load_checkpoint(HERE / "assets/dial.pt"))
    numbers = torch.arange(150)
    told = numbers % 15
    images = sample.generate(net, "multistep", steps, numbers, told)
    assert share_right(images, told) > 0.93

# ---- The README ----------------------------------------------------------------------------------
# Its snippets run, with loops of hundreds cut short. Its commands are parsed; nothing is trained.
README = (HERE / "README.md").read_text()
SNIPPETS = re.findall("```python\n(.*?)```", README, re.DOTALL)
COMMAND = r"(?:^|`|&& )(?:python|torchrun .*?) (\w+)\.py ?([^`#&\n]*)"
COMMANDS = re.findall(COMMAND, README, re.MULTILINE)
assert len(COMMANDS) > 5

@parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    names = {}
    exec(re.sub(r"range\(\d{3,}\)", "range(20)", SNIPPETS[number]), names)
    assert torch.as_tensor(names.get("loss", 0)).isfinite().all()

@parametrize("N", [1, 2, 8])
def test_a_network_that_predicts_noise_can_make_the_data_on_its_own_schedule(N):
    """Stable Diffusion's. It keeps a variance of 1: such Gaussian data stay where they are."""
    names = {}
    exec(SNIPPETS[1], names)
    schedule = names["schedule"]
    alpha, sigma = schedule(t)
    close(alpha**2 + sigma**2, 1.0)
    def net(z, k, text):
        time = (k + 1) / 1000
        segment = (time * N - 1e-3).ceil() - 1
        edge = segment / N
        x_hat = mcm.inv_ddim(z, z, time, edge, schedule)
        alpha, sigma = alpha_sigma(schedule, time, z)
        return (z - alpha * x_hat) / sigma
    f = names["make_f"](net, None)
    z = randn(100, 3)
    close(sample.multistep(f, z, N, schedule), z)

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
