"""Easy Consistency Tuning (Geng et al., "Consistency Models Made Easy", arXiv 2406.14548).

Train f(z_t, t) to equal f(z_r, r). A pretrained diffusion model is the case r = 0, so start there,
and move r towards t as training goes on. What that changes against mcm.py:

    1. the times      t log-normal, r a function of t and the stage     (MCM: a grid of T steps)
    2. the loss       the norm of an image's error in x, over t - r     (MCM: its RMS in v)
    3. the schedule   z_t = x + t eps, mcm.edm, so that f is D          (MCM: mcm.cosine)
    4. the sampler    fresh noise between steps, sample.renoise         (MCM: DDIM)

The target is mcm.consistency_target in both. With `edges` time is cut into segments, as in MCM:
the two papers combined.

    python ect.py        # r(t) by stage, and the toy of mcm.py tuned in 1 and 2 segments; 30 s
"""
import argparse, copy, signal

import torch

import mcm

# The authors' settings for CIFAR-10 from EDM's unconditional VP weights, 2-step FID at the right.
# Also theirs: c = 0, RAdam (in train_cifar.py), betas 0.9 and 0.999, no clipping, no flips. t - r
# shrinks by a factor q every double_every iterations (0: never).
BOTH = dict(batch=128, lr=1e-4, dropout=0.2)
RECIPES = {
    "hour": dict(BOTH, iters=8_000, q=256.0, double_every=0, ema=0.9993),   # an A100 hour, 2.73
    "long": dict(BOTH, iters=200_000, q=2.0, double_every=25_000, ema=0.9999),           # 2.15
}
MID_SIGMA = 0.821                       # where their second step starts: 80 -> x, + 0.821 eps -> x

def stage(iteration, double_every):
    """A function of the iteration alone, so a resumed run cannot lose its place."""
    return iteration // double_every if double_every else 0

def draw_t(batch, p_mean=-1.1, p_std=2.0, generator=None, device=None):
    """t [B] > 0, ln t ~ N(p_mean, p_std^2)."""
    return (p_mean + p_std * torch.randn(batch, generator=generator, device=device)).exp()

def relative_gap(t, stage, q=2, k=8, b=1):
    """(t - r) / t in (0, 1]: n(t) / q^(stage + 1) with n(t) = 1 + k sigmoid(-b t), at most 1.

    All else is built on this, as t - r cancels: in float32 little is left at q = 256, stage 2. q is
    a float because 256^8 does not fit in 64 bits.
    """
    return ((1 + k * torch.sigmoid(-b * t)) / float(q) ** (stage + 1)).clamp(max=1)

def t_to_r(t, stage, q=2, k=8, b=1):
    """r = max(0, t (1 - n(t) / q^(stage + 1))), in t's shape and dtype."""
    return t * (1 - relative_gap(t, stage, q, k, b))

def gap(t, stage, q=2, k=8, b=1, edge=0.0):
    """t - max(r, edge), without cancellation."""
    return torch.minimum(t * relative_gap(t, stage, q, k, b), t - edge)

def default_edges(steps):
    """The N - 1 inner edges, in sigma, of N segments: those of the cosine schedule, as in MCM."""
    alpha, sigma = mcm.cosine(torch.arange(1, steps, dtype=torch.float64) / steps)
    return (sigma / alpha).float()

def lower_edge(t, edges):
    """The largest of 0 and `edges` below t [B]. An edge, or all but, is of the segment below it, as
    in mcm.segment."""
    return torch.cat([edges.new_zeros(1), edges])[torch.bucketize(t * (1 - 1e-6), edges)]

def ect_loss(denoise, x, eps, t, stage, q=2, k=8, b=1, c=0., edges=None):
    """ECT's loss, per sample: data x [B, ...], noise eps like x, t [B] of draw_t -> [B].

    edges None: the paper, sqrt(|d|^2 + c^2) - c of the whole image, over t - r.
    edges [N - 1]: segments, as default_edges(N) with mcm.conditioned(D, N). r stops at the lower
    edge e, and d is the distance of where both predictions jump to there, (1 - e / t) times that in
    x. Without this factor the loss has no finite mean: for r = e, the distance in x is the
    denoising error, which stays as t - r goes to 0.
    """
    edge = torch.zeros_like(t) if edges is None else lower_edge(t, edges.to(t))
    r = torch.maximum(t_to_r(t, stage, q, k, b), edge)
    z_t = x + mcm.per_sample(t, x) * eps
    z_r = x + mcm.per_sample(r, x) * eps
    target = mcm.consistency_target(denoise, z_r, z_t, t, r, edge, mcm.edm)
    d = (denoise(z_t, t) - target) * mcm.per_sample(1 - edge / t, x)
    norm = mcm.pseudo_huber((d**2).reshape(len(d), -1).sum(1), c)
    return norm / gap(t, stage, q, k, b, edge)

def main(arguments=None, n=100_000):
    argparse.ArgumentParser("ect.py", argparse.SUPPRESS, __doc__[:24]).parse_args(arguments)
    t = torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 80.0])
    print("t              ", *(f"{value:9.4g}" for value in t))
    for q, s in [(2, 0), (2, 1), (2, 3), (2, 5), (2, 7), (256, 0)]:
        print(f"r, q {q:>3} stage {s}", *(f"{value:9.4g}" for value in t_to_r(t, s, q)))
    (z, truth), diffusion = mcm.quantiles(n), mcm.toy()
    fresh = torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    print("Wasserstein-1 distance to the truth, as in mcm.py")
    for N in (1, 2):
        net, edges = copy.deepcopy(diffusion), default_edges(N)
        D = mcm.conditioned(net, N)

        def loss_of(eps, x, u, i):  # c = 100: squared, as in mcm.py and for the same reason
            return ect_loss(D, x, eps, draw_t(len(x)), stage(i, 300), c=100.0, edges=edges)
        mcm.train_toy(net, loss_of)
        with torch.no_grad():
            x = D(80 * z, torch.full((n,), 80.0))
            if N == 1:
                print(f"ECT, 1 segment, 1 step: {mcm.distance(x, truth):.4f}")
                x = D(x + MID_SIGMA * fresh, torch.full((n,), MID_SIGMA))
            else:
                x = D(mcm.ddim(x, 80 * z, 80.0, edges.item(), mcm.edm), edges.expand(n))
        print(f"ECT, {N} segment{'s' * (N - 1)}, 2 steps: {mcm.distance(x, truth):.4f}")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in mcm.py
    main()
