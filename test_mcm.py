"""Tests: limits and closed forms, the peers' own numbers, the programs as a user runs them.

    python -m pytest -q
"""
import collections
import json
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import ect
import fid
import mcm
import sample
import train_cifar

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is absent")
torch.set_num_threads(2)
V = 0.3  # the variance of Gaussian data, whose denoiser and consistency function are known

def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def times(batch, N, T, seed=0):
    t, s, t_step = mcm.draw_times(batch, N, T, torch.Generator().manual_seed(seed))
    return t.double(), s.double(), t_step.double()

def gaussian_denoise(x, sigma):
    return x * (V / (V + sigma**2)).reshape(-1, *[1] * (x.ndim - 1))

def flow(z_t, t, s):
    """The probability flow of Gaussian data from t to s, exactly."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = mcm.at(mcm.cosine, t, z_t), mcm.at(mcm.cosine, s, z_t)
    return z_t * ((alpha_s**2 * V + sigma_s**2) / (alpha_t**2 * V + sigma_t**2)) ** 0.5

def gaussian_f(N):
    """The exact N-step consistency function: the x that jumps to where the flow meets the edge."""
    def f(z, t):
        edge = ((t * N - 1e-6).ceil() - 1) / N
        return mcm.inv_ddim(flow(z, t, edge), z, t, edge)
    return f

def load(name):
    return {k: v for k, v in np.load(FIXTURES / name, allow_pickle=False).items()}

# ------------------------------------------------------------------------------------------------
# mcm.py

def test_schedules():
    t = torch.linspace(0, 1, 10_001)
    alpha, sigma = mcm.cosine(t)
    ratio = sigma / alpha
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t))
    assert torch.allclose(ratio[[0, -1]], torch.tensor([0.002, 80.0]), rtol=1e-4)
    assert (ratio.diff() > 0).all() and (alpha > 0).all()
    assert mcm.edm(t)[0].eq(1).all() and mcm.edm(t)[1].equal(t)

@pytest.mark.parametrize("schedule", [mcm.cosine, mcm.edm])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_inv_ddim_inverts_ddim(schedule, dtype, tolerance):
    t, s = (grid.flatten() for grid in torch.meshgrid(
        *[torch.linspace(0, 1, 33)] * 2, indexing="ij"))
    t, s = t[t > s].to(dtype), s[t > s].to(dtype)
    x, z_t = noise(len(t), 2, 3).to(dtype), noise(len(t), 2, 3, seed=1).to(dtype)
    back = mcm.inv_ddim(mcm.ddim(x, z_t, t, s, schedule), z_t, t, s, schedule)
    assert t.max() == 1 and s.min() == 0
    assert (back - x).abs().max() < tolerance

def test_addim_limits():
    x, z, (t, s, _) = noise(64, 3, 4), noise(64, 3, 4, seed=1), times(64, 2, 8)
    assert torch.allclose(mcm.addim(x, z, t, s, 0.0), mcm.ddim(x, z, t, s))
    x_var = torch.rand(64, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = mcm.at(mcm.cosine, t, z), mcm.at(mcm.cosine, s, z)
    eps_hat = (z - alpha_t * x) / sigma_t
    missing = ((alpha_s - alpha_t * sigma_s / sigma_t) ** 2).flatten() * x_var
    left = mcm.mean_per_sample((mcm.addim(x, z, t, s, x_var) - alpha_s * x)
                               ** 2)           # eq. (14)
    assert torch.allclose(left, sigma_s.flatten() ** 2 * mcm.mean_per_sample(eps_hat**2) + missing)
    alpha = mcm.cosine(t)[0][:, None, None]
    # eps_hat = 0
    assert mcm.addim(z / alpha, z, t, s, 1.0).isfinite().all()

@pytest.mark.parametrize("name", ["ddim", "inv_ddim", "addim", "mct", "mcd", "ect", "ect_edges",
                                  "segment", "pseudo_huber"])
def test_a_batch_of_two_is_two_batches_of_one(name):
    def f(z, t):
        return torch.tanh(1.3 * z) * mcm.per_sample(torch.cos(t), z)

    def teacher(z, t):
        return 0.8 * z
    x, eps, (t, s, t_step) = noise(2, 3, 4), noise(2, 3, 4, seed=1), times(2, 2, 8)
    run = {
        "ddim": lambda i: mcm.ddim(x[i], eps[i], t[i], s[i]),
        "inv_ddim": lambda i: mcm.inv_ddim(x[i], eps[i], t[i], s[i]),
        "addim": lambda i: mcm.addim(x[i], eps[i], t[i], s[i], t[i]),
        "mct": lambda i: mcm.consistency_loss(f, x[i], eps[i], t[i], s[i], t_step[i]),
        "mcd": lambda i: mcm.consistency_loss(f, x[i], eps[i], t[i], s[i], t_step[i],
                                               teacher=teacher),
        "ect": lambda i: ect.ect_loss(f, x[i], eps[i], t[i], 1, c=0.06),
        "ect_edges": lambda i: ect.ect_loss(f, x[i], eps[i], t[i], 1, edges=torch.tensor([0.3])),
        "segment": lambda i: mcm.segment(t[i], torch.tensor([2, 4])[i]),
        "pseudo_huber": lambda i: mcm.v_loss(x[i], eps[i], x[i], t[i]),
    }[name]
    assert torch.allclose(run(slice(0, 2)), torch.cat(
        [run(slice(0, 1)), run(slice(1, 2))]), rtol=1e-12)

@pytest.mark.parametrize("N", [1, 2, 3, 8])
def test_times(N):
    t, s, t_step = mcm.draw_times(4096, N, 24, torch.Generator().manual_seed(0))
    assert (t_step <= s).all() and (s < t).all() and (t <= 1).all() and (t_step >= 0).all()
    assert torch.allclose(t - s, torch.tensor(1 / 24), atol=1e-6)
    assert 0.5 * N / 24 < (s == t_step).float().mean() < 2 * N / 24
    assert len(t.unique()) == 24
    assert ((t - t_step) * N < 1 + 1e-5).all()

def test_segments_and_teacher_steps():
    rows = []
    for N in range(1, 65):
        # an edge belongs to the segment below
        edge = torch.arange(1, N + 1) / N
        assert mcm.segment(edge, N).tolist() == [N * (N - 1) // 2 + i for i in range(N)]
        assert mcm.segment(edge - 0.5 / N, N).equal(mcm.segment(edge, N))
        rows += mcm.segment(edge, N).tolist()
    assert rows == list(range(64 * 65 // 2))
    T = [mcm.teacher_steps(i) for i in (0, 50_000, 100_000, 200_000)]
    assert np.allclose(T, [64, math.sqrt(64 * 1280), 1280, 1280])

def test_one_segment_is_a_consistency_model():
    """N = 1 where alpha = 1: Song et al.'s loss |f(z_t, t) - f(z_s, s)|, here with the v-weight."""
    def f(z, t):
        return torch.tanh(z) / mcm.per_sample(1 + t, z)
    x, eps, t = noise(8, 5), noise(8, 5, seed=1), torch.linspace(0.5, 2, 8, dtype=torch.float64)
    s = 0.9 * t
    loss = mcm.consistency_loss(f, x, eps, t, s, 0 * t, mcm.edm, huber_eps=0.0)
    d = f(x + t[:, None] * eps, t) - f(x + s[:, None] * eps, s)
    assert torch.allclose(loss, (d**2).mean(1).sqrt() * (1 + t**2).sqrt() / t)

@pytest.mark.parametrize("N", [1, 4, 16])
def test_as_many_segments_as_teacher_steps_is_diffusion(N):
    x, eps, (t, s, t_step) = noise(8, 5), noise(8, 5, seed=1), times(8, N, N)
    alpha, sigma = mcm.at(mcm.cosine, t, x)
    z_t = alpha * x + sigma * eps
    f = mcm.as_f(gaussian_denoise)
    loss = mcm.consistency_loss(f, x, eps, t, s, t_step, huber_eps=0.01)
    v_error = (((f(z_t, t) - x) / sigma) ** 2).mean(1)
    assert torch.allclose(loss, (v_error + 1e-4).sqrt() - 0.01)
    assert torch.allclose(loss, mcm.v_loss(f(z_t, t), x, z_t, t, huber_eps=0.01))

def test_training_target_lies_between_reference_and_data():
    """With z_s = ddim(x, z_t) both jumps come to w x_ref + (1 - w) x, w from the three angles."""
    x, eps, (t, s, e) = noise(64, 5), noise(64, 5, seed=1), times(64, 2, 16)
    angle = [mcm.ANGLE_0 + u * (mcm.ANGLE_1 - mcm.ANGLE_0) for u in (t, s, e)]
    w = (angle[0].sin() * (angle[1] - angle[2]).sin() / \
         angle[1].sin() / (angle[0] - angle[2]).sin())[:, None]
    alpha, sigma = mcm.at(mcm.cosine, t, x)
    z_t = alpha * x + sigma * eps
    target = mcm.consistency_target(lambda z, t: torch.tanh(
        z), z_s := mcm.ddim(x, z_t, t, s), z_t, t, s, e)
    assert torch.allclose(target, w * torch.tanh(z_s) + (1 - w) * x)

@pytest.mark.parametrize("N", [1, 2, 4])
def test_gaussian_consistency_function_is_the_fixed_point(N):
    """One DDIM step of 1/T errs by O(1/T^2), so the exact f has that loss at a fixed distance from
    the edge. The jump back divides by that distance: right next to the edge it is O(1/T)."""
    f, teacher, far, near = gaussian_f(N), mcm.as_f(gaussian_denoise), [], []
    for n in (64, 256):
        k = torch.arange(1, n * N + 1, dtype=torch.float64)
        x, eps = noise(len(k), 64) * V**0.5, noise(len(k), 64, seed=1)
        t, s, edge = k / (n * N), (k - 1) / (n * N), (k - 1).div(n, rounding_mode="floor") / N
        loss = mcm.consistency_loss(f, x, eps, t, s, edge, teacher=teacher,
                                    x_var_frac=0.0, huber_eps=0.0)
        loss = loss.reshape(N, n)
        far.append(loss[:, n // 2:].mean())
        near.append(loss[0, 0])
    assert 14 < far[0] / far[1] < 18 and 3 < near[0] / near[1] < 5
    z_1 = noise(100, 3)
    assert torch.allclose(sample.multistep(f, z_1, N), flow(
        z_1, 1.0, 0.0))  # so its variance is right

def test_references_teachers_and_gradients():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(z, t, w=w):
        return torch.tanh(w * z) * mcm.per_sample(torch.cos(t), z)

    def teacher(z, t):
        return 0.5 * z
    x, eps, u = noise(16, 3), noise(16, 3, seed=1), times(16, 2, 8)
    mcd = mcm.consistency_loss(f, x, eps, *u, teacher=teacher)
    same = mcm.consistency_loss(f, x, eps, *u, teacher=teacher, f_ref=lambda z, t: f(z, t))
    tract = mcm.consistency_loss(f, x, eps, *u, teacher=teacher, f_ref=lambda z, t: f(z, t, 0.6))
    assert mcd.equal(same) and not mcd.allclose(tract)
    assert mcm.consistency_loss(f, x, eps, *u, teacher=lambda z, t: (0.5 * z, 0.5 * z)).equal(mcd)
    mcd.sum().backward()

    def objective(v):  # the reference and the teacher stay at w
        return mcm.consistency_loss(lambda z, t: f(z, t, v), x, eps, *u, teacher=teacher,
                                    f_ref=lambda z, t: f(z, t, 0.7)).sum()
    slope = (objective(0.7 + 1e-6) - objective(0.7 - 1e-6)) / 2e-6
    assert torch.allclose(w.grad, slope, rtol=1e-6)

def test_addim_keeps_variance_where_the_signal_is_small():
    """For Gaussian data of variance c and its exact posterior variance, the error of one aDDIM step
    is -c cot(a_t) cot(a_s) times DDIM's to first order (a: the angles of cosine), as eq. (14) takes
    x_hat and eps_hat for uncorrelated. So it pays at a low SNR, and overshoots for c ~ 1."""
    c, z = 1e-4, noise(64, 10_000)
    f = mcm.as_f(lambda x, sigma: x * (c / (c + sigma**2)).reshape(-1, 1))
    alpha, sigma = mcm.at(mcm.cosine, 0.0, z)
    wanted = alpha**2 * c + sigma**2
    exact = sample.addim(f, z, 8, x_var=lambda a, s: c * s**2 / (a**2 * c + s**2))
    assert abs(exact.var() - wanted) < 0.1 * abs(sample.ddim(f, z, 8).var() - wanted)

def test_the_loss_compiles_whole_and_agrees():
    net = train_cifar.UNet(16, (1,), 1, resolution=8, segments=3, dropout=0.3, attention=())
    x, eps = noise(4, 3, 8, 8).float(), noise(4, 3, 8, 8, seed=1).float()
    N, seed = torch.full((4,), 2), torch.arange(4)
    t, s, t_step = (u.float() for u in times(4, 2, 8))
    torch._foreach_add_([p.data for p in net.parameters()], 0.05)

    def loss(t, s, t_step):
        f = mcm.as_f(net, steps=N, seed=seed)
        return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=mcm.as_f(net)).mean()

    def run(loss):
        net.zero_grad()
        value = loss(t, s, t_step)
        value.backward()
        return value, torch.cat([p.grad.flatten() for p in net.parameters()])
    for eager, compiled in zip(run(loss), run(torch.compile(loss, fullgraph=True))):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)

# ------------------------------------------------------------------------------------------------
# ect.py and sample.py, against the authors' code

def stand_in(w):
    """The fixtures' closed-form network."""
    def denoise(x, sigma):
        s = mcm.per_sample(sigma, x)
        scale = (s**2 + 0.25).rsqrt()
        return 0.25 * scale**2 * x + 0.5 * s * scale * torch.tanh(w * scale * x)
    return denoise

@needs_fixtures
@pytest.mark.parametrize("q", [2, 4, 256])
@pytest.mark.parametrize("k, name", [(8, "sigmoid"), (0, "const")])
def test_ect_mapping(q, k, name):
    data = load("ect_t_to_r.npz")
    t = torch.from_numpy(data["t"])
    for stage in data["stages"].tolist():
        r = ect.t_to_r(t, stage, q, k)
        assert np.allclose(r, data[f"r64_q{q}_{name}"][stage], rtol=1e-12, atol=1e-12)
        assert np.allclose(ect.t_to_r(t.float(), stage, q, k), data[f"r32_q{q}_{name}"][stage],
                           rtol=3e-7, atol=1e-6)
        wide = data["t"].astype(np.longdouble)
        exact = wide * np.minimum(1, (1 + k / (1 + np.exp(wide))) / np.longdouble(q) ** (stage + 1))
        assert np.allclose(ect.gap(t.float(), stage, q, k).numpy(), exact, rtol=1e-5, atol=0)

@needs_fixtures
def test_ect_loss():
    data = load("ect_loss_standin.npz")
    x, eps, t = (torch.from_numpy(data[k]) for k in ("x", "eps", "t_f64"))
    for case in (k[7:] for k in data if k.startswith("losshp_")):
        q, adj, stage, c = case.split("_")
        q, stage, c, k = int(q[1:]), int(stage[1:]), float(c[1:]), 8 if adj == "sigmoid" else 0
        for dtype in (torch.float64, torch.float32):
            w = torch.tensor(float(data["w"]), dtype=dtype, requires_grad=True)
            arguments = [a.to(dtype) for a in (x, eps, t)]
            loss = ect.ect_loss(stand_in(w), *arguments, stage, q, k, c=c)
            loss.mean().backward()
            assert loss.isfinite().all() and w.grad.isfinite()    # the authors' is NaN in places
            if dtype == torch.float64 and q ** (stage + 1) <= 65536:
                assert np.allclose(loss.detach(), data[f"loss_{case}_f64"], rtol=1e-9)
                assert np.allclose(w.grad, data[f"gradw_{case}_f64"], rtol=1e-8)
            elif dtype == torch.float32 and stage == 0:
                assert np.allclose(
                    loss.detach(), data[f"losshp_{case}"], rtol=5e-5 if q == 2 else 1.5e-2)

def test_ect_segments():
    x, eps, t = noise(64, 5), noise(64, 5, seed=1), ect.draw_t(64).double()
    D = stand_in(0.8)
    none = torch.empty(0, dtype=torch.float64)
    assert ect.ect_loss(D, x, eps, t, 3).equal(ect.ect_loss(D, x, eps, t, 3, edges=none))
    edges = ect.default_edges(4).double()
    assert torch.allclose(ect.default_edges(2), torch.tensor([1.0]), atol=0.02)      # tan(pi / 4)
    assert ect.lower_edge(edges, edges).tolist() == [0.0, *edges[:-1].tolist()]
    told = ect.told_segment(lambda x, sigma, segment: segment, edges)
    assert told(x, torch.tensor([0.01, *edges, 80.0])
                ).tolist() == [6, 6, 7, 8, 9]   # as mcm.segment
    # Near an edge the loss stays bounded, though its weight 1 / (t - r) does not.
    near = edges[:1].expand(64) * (1 + torch.logspace(-12, -1, 64, dtype=torch.float64))
    assert ect.ect_loss(D, x, eps, near, 3, edges=edges).max() < 50
    assert [ect.stage(i, 25_000) for i in (0, 24_999, 25_000)] == [0, 0, 1] and ect.stage(9, 0) == 0

@needs_fixtures
def test_renoise_is_ects_generator():
    data = load("ect_generator_standin.npz")
    latents, eps = torch.from_numpy(data["latents"]), torch.from_numpy(data["noise"])
    for steps in (1, 2, 3):
        sigmas = [80.0, *data[f"mid_t_{steps}step"]]
        x = sample.renoise(stand_in(torch.tensor(data["w"])), latents, sigmas, eps)
        assert np.allclose(x, data[f"out_{steps}step_f64"], atol=1e-10)

def test_heun_is_second_order():
    z = noise(8, 3)
    exact = z * 80 * (V / (V + 80**2)) ** 0.5
    error = [(sample.heun(gaussian_denoise, z, n) - exact).abs().max() for n in (32, 64, 128)]
    assert 3 < error[0] / error[1] < 5 and 3 < error[1] / error[2] < 5

# ------------------------------------------------------------------------------------------------
# The network

@needs_fixtures
@pytest.mark.parametrize("kind, classes", [("uncond", 0), ("cond", 10)])
def test_unet_is_edms(kind, classes):
    io = {k: torch.from_numpy(v) for k, v in load(
        f"edm_{kind}_ch32_io.npz").items() if v.dtype != "<U18"}
    state = {k: torch.from_numpy(v) for k, v in load(f"edm_{kind}_ch32_state.npz").items()}
    net = train_cifar.UNet(32, classes=classes, augment_dim=9, segments=3).eval().load(state, kind)
    raw = []
    net.model.register_forward_hook(lambda module, inputs, output: raw.append(output))
    x, sigma, labels = io["x"], io["sigma"], io.get("class_labels")

    def close(a, b, atol=3e-5):
        return torch.allclose(a, b, atol=atol, rtol=1e-5)
    with torch.no_grad():
        segment = torch.ones(8, dtype=torch.int64)                       # zero at first: no effect
        assert close(net(x, sigma, labels, segment=segment), io["D"]) and close(raw[0], io["F"])
        assert close(net(x, sigma, labels, io["augment_labels"]), io["D_augment_labels"])
        assert close(net(x, torch.tensor(1.5), labels), io["D_scalar_sigma"], 5e-5)
        if classes:
            assert close(net(x, sigma), io["D_no_labels"])
    del state["model.map_layer0.bias"]
    with pytest.raises(fid.UserError, match="map_layer0.bias"):
        net.load(state, kind)

def test_unet_size():
    with torch.device("meta"):
        net = train_cifar.UNet(augment_dim=9)
    assert sum(p.numel() for p in net.parameters()) == 55_733_891 and len(net.state_dict()) == 425

def test_dropout_is_one_mask():
    net = train_cifar.UNet(16, (1,), 1, resolution=8, dropout=0.5, attention=()).train()
    torch._foreach_add_([p.data for p in net.parameters()], 0.05)
    x, sigma, seed = noise(2, 3, 8, 8), torch.ones(2), torch.tensor([5, 6])
    assert net(x, sigma, seed=seed).equal(net(x, sigma, seed=seed))
    assert not net(x, sigma, seed=seed).allclose(net(x, sigma, seed=seed + 1))
    assert net(x, sigma, seed=seed)[1:].allclose(net(x[1:], sigma[1:], seed=seed[1:]), atol=1e-6)
    kept = train_cifar.dropout(torch.ones(64, 16, 16, 16), 0.2, torch.arange(64), 3)
    assert abs(kept.mean() - 1) < 0.01 and set(kept.unique().tolist()) == {0.0, 1.25}
    flat = (kept > 0).float().reshape(64, -1)
    assert torch.corrcoef(flat).fill_diagonal_(
        0).abs().max() < 0.08     # between samples: 4096 elements

# ------------------------------------------------------------------------------------------------
# fid.py

def published_rule(key, shape):  # the fixtures' weights
    rng = np.random.default_rng([11, zlib.crc32(key.encode())])
    scale = 0.1 if len(shape) < 2 else (2 / np.prod(shape[1:])) ** 0.5
    positive = key.endswith(("bn.weight", "running_var"))
    return rng.uniform(0.5, 1.5, shape) if positive else rng.standard_normal(shape) * scale

@needs_fixtures
def test_fid_fixtures():
    r, z, f = (np.load(FIXTURES / f"fid_{k}.npz") for k in ("resize", "inception", "frechet"))
    for size in "32", "64x48":
        ours = fid.resize_tf1(torch.tensor(r[f"img{size}"])).numpy()
        assert abs(ours[:, :, ::13, ::13] - r[f"tf1_{size}_stride13"]).max() < 2e-3
    keys = json.loads((FIXTURES / "fid_inception_keys.json").read_text())["keys"]
    net = fid.InceptionFID().eval()
    net.load_state_dict({k: torch.tensor(published_rule(k, v["shape"])) for k, v in keys.items()})
    for net in net, net.fold():
        with torch.inference_mode():
            ours = net(torch.tensor(z["img64x48"])).numpy()
        assert abs(ours - z["tfid_img64x48_2048"]).max() < 5e-4
    for i in range(3):
        gaussians = [f[f"{k}_pair{i}"] for k in ("mu1", "sigma1", "mu2", "sigma2")]
        assert fid.frechet_distance(*gaussians) == pytest.approx(f[f"fd_pair{i}"], rel=1e-9)
    s, t = (fid.Statistics().update(torch.tensor(f[k])) for k in ("x_rankdef", "y_rankdef"))
    exact = pytest.approx(f["fd_exact_rankdef"], rel=1e-6)
    assert fid.frechet_distance(s.mean, s.cov, t.mean, t.cov) == exact

def test_fid_facts():
    assert fid.metric_name("inception", 50_000) == "FID" != fid.metric_name("inception", 49_999)
    x = np.random.default_rng(0).standard_normal((300, 5)) + 1e7  # a large mean must not cancel
    a, b, s = (fid.Statistics().update(torch.tensor(p)) for p in (x[:10], x[10:11], x[11:]))
    assert np.allclose(a.merge(b).merge(s).cov, np.cov(x.T), rtol=1e-9)
    few = fid.Statistics().update(torch.randn(20, 50))  # n < d
    assert 0 <= fid.frechet_distance(few.mean, few.cov, few.mean, few.cov) < 1e-6

def test_foreign_files_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "bad.npz", np.array([{}], dtype=object))
    silent = socket.create_server(("127.0.0.1", 0))  # takes a call and says nothing
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/bad"
    for call in (fid.feature_extractor, fid.read_npz, lambda p: fid.fetch(url, "0", p + "d", 0.3),
                 lambda p: fid.feature_extractor("inception", weights=p)):
        with pytest.raises(fid.UserError, match="bad"):
            call(str(tmp_path / "bad.npz"))

# ------------------------------------------------------------------------------------------------
# EDM's pickles

def call(function, *args):  # pickled, it asks that function(*args) be called
    return types.SimpleNamespace(__reduce_ex__=lambda protocol: (function, args))

def edm_pickle(offset=0, size=(8, 8, 3, 3), stride=(72, 9, 3, 1), **changes):
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {"none": None}, "_modules": {}, **state}
        return call(print, dict(module_src="open('PWNED', 'w')", class_name=name, state=state))
    storage = torch.arange(576.)._typed_storage()
    weight = call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    given = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0, img_resolution=8)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs={**given, **changes})
    ema = module("EDMPrecond", _modules=dict(model=unet), sigma_data=0.5, gain=np.float64(1))
    return pickle.dumps(dict(loss_fn=call(getattr, ema, "forward"), ema=ema), 3).replace(
        b"cbuiltins\nprint\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = [RUN + b"R.", RUN + b"\x81.", RUN + b"}\x92.", b"(" + RUN + b"o.", b"(iposix\nsystem\n.",
           b"\x8c\5posix\x8c\6system\x93.", b"\x82\1.", b"\x84\1\0\0\0.", b"Pposix\n.", b"NQ.",
           b"\x8c\5numpy\x8c\7dtype.x\x93.", 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.", b"",
           b"ccollections\nOrderedDict\n)\x81}\x8c\x0c__setstate__cposix\nsystem\nsb.", b"}K\1Ns.",
           b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.", b"\x8b\xff\xff\xff\x7f",
           b"\x8e" + bytes(7) + b"\x10", b"\x8f" * 10**6, b"I" + b"9" * 10**7, b"]" * 10**5 + b"a.",
           edm_pickle(0, (2**20, 2**20), (0, 0)), edm_pickle(embedding_type="fourier"),
           edm_pickle(-2), *map(Path.read_bytes, FIXTURES.glob("edm_maliciou*[!c].pkl"))]

@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_edm_pickles_are_refused(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(HOSTILE[number])
    begun, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(train_cifar.UserError, match="^net.pkl: .*--init"):
        train_cifar.load_edm("net.pkl")
    assert time.process_time() - begun < 1 and os.listdir() == ["net.pkl"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20  # kB

def test_edm_pickles_load(tmp_path):
    (tmp_path / "net.pkl").write_bytes(edm_pickle())
    state, kwargs = train_cifar.load_edm(tmp_path / "net.pkl")
    assert list(state) == ["model.conv.weight"] and state.popitem()[1].flatten()[575] == 575
    assert [*kwargs.items()][:4] == [("mult", (1,)), ("dropout", 0.1), ("width", 8), ("blocks", 4)]
    for name in ("edm_uncond_small", "ect_snapshot_tiny") if FIXTURES.exists() else ():
        made = dict(np.load(FIXTURES / f"{name.replace('small', 'ch32')}_state.npz"))
        state, _ = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
        np.testing.assert_equal({key: weight.numpy() for key, weight in state.items()}, made)

# ------------------------------------------------------------------------------------------------
# The programs, as a user runs them

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run of seconds on 64 shapes, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    np.savez("shapes.npz", arr_0=train_cifar.shapes(64, 16)[0].permute(0, 2, 3, 1))
    return ("--data shapes.npz --device cpu --width 16 --mult 1 --blocks 1 --pretrain-iters 6 "
            "--iters 6 --batch 4 --log-every 2 --save-every 2 --fd-samples 16 --many 2").split()

def loss_rows(out):
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [(row["phase"], row["step"], row["loss"]) for row in rows]

def same(a, b):
    if torch.is_tensor(a):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "config")
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b

@pytest.mark.parametrize("method", ["mct", "mcd", "ect"])
def test_a_run_that_died_and_went_on_is_the_run_that_did_not(tiny, method, monkeypatch):
    tiny += ["--method", method]
    train_cifar.main([*tiny, "--out", "straight"])
    draw, blows = train_cifar.draw, [("pretrain", 3, "crash"), ("pretrain", 5, signal.SIGINT),
                                     ("tune", 1, "crash"), ("tune", 4, signal.SIGTERM)]

    def deadly(run, phase, step):
        if blows and (phase, step) == blows[0][:2]:
            blow = blows.pop(0)[2]
            if blow == "crash":  # as kill -9: nothing is saved
                raise RuntimeError
            os.kill(os.getpid(), blow)
        return draw(run, phase, step)
    monkeypatch.setattr(train_cifar, "draw", deadly)
    while blows:
        with pytest.raises((RuntimeError, SystemExit)):
            train_cifar.main([*tiny, "--out", "torn"])
    train_cifar.main([*tiny, "--out", "torn"])
    states = [torch.load(f"{out}/latest.pt", weights_only=True) for out in ("straight", "torn")]
    assert same(*states) and loss_rows("straight") == loss_rows("torn")
    results = [json.loads(Path(out, "result.json").read_text()) for out in ("straight", "torn")]
    assert [row["distance"] for row in results[0]] == [row["distance"] for row in results[1]]
    assert [(row["model"], row["nfe"]) for row in results[0]] == [
        ("diffusion", 2), ("tuned", 2), ("diffusion", 3)]

def test_two_processes_are_one(tiny):
    train_cifar.main([*tiny, "--out", "one", "--steps", "1", "2"])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    "--master_port=29517",
                    HERE / "train_cifar.py", *tiny, "--out", "two", "--steps", "1", "2"],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (torch.load(f"{out}/latest.pt", weights_only=True)["net"] for out in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)
    assert [row[:2] for row in loss_rows("one")] == [row[:2] for row in loss_rows("two")]

def test_sample_command(tiny):
    train_cifar.main([*tiny, "--out", "run dir", "--method", "ect", "--segmented"])
    for arguments in (["run dir/latest.pt"],
                      ["run dir/diffusion.pt", "--sampler", "addim", "--steps", "3"]):
        sample.main([*arguments, "--n", "5", "--out", "x.npz"])
        images = np.load("x.npz")["arr_0"]
        assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
        sample.main([*arguments, "--n", "5", "--out", "x.png"])
    levels = torch.arange(256, dtype=torch.uint8)
    assert sample.to_uint8(levels.float() / 127.5 - 1).equal(levels)

# Bad command lines and, behind >, what their one line must name; else it is their last option.
BAD = """
train --steps 0; train --steps x; train --steps; train --steps 1000; train --method dog
train --batch 0; train --lr nan; train --lr -1; train --ema 2; train --iters 1.5; train --what
train --precision fp8; train --device cuda; train --device tpu; train --T 4; train --seed -1
train --data nowhere > nowhere; train --data empty > empty; train --data text > a.png
train --data mixed > mixed; train --data odd > odd; train --data text.npz > text.npz
train --data float.npz > float.npz; train --data cifar10 > cifar-10; train --segmented
train --data ok.npz --init nowhere; train --data ok.npz --init text.npz; train --batch 5 --accum 2
train --data ok.npz --out text.npz; train --data ok.npz --out text.npz/x; train --accum 0
train --data ok.npz --features text.npz > text.npz; train --segmented --method ect --steps 1 2
train --mult 2 2 --width 48; train --data ok.npz --patch 3; train --fd-samples 1; train --q 0
sample > checkpoint; sample nowhere.pt > nowhere.pt; sample text.npz > text.npz; sample x --steps 0
sample x --n 0; sample x --out x.jpg; sample x --out no/where.png; sample x --sampler euler
sample x --device cuda; fid > a, b; fid ok.npz > b; fid nowhere ok.npz > nowhere
fid ok.npz nowhere > nowhere; fid ok.npz ok.npz --n 1; fid ok.npz ok.npz --batch 0
fid text ok.npz --features random > a.png; fid ok.npz ok.npz --features dog > dog
fid ok.npz ok.npz --weights nowhere > nowhere; mcm --method dog; mcm --out no/where.png; ect --what
"""

@pytest.mark.parametrize("line", BAD.strip().replace("\n", "; ").split("; "))
def test_bad_input_is_one_line(line, tmp_path, monkeypatch, capsys):
    line, _, named = line.partition(" > ")
    named = named or [word for word in line.split() if word.startswith("--")][-1]
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "text", "mixed", "odd"):
        Path(folder).mkdir()
    Path("text/a.png").write_text("no image")
    Path("text.npz").write_text("no archive")
    for i, size in enumerate((16, 24)):
        sample.save_grid(torch.zeros(1, 3, size, size), Path(f"mixed/{i}.png"), 1)
        sample.save_grid(torch.zeros(1, 3, 9, 9), Path(f"odd/{i}.png"), 1)
    np.savez("ok.npz", arr_0=np.zeros((16, 16, 16, 3), np.uint8))
    np.savez("float.npz", arr_0=np.zeros((16, 16, 16, 3)))
    program, *arguments = line.split()
    module = {"train": train_cifar, "sample": sample, "fid": fid, "mcm": mcm, "ect": ect}[program]
    Path("data").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fid.run(lambda: module.main(arguments))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and named in error and len(error.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before

def test_readme_snippets():
    text = (HERE / "README.md").read_text()
    for block in text.split("```python\n")[1:]:
        names = {}
        exec(block.split("```")[0], names)
        assert names["loss"].isfinite().all()
