"""Easy Consistency Tuning (Geng et al., "Consistency Models Made Easy", arXiv 2406.14548).

Train f(z_t, t) to equal f(z_r, r) for an r below t. For r = 0 the target is x: a diffusion model.
So start from a pretrained one, and move r towards t as training goes on. Compared with mcm.py:

                  MCM                                   ECT
    times         a grid of T steps in [0, 1]           t log-normal, r a function of t and stage
    loss          RMS of a difference in v              norm of a difference in x, over t - r
    schedule      mcm.cosine                            mcm.edm: z_t = x + t eps, and f is D
    sampler       DDIM from edge to edge                fresh noise between steps, sample.renoise

The target, mcm.consistency_target, is the same function in both. Given `edges`, time is cut into
segments as in MCM: the two papers combined. (Ours.)

    t, r [B]    noise levels, 0 <= r < t
    stage       of the curriculum, 0, 1, ..., int or [B]. r rounds to t from q^(stage + 1) = 2^25
    q, k, b     each stage divides t - r by q (2 or 256). k, b = 8, 1: n(t) falls from 5 to 1
    c           rounds the norm near 0 (pseudo-Huber). The norm sums over an image. The paper: c = 0
"""
import torch

import mcm

# The authors' recipes for CIFAR-10, with their 2-step FIDs. Both start from EDM's unconditional VP
# weights and use RAdam at a constant 1e-4, batch 128, dropout 0.2, c = 0, no flips.
#   8,000 iterations      q = 256, one stage                     ema 0.9993   2.73 (one A100 hour)
#   200,000 iterations    q = 2, 8 stages of 25,000 iterations   ema 0.9999   2.15
MID_SIGMA = 0.821       # the start of their second step: 80 -> x, then x + 0.821 eps -> x

def draw_t(batch, p_mean=-1.1, p_std=2.0, generator=None, device=None):
    """t [B] > 0 with ln t ~ N(p_mean, p_std^2)."""
    normal = torch.randn(batch, generator=generator, device=device, dtype=torch.float32)
    return (p_mean + p_std * normal).exp()

def t_to_r(t, stage, q=2, k=8, b=1):
    """r = max(0, t (1 - n(t) / q^(stage + 1))) with n(t) = 1 + k sigmoid(-b t), in t's shape."""
    n = 1 + k * torch.sigmoid(-b * t)
    relative_gap = n / float(q) ** (stage + 1)          # (t - r) / t; float: 256^8 is no int64
    return t * (1 - relative_gap).clamp(min=0)

def segment_edges(steps, device=None):
    """The inner edges, rising sigmas, of N segments that are equal in cosine's t -> [N - 1]."""
    t = torch.arange(1, steps, device=device).double() / steps
    alpha, sigma = mcm.cosine(t)
    return (sigma / alpha).float()

def ect_loss(denoise, x, eps, t, stage, q=2, k=8, b=1, c=0., edges=None):
    """ECT's loss for data x, noise eps [B, ...], t [B] of draw_t and a stage -> [B]. edges None:
    the paper. edges [N - 1], of segment_edges: N segments, and a denoiser mcm.conditioned(D, N)."""
    # (1) The earlier time. In segments it stops at the lower edge of t's segment.
    edge = torch.zeros_like(t)
    if edges is not None:
        lower_edges = torch.cat([edge.new_zeros(1), edges.to(t)])       # of segments 0 .. N - 1
        edge = lower_edges[mcm.segment_of(t, len(lower_edges))]         # edm's t is a sigma
    r = torch.maximum(t_to_r(t, stage, q, k, b), edge)

    # (2) Two noisy images with the same noise.
    z_t = x + mcm.per_sample(t, x) * eps
    z_r = x + mcm.per_sample(r, x) * eps

    # (3) The target, as in MCM. With edge 0 both jumps go down to 0, so the target is D(z_r, r),
    #     without gradient; where r = 0, it is x.
    target = mcm.consistency_target(denoise, z_r, z_t, t, r, edge, mcm.edm)

    # (4) The two guesses are compared where they land, at the edge. A jump from z_t lands at
    #     x_hat + edge / t (z_t - x_hat), so the landings differ by (1 - edge / t) times as much as
    #     the guesses (ours; with edge 0, as much). So the loss is finite just above an edge: there
    #     r = edge, and for guesses that differ by d, (1 - edge / t) |d| / (t - edge) = |d| / t.
    difference = (denoise(z_t, t) - target) * mcm.per_sample(1 - edge / t, x)

    # (5) (sqrt(|difference|^2 + c^2) - c) / (t - r), the square summed over the whole image.
    square = (difference**2).unsqueeze(-1).flatten(1).sum(1)
    t_minus_r = torch.where(r < t, t - r, torch.inf)    # where r rounds to t, the loss is 0
    return mcm.pseudo_huber(square, c) / t_minus_r
