"""Multistep Consistency Models (Heek, Hoogeboom, Salimans, arXiv 2403.06807) in one file.

A network f(z_t, t) guesses the clean x of a noisy z_t. A diffusion model guesses the mean of all x
that fit, so DDIM takes many small steps, each with a new guess. A consistency model guesses the x
with which one long DDIM step, a jump, ends where the many small ones end. That is hard to learn.
Between the two lies a dial: cut time into N segments, and let f jump to the lower edge of t's own.
N = 1 is a consistency model, N = T (one teacher step in each) a diffusion model.

    t = 0               1/2             1
        |---+---+---+---|---+---+---+---|       N = 2 segments, n = 4 teacher steps in each, T = 8
    image            t_step     s   t   noise
                                <---            one teacher step (DDIM or aDDIM) from z_t to z_s
                        <-------                the jump with f's x at s, the reference
                        <-----------            the jump with f's x at t, which must land there too

In the drawing step = 1 and n_rel = 3, so t = 7/8, s = 6/8, t_step = 4/8. The symbols (there are B
samples, and "..." is any shape, such as C, H, W):
    MCM's paper    ECT's paper    here          shape           what it is
    x              x              x             [B, ...]        a clean image, in [-1, 1]
    epsilon        epsilon        eps           [B, ...]        unit Gaussian noise
    z_t            x_t            z_t           [B, ...]        noisy image, alpha x + sigma eps
    alpha, sigma   1, t           alpha, sigma  [B, 1, ...]     the schedule at t
    t, s           t, r           t, s   (t, r) [B]             a time, and an earlier one, s < t
    t_step         0              t_step        [B]             lower edge of t's segment, <= s
    student_steps  1              N, steps      int or [B]      segments, and sampling steps
    T(i)           -              T             [] or [B]       teacher steps in [0, 1], = n N
    T / N          -              n             [] or [B]       teacher steps in one segment, whole
    step, n_rel    -              step, n_rel   [B]             which segment, which step in it
    f(z_t, t)      f(x_t, t)      f(z_t, t)     -> [B, ...]     x_hat, the x that DDIM jumps with
    -              -              D(x, sigma)   -> [B, ...]     EDM's f. Here x is noisy: z / alpha
    x_teacher      -              x_teacher     [B, ...]        the x of the DDIM step to s
    x_var          -              x_var         [B]             variance that x_teacher lacks
    x_ref          f(x_r, r)      x_ref         [B, ...]        f's guess at s, without gradient
"""
import math

import torch

# ---- Schedules -----------------------------------------------------------------------------------
# A schedule is a function t -> (alpha, sigma), with alpha > 0 and a rising sigma / alpha, nowhere
# constant. Networks only see this ratio, so one network serves every schedule.
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0      # EDM samples between these noise levels
ANGLE_MIN, ANGLE_MAX = math.atan(SIGMA_MIN), math.atan(SIGMA_MAX)

def cosine(t):
    """Variance preserving: t in [0, 1] -> alpha = cos(angle), sigma = sin(angle), in t's shape.
    sigma / alpha rises from 0.002 to 80. SNR is alpha^2 / sigma^2."""
    angle = ANGLE_MIN + torch.as_tensor(t) * (ANGLE_MAX - ANGLE_MIN)
    return angle.cos(), angle.sin()

def edm(t):
    """Variance exploding: t >= 0 -> alpha = 1, sigma = t (EDM, Karras et al., 2206.00364)."""
    t = torch.as_tensor(t)
    return torch.ones_like(t), t

def alpha_sigma(schedule, t, x):
    """alpha and sigma at t, a number or [B] -> [1 or B, 1, ...], for x [B, ...]."""
    if not torch.is_tensor(t):          # float32 or better: a bfloat16 angle would give 62 for 80
        t = torch.tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    alpha, sigma = schedule(t)
    return per_sample(alpha, x), per_sample(sigma, x)

def per_sample(value, x):
    """A number or [B] -> [1 or B, 1, ...], to broadcast against x [B, ...]."""
    value = torch.as_tensor(value, device=x.device)
    return value.reshape([-1] + [1] * (x.ndim - 1))

def mean_per_sample(x):
    """[B, ...] -> [B]."""
    return x.unsqueeze(-1).flatten(1).mean(1)       # also for x [B], and for B = 0

# ---- Steps: x, z_t, z_s [B, ...]; t, s a number or [B], s < t ------------------------------------
def ddim(x, z_t, t, s, schedule=cosine):
    """Eq. (4): z_t moved from t to s, as if x were the clean image -> z_s [B, ...]."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, z_t)
    alpha_s, sigma_s = alpha_sigma(schedule, s, z_t)
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)

def inv_ddim(z_s, z_t, t, s, schedule=cosine):
    """Eq. (5), inverse DDIM: the x for which ddim(x, z_t, t, s) = z_s -> [B, ...]."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, z_t)
    alpha_s, sigma_s = alpha_sigma(schedule, s, z_t)
    return (z_s - sigma_s / sigma_t * z_t) / (alpha_s - alpha_t * sigma_s / sigma_t)

def addim(x, z_t, t, s, x_var, schedule=cosine):
    """Algorithm 3, adjusted DDIM, with eq. (14) -> z_s [B, ...].
    A diffusion model's x is the mean of all images that z_t may come from, so DDIM loses their
    variance. aDDIM makes the noise a little longer to put it back. x_var, a number or [B], is the
    variance per element that x lacks. With x_var = 0 this is ddim."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, z_t)
    alpha_s, sigma_s = alpha_sigma(schedule, s, z_t)
    eps_hat = (z_t - alpha_t * x) / sigma_t

    eps_square = per_sample(mean_per_sample(eps_hat**2), z_t).clamp(min=1e-12)      # not 0 / 0
    z_s_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * per_sample(x_var, z_t)
    return alpha_s * x + (sigma_s**2 + z_s_var / eps_square).sqrt() * eps_hat

# ---- Times, in cosine's [0, 1] -------------------------------------------------------------------
def teacher_steps(i, start=64, end=1280, anneal=100_000):
    """T(i) at iteration i, the teacher steps in [0, 1]: log-linear, T(0) = start, T(anneal) = end.
    anneal is half of the run. f can be right at t once it is right at s, so it learns upward from a
    segment's lower edge. With few long steps this is fast, but inexact. So T starts small."""
    progress = min(max(i / anneal, 0.0), 1.0)
    return start * (end / start) ** progress

def draw_times(batch, student_steps, teacher_steps, generator=None, device=None, u=None):
    """The random times of Algorithm 1 -> t, s, t_step [B], with t_step <= s < t.
    student_steps: N, or int64 [B] where one network serves several N.
    teacher_steps: T(i) > 0, a number. We round it to T = n N, so that n is whole, n >= 1.
    u: [2, B] in [0, 1), in place of torch.rand."""
    if u is None:
        u = torch.rand(2, batch, generator=generator, device=device, dtype=torch.float32)
    N = torch.as_tensor(student_steps, device=u.device)
    n = (teacher_steps / N.float()).round().clamp(min=1)
    T = n * N
    step = (u[0] * N).floor()                       # uniform in 0 .. N - 1
    n_rel = (u[1] * n).floor() + 1                  # uniform in 1 .. n

    # Whole numbers over T, so that s equals t_step to the last bit where n_rel = 1.
    t = (step * n + n_rel) / T
    s = (step * n + n_rel - 1) / T
    t_step = step * n / T
    return t, s, t_step

# ---- The loss ------------------------------------------------------------------------------------
def consistency_loss(f, x, eps, t, s, t_step, schedule=cosine, teacher=None, f_ref=None,
                     x_var_frac=0.75, huber_eps=1e-4):
    """Algorithm 1 for data x [B, ...], noise eps [B, ...] and times [B] of draw_times -> [B].
    teacher None    consistency training (MCT): the step to s is made with the data itself.
    teacher(z, t)   distillation (MCD): it is made with the teacher's x. See also `guided`.
    f_ref           the reference. None: f itself. TRACT (2303.04248): f with averaged weights.
    Without a teacher, N = 1 is the loss of a consistency model, T = N that of a diffusion model.
    f is called at s without gradient, at t with gradient. Dropout should have one mask for both.
    draw_times suits all schedules on [0, 1]. For edm, give cosine's sigma / alpha at each time."""
    # (1) The noisy image.
    alpha_t, sigma_t = alpha_sigma(schedule, t, x)
    z_t = alpha_t * x + sigma_t * eps
    with torch.no_grad():
        # (2) The x of the teacher step. A guided teacher gives two: we step along the guided one,
        #     and x_cond, without guidance, gives the variance.
        x_teacher = x if teacher is None else teacher(z_t, t)
        x_cond = x_teacher
        if isinstance(x_teacher, tuple):
            x_teacher, x_cond = x_teacher

        # (3) One step to s. The paper puts back 3/4 of the teacher's squared error, as noise. We do
        #     not at s = 0, where it would stay. Without a teacher x_var is 0, and aDDIM is DDIM.
        x_var = x_var_frac * mean_per_sample((x_cond - x) ** 2).where(s > 0, 0)
        z_s = addim(x_teacher, z_t, t, s, x_var, schedule)

        # (4) The reference's x at s, turned into a target for the x at t.
        if f_ref is None:
            f_ref = f
        target = consistency_target(f_ref, z_s, z_t, t, s, t_step, schedule)

    # (5) The x at t, and its distance from the target.
    return v_loss(f(z_t, t), target, z_t, t, schedule, huber_eps)

@torch.no_grad()
def consistency_target(f_ref, z_s, z_t, t, s, t_step, schedule=cosine):
    """The x whose jump from z_t lands where the reference's jump from z_s lands -> [B, ...].
    Both jumps end at t_step, and all times are [B]. Where s = t_step no jump is left, and the place
    is z_s. Without a teacher the result is then x, a diffusion model's target, eq. (8)."""
    # Where no jump is left, x_ref is not used, but f runs on the whole batch. There f gets t, since
    # edm's s may be 0, and a network takes its logarithm. ddim's 0 / 0 is dropped by torch.where.
    no_jump_left = s <= t_step
    x_ref = f_ref(z_s, torch.where(no_jump_left, t, s))
    z_step = ddim(x_ref, z_s, s, t_step, schedule)
    z_step = torch.where(per_sample(no_jump_left, z_s), z_s, z_step)
    return inv_ddim(z_step, z_t, t, t_step, schedule)

def v_loss(x_hat, x_target, z_t, t, schedule=cosine, huber_eps=1e-4):
    """The pseudo-Huber distance of two guesses of x [B, ...], measured in v-space -> [B].
    v = alpha eps - sigma x. With alpha^2 + sigma^2 = 1 it is (alpha z_t - x) / sigma, and so
    dv = -dx / sigma: the paper's |dv|^2 = (SNR + 1) |dx|^2. Other schedules get the same SNR + 1.
    A mean, where the paper has a sum: our 1e-4 is its root(elements) * 1e-4 (5.5e-3 at 3x32x32)."""
    alpha, sigma = alpha_sigma(schedule, t, z_t)
    v_difference = (x_hat - x_target) * (alpha**2 + sigma**2) ** 0.5 / sigma
    return pseudo_huber(mean_per_sample(v_difference**2), huber_eps)

def pseudo_huber(square, c):
    """sqrt(square + c^2) - c, [B] -> [B]. Small c: a norm. Large c: nearly square / (2 c)."""
    return square / ((square + c**2 + 1e-30) ** 0.5 + c)    # no cancellation, a finite slope at 0

# ---- Networks ------------------------------------------------------------------------------------
def make_f(denoise, schedule=cosine, steps=None, **condition):
    """The paper's f(z_t, t) -> x_hat from a denoiser: f(z, t) = D(z / alpha, sigma / alpha).
    steps: N, int or int64 [B]. It and condition: see `conditioned`. D gets float32 or better."""
    D = conditioned(denoise, steps, **condition)
    def f(z, t):
        alpha, sigma = alpha_sigma(schedule, t, z)
        return D(z / alpha, (sigma / alpha).flatten().expand(len(z)))
    return f

def conditioned(denoise, steps=None, **condition):
    """D(x, sigma) with labels, text, ... bound and, for steps (N), the segment of cosine's t."""
    def D(x, sigma):
        if steps is None:
            return denoise(x, sigma, **condition)
        return denoise(x, sigma, segment=segment_row(sigma, steps), **condition)
    return D

def segment_of(sigma, steps):
    """Which of the N segments of cosine's t holds the noise level sigma / alpha [B] -> int64 [B].
    A level on an edge belongs to the segment below, even if rounding puts it above the edge, by up
    to 1e-4 of a segment. MCM's next time is 1/n of a segment above, so n must be below 10,000."""
    t = (sigma.atan() - ANGLE_MIN) / (ANGLE_MAX - ANGLE_MIN)
    return (t.clamp(0, 1) * steps - 1e-4).ceil().clamp(min=1).long() - 1

def segment_row(sigma, steps):
    """The row of (N, segment) in one table for all N -> int64 [B]: N = 1 has row 0, N = 2 has 1, 2.
    The paper does not tell the network its segment. We do, because its target is discontinuous
    where two segments meet."""
    return segment_of(sigma, steps) + steps * (steps - 1) // 2

def guided(f, f_uncond, weight):
    """Classifier-free guidance (weight 0: none): a teacher for consistency_loss, see its (2)."""
    def teacher(z, t):
        x_cond = f(z, t)
        x_guided = x_cond + weight * (x_cond - f_uncond(z, t))
        return x_guided, x_cond
    return teacher
