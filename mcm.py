"""Multistep Consistency Models (Heek, Hoogeboom, Salimans, arXiv 2403.06807) in one file.

A diffusion model predicts the average clean image, so its sampler must take many small steps. A
consistency model predicts where that sampler would end, so one step is enough, but this is hard to
learn. Between them lies a dial: cut time into N segments and predict only where the sampler would
leave the current one. N = 1 is a consistency model, N = infinity a diffusion model, and 2 to 8
steps recover most of the quality.

    cosine, edm            schedules t -> (alpha, sigma), with z_t = alpha x + sigma eps
    ddim, inv_ddim, addim  eq. (4), eq. (5), Algorithm 3 with eq. (14)
    draw_times             the times of Algorithm 1, and teacher_steps, T(i)
    consistency_loss       Algorithm 1: training, distillation, TRACT, plain consistency models
    as_f, guided           a denoiser D(x, sigma) as the paper's f(z_t, t), which knows its segment

The contract: x and z have any shape [B, ...], times are [B], f(z_t, t) -> x_hat has x's shape.
Everything is computed per sample, and nothing but draw_times is random. f is called twice, without
gradient and with: autocast belongs inside it, and dropout should draw one mask for both calls.

    python mcm.py [--method mcd]     # the dial in one dimension: a table and mcm.png; a minute
"""
import argparse, copy, math, signal
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

# ---- Schedules -----------------------------------------------------------------------------------
# Any function t -> (alpha, sigma) with alpha > 0 and rising sigma / alpha will do, in the loss, in
# as_f and in the samplers, within the range below: networks see nothing but sigma / alpha.
# draw_times returns cosine's t: for another schedule, map them to the t of equal sigma / alpha.

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
ANGLE_0, ANGLE_1 = math.atan(SIGMA_MIN), math.atan(SIGMA_MAX)

def cosine(t):
    """Variance preserving: alpha = cos a, sigma = sin a, with an angle a linear in t in [0, 1].

    log-SNR = -2 log tan a falls from +2 log 500 to -2 log 80, strictly: a clamp would make two
    times equal, and at a = pi/2 tan is negative in float32.
    """
    angle = ANGLE_0 + torch.as_tensor(t) * (ANGLE_1 - ANGLE_0)
    return angle.cos(), angle.sin()

def edm(t):
    """Variance exploding: alpha = 1, sigma = t in [0, 80] (Karras et al. 2206.00364; ECT's)."""
    t = torch.as_tensor(t)
    return torch.ones_like(t), t

def at(schedule, t, x):
    """(alpha, sigma) at t, a number or [B], shaped to broadcast against x [B, ...]."""
    t = t if torch.is_tensor(t) else x.new_tensor(t)
    return tuple(per_sample(value, x) for value in schedule(t))

def per_sample(value, x):
    """A number or [B] -> [1 or B, 1, ...], to broadcast against x [B, ...]."""
    return torch.as_tensor(value, device=x.device).reshape(-1, *[1] * (x.ndim - 1))

def mean_per_sample(x):
    """[B, ...] -> [B]."""
    return x.reshape(len(x), -1).mean(1)

# ---- Steps ---------------------------------------------------------------------------------------
# ddim moves z from t to s < t in the belief that the clean image is x. inv_ddim asks which belief
# would have made a given move.

def ddim(x, z_t, t, s, schedule=cosine):
    """Eq. (4): z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at(schedule, t, z_t), at(schedule, s, z_t)
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)

def inv_ddim(z_s, z_t, t, s, schedule=cosine):
    """Eq. (5): the x for which ddim(x, z_t, t, s) = z_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at(schedule, t, z_t), at(schedule, s, z_t)
    return (z_s - sigma_s / sigma_t * z_t) / (alpha_s - alpha_t * sigma_s / sigma_t)

def addim(x, z_t, t, s, x_var, schedule=cosine):
    """Algorithm 3, adjusted DDIM: ddim, with the noise lengthened for the spread that x lacks.

    x is the mean of the images that z_t may come from, so every DDIM step loses variance. Given the
    missing variance per element, x_var (number or [B], sample.paper_x_var when sampling), eq. (14)
    makes mean((z_s - alpha_s x)^2) =
    sigma_s^2 mean(eps_hat^2) + (alpha_s - alpha_t sigma_s / sigma_t)^2 x_var.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at(schedule, t, z_t), at(schedule, s, z_t)
    eps_hat = (z_t - alpha_t * x) / sigma_t
    # Over the elements of one sample, never over the batch. With few elements it can be 0.
    power = per_sample(mean_per_sample(eps_hat**2).clamp(min=1e-12), z_t)
    missing = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * per_sample(x_var, z_t)
    return alpha_s * x + (sigma_s**2 + missing / power).sqrt() * eps_hat

# ---- Times, in cosine's [0, 1] -------------------------------------------------------------------

def teacher_steps(i, start=64, end=1280, anneal=100_000):
    """T(i): steps that the path is cut into at iteration i, from start to end, log-linearly.

    Few, long, biased strides first, then many. The paper anneals over half of its 200k iterations
    of batch 2048. Set `anneal` to half of your run. A float: draw_times rounds.
    """
    return start * (end / start) ** min(max(i / anneal, 0.0), 1.0)

def draw_times(batch, student_steps, teacher_steps, generator=None, device=None, u=None):
    """The times of Algorithm 1 -> t, s, t_step [B]: t_step <= s < t in a segment of length 1/N.

    student_steps: N, or int64 [B] where one network serves several N. teacher_steps: T, rounded to
    n N with n = round(T / N) >= 1 in each segment. All times are whole numbers over n N, so that
    s == t_step exactly where it should be. u: [2, B] in [0, 1), to draw by other than torch.rand.
    """
    u = torch.rand(2, batch, generator=generator, device=device) if u is None else u
    N = student_steps
    n = torch.as_tensor(teacher_steps / N).round().clamp(min=1)
    step = (u[0] * N).floor()                        # which segment: 0 .. N-1
    n_rel = (u[1] * n).floor() + 1                   # which teacher step in it: 1 .. n
    return tuple((step * n + k) / (n * N) for k in (n_rel, n_rel - 1, 0))

# ---- The loss ------------------------------------------------------------------------------------

def consistency_loss(f, x, eps, t, s, t_step, schedule=cosine, teacher=None, f_ref=None,
                     x_var_frac=0.75, huber_eps=1e-4):
    """Algorithm 1, per sample: data x [B, ...], noise eps like x, times [B] of draw_times -> [B].

    teacher None     consistency training (MCT): the data itself leads from t to s.
    teacher(z, t)    distillation (MCD): the teacher's prediction does. A guided teacher returns
                     two, see `guided`: the first leads, the second tells the variance.
    f_ref None       the reference is f, without gradient. TRACT (2303.04248): a teacher, and f_ref
                     an average of f.
    x_var_frac: see below. huber_eps: see v_loss, suits data of standard deviation 0.5 to 1.
    N = 1 (t_step = 0) is a consistency model's loss, T = N (s = t_step) a diffusion model's.
    Gradients flow through the second f, f(z_t, t), only.
    """
    alpha_t, sigma_t = at(schedule, t, x)
    z_t = alpha_t * x + sigma_t * eps
    with torch.no_grad():
        x_teacher = x if teacher is None else teacher(z_t, t)
        x_teacher, x_mean = x_teacher if isinstance(x_teacher, tuple) else (x_teacher, x_teacher)
        # The teacher's average lacks variance: the paper takes 3/4 of its mean squared distance
        # from the data. Without a teacher, x_mean is x and this is 0.
        x_var = x_var_frac * mean_per_sample((x_mean - x) ** 2)
        z_s = addim(x_teacher, z_t, t, s, x_var, schedule)
    target = consistency_target(f if f_ref is None else f_ref, z_s, z_t, t, s, t_step, schedule)
    return v_loss(f(z_t, t), target, z_t, t, schedule, huber_eps)

@torch.no_grad()
def consistency_target(f_ref, z_s, z_t, t, s, t_step, schedule=cosine):
    """What f(z_t, t) should say: the x that jumps from z_t to where the reference jumps from z_s.

    Both jumps end on the segment's edge t_step. For s on the edge there is no jump left: the target
    is inv_ddim(z_s), the diffusion target, eq. (8). The batch is one tensor, so f_ref answers for
    these samples too, at t, since D(x, 0) need not exist. The answer, even NaN, is not used.
    """
    on_edge = s <= t_step                            # draw_times makes them equal to the bit
    x_ref = f_ref(z_s, torch.where(on_edge, t, s))
    z_step = torch.where(per_sample(on_edge, z_s), z_s, ddim(x_ref, z_s, s, t_step, schedule))
    return inv_ddim(z_step, z_t, t, t_step, schedule)

def v_loss(x_hat, x_target, z_t, t, schedule=cosine, huber_eps=1e-4):
    """Pseudo-Huber of the root mean square distance of two predictions in v-space, per sample [B].

    Under variance preservation a difference in x is sigma times one in v, so the paper's weight
    SNR + 1 = (alpha^2 + sigma^2) / sigma^2 stands inside the norm, as its square root. The paper
    sums where we average: our huber_eps is an error per element, whatever the size. With the data
    as target this is a diffusion loss. Its minimum is a mean for large huber_eps (1 for images).
    """
    alpha, sigma = at(schedule, t, z_t)
    v_difference = (x_hat - x_target) * (alpha**2 + sigma**2) ** 0.5 / sigma
    return pseudo_huber(mean_per_sample(v_difference**2), huber_eps)

def pseudo_huber(square, eps):
    """sqrt(square + eps^2) - eps for square = |d|^2: no cancellation, slope 0 at d = 0 for any eps.

    A norm where eps is small, a squared error over 2 eps where it is large. 1e-30: 0 / 0 is 0.
    """
    return square / ((square + eps**2 + 1e-30) ** 0.5 + eps)

# ---- Networks as f -------------------------------------------------------------------------------

def as_f(denoise, schedule=cosine, steps=None, **condition):
    """The paper's f(z_t, t) from a denoiser D(x0 + sigma eps, sigma): D(z / alpha, sigma / alpha).

    steps (N, or int64 [B]) and condition: see `conditioned`.
    """
    D = conditioned(denoise, steps, **condition)
    def f(z, t):
        alpha, sigma = at(schedule, t, z)
        return D(z / alpha, (sigma / alpha).flatten().expand(len(z)))
    return f

def conditioned(denoise, steps=None, **condition):
    """D(x, sigma) that passes on `condition` (labels, text, ...) and, given N, the segment."""
    def D(x, sigma):
        where = {} if steps is None else {"segment": segment(sigma, steps)}
        return denoise(x, sigma, **where, **condition)
    return D

def segment(sigma, steps):
    """Which of N segments, equal in cosine's t, holds the noise level sigma / alpha [B].

    int64 [B], a row in a table of the segments of all N: those of an N-step model are the rows from
    1 + 2 + ... + (N-1) = N(N-1)/2 on. A network needs to know: its target jumps where segments
    meet, which it cannot follow as a smooth function of ln sigma. On the toy below at N = 2, `main`
    finds 0.027 when told, 0.090 with --untold, and where one network serves N = 1, 2, 4, 8, 0.038
    and 0.280. Jumps start on edges, so an edge is of the segment below it, with 1e-4 to spare for a
    sigma rounded up.
    """
    t = ((sigma.atan() - ANGLE_0) / (ANGLE_1 - ANGLE_0)).clamp(0, 1)
    return ((t * steps - 1e-4).ceil().clamp(min=1) - 1 + steps * (steps - 1) // 2).long()

def guided(f, f_uncond, weight):
    """A teacher under classifier-free guidance (weight 0: none) -> x (guided, conditional)."""
    def teacher(z, t):
        x, x_uncond = f(z, t), f_uncond(z, t)
        return x + weight * (x - x_uncond), x
    return teacher

# ---- The dial in one dimension, as in Figure 1: everything above, used as train_cifar.py uses it -

WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([-1.2, 0.2, 1.3]), 0.1

def quantiles(n):
    """Noise and a mixture of three Gaussians, each as n equally likely values [n, 1], in order."""
    u = (torch.arange(n).double() + 0.5) / n
    grid = torch.linspace(-2, 2, 10 * n).double()
    cdf = torch.special.ndtr((grid[:, None] - MEANS) / STD) @ WEIGHTS.double()
    return tuple(v.float()[:, None] for v in (torch.special.ndtri(u),
                                              grid[torch.searchsorted(cdf, u)]))

def exact_denoise(x, sigma):
    """E[x0 | x0 + sigma eps = x] for the mixture; x [B, 1], sigma [B]."""
    variance = STD**2 + sigma[:, None] ** 2                                         # of each mode
    mode = (WEIGHTS.log() - (x - MEANS) ** 2 / (2 * variance)).softmax(1)           # [B, 3]
    return (mode * (MEANS + STD**2 / variance * (x - MEANS))).sum(1, keepdim=True)  # [B, 1]

class ToyDenoiser(nn.Module):
    """An MLP under EDM's preconditioning (sigma_data = 1), told its segment by an embedding that is
    zero at first, so that a diffusion model stays itself until it is tuned."""
    def __init__(self, width=32, segments=36):  # those of N = 1 .. 8
        super().__init__()
        self.embed = nn.Linear(22, width)
        self.segment = nn.Embedding(segments, width, _weight=torch.zeros(segments, width))
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                  nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    def forward(self, x, sigma, segment=None):
        sigma = sigma[:, None]
        scale = (sigma**2 + 1).rsqrt()
        waves = torch.cat([1.5 * scale * x * torch.arange(1, 7),  # Fourier features
                           sigma.atan() * torch.arange(1, 5)], 1)
        h = self.embed(torch.cat([scale * x, sigma.log() / 4, waves.cos(), waves.sin()], 1))
        h = h if segment is None else h + self.segment(segment)
        return scale**2 * x + sigma * scale * self.rest(h)

def train_toy(net, loss_of, iterations=2400, batch=4096, lr=3e-2):
    """Adam on the mean of loss_of(eps [B, 1], x [B, 1], u [3, B] in [0, 1), iteration) -> [B].

    All are read off Sobol points, which fill space more evenly than chance: the mean over a batch
    is as exact as over many more random draws, which 8 steps need to come near the floor.
    """
    tables, points = quantiles(100_000), torch.quasirandom.SobolEngine(5, scramble=True, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations) ** 1.5
        u = points.draw(batch).T.clamp(max=1 - 2**-24)  # never rounded up to 1
        eps, x = (table[(v * len(table)).long()] for table, v in zip(tables, u))
        optimizer.zero_grad()
        loss_of(eps, x, u[2:], i).mean().backward()
        optimizer.step()
    return net

def toy(diffusion=None, steps=(1,), iterations=2400, teacher=None, told=True):
    """Trains the diffusion model or, given one, tunes one copy to all N in `steps`.

    In one dimension the root "mean" square is |v|, of order 1: only a large huber_eps makes it a
    squared error, and anything else learns medians. No aDDIM: one element has no norm to speak of.
    """
    torch.manual_seed(0)
    net = copy.deepcopy(diffusion) if diffusion else ToyDenoiser()
    def loss_of(eps, x, u, i):
        N = torch.tensor(steps)[(u[2] * len(steps)).long()] if diffusion else None
        if diffusion:
            T = teacher_steps(i, 12, 512, anneal=iterations * 2 / 3)
            times = draw_times(len(x), N, T, u=u[:2])
        else:  # from any t to s = t_step = 0: the target is the data
            times = 1 - u[0], 0 * u[0], 0 * u[0]
        return consistency_loss(as_f(net, steps=N if told else None), x, eps, *times,
                                teacher=teacher, x_var_frac=0.0, huber_eps=100.0)
    return train_toy(net, loss_of, iterations, 4096 * len(steps))

@torch.no_grad()
def jumps(f, z, steps):
    """Algorithm 2 (sample.py has the full one) -> the path: z at t = 1, 1 - 1/N, ..., 0."""
    path = [z]
    for i in range(steps, 0, -1):
        t = z.new_full((len(z),), i / steps)
        path.append(ddim(f(path[-1], t), path[-1], t, t - 1 / steps))
    return path

def distance(x, y):
    """Wasserstein-1 distance of two samples of one size [n, 1]."""
    return (x.flatten().sort().values - y.flatten().sort().values).abs().mean().item()

def draw_paths(paths, out, width=1000, height=1200):
    """A PNG, a panel for each (name, [z] of the jumps): noise at its left, data at its right."""
    from PIL import Image, ImageDraw
    canvas = Image.new("RGB", (width * len(paths), height), "white")
    draw = ImageDraw.Draw(canvas)
    for panel, (name, path) in enumerate(paths):
        draw.text((width * (panel + 0.05), 16), name, "black", font_size=44)
        x = ((torch.linspace(0.05, 0.95, len(path)) + panel) * width).tolist()
        for z in torch.stack(path)[:, :, 0].T:                                  # [jumps + 1]
            color = ("#3b6ea5", "#c8553d", "#588b4b")[(z[-1] - MEANS).abs().argmin()]
            draw.line(list(zip(x, ((0.55 - z / 6.5) * height).tolist())), color, 5)
    canvas.reduce(4).save(out)

def main(arguments=None, n=100_000):
    """The table of README.md, and the paths."""
    parser = argparse.ArgumentParser("mcm.py", argparse.SUPPRESS, __doc__.split("\n")[0])
    parser.add_argument("--method", choices=("mct", "mcd"), default="mct", help="train or distil")
    parser.add_argument("--untold", action="store_true", help="do not tell networks their segment")
    args = parser.parse_args(arguments)
    diffusion, exact, steps = toy(), as_f(exact_denoise), (1, 2, 4, 8)
    teacher = as_f(diffusion) if args.method == "mcd" else None
    # Each N has a batch of 4096, also in the one network: less work than in four, more than in one.
    jobs = [(steps, 1600), *(([N], 2400) for N in steps)]
    torch.set_num_threads(1)  # for tensors this small, trainings side by side are faster
    with ThreadPoolExecutor(2) as pool:
        one, *each = pool.map(lambda job: toy(diffusion, *job, teacher, not args.untold), jobs)
    (z, truth), chance = quantiles(n), torch.Generator().manual_seed(1)
    def score(f, N):
        return f"{distance(jumps(f, z, N)[-1], truth):15.4f}"
    floors = [distance(truth[torch.randint(n, (n,), generator=chance)], truth) for _ in range(50)]
    print(f"Wasserstein-1 distance to the truth; of {n} draws of it: {sum(floors) / 50:.4f}\n"
          f"exact denoiser, DDIM in 64 steps {score(exact, 64)}\n"
          f"steps     exact DDIM  diffusion model {args.method:>14} {args.method:>6} for all N")
    paths, some = [], z[n // 100::n // 50]
    for N, net in zip(steps, each):
        f, f_one = (as_f(D, steps=None if args.untold else N) for D in (net, one))
        paths.append((f"{N} step{'s' * (N > 1)}", jumps(f, some, N)))
        print(f"{N:>5}", *(score(g, N) for g in (exact, as_f(diffusion), f, f_one)))
    draw_paths(paths[:3] + [("diffusion, 64 steps", jumps(as_f(diffusion), some, 64))], "mcm.png")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: there is nothing to save
    main()
