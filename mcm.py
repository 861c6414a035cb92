"""Multistep Consistency Models (Heek, Hoogeboom, Salimans, arXiv 2403.06807) in one file.

A diffusion model predicts the average clean image, so a sampler must take many small steps. A consistency model
predicts where the sampler would end, so one step is enough, but the function is hard to learn. Between the two lies a
dial: cut time into N segments and predict only where the sampler would leave the current segment. N = 1 is a
consistency model, N = infinity is a diffusion model, and 2 to 8 steps recover most of the quality.

    cosine, edm            schedules t -> (alpha, sigma), z_t = alpha x + sigma eps
    ddim, inv_ddim         eq. (4) and (5)           addim              Algorithm 3 and eq. (14)
    draw_times             the times of Algorithm 1  teacher_steps      T(i), section 3.2
    consistency_loss       Algorithm 1: training, distillation, TRACT, plain consistency models
    as_f                   a denoiser D(x, sigma) as the paper's f(z_t, t); the only place that converts

The contract: x and z have any shape [B, ...]; times are [B]; f(z_t, t) -> x_hat, in x's shape. Nothing here touches the
random state but `draw_times`, everything is computed per sample, and the loss compiles as one graph.

    python mcm.py                  # the dial on a 1-D mixture: a table and trajectories.png, see `main`
    python mcm.py --method mcd     # the same by distillation
"""
import math

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Schedules. Only sigma/alpha matters to a network, and it runs over EDM's range 0.002 .. 80.

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
ANGLE_0, ANGLE_1 = math.atan(SIGMA_MIN), math.atan(SIGMA_MAX)


def cosine(t):
    """Variance preserving: alpha = cos a, sigma = sin a, the angle a linear in t in [0, 1].

    log-SNR = -2 log tan a runs from +2 log 500 (t = 0) to -2 log 80 (t = 1) and is strictly monotone: an angle that
    reaches pi/2 would make tan negative in float32, and a clamp would make two times equal.
    """
    t = torch.as_tensor(t)
    angle = ANGLE_0 + t * (ANGLE_1 - ANGLE_0)
    return angle.cos(), angle.sin()


def edm(t):
    """Variance exploding: alpha = 1, sigma = t in [0, 80] (Karras et al. 2206.00364, the schedule of ECT)."""
    t = torch.as_tensor(t)
    return torch.ones_like(t), t


def at(schedule, t, x):
    """(alpha, sigma) at times t [B] (or a number), shaped to broadcast against x [B, ...]."""
    t = t if torch.is_tensor(t) else torch.tensor(t, dtype=x.dtype, device=x.device)
    alpha, sigma = schedule(t)
    shape = t.shape + (1,) * (x.ndim - t.ndim) if t.ndim else ()
    return alpha.reshape(shape), sigma.reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Steps along the path. ddim moves z from t to s < t under the belief that the clean image is x; inv_ddim asks which
# belief would have made that move.


def ddim(x, z_t, t, s, schedule=cosine):
    """Eq. (4): z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x)."""
    alpha_t, sigma_t = at(schedule, t, z_t)
    alpha_s, sigma_s = at(schedule, s, z_t)
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)


def inv_ddim(z_s, z_t, t, s, schedule=cosine):
    """Eq. (5): the x for which ddim(x, z_t, t, s) is z_s."""
    alpha_t, sigma_t = at(schedule, t, z_t)
    alpha_s, sigma_s = at(schedule, s, z_t)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z_t) / (alpha_s - alpha_t * ratio)


def addim(x, z_t, t, s, x_var, schedule=cosine):
    """Adjusted DDIM, Algorithm 3: ddim with the norm it would have if x were a draw and not an average.

    x is an average over the clean images that z_t may come from, so alpha_s x lacks their spread and every DDIM step
    loses variance. Eq. (14) puts it back by lengthening the noise: with x_var (number or [B]) the variance per element
    that x lacks,  mean((z_s - alpha_s x)^2) = sigma_s^2 mean(eps_hat^2) + (alpha_s - alpha_t sigma_s/sigma_t)^2 x_var.
    """
    alpha_t, sigma_t = at(schedule, t, z_t)
    alpha_s, sigma_s = at(schedule, s, z_t)
    eps_hat = (z_t - alpha_t * x) / sigma_t
    x_var = torch.as_tensor(x_var, device=z_t.device)
    x_var = x_var.reshape(x_var.shape + (1,) * (z_t.ndim - x_var.ndim) if x_var.ndim else ())
    missing = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    # The mean over the elements of one sample, never over the batch. It can be 0 when there are few elements.
    power = mean_per_sample(eps_hat**2).reshape((-1,) + (1,) * (z_t.ndim - 1)).clamp(min=1e-12)
    return alpha_s * x + (sigma_s**2 + missing / power).sqrt() * eps_hat


def mean_per_sample(x):
    """[B, ...] -> [B]."""
    return x.reshape(len(x), -1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Times.


def teacher_steps(i, start=64, end=1280, anneal=100_000):
    """T(i): how many steps the path is cut into at training iteration i, from `start` to `end`, log-linearly.

    Few steps first (large, biased, low-variance strides), many later. The paper anneals over half of its 200k
    iterations of batch 2048; set `anneal` to half of your run. Returns a float; draw_times rounds.
    """
    return start * (end / start) ** min(max(i / anneal, 0.0), 1.0)


def draw_times(batch, student_steps, teacher_steps, generator=None, device=None):
    """The times of Algorithm 1 -> t, s, t_step, each [B]: t_step <= s < t, in one segment of length 1/N.

    student_steps: N, a number or an int64 [B] (one network may serve several N); teacher_steps: T, a number or 0-d
    tensor, rounded to n = max(1, round(T / N)) steps per segment. All three are quotients of whole numbers by n N, so
    that s == t_step holds exactly where it should.
    """
    u = torch.rand(2, batch, generator=generator, device=device)
    N = torch.as_tensor(student_steps, device=device)
    n = (teacher_steps / N).round().clamp(min=1)
    step = (u[0] * N).floor().minimum(N - 1)      # which segment, 0 .. N - 1 (float rounding could reach N)
    n_rel = (u[1] * n).floor().minimum(n - 1) + 1  # which teacher step in it, 1 .. n
    k = step * n + n_rel
    T = n * N
    return k / T, (k - 1) / T, step * n / T


def segment(t, steps):
    """Index of the segment (i/N, (i+1)/N] that holds t [B], in one table of all segments of all N (int64 [B]).

    A time on an edge belongs to the segment below it, for that is where a sampler's jump starts; the 1e-4 keeps a t that
    was rounded up from doing otherwise. The N segments of an N-step model are rows N(N-1)/2 and following, so a row says
    both N and the segment. A network needs this: its target jumps where segments meet, which a smooth function of
    ln sigma cannot follow. The toy below, without and with it: see `main`.
    """
    N = torch.as_tensor(steps, device=t.device)
    i = (t * N - 1e-4).ceil().clamp(min=1).minimum(N) - 1
    return (N * (N - 1) // 2 + i).long()


def as_f(denoise, schedule=cosine, steps=None, **condition):
    """The paper's f(z_t, t) from a denoiser D(x, sigma) that expects x0 + sigma eps: D(z / alpha, sigma / alpha).

    With `steps` (N, or int64 [B]) the network is told its segment, as the keyword `segment` [B]. What else it is to be
    given (labels, text, ...) rides along in `condition`.
    """
    def f(z, t):
        alpha, sigma = at(schedule, t, z)
        told = {} if steps is None else {"segment": segment(t, steps)}
        return denoise(z / alpha, (sigma / alpha).flatten(), **told, **condition)
    return f


# ---------------------------------------------------------------------------------------------------------------------
# The loss.


def pseudo_huber(mean_square, eps):
    """sqrt(d^2 + eps^2) - eps from d^2, without cancellation; its slope at d = 0 is 0 for every eps, also eps = 0.

    Small eps: a norm. Large eps: d^2 / (2 eps), a squared error.
    """
    return mean_square / ((mean_square + eps**2 + 1e-30) ** 0.5 + eps)


def v_loss(x_hat, x_target, z_t, t, schedule=cosine, huber_eps=1e-4):
    """Distance of two predictions of x from z_t, in v-space, per sample [B] (root mean square, pseudo-Huber).

    A difference in x is sigma_t times one in v (variance preserving), so the paper's weight SNR + 1 =
    (alpha^2 + sigma^2) / sigma^2 stands inside the norm as its square root. With x_target = x, the data, this is the
    diffusion loss; huber_eps = 1 makes it practically a squared error.
    """
    alpha, sigma = at(schedule, t, z_t)
    difference = (x_hat - x_target) * (alpha**2 + sigma**2) ** 0.5 / sigma
    return pseudo_huber(mean_per_sample(difference**2), huber_eps)


@torch.no_grad()
def consistency_target(f_ref, z_s, z_t, t, s, t_step, schedule=cosine):
    """What f(z_t, t) should say: the x whose DDIM step from t leaves the segment where the reference leaves it from s.

    The reference is carried from s to the segment's edge t_step, the result is carried back from t. On the edge itself
    (s = t_step) there is nothing to carry and no reference: the target is inv_ddim(z_s), the diffusion target, eq. (8).
    The network still runs there, since the batch is one tensor, but at t, because D(x, 0) need not exist.
    """
    on_edge = s <= t_step
    x_ref = f_ref(z_s, torch.where(on_edge, t, s))
    z_step = ddim(x_ref, z_s, s, t_step, schedule)
    z_step = torch.where(on_edge.reshape((-1,) + (1,) * (z_s.ndim - 1)), z_s, z_step)
    return inv_ddim(z_step, z_t, t, t_step, schedule)


def consistency_loss(f, x, eps, t, s, t_step, schedule=cosine, teacher=None, f_ref=None,
                     x_var_frac=0.75, huber_eps=1e-4):
    """Algorithm 1, per sample: f, x [B, ...], eps ~ N(0, 1) like x, times [B] from draw_times -> [B].

    teacher None     consistency training (MCT): the step from t to s uses the data x itself.
    teacher(z, t)    distillation (MCD): it uses the teacher's prediction. A guided teacher returns a pair (guided,
                     conditional): the step follows the first, the variance comes from the second (section 4).
    f_ref None       the reference at s is f itself, detached. TRACT (2303.04248) is a teacher and f_ref = an average of f.
    t = s + 1/T and t_step = 0 for all (N = 1): a consistency model. s = t_step for all (T = N): a diffusion model.
    Gradients flow through f(z_t, t) only.
    """
    alpha_t, sigma_t = at(schedule, t, x)
    z_t = alpha_t * x + sigma_t * eps
    with torch.no_grad():
        x_teacher = x if teacher is None else teacher(z_t, t)
        x_teacher, x_mean = x_teacher if isinstance(x_teacher, tuple) else (x_teacher, x_teacher)
        # A teacher's x is an average, and how far it is from the data tells how much variance it lacks; data lack none.
        x_var = x_var_frac * mean_per_sample((x_mean - x) ** 2)
        z_s = addim(x_teacher, z_t, t, s, x_var, schedule)
    target = consistency_target(f if f_ref is None else f_ref, z_s, z_t, t, s, t_step, schedule)
    return v_loss(f(z_t, t), target, z_t, t, schedule, huber_eps)


# ---------------------------------------------------------------------------------------------------------------------
# The dial in one dimension, as in the paper's Figure 1. Everything above is used as a training run on images uses it.

WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([-1.2, 0.2, 1.3]), 0.1


def mixture(n, generator=None):
    """n draws [n, 1] from the mixture of three Gaussians."""
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return (MEANS[which] + STD * torch.randn(n, generator=generator))[:, None]


def exact_denoise(x, sigma, segment=None):
    """E[x0 | x0 + sigma eps = x] of the mixture, in closed form; x [B, 1], sigma [B]."""
    variance = STD**2 + sigma[:, None] ** 2                                       # of each mode of x    [B, 1]
    posterior = (WEIGHTS.log() - (x - MEANS) ** 2 / (2 * variance)).softmax(1)    # which mode           [B, 3]
    return (posterior * (MEANS + STD**2 / variance * (x - MEANS))).sum(1, keepdim=True)


class ToyDenoiser(nn.Module):
    """A small MLP under EDM's preconditioning (sigma_data = 1), with the zero-initialised segment embedding."""

    def __init__(self, width=128, segments=36):
        super().__init__()
        self.first = nn.Linear(10, width)
        self.segment = nn.Embedding(segments, width)
        nn.init.zeros_(self.segment.weight)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                  nn.Linear(width, 1))

    def forward(self, x, sigma, segment=None):
        sigma = sigma[:, None]
        scale = (sigma**2 + 1).rsqrt()
        angle = sigma.atan() * torch.arange(1, 5)                                                        # [B, 4]
        h = self.first(torch.cat([x * scale, sigma.log() / 4, angle.cos(), angle.sin()], 1))
        if segment is not None:
            h = h + self.segment(segment)
        return scale**2 * x + sigma * scale * self.rest(h)


def train_toy(net, steps, teacher=None, iterations=3000, batch=1024, T=(8, 64), lr=1e-3, seed=0, told=True):
    """Algorithm 1 with squared error. steps: one N, several, or None for a diffusion model (T = N, all times)."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / iterations)
    for i in range(iterations):
        x = mixture(batch, g)
        eps = torch.randn(batch, 1, generator=g)
        if steps is None:
            t = torch.rand(batch, generator=g)
            z_t = cosine(t)[0][:, None] * x + cosine(t)[1][:, None] * eps
            loss = v_loss(as_f(net)(z_t, t), x, z_t, t, huber_eps=1.0)
        else:
            N = torch.as_tensor(steps)[torch.randint(len(steps), (batch,), generator=g)]
            times = draw_times(batch, N, teacher_steps(i, *T, anneal=iterations / 2), g)
            f = as_f(net, steps=N if told else None)
            loss = consistency_loss(f, x, eps, *times, teacher=teacher, x_var_frac=0.0, huber_eps=1.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        decay.step()
    return net


@torch.no_grad()
def jumps(f, z, steps):
    """The multistep sampler (Algorithm 2; sample.py has the one for images): z at t = 1, 1 - 1/N, ..., 0."""
    path = [z]
    for i in range(steps, 0, -1):
        t = torch.full((len(z),), i / steps)
        path.append(ddim(f(path[-1], t), path[-1], t, t - 1 / steps))
    return path
