"""FID as published numbers are computed (Inception of 2015, TensorFlow 1 resizing), in one file.

    python fid.py samples.npz cifar10                           # "FID" from 50,000 samples on
    python fid.py samples train --features random --n 1000      # needs no download

A and B: a folder of images, an .npz with arr_0 (uint8 NHWC), or cifar10 (its training split, kept
in ./data); B also an .npz of statistics (mu, sigma). With other weights, other features or fewer
samples the name says so, FD(features)@n. The floor is the distance of n real images from n others.

Ours (2-core Xeon, AVX-512, one thread; CIFAR-10 as JPEG, random, n = 1000): test against train is
FD(random)@1000 = 1.36, floor 1.24. In floors: noise of 0.05 scores 65, a 2-pixel blur 193, grey 7,
the first five classes 8. Inception: 11.8 images/s, 1.6 times torch-fidelity; the distance at d = 2048
takes 1.0 s, SciPy's matrix root 11 times that.
"""
import argparse
import contextlib
import hashlib
import json
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TIMEOUT = 30.0  # seconds for which a server may be silent
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
CIFAR = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
         "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")


class UserError(Exception):
    """What the user can mend: one line naming the file or argument, what is wrong, the remedy."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # the library prints its whole usage first
        self.exit(2, f"{self.prog}: error: {message} (--help lists what can be given)\n")


def run(main):  # the one place where exceptions become a line and an exit code
    try:
        return main()
    except (UserError, OSError, KeyboardInterrupt) as error:
        print("error:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)
        sys.exit({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


@contextlib.contextmanager
def blame(message):  # whatever a library raises over a foreign file or server becomes a UserError
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({' '.join(str(error).split())[:200]})") from error


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fetch(url, digest, folder=None):
    """The path of url's file in folder (or torch's hub cache), downloaded if it is not there."""
    path = Path(folder or Path(torch.hub.get_dir(), "checkpoints"), url.rsplit("/", 1)[-1])
    if path.exists():
        if sha256(path) != digest:  # somebody put it there: not ours to overwrite
            raise UserError(f"{path} is truncated or not the file of {url}: delete or replace it")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(TIMEOUT)  # the library would wait for ever
    with blame(f"cannot download {url}: put the file at {path} yourself"):
        # writes to another name, checks the hash, renames, cleans up
        torch.hub.download_url_to_file(url, str(path), digest, progress=sys.stderr.isatty())
    return path


def resize_tf1(images):
    """[N, C, H, W] in 0..255 -> [N, C, 299, 299]; TensorFlow 1 reads at i * size / 299."""
    def matrix(size):  # [299, size]: linear interpolation is a hat around the source position
        source = (torch.arange(299, dtype=torch.float64) * size / 299).clamp(max=size - 1)
        hats = (1 - (source[:, None] - torch.arange(size)).abs()).clamp(min=0)
        return hats.to(images.device, torch.float32)
    return matrix(images.shape[2]) @ images.float() @ matrix(images.shape[3]).T


class InceptionFID(nn.Module):
    """uint8 [N, 3, H, W] -> [N, 2048], with the published weights' keys.

    It is torchvision's Inception-v3 but for two things: average pools do not count padding, and the
    last block pools by maximum. So we edit the traced graph rather than write the network again.
    """

    def __init__(self):
        from torchvision.models import inception_v3
        super().__init__()
        net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
        net = torch.fx.symbolic_trace(net)
        *averages, last = [node for node in net.graph.nodes if node.target is F.avg_pool2d]
        last.target = F.max_pool2d
        for node in averages:
            node.update_kwarg("count_include_pad", False)
        logits = next(node for node in net.graph.nodes if node.target == "fc")
        logits.replace_all_uses_with(logits.args[0])  # features are what fc would see
        net.recompile()
        self.features = net.forward
        for name, layer in net.named_children():
            self.add_module(name, layer)

    def forward(self, images):
        return self.features((resize_tf1(images) - 128) / 128)

    def fold(self):
        """BatchNorm into the convolutions, channels last: the same function, 1.6 times as fast."""
        for part in self.modules():
            if isinstance(getattr(part, "bn", None), nn.BatchNorm2d):
                part.conv = nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
                part.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def load_inception(path=None):
    path, net = path or fetch(*INCEPTION), InceptionFID().eval()
    with blame(f"{path} is truncated or not Inception's weights: get {INCEPTION[0]}"):
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net


def random_features(images):
    """uint8 [N, 3, H, W] -> [N, 156]: log energies of random filters, and where which colour is.

    Nothing is strided before it is measured, so grain is seen, and a logarithm shows it where the
    image is smooth. Coarse scales have few pixels and so vary most: they weigh less.
    """
    x = images.float() / 127.5 - 1
    features = [3 * F.adaptive_avg_pool2d(x, 2).flatten(1)]
    for scale in range(3):
        y = x
        for layer in range(2):
            filters = np.random.default_rng([scale, layer]).standard_normal((24, y.shape[1], 3, 3))
            filters -= filters.mean((2, 3), keepdims=True)  # blind to flat areas
            filters /= np.sqrt((filters**2).sum((1, 2, 3), keepdims=True))
            y = F.pad(y, (1, 1, 1, 1), mode="replicate")
            y = F.conv2d(y, torch.from_numpy(filters).to(y)).abs()
            features.append(10 / 3**scale * (y.mean((2, 3)) + 0.02).log())
        x = F.avg_pool2d(x, 2)
    return torch.cat(features, 1)


def feature_extractor(spec, device="cpu", weights=None):
    """Images -> features [N, d]; .name, .hash. Only the published weights are named inception."""
    path, name = spec, Path(spec).stem
    if spec == "random":
        path, net = __file__, random_features
    elif spec == "inception":
        path = weights or fetch(*INCEPTION)
        net = load_inception(path).fold().to(device)
        name = name if sha256(path) == INCEPTION[1] else f"{name}-{Path(path).stem}"
        if str(device).startswith("cuda"):
            net.features = torch.compile(net.features, dynamic=True)  # the last batch is smaller
    else:
        name += ".ts" * (name == "inception")
        with warnings.catch_warnings(), blame(f"{spec} is no TorchScript file: see --features"):
            warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated")
            net = torch.jit.load(spec, map_location=device).eval()

    @torch.inference_mode()
    def extract(images):  # TF32, torch's default for convolutions on a GPU, would move the features
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return net(images.to(device)).flatten(1)
    extract.name, extract.hash = name, sha256(path)
    return extract


class Statistics:
    """Mean and unbiased covariance, in float64, of features that are not kept."""

    def __init__(self, n=0, mean=0.0, scatter=0.0):
        self.n, self.mean, self.scatter = n, mean, scatter  # scatter: sum of (x - mean)(x - mean)'

    @property
    def cov(self):
        return self.scatter / (self.n - 1)

    def update(self, features):
        x = features.double()
        mean = x.mean(0)
        return self.merge(Statistics(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other):  # Chan's formula: only deviations are squared, so no digits cancel
        between, n = other.mean - self.mean, self.n + other.n
        self.scatter = self.scatter + other.scatter
        self.scatter += self.n * other.n / n * torch.outer(between, between)
        self.mean = self.mean + other.n / n * between
        self.n = n
        return self

    def all_reduce(self):  # the union over all processes, in each of them
        n, mean = torch.tensor(self.n, device=self.mean.device), self.n * self.mean
        torch.distributed.all_reduce(n)
        torch.distributed.all_reduce(mean)
        self.scatter += self.n * torch.outer(self.mean - mean / n, self.mean - mean / n)
        torch.distributed.all_reduce(self.scatter)
        self.n, self.mean = n.item(), mean / n


def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2), without a matrix root.

    With cov1 = A A' and cov2 = B B', the trace of the root is the sum of A'B's singular values.
    """
    def factor(cov):
        lower, failed = torch.linalg.cholesky_ex(cov)
        if not failed:
            return lower
        values, vectors = torch.linalg.eigh(cov)  # n < d: dearer, and zeros arrive as rounding
        keep = values > values[-1] * len(cov) * 2.2e-16
        return vectors[:, keep] * values[keep].sqrt()

    mean1, cov1, mean2, cov2 = (torch.as_tensor(x).double() for x in (mean1, cov1, mean2, cov2))
    if not (mean1 + mean2).isfinite().all():
        raise UserError("features are not finite: look at the images and the feature extractor")
    small, large = sorted((factor(cov1), factor(cov2)), key=lambda factor: factor.shape[1])
    product = large.T @ small
    roots = torch.linalg.eigvalsh(product.T @ product).clamp(min=0).sqrt()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)


def metric_name(features, n):
    return "FID" if features == "inception" and n >= 50_000 else f"FD({features})@{n}"


def evaluate(batches, extractor, device=None, n=None, progress=None):
    """Statistics (on device) of the first n images of uint8 batches; progress: a name to print."""
    statistics, start = Statistics(), time.perf_counter()
    for images in filter(len, batches):
        features = extractor(images[:n and n - statistics.n])
        statistics.update(features.to(device or features.device))
        if progress:
            speed = statistics.n / (time.perf_counter() - start)
            left = f", {(n - statistics.n) / speed:.0f} s left" if n else ""
            print(f"\r{progress}: {statistics.n} images, {speed:.0f} images/s{left}   ", end="",
                  file=sys.stderr, flush=True)
        if statistics.n == n:
            break
    return statistics


def tensor(images):  # NHWC, an array or a list of them -> [N, C, H, W]
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).contiguous()


def read_folder(path):
    """uint8 [N, 3, H, W], labels [N], class names: the subfolders, none if the folder is flat."""
    from PIL import Image
    suffixes = Image.registered_extensions()
    files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{path} is not a folder with images: give one, an .npz, or cifar10")

    def decode(file):
        with blame(f"{file} is not a readable image: repair or remove it"):
            return np.asarray(Image.open(file).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(decode, files))
    for file, array in zip(files, arrays):
        if array.shape != arrays[0].shape:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (array, arrays[0])]
            raise UserError(f"{file} is {sizes[0]}, {files[0]} is {sizes[1]}: give one size")
    tops = [file.relative_to(path).parts[0] for file in files]  # of a flat folder, the file itself
    classes = sorted(set(tops) - {file.name for file in files})
    labels = [classes.index(top) if top in classes else 0 for top in tops]
    return tensor(arrays), torch.tensor(labels), classes


def load_npz(path):
    with blame(f"{path} is not a readable .npz of plain arrays: write it anew"):
        with np.load(path, allow_pickle=False) as file:  # a pickle would run its code
            return dict(file)


def read_npz(path):
    """arr_0 and, if there, the labels arr_1, in the form of `read_folder`."""
    arrays = load_npz(path)
    images = arrays.get("arr_0", np.zeros(0))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}: give uint8 [N, H, W, 3]")
    labels = arrays.get("arr_1", np.zeros(len(images)))
    return tensor(images), torch.from_numpy(labels).long(), []


def read_cifar10(folder="data"):
    """The training split in the form of `read_folder`, downloaded if need be."""
    from torchvision.datasets import CIFAR10
    if not Path(folder, CIFAR10.base_folder).exists():
        fetch(*CIFAR, folder)
    with blame(f"{folder}/{CIFAR10.base_folder} is damaged: delete it"):
        data = CIFAR10(folder, download=True)  # unpacks what is there
    return tensor(data.data), torch.tensor(data.targets), data.classes


def read_images(source, n=None):
    """n images (or all) of a folder, .npz, cifar10 or tensor, in a random but fixed order."""
    if isinstance(source, torch.Tensor):
        images = source
    elif str(source) == "cifar10":
        images = read_cifar10()[0]
    else:
        images = (read_npz if str(source).endswith(".npz") else read_folder)(source)[0]
    if len(images) < (n or 4):  # 4 make two covariances
        raise UserError(f"{source} holds {len(images)} images, not {n or 4}: add some or lower --n")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]


def reference(source, extractor, n, batch=64, progress=None):
    """Statistics of a reference; the distance of n of its images from n others; that n.

    Both sets are part of the statistics: the floor costs no features. CIFAR-10's stay in ./data.
    """
    identity = f"cifar10 train, all 50000 images, floor at {n}, features {extractor.hash}"
    cache = Path("data", f"fid-cifar10-{extractor.name}-{n}.npz")
    path = cache if source == "cifar10" and cache.exists() else source
    saved = load_npz(path) if str(path).endswith(".npz") else {}
    if "mu" in saved and (path == source or saved["identity"] == identity):
        mean, cov = torch.from_numpy(saved["mu"]), torch.from_numpy(saved["sigma"])
        return Statistics(2, mean, cov), *saved.get("floor", [None, None])  # n = 2: scatter = cov
    images = read_images(source)
    n = min(n, len(images) // 2)
    first, second, rest = (evaluate(part.split(batch), extractor, None, len(part), progress)
                           for part in images.tensor_split([n, 2 * n]))
    floor = frechet_distance(first.mean, first.cov, second.mean, second.cov)
    whole = first.merge(second).merge(rest)
    if source == "cifar10":
        partial = cache.with_suffix(".part.npz")  # never half a file under the final name
        np.savez(partial, mu=whole.mean.cpu(), sigma=whole.cov.cpu(), floor=(floor, n),
                 identity=identity)
        partial.replace(cache)
    return whole, floor, n


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("a", help="images to judge: a folder, an .npz or cifar10")
    parser.add_argument("b", help="the reference: the same, or an .npz of statistics")
    parser.add_argument("--features", default="inception", help="or random, or a TorchScript file")
    parser.add_argument("--weights", help="a local file of Inception's weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--n", type=int, help="judge this many of A, drawn at random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.batch < 1 or (args.n is not None and args.n < 4):
        parser.error("--batch must be at least 1 and --n at least 4")
    if args.weights and args.features != "inception":
        parser.error("--weights is for --features inception only: leave one of them out")
    for path in {args.a, args.b, args.weights or args.a} - {"cifar10"}:
        if not Path(path).exists():
            parser.error(f"{path} does not exist: give a folder or a file that does")
    with blame(f"--device {args.device} is not available: leave it out"):
        torch.zeros(1, device=args.device)
    extractor = feature_extractor(args.features, args.device, args.weights)
    images = read_images(args.a, args.n)
    n = len(images)
    real, floor, at = reference(args.b, extractor, n, args.batch, "reference")
    fake = evaluate(images.split(args.batch), extractor, None, n, "samples")
    value = frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
    name = metric_name(extractor.name, n)
    known = "unknown: no images" if floor is None else f"{floor:.4f} at n = {at:.0f}"
    print(file=sys.stderr)
    if n < len(fake.mean):
        print(f"warning: n = {n} is less than the {len(fake.mean)} features: {name} is too large "
              f"by about the floor ({known})", file=sys.stderr)
    result = dict(metric=name, value=value, n=n, features=extractor.name, reference=args.b,
                  floor=floor, floor_n=at and int(at))
    line = (f"{name} = {value:.4f}  (n {n}, features {extractor.name}, reference {args.b}, "
            f"real-against-real floor {known})")
    print(json.dumps(result) if args.json else line)


if __name__ == "__main__":
    run(main)
