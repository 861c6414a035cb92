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

    t, r      [B], noise levels, 0 <= r < t             q, k, b   the mapping t -> r, below
    stage     how far the curriculum is, 0, 1, 2, ...   c         of the pseudo-Huber norm
"""
import torch

import mcm

# The authors' recipes for CIFAR-10 start from EDM's unconditional VP weights. Both use RAdam at a
# constant 1e-4, batch 128, dropout 0.2, c = 0, no flips. Their 2-step FIDs stand at the right.
#   8,000 iterations      q = 256, one stage                     ema 0.9993   2.73 (one A100 hour)
#   200,000 iterations    q = 2, 8 stages of 25,000 iterations   ema 0.9999   2.15
# train_cifar.py --preset cifar10 --method ect is the first, but in fp16, and the rate falls to 0.
MID_SIGMA = 0.821       # the start of their second step: 80 -> x, then x + 0.821 eps -> x

def draw_t(batch, p_mean=-1.1, p_std=2.0, generator=None, device=None):
    """t [B] > 0 with ln t ~ N(p_mean, p_std^2)."""
    normal = torch.randn(batch, generator=generator, device=device)
    return (p_mean + p_std * normal).exp()

def relative_gap(t, stage, q=2, k=8, b=1):
    """(t - r) / t = n(t) / q^(stage + 1), at most 1, in t's shape; n(t) = 1 + k sigmoid(-b t).
    For q = 256 at stage 3, r rounds to t in float32. So ect_loss takes t - r from this, as t * gap.
    """
    n = 1 + k * torch.sigmoid(-b * t)
    return (n / float(q) ** (stage + 1)).clamp(max=1)   # float: 256^8 overflows an int64

def t_to_r(t, stage, q=2, k=8, b=1):
    """r = max(0, t (1 - n(t) / q^(stage + 1))), in t's shape and dtype."""
    return t * (1 - relative_gap(t, stage, q, k, b))

def segment_edges(steps, device=None):
    """The N - 1 inner edges, in sigma, of N segments that are equal in cosine's t -> [N - 1]."""
    t = torch.arange(1, steps, device=device).double() / steps
    alpha, sigma = mcm.cosine(t)
    return (sigma / alpha).float()

def lower_edge(t, edges):
    """The largest edge below t, or 0 -> [B]. The factor allows for a t that was rounded up."""
    lower = torch.cat([edges.new_zeros(1), edges])
    index = torch.bucketize(t * (1 - 1e-6), edges)
    return lower[index]

def ect_loss(denoise, x, eps, t, stage, q=2, k=8, b=1, c=0., edges=None):
    """ECT's loss for data x [B, ...], noise eps [B, ...], t [B] of draw_t and a stage -> [B].
    edges None: the paper. edges [N - 1], of segment_edges: N segments, with a denoiser that is told
    its segment, mcm.conditioned(D, N).
    """
    # (1) The earlier time. In segments it stops at the lower edge of t's segment.
    edge = torch.zeros_like(t)
    if edges is not None:
        edge = lower_edge(t, edges.to(t))
    r = torch.maximum(t_to_r(t, stage, q, k, b), edge)

    # (2) Two noisy images with the same noise.
    z_t = x + mcm.per_sample(t, x) * eps
    z_r = x + mcm.per_sample(r, x) * eps

    # (3) The target, as in MCM. With edge 0 both jumps go down to 0, so the target is D(z_r, r),
    #     without gradient; where r = 0, it is x.
    target = mcm.consistency_target(denoise, z_r, z_t, t, r, edge, mcm.edm)

    # (4) The two guesses are compared where they land at the edge: x_hat + edge / t (z_t - x_hat).
    #     There they differ by (1 - edge / t) times their difference in x: a factor of 1 at edge 0.
    #     Without this factor, (5)'s 1 / (t - edge) just above an edge would integrate to infinity.
    difference = (denoise(z_t, t) - target) * mcm.per_sample(1 - edge / t, x)

    # (5) (sqrt(|difference|^2 + c^2) - c) / (t - r), the square summed over the whole image.
    square = (difference**2).reshape(len(x), -1).sum(1)
    gap = relative_gap(t, stage, q, k, b)
    t_minus_r = torch.minimum(t * gap, t - edge)
    return mcm.pseudo_huber(square, c) / t_minus_r
