"""Tests: limits and closed forms, the peers' own numbers, the programs as a user runs them."""
import collections, fcntl, gc, hashlib, http.server, itertools, json, math, os, pickle, re, resource
import shlex, signal, socket, subprocess, sys, threading, time, types, warnings, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import allclose
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import ect, fid, mcm, sample, train_cifar

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is absent")

def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()

# All t > s >= t_step (here e, for edge) that are multiples of 1/32, with 0 and 1.
TIMES = torch.combinations(torch.arange(34), 3).double() - torch.tensor([0, 1, 1])
TIMES = T, S, E = tuple(TIMES.flip(1).T.contiguous() / 32)
X, EPS = randn(2, len(T), 2, 3)  # data and noise
V = 0.3  # the variance of Gaussian data, whose denoiser and consistency function are known

def D(x, sigma, w=0.8):  # the fixtures' stand-in for a network; to us, any f(z, t)
    scale = mcm.per_sample((sigma**2 + 0.25).rsqrt(), x)
    return scale**2 / 4 * x + mcm.per_sample(sigma, x) / 2 * scale * torch.tanh(w * scale * x)

def gaussian(x, sigma, V=V):
    return x * mcm.per_sample(V / (V + sigma**2), x)

def exact(x, sigma, segment, N, end=mcm.SIGMA_MIN):
    """The x whose jump ends where the flow of Gaussian data, x ~ (V + sigma^2)^1/2, ends it."""
    i = segment.double() - N * (N - 1) // 2
    alpha, edge = mcm.cosine(i / N)
    edge = torch.where(i > 0, edge / alpha, end)
    x_edge = x * mcm.per_sample((V + edge**2) / (V + sigma**2), x) ** 0.5
    return mcm.inv_ddim(x_edge, x, sigma, edge, mcm.edm)

def load(name):
    arrays = np.load(FIXTURES / name).items()
    return {k: v if v.dtype.kind == "U" else torch.tensor(v) for k, v in arrays}

def small_net(**more):  # a network away from the zeros that it starts with
    net = train_cifar.UNet(16, (1,), 1, **{"resolution": 8, "attention": (), **more})
    torch._foreach_add_([p.data for p in net.parameters()], 0.05)
    return net

def test_schedules_and_segments():
    alpha, sigma = mcm.cosine(torch.linspace(0, 1, 10_001))
    ratio = sigma / alpha
    assert allclose(alpha**2 + sigma**2, 1) and alpha.gt(0).all() and ratio.diff().gt(0).all()
    assert allclose(ratio[[0, -1]], [0.002, 80], rtol=1e-4)
    assert mcm.edm(T)[0].eq(1).all() and mcm.edm(T)[1].equal(T)
    for N, rows in enumerate(torch.arange(64 * 65 // 2).split([*range(1, 65)]), 1):
        lower = torch.cat([torch.zeros(1), ect.default_edges(N)])
        for inside in (1e-3, 0.5, 1.0):  # an edge belongs to the segment below, also if rounded up
            alpha, sigma = mcm.cosine((torch.arange(N).double() + inside) / N)
            sigma = (sigma / alpha).float()
            assert mcm.segment(sigma * 1.000001, torch.tensor([N]).expand(N)).equal(rows)
            assert mcm.segment(sigma, N).equal(rows)
            for up in (1, 1 + 5e-7):
                assert ect.lower_edge(sigma * up, lower[1:]).equal(lower)
        assert mcm.segment(torch.tensor([0.0, 1e9]), N).equal(rows[[0, -1]])
    assert mcm.as_f(lambda x, sigma: sigma)(X, 0.5).shape == T.shape

def test_the_toys_truth():
    z, x = mcm.quantiles(10_000)
    assert allclose([z.mean(), z.std()], [0, 1], atol=1e-3)
    mode = (x - mcm.MEANS).abs().argmin(1)
    assert allclose(mode.bincount() / 10_000, mcm.WEIGHTS, atol=1e-3) and abs(
        (x[:, 0] - mcm.MEANS[mode]).std() - mcm.STD) < 1e-3
    assert mcm.distance(mcm.jumps(mcm.as_f(mcm.exact_denoise), z, 512)[-1], x) < 0.005

@pytest.mark.parametrize("N, T, n", [(1, 24, 24), (2, 25, 12), (3, 24, 8), (8, 22, 3), (8, 3, 1)])
def test_times(N, T, n):  # n teacher steps in each segment
    one, each = (mcm.draw_times(4096, steps, T, torch.Generator().manual_seed(0))
                 for steps in (N, torch.tensor(N).expand(4096)))
    t, s, t_step = one
    given = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, one, mcm.draw_times(4096, N, T, u=given)))
    assert allclose([mcm.teacher_steps(i) for i in (-1, 0, 5e4, 2e5)], [64, 64, 81920**0.5, 1280])
    grid, counts = t.unique(return_counts=True)
    assert allclose(grid * n * N, torch.arange(n * N) + 1) and counts.min() > 2048 / (n * N)
    assert allclose((t - s) * n * N, 1, atol=1e-4) and all(map(torch.equal, one, each))
    assert allclose(t_step * N, (t * N - 1e-4).ceil() - 1)
    assert s.equal(torch.where((t - t_step) * n * N < 1.5, t_step, s.maximum(t_step)))

@pytest.mark.parametrize("schedule", [mcm.cosine, mcm.edm])
def test_limits(schedule):
    (alpha, sigma), (alpha_s, sigma_s), (alpha_e, sigma_e) = (mcm.at(schedule, u, X) for u in TIMES)
    z_t, z_s = alpha * X + sigma * EPS, alpha_s * X + sigma_s * EPS
    assert allclose(mcm.ddim(X, z_t, T, S, schedule), z_s)  # eq. (4)
    assert allclose(mcm.inv_ddim(z_s, z_t, T, S, schedule), X, rtol=0, atol=1e-9)  # eq. (5)
    back = mcm.inv_ddim(*(u.float() for u in (z_s, z_t, T, S)), schedule)
    assert allclose(back, X, rtol=0, atol=2e-3)
    # aDDIM is DDIM if no variance is missing; else eq. (14); it is finite where eps_hat = 0.
    assert allclose(mcm.addim(X, z_t, T, S, 0.0, schedule), z_s)
    x_var = mcm.mean_per_sample(X**2)
    length = mcm.mean_per_sample((mcm.addim(X, z_t, T, S, x_var, schedule) - alpha_s * X) ** 2)
    missing = (alpha_s - alpha * sigma_s / sigma).flatten() ** 2 * x_var
    assert allclose(length, mcm.mean_per_sample((sigma_s * EPS) ** 2) + missing)
    assert mcm.addim(z_t / alpha, z_t, T, S, 1.0, schedule).isfinite().all()
    # Led by the data, both jumps come to a mean of reference and data. Where s = e that is data:
    # T = N is diffusion. Where e = 0 and alpha = 1, w = 1: N = 1 is Song et al.'s consistency loss.
    w = (1 - sigma_e / alpha_e * alpha_s / sigma_s) / (1 - sigma_e / alpha_e * alpha / sigma)
    target = torch.where(mcm.per_sample(S > E, X), w * D(z_s, S) + (1 - w) * X, X)
    error = (D(z_t, T) - target) * (alpha**2 + sigma**2) ** 0.5 / sigma  # the root of SNR + 1
    loss = mcm.consistency_loss(D, X, EPS, *TIMES, schedule, huber_eps=0.01)
    assert allclose(loss, (mcm.mean_per_sample(error**2) + 1e-4) ** 0.5 - 0.01)

def test_a_batch_of_two_is_two_batches_of_one():
    def run(x, z, t, s, e, N):
        return [mcm.ddim(x, z, t, s), mcm.inv_ddim(x, z, t, s), mcm.addim(x, z, t, s, t),
                mcm.consistency_loss(D, x, z, t, s, e), mcm.v_loss(x, z, x, t), mcm.segment(t, N),
                mcm.consistency_loss(D, x, z, t, s, e, teacher=gaussian),
                ect.ect_loss(D, x, z, t, 1, c=0.06), ect.ect_loss(D, x, z, t, 1, edges=E[-1:] / 2)]
    two = [u[::4000].contiguous() for u in (X, EPS, *TIMES)] + [torch.tensor([2, 4])]
    for both, *alone in zip(run(*two), *(run(*(u[i:i + 1] for u in two)) for i in (0, 1))):
        assert allclose(both, torch.cat(alone), rtol=1e-12, atol=0)

def test_teachers_references_and_gradients():
    w, seen = torch.tensor(0.8, dtype=torch.float64, requires_grad=True), []
    def other(z, u):
        seen.append((z, u, torch.is_grad_enabled()))
        return D(z, u)
    def loss(w, teacher=other, **more):
        f = mcm.conditioned(D, w=w)
        return mcm.consistency_loss(f, X, EPS, *TIMES, teacher=teacher, **more)
    mcd = loss(w)
    mcd.sum().backward()  # as if the teacher and the reference were constants:
    rise = loss(0.8 + 1e-6, f_ref=other) - loss(0.8 - 1e-6, f_ref=other)
    assert allclose(w.grad, rise.sum() / 2e-6, rtol=1e-6)
    assert mcd.equal(loss(w, f_ref=other)) and not mcd.allclose(loss(w, f_ref=gaussian))  # TRACT
    (z_t, t, grad_t), (z_s, s, grad_s) = seen[-3:-1]
    assert t.equal(T) and s.equal(torch.where(S > E, S, T)) and not (grad_t or grad_s)
    x_hat = D(z_t, T)
    assert allclose(z_s, mcm.addim(x_hat, z_t, T, S, 0.75 * mcm.mean_per_sample((x_hat - X) ** 2)))
    leads, varies = mcm.guided(D, gaussian, 2.0)(z_t, T)
    assert allclose(leads, 3 * x_hat - 2 * gaussian(z_t, T)) and varies.equal(x_hat)
    assert loss(w, lambda z, t: (D(z, t), X)).equal(loss(w, x_var_frac=0.0))
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(mcm.pseudo_huber(zero**2, 0.0), zero)[0] == 0

@pytest.mark.parametrize("N", [1, 2, 4])
def test_gaussian_data(N):
    """One DDIM step of 1/T errs by O(1/T^2), so the exact f has that loss at a fixed distance from
    the edge. The jump back divides by that distance: right next to the edge it is O(1/T)."""
    losses = []
    for n in (64, 256):
        k, (x, eps) = torch.arange(n * N), randn(2, n * N, 64)
        times = [u.double() / (n * N) for u in (k + 1, k, k // n * n)]
        loss = mcm.consistency_loss(mcm.as_f(exact, steps=N, N=N), V**0.5 * x, eps, *times,
                                    teacher=mcm.as_f(gaussian), x_var_frac=0.0, huber_eps=0.0)
        losses.append((loss.view(N, n)[:, n // 2:].mean(), loss[0]))
    far, near = (few / many for few, many in zip(*losses))
    assert 14 < far < 18 and 3 < near < 5
    z = randn(10_000, 3)  # it samples N(0, V), and with ECT's fresh noise the right variance
    for method, more in (("mct", {}), ("ect", dict(segmented=True, end=0.0))):
        assert allclose(sample.generate(exact, method, N, z, N=N, **more), V**0.5 * z, rtol=1e-4)
    x, again = (sample.generate(exact, "ect", N, z, N=1) for _ in range(2))
    fresh = sample.renoise(mcm.conditioned(exact, 1, N=1), z, [80, 1])
    assert x.equal(again) and abs(x.var() - V) < 0.01 and abs(fresh.var() - V) < 0.01

def test_solvers():
    """For Gaussian data of variance c and its exact posterior variance, the error of one aDDIM step
    is -c cot(a_t) cot(a_s) times DDIM's to first order (a: the angles of cosine), as eq. (14) takes
    x_hat and eps_hat for uncorrelated. So it pays at a low SNR, and overshoots for c ~ 1."""
    c, z = 1e-4, randn(64, 10_000)
    f, alpha, sigma = mcm.as_f(gaussian, V=c), *mcm.cosine(0.0)
    addim = sample.addim(f, z, 8, x_var=lambda a, s: c * s**2 / (a**2 * c + s**2))
    error = [abs(z_0.var() - alpha**2 * c - sigma**2) for z_0 in (addim, sample.ddim(f, z, 8))]
    assert error[0] < 0.1 * error[1] and allclose(sample.paper_x_var(2.0, 1.0), 0.1 / 6)
    heun = [sample.generate(gaussian, "diffusion", n, z, "heun") for n in (32, 64, 128)]
    error = [abs(x - 80 * (V / (V + 80**2)) ** 0.5 * z).max() for x in heun]
    assert 3 < error[0] / error[1] < 5 and 3 < error[1] / error[2] < 5  # of second order
    addim = sample.addim(mcm.as_f(gaussian), z, 8)
    assert addim.equal(sample.generate(gaussian, "diffusion", 8, z, "addim"))

@pytest.mark.parametrize("method, steps, sampler, sigmas", [
    ("diffusion", 2, "heun", [80, 0.002, 0.002]), ("diffusion", 2, "ddim", [80, 1]),
    ("ect", 2, None, [80, 0.821]), ("ect", 3, None, [80, 3**0.5, 3**-0.5])])
def test_where_samplers_ask(method, steps, sampler, sigmas):
    asked = []
    def net(x, sigma, segment=None):
        asked.append(sigma.item())
        return 0 * x
    sample.generate(net, method, steps, randn(1, 3), sampler)
    assert allclose(asked, sigmas, rtol=0.03)

@needs_fixtures
def test_ect_mapping_and_generator():
    data = load("ect_t_to_r.npz")
    t, wide = data["t"], data["t"].numpy().astype(np.longdouble)
    for q, k, i in itertools.product((2, 4, 256), (8, 0), range(9)):
        name = f"q{q}_{'sigmoid' if k else 'const'}"
        r_64, r_32 = (ect.t_to_r(u, i, q, k) for u in (t, t.float()))
        assert allclose(r_64, data[f"r64_{name}"][i], rtol=1e-12, atol=1e-12)
        assert allclose(r_32, data[f"r32_{name}"][i], rtol=3e-7, atol=1e-6)
        gap = wide * np.minimum(1, (1 + k / (1 + np.exp(wide))) / np.longdouble(q) ** (i + 1))
        assert allclose(ect.gap(t.float(), i, q, k).numpy(), gap, rtol=1e-5, atol=0)
    data = load("ect_generator_standin.npz")
    for n in (1, 2, 3):
        sigmas = [80.0, *data[f"mid_t_{n}step"]]
        x = sample.renoise(mcm.conditioned(D, w=data["w"]), data["latents"], sigmas, data["noise"])
        assert allclose(x, data[f"out_{n}step_f64"], rtol=0, atol=1e-10)

@needs_fixtures
def test_ect_loss():
    data = load("ect_loss_standin.npz")
    for case in (key[7:] for key in data if key.startswith("losshp_")):
        q, adjust, stage, c = case.split("_")  # as in q256_sigmoid_s3_c0.06
        q, k, stage, c = int(q[1:]), 8 * (adjust == "sigmoid"), int(stage[1:]), float(c[1:])
        for dtype in (torch.float64, torch.float32):
            w, x, eps, t = (data[key].to(dtype) for key in ("w", "x", "eps", "t_f64"))
            denoise = mcm.conditioned(D, w=w.requires_grad_())
            loss = ect.ect_loss(denoise, x, eps, t, stage, q, k, c=c)
            slope, loss = torch.autograd.grad(loss.mean(), w)[0], loss.detach()
            assert loss.isfinite().all() and slope.isfinite()  # the authors' is NaN in places
            if dtype == torch.float64 and q ** (stage + 1) <= 65536:
                assert allclose(loss, data[f"loss_{case}_f64"], rtol=1e-9)
                assert allclose(slope, data[f"gradw_{case}_f64"], rtol=1e-8)
            elif dtype == torch.float32 and stage == 0:
                assert allclose(loss, data[f"losshp_{case}"], rtol=5e-5 if q == 2 else 1.5e-2)
    data = load("ect_loss_net.npz")
    net = train_cifar.UNet(8).load(load("ect_snapshot_tiny_state.npz"), "ect_snapshot_tiny")
    x_hat = net(data["precond_x"], data["precond_sigma"]).detach()
    assert allclose(x_hat, data["D_train"], atol=3e-5)
    weights = [net.get_parameter(name) for name in data["param_names"]]
    t = (2 * data["rnd_normal"] - 1.1).exp()  # some with r = 0, where the network is NaN
    for stage, c, rtol in [(0, "0", 2e-4), (0, "0.06", 2e-4), (3, "0", 1e-3)]:
        loss = ect.ect_loss(net, data["x"], data["eps"], t, stage, c=float(c))
        norms = [gradient.norm() for gradient in torch.autograd.grad(loss.mean(), weights)]
        assert allclose(loss.detach(), data[f"loss_s{stage}_c{c}"], rtol=rtol)
        assert allclose(norms, data[f"gradnorm_s{stage}_c{c}"], rtol=2e-3)

def test_ect_in_segments():
    t, edges = ect.draw_t(len(T)).double(), ect.default_edges(4).double()
    n = 1 + 8 / (1 + t.exp())
    assert allclose(ect.t_to_r(t, 0), t * (1 - n / 2).clamp(min=0))
    # Both predictions are carried to the edge, and compared there.
    edge = ect.lower_edge(t, edges)
    r = edge.maximum(t * (1 - n / 2**4))
    z_t, z_r = (X + mcm.per_sample(u, X) * EPS for u in (t, r))
    d = mcm.ddim(D(z_t, t), z_t, t, edge, mcm.edm) - mcm.ddim(D(z_r, r), z_r, r, edge, mcm.edm)
    loss = ((d**2).flatten(1).sum(1) + 0.06**2) ** 0.5 - 0.06
    assert allclose(ect.ect_loss(D, X, EPS, t, 3, c=0.06, edges=edges), loss / (t - r))
    # So near an edge the loss stays bounded, though its weight 1 / (t - r) does not.
    near = edges[0] * (1 + torch.logspace(-12, -1, len(T)).double())
    assert ect.ect_loss(D, X, EPS, near, 3, edges=edges).max() < 50
    paper, one = (ect.ect_loss(D, X, EPS, t, 3, edges=u) for u in (None, edges[:0]))
    assert paper.equal(one) and allclose(edges, np.tan(np.pi / 8 * np.arange(1, 4)), rtol=0.03)
    assert [ect.stage(i, 100) for i in (0, 99, 100)] == [0, 0, 1] and ect.stage(9, 0) == 0
    assert allclose(torch.std_mean(ect.draw_t(10**6).log()), [2, -1.1], rtol=0.01)

def test_the_loss_compiles_whole_and_agrees():
    net, x, eps = small_net(segments=3, dropout=0.3), *randn(2, 4, 3, 8, 8).float()
    f = mcm.as_f(net, steps=torch.full((4,), 2), seed=torch.arange(4))
    times = [u[::1500].float() for u in TIMES]
    def run(loss):
        value = loss(f, x, eps, *times, teacher=mcm.as_f(net)).mean()
        return value, *torch.autograd.grad(value, list(net.parameters()))
    whole = torch.compile(mcm.consistency_loss, fullgraph=True, backend="aot_eager")
    for eager, compiled in zip(run(mcm.consistency_loss), run(whole)):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)

def test_the_reference_keeps_no_activations():
    net, x, kept = small_net(segments=1), torch.randn(8, 3, 8, 8), [0, 0]
    t, f = torch.linspace(0.1, 1, 8), mcm.as_f(net, steps=1)
    for i, run in enumerate((lambda: net(x, torch.ones(8)), lambda: mcm.consistency_loss(
            f, x, x, t, 0.9 * t, 0 * t))):
        def pack(tensor, i=i):
            kept[i] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run().sum().backward()
    assert kept[1] < 1.1 * kept[0]

def test_dropout_is_one_mask():
    net, x, seed = small_net(dropout=0.5), randn(2, 3, 8, 8), torch.tensor([5, 6])
    once, again, other = (net(x, 1.0, seed=u) for u in (seed, seed, seed + 1))
    assert once.equal(again) and not once.allclose(other)
    assert once[1:].allclose(net(x[1:], 1.0, seed=seed[1:]), atol=1e-6)
    asked = torch.ones(64, 16, 16, 16), 0.2, torch.arange(64), 3
    kept = train_cifar.dropout(*asked)
    assert kept.equal(torch.compile(train_cifar.dropout)(*asked))
    assert abs(kept.mean() - 1) < 0.01 and kept.unique().tolist() == [0.0, 1.25]
    assert torch.corrcoef(kept.flatten(1)).fill_diagonal_(0).abs().max() < 0.08  # of samples

def test_adam_times_its_rectification_is_radam():
    ours, theirs = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizers = torch.optim.Adam([ours], 1.0), torch.optim.RAdam([theirs], 1.0)
    for step in range(1, 100):
        optimizers[0].param_groups[0]["lr"] = train_cifar.rectification(step)
        for w, optimizer in zip((ours, theirs), optimizers):
            w.data.zero_()
            w.grad = torch.tensor([1.0, -2.0, 3.0]).double() * step**0.5
            optimizer.step()
        assert allclose(ours.detach(), theirs.detach() * (step > 5))
    assert 0.99 < train_cifar.rectification(10**9) <= 1

@needs_fixtures
@pytest.mark.parametrize("kind, classes", [("uncond", 0), ("cond", 10)])
def test_unet_is_edms(kind, classes):
    io, state = load(f"edm_{kind}_ch32_io.npz"), load(f"edm_{kind}_ch32_state.npz")
    net = train_cifar.UNet(32, classes=classes, augment_dim=9, segments=3).eval().load(state, kind)
    x, sigma, labels, raw = io["x"], io["sigma"], io.get("class_labels"), []
    net.model.register_forward_hook(lambda module, inputs, output: raw.append(output))
    segment = torch.ones(8, dtype=torch.int64)  # whose embedding is zero at first
    with torch.no_grad():
        ours = dict(D=net(x, sigma, labels, segment=segment), F=raw[0],
                    D_augment_labels=net(x, sigma, labels, io["augment_labels"]),
                    D_scalar_sigma=net(x, torch.tensor(1.5), labels))
        if classes:
            ours["D_no_labels"] = net(x, sigma)
    for name in ours:
        assert allclose(ours[name], io[name], atol=5e-5 if "scalar" in name else 3e-5), name
    del state["model.map_layer0.bias"]
    with pytest.raises(fid.UserError, match="map_layer0.bias"):
        net.load(state, kind)

def test_unet_is_as_large_as_edms():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = train_cifar.UNet(augment_dim=9)
        net.model(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert sum(p.numel() for p in net.parameters()) == 55_733_891 and len(net.state_dict()) == 425
    assert round(counter.get_total_flops() / 1e9, 2) == 42.38

def distance(x, y):
    a, b = (fid.Statistics().update(torch.as_tensor(u)) for u in (x, y))
    return fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)

def inception_weights(key, shape):  # the fixtures' rule
    rng = np.random.default_rng([11, zlib.crc32(key.encode())])
    if key.endswith(("bn.weight", "running_var")):
        return torch.tensor(rng.uniform(0.5, 1.5, shape))
    scale = 0.1 if len(shape) < 2 else (2 / np.prod(shape[1:])) ** 0.5
    return torch.tensor(rng.standard_normal(shape) * scale)

@needs_fixtures
def test_fid_is_the_published_one():
    resize, data, frechet = (load(f"fid_{k}.npz") for k in ("resize", "inception", "frechet"))
    for size in ("32", "64x48"):
        ours = fid.resize_tf1(resize[f"img{size}"])[:, :, ::13, ::13]
        assert allclose(ours, resize[f"tf1_{size}_stride13"], rtol=0, atol=2e-3)
    keys = json.loads((FIXTURES / "fid_inception_keys.json").read_text())["keys"]
    net = fid.InceptionFID().eval().requires_grad_(False)
    net.load_state_dict({k: inception_weights(k, v["shape"]) for k, v in keys.items()})
    for net in (net, net.fold()):
        features = net(data["img64x48"])
        assert allclose(features, data["tfid_img64x48_2048"], rtol=0, atol=5e-4)
    for i in range(3):
        pair = [frechet[f"{k}_pair{i}"] for k in ("mu1", "sigma1", "mu2", "sigma2")]
        assert allclose(fid.frechet_distance(*pair), frechet[f"fd_pair{i}"], rtol=1e-9, atol=0)
    few = distance(frechet["x_rankdef"], frechet["y_rankdef"])
    assert allclose(few, frechet["fd_exact_rankdef"], rtol=1e-6, atol=0)
    rng, sets = np.random.default_rng([11, 30]), []
    for low, high, shift in ((0.5, 1.5, 0), (1.2, 0.6, 0.05)):
        z = rng.standard_normal((5000, 2048))
        sets.append(z * np.linspace(low, high, 2048) + 0.5 * np.roll(z, 1, 1) + shift)
    assert allclose(distance(*sets), frechet["fd_d2048"], rtol=1e-8, atol=0)

def test_fid_facts_and_grey_levels(tmp_path):
    assert fid.metric_name("inception", 50_000) == "FID" != fid.metric_name("inception", 49_999)
    x = randn(300, 5) + 1e7  # a mean that must not cancel
    a, b, c = (fid.Statistics().update(part) for part in x.split([10, 1, 289]))
    assert allclose(a.merge(b).merge(c).cov, np.cov(x.T), rtol=1e-9)
    levels = torch.arange(256).byte()
    for error in (-0.4, 0, 0.4):
        assert sample.to_uint8((levels + error) / 127.5 - 1).equal(levels)
    assert sample.to_uint8(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]
    for file in ("top.png", "sub/low.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / file)
    assert fid.read(tmp_path)[1].tolist() == [1, 0] and fid.read(tmp_path)[2] == [".", "sub"]
    np.savez(tmp_path / "minus.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=[0, -1])
    with pytest.raises(fid.UserError, match="below 0"):
        fid.read(str(tmp_path / "minus.npz"))
    few = randn(20, 50)  # n < d
    assert 0 <= distance(few, few) < 1e-6 and allclose(distance(few, few + 3), 50 * 3**2)
    np.savez(tmp_path / "bad.npz", np.array([{}], dtype=object))
    silent = socket.create_server(("127.0.0.1", 0))  # takes a call and says nothing
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/bad"
    for call in (fid.feature_extractor, fid.read, lambda path: fid.fetch(url, "0", path + "d", 0.3),
                 lambda path: fid.feature_extractor("inception", weights=path)):
        with pytest.raises(fid.UserError, match="bad"):
            call(str(tmp_path / "bad.npz"))

def asks(function, *args):  # pickled, it asks that function(*args) be called
    return types.SimpleNamespace(__reduce_ex__=lambda protocol: (function, args))

def edm_pickle(offset=0, size=(8, 8, 3, 3), stride=(72, 9, 3, 1), doubled=0, **changes):
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {"none": None}, "_modules": {}, **state}
        return asks(print, dict(module_src="open('PWNED', 'w')", class_name=name, state=state))
    storage = torch.arange(576.)._typed_storage()
    weight = asks(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    for _ in range(doubled):  # a module of 2^doubled modules, by sharing
        conv = module("Conv2d", _modules=dict(a=conv, b=conv))
    given = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0, img_resolution=8)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs={**given, **changes})
    ema = module("EDMPrecond", _modules=dict(model=unet), sigma_data=0.5, gain=np.float64(1))
    return pickle.dumps(dict(loss_fn=asks(getattr, ema, "forward"), ema=ema), 3).replace(
        b"cbuiltins\nprint\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = [RUN + b"R.", RUN + b"\x81.", RUN + b"}\x92.", b"(" + RUN + b"o.", b"(iposix\nsystem\n.",
           b"\x8c\5posix\x8c\6system\x93.", b"\x82\1.", b"\x84\1\0\0\0.", b"Pposix\n.", b"NQ.",
           b"\x8c\5numpy\x8c\7dtype.x\x93.", 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.", b"",
           b"ccollections\nOrderedDict\n)\x81}\x8c\x0c__setstate__cposix\nsystem\nsb.", b"}K\1Ns.",
           b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.", b"\x8b\xff\xff\xff\x7f",
           b"\x8e" + bytes(7) + b"\x10", b"\x8f" * 10**6, b"I" + b"9" * 10**7, b"]" * 10**5 + b"a.",
           edm_pickle(0, (2**20, 2**20), (0, 0)), edm_pickle(embedding_type="fourier"),
           edm_pickle(-2), edm_pickle(doubled=19), edm_pickle(extra={7: 7}),
           edm_pickle(model_channels=2**40), edm_pickle().replace(b"FloatStorage", b"EvilyStorage"),
           edm_pickle().replace(b"\x80\3", b"\x80\3(1", 1), edm_pickle(channel_mult=10 * [1]),
           edm_pickle(num_blocks=33), edm_pickle(dropout=1.0),
           *map(Path.read_bytes, FIXTURES.glob("edm_maliciou*[!c].pkl"))]

@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_edm_pickles_are_refused(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(HOSTILE[number])
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(fid.UserError, match="^net.pkl: .*--init"):
        train_cifar.load_edm("net.pkl")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1 and os.listdir() == ["net.pkl"]
    assert after.ru_maxrss - before.ru_maxrss < 1 << 20  # kB

def test_edm_pickles_load(tmp_path):
    (tmp_path / "net.pkl").write_bytes(edm_pickle())
    state, kwargs = train_cifar.load_edm(tmp_path / "net.pkl")
    assert list(state) == ["model.conv.weight"] and state.popitem()[1].flatten()[575] == 575
    assert kwargs.items() >= {"mult": (1,), "dropout": 0.1, "width": 8, "blocks": 4}.items()
    for name in ("edm_uncond_small", "ect_snapshot_tiny") if FIXTURES.exists() else ():
        made = load(f"{name.replace('small', 'ch32')}_state.npz")
        state, _ = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
        assert state.keys() == made.keys() and all(state[k].equal(made[k]) for k in made)

# ---- The programs, as a user runs them -----------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run of seconds on 64 shapes, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for net in ("small", "edm"):
        monkeypatch.setitem(train_cifar.NETS, net, dict(width=16, mult=[1, 2], blocks=1, patch=2))
    images, labels, _ = train_cifar.shapes(64, 16)
    np.savez("few.npz", arr_0=images.permute(0, 2, 3, 1), arr_1=labels)
    return ("--data few.npz --device cpu --pretrain-iters 6 --iters 6 --batch 4 "
            "--log-every 2 --save-every 2 --fd-samples 16 --many 2 --seed 2147483648 --out").split()

def state_of(out):
    """All that a run leaves but speeds, with tensors as lists of their bytes."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("images_per_second", "out")}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.numpy().tobytes() if torch.is_tensor(value) else value
    log = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    table = json.loads(Path(out, "result.json").read_text())
    return plain([torch.load(f"{out}/latest.pt", weights_only=True), log, table])

@pytest.mark.parametrize("method", ["mct", "mcd --classes --guidance 1", "ect --segmented"])
def test_a_run_that_died_and_went_on_is_the_run_that_did_not(tiny, method, monkeypatch, capsys):
    method, labels, grid = ["--method", *method.split()], [], sample.save_grid
    monkeypatch.setattr(sample, "save_grid", lambda *given: (
        labels.append(given[3:]), grid(*given)))
    train_cifar.main([*tiny, "straight", *method])
    assert labels[-1] == ([f"diffusion {N}" for N in (1, 2)] + ["tuned 2"] + [
        f"diffusion {N}" for N in (4, 8, 3)],)
    blows = [("pretrain", 3, "crash"), ("pretrain", 5, signal.SIGINT), ("tune", 1, "crash"),
             ("tune", 4, signal.SIGTERM)]
    def deadly(run, phase, step, draw=train_cifar.draw):
        if blows and (phase, step) == blows[0][:2]:
            blow = blows.pop(0)[2]
            if blow == "crash":  # as kill -9: nothing is saved
                raise RuntimeError
            os.kill(os.getpid(), blow)
        return draw(run, phase, step)
    monkeypatch.setattr(train_cifar, "draw", deadly)
    while blows:
        with pytest.raises((RuntimeError, SystemExit)):
            train_cifar.main([*tiny, "torn", *method])
    train_cifar.main([*tiny, "torn", *method])
    assert state_of("straight") == state_of("torn")
    assert [(row["model"], row["nfe"]) for row in state_of("torn")[2]] == [
        ("diffusion", 2), ("tuned", 2), ("diffusion", 3)]
    for options in (["latest.pt"], ["diffusion.pt", "--sampler", "addim", "--steps", "3"]):
        for out in ("x.npz", "x.png"):
            sample.main([f"torn/{options[0]}", *options[1:], "--n", "5", "--out", out])
    images = np.load("x.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    train_cifar.main([*tiny, "torn", *method])  # there is only the report left to do
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_cifar.main([*tiny, "fresh", *method, "--profile"])
    assert os.listdir("fresh") == ["lock"]
    assert "0 host synchronisations in 20 steps, 0 graph breaks" in capsys.readouterr().out

def test_a_model_from_a_pickle_teaches_without_its_dropout(tiny, monkeypatch):
    net, modes = small_net(resolution=16, dropout=0.5), []
    monkeypatch.setattr(train_cifar, "load_edm", lambda path: (net.state_dict(), net.arguments))
    monkeypatch.setattr(train_cifar, "report", lambda run, *nets: modes.extend(
        net.training for net in nets))
    np.savez("few.npz", arr_0=np.zeros((64, 16, 16, 3), np.uint8))
    train_cifar.main([*tiny, "run", "--method", "mcd", "--init", "net.pkl"])
    with pytest.raises(fid.UserError, match="resolution"):
        train_cifar.main([*tiny, "other", "--init", "net.pkl", "--data", "shapes"])
    # And on in half precision, where one loss that overflows is one step that is skipped.
    loss, factor = train_cifar.step_loss, iter([math.inf])
    monkeypatch.setattr(train_cifar, "step_loss", lambda *given, **drawn: loss(
        *given, **drawn) * next(factor, 1.0))
    train_cifar.main([*tiny, "run", "--method", "mcd", "--iters", "8", "--precision", "fp16",
                      "--init", "not looked at"])
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert modes == 4 * [False] and last["skipped"] == 1 and math.isfinite(last["loss"])

def test_two_processes_are_one(tiny):
    for n, out in enumerate(("one", "two"), 1):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                        "--master_port=29517", HERE / "train_cifar.py", *tiny, out, "--steps", "1",
                        "2"], check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (torch.load(f"{out}/latest.pt", weights_only=True) for out in ("one", "two"))
    assert all(torch.allclose(one["net"][k], two["net"][k], atol=2e-4) for k in one["net"])
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
        a, b = a["exp_avg"], b["exp_avg"]
        assert torch.allclose(a, b, rtol=0, atol=0.01 * a.abs().max())
    assert [row["step"] for row in one["log"]] == [row["step"] for row in two["log"]]

def test_what_sample_asks_for(tiny, monkeypatch):
    train_cifar.main([*tiny, "run", "--classes", "--steps", "2", "1"])
    asked = []
    monkeypatch.setattr(sample, "generate", lambda *given, labels: asked.append(
        (*given[1:3], given[4], labels.argmax(1).tolist())) or given[3])
    for line in ("latest.pt", "latest.pt --steps 1 --class-label 1", "diffusion.pt --steps 2",
                 "diffusion.pt"):
        sample.main(f"run/{line} --n 4 --out x.png".split())
    assert asked == [("mct", 2, "ddim", [0, 1, 2, 0]), ("mct", 1, "ddim", [1, 1, 1, 1]),
                     ("diffusion", 2, "ddim", [0, 1, 2, 0]),
                     ("diffusion", 18, "heun", [0, 1, 2, 0])]
    data = types.SimpleNamespace(images=torch.empty(3, 3, 1, 1), labels=torch.tensor([0, 2, 2]))
    run = types.SimpleNamespace(c=types.SimpleNamespace(seed=0, batch=9000), device="cpu",
                                data=data, classes=3)
    shares = train_cifar.Run.noise(run, 0, 9000)["labels"].mean(0)  # as in the data
    trained = train_cifar.draw(run, "pretrain", 0)["labels"].mean(0)  # nine in ten have theirs
    assert allclose(shares, [1 / 3, 0, 2 / 3], atol=0.02)
    assert allclose(trained, 0.9 * shares, atol=0.02)

def test_what_cannot_go_on_says_so_and_keeps_what_was_there(tiny, monkeypatch, capsys):
    def refused(named, *arguments):
        gc.collect()  # lets go of the lock, which the last traceback held
        with pytest.raises(SystemExit) as stop:
            fid.run(lambda: train_cifar.main([*tiny, *arguments]))
        text = capsys.readouterr().err + str(stop.value)
        assert stop.value.code != 0 and named in text and len(text.splitlines()) <= 2
        assert Path("run/latest.pt").read_bytes() == kept
    train_cifar.main([*tiny, "run"])
    kept = Path("run/latest.pt").read_bytes()
    with open("run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("in use by another run", "run")
    for line in ("--steps 4", "--method ect", "--net edm", "--batch 8", "--seed 1", "--classes",
                 "--data shapes"):
        refused(line.split()[0] + ": run was begun with", "run", *line.split())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # as a full disk
    refused("cannot write run/latest.pt", "run", "--iters", "8")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for value, named in ((math.nan, "tune iteration 6: loss not finite"),
                         (1.0, "fp16 overflows"), (0.0, "weights not finite")):  # slope of 0^1/2
        monkeypatch.setattr(train_cifar, "step_loss", lambda net, *_, x, **rest: torch.zeros(
            len(x)) + (value + 0 * sum(p.sum() for p in net.parameters())) ** 0.5)
        if value == 1:
            monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: True)
            monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
        refused(named, "run", "--iters", "7")
        monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: False)

def test_downloads(tmp_path):
    good, faults = b"weights" * 1000, ["404", "short", "wrong", "reset", "stall", "good"]
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = faults[0]
            self.send_response(404 if fault == "404" else 200)
            self.send_header("Content-Length", str(len(good)))
            self.end_headers()
            part = 500 if fault in ("short", "reset", "stall") else len(good)
            self.wfile.write((good if fault != "wrong" else good[::-1])[:part])
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
            time.sleep(1.0 if fault == "stall" else 0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, sha = f"http://127.0.0.1:{server.server_port}/file.pth", hashlib.sha256(good).hexdigest()
    while faults[0] != "good":
        with pytest.raises(fid.UserError, match="file.pth"):
            fid.fetch(url, sha, tmp_path, 0.3)
        assert os.listdir(tmp_path) == []
        faults.pop(0)
    assert fid.fetch(url, sha, tmp_path).read_bytes() == good
    server.shutdown()

# Bad command lines and, behind >, what their one line must name; else it is their last option.
BAD = """
train --steps 0, train --steps x, train --steps, train --steps 1000, train --method dog
train --batch 0, train --lr nan, train --lr -1, train --ema 2, train --iters 1.5, train --what
train --precision fp8, train --device cuda, train --device tpu, train --T 4, train --seed -1
train --data nowhere > not exist, train --data empty > empty, train --data text > a.png
train --data mixed > mixed, train --data odd > odd, train --data text.npz > text.npz
train --data float.npz > float.npz, train --data cifar10 > cifar-10, train --segmented
train --data ok.npz --init nowhere, train --data ok.npz --init text.npz, train --batch 5 --accum 2
train --data ok.npz --out text.npz, train --data ok.npz --out text.npz/x, train --accum 0
train --data ok.npz --features text.npz > text.npz, train --segmented --method ect --steps 1 2
train --net big, train --fd-samples 1, train --q 0, train --guidance 1
train --data ok.npz --classes > --classes, train --data ok.npz --init text.pkl > text.pkl
train --data ü.npz > ü.npz, sample ü.pt > ü.pt
sample x.pt y.pt > y.pt, sample nowhere.pt > nowhere.pt, sample text.npz > text.npz
sample x --steps 0, sample x --n 0, sample x --out x.jpg, sample x --out no/where.png
sample x --sampler euler, sample x --device cuda, sample x --class-label -1, fid > a, fid ok.npz > b
fid nowhere ok.npz > nowhere, fid ok.npz nowhere > nowhere, fid ok.npz ok.npz --n 1
fid ok.npz ok.npz --batch 0, fid text ok.npz --features random > a.png, mcm --out no/where.png
fid ok.npz ok.npz --features dog > dog, fid ok.npz ok.npz --weights nowhere > nowhere
mcm --method dog, ect --what
"""

@pytest.mark.parametrize("line", BAD.strip().replace("\n", ", ").split(", "))
def test_bad_input_is_one_line(line, tmp_path, monkeypatch, capsys):
    line, _, named = line.partition(" > ")
    named = named or [word for word in line.split() if word.startswith("--")][-1]
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "text", "mixed", "odd", "data"):
        Path(folder).mkdir()
    for file in ("text/a.png", "text.npz", "text.pkl"):
        Path(file).write_text("nothing of the kind")
    for i, size in enumerate((16, 24)):
        sample.save_grid(torch.zeros(1, 3, size, size), Path(f"mixed/{i}.png"), 1)
        sample.save_grid(torch.zeros(1, 3, 9, 9), Path(f"odd/{i}.png"), 1)
    np.savez("ok.npz", arr_0=np.zeros((16, 16, 16, 3), np.uint8))
    np.savez("float.npz", arr_0=np.zeros((16, 16, 16, 3)))
    program, *arguments = line.split()
    module = {"train": train_cifar, "sample": sample, "fid": fid, "mcm": mcm, "ect": ect}[program]
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fid.run(lambda: module.main(arguments))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and named in error and "weights_only" not in error
    assert len(error.splitlines()) == 1 and sorted(Path().rglob("*")) == before

README = (HERE / "README.md").read_text()

def test_readme_snippets():
    for block in README.split("```python\n")[1:]:
        names = {}
        exec(block.split("```")[0], names)
        assert names["loss"].isfinite().all()

def test_readme_commands(tiny, monkeypatch):
    """Each as it stands there, one after the other, with options behind it that make it small."""
    few, small = train_cifar.shapes(64, 16), tiny[2:-1]
    def offline(*_):
        raise fid.UserError("no network")
    monkeypatch.setattr(fid, "fetch", offline)
    monkeypatch.setattr(train_cifar, "shapes", lambda: few)
    monkeypatch.setattr(mcm, "train_toy", lambda net, *given, real=mcm.train_toy: real(
        net, given[0], 2, 8))
    for folder in ("FOLDER", "assets", "data"):
        Path(folder).mkdir()
    for i, image in enumerate(few[0].permute(0, 2, 3, 1)):
        Image.fromarray(image.numpy()).save(f"FOLDER/{i}.png")
    with warnings.catch_warnings(action="ignore"):
        features = torch.jit.trace(lambda x: x[:, :, 0, :3].flatten(1).float(), few[0])
    features.save("resnet56_cifar10.ts")
    digest = fid.feature_extractor("random").hash
    np.savez(f"data/fid-cifar10-train-16-{digest}.npz", mu=np.zeros(36), sigma=np.eye(36))
    done = []
    for line in re.findall(r"(?:^|`)python ((?!-m)[^`]+?)(?: +#.*)?(?:$|`)", README, re.M):
        program, *arguments = shlex.split(line)
        if program == "-c":
            exec(arguments[0], {})
        elif program in ("mcm.py", "ect.py"):
            sys.modules[program[:-3]].main(arguments, 6000)
        else:
            more = {"train_cifar.py": small, "sample.py": ["--n", "16"],
                    "fid.py": ["--features", "random"]}[program]
            sys.modules[program[:-3]].main(arguments + more)
        done.append(line)
    assert len(done) > 12 and Path("assets/dial.pt").exists()
