"""FID as published numbers are computed: the Inception of 2015, TensorFlow 1 resizing; one file.

    python fid.py samples.npz cifar10                         # "FID" from 50,000 samples on
    python fid.py samples train --features random --n 1000    # CIFAR's test set: 1.68, floor 1.13
A, B: a folder, an .npz (uint8 NHWC arr_0, B: or mu, sigma), cifar10 (train). Floor: real to real.
"""
import argparse, contextlib, glob, hashlib, json, socket, sys, time, warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

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
    except (UserError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)
        sys.exit({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))

@contextlib.contextmanager
def blame(message):  # whatever a library raises over a foreign file or server becomes a UserError
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({str(error)[:300]})") from error

def fetch(url, sha256, folder=None, timeout=30):
    """The path of url's file in folder (or torch's hub cache), downloaded if it is not there."""
    path = Path(folder or Path(torch.hub.get_dir(), "checkpoints"), url.rsplit("/", 1)[-1])
    socket.setdefaulttimeout(timeout)  # seconds of silence; the library would wait for ever
    with blame(f"{path} is missing, truncated or another file: put {url} there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # under another name until the hash is right
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError("wrong SHA-256")
    return path

def resize_tf1(images):
    """[N, C, H, W] in 0..255 -> [N, C, 299, 299]; TensorFlow 1 reads at i * size / 299."""
    for size in (images.shape[3], images.shape[2]):  # each turn resizes the last axis, transposes
        source = (torch.arange(299, dtype=torch.float64) * size / 299).clamp(max=size - 1)
        hats = (1 - (source - torch.arange(size)[:, None]).abs()).clamp(min=0)  # [size, 299]
        images = (images.double() @ hats.to(images.device)).mT  # which TF32 would round
    return images.float()

class InceptionFID(torch.fx.GraphModule):
    """uint8 [N, 3, H, W] -> [N, 2048]: torchvision's graph, edited; the published weights' keys."""
    def __init__(self):
        from torchvision.models import inception_v3
        net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
        super().__init__(net, torch.fx.Tracer().trace(net))
        *averages, last = [n for n in self.graph.nodes if n.target is nn.functional.avg_pool2d]
        last.target = nn.functional.max_pool2d  # in Mixed_7c
        for node in averages:
            node.update_kwarg("count_include_pad", False)
        *_, fc, output = self.graph.nodes
        output.args = fc.args
        self.recompile()
        self.register_forward_pre_hook(lambda _, images: (resize_tf1(*images) - 128) / 128)
    def fold(self):
        """BatchNorm into the convolutions, channels last: the same function, faster."""
        for part in [m for m in self.modules() if isinstance(getattr(m, "bn", 0), nn.BatchNorm2d)]:
            part.conv, part.bn = nn.utils.fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)

def random_features(images):
    """uint8 [N, 3, H, W] -> [N, 36]: log energies of random filters, and where which colour is."""
    x, rng = images.float() / 127.5 - 1, np.random.default_rng(2)
    features = [nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)]
    for scale, weight in (1, 24), (2, 8):  # chosen on CIFAR; few, as the floor grows with them
        y = nn.functional.avg_pool2d(x, scale)
        for layer in range(2):  # nothing is strided before it is measured, so grain is seen
            filters = rng.standard_normal((12, y.shape[1], 3, 3)) / (9 * y.shape[1]) ** 0.5
            filters -= (scale == 1) * filters.mean((2, 3), keepdims=True)  # 2 also sees flat areas
            y = nn.functional.conv2d(y, torch.from_numpy(filters).to(y)).abs()
        features.append(weight * (y.mean((2, 3)) + 0.02).log())
    return torch.cat(features, 1)

def feature_extractor(spec, device="cpu", weights=None):
    """For inception, random or a TorchScript file: images -> [N, d], with its .name and .hash."""
    path, net = __file__ if spec == "random" else spec, random_features
    if spec == "inception":
        path, net = weights or fetch(*INCEPTION), InceptionFID()
    with blame(f"{path} is truncated or not what --features {spec} needs; see {INCEPTION[0]}"):
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if spec == "inception":
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            net.fold().to(device)
            net.forward = torch.compile(net.forward, dynamic=True, disable=str(device) == "cpu")
        elif spec != "random":
            warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated")
            net = torch.jit.load(path, map_location=device).eval()
    def extract(images):  # TF32, torch's default for convolutions on a GPU, would move the features
        with (torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
              blame(f"--features {spec} does not take uint8 {tuple(images.shape)}")):
            return net(images.to(device)).flatten(1)
    extract.hash, known = digest, spec == "random" or digest == INCEPTION[1]
    extract.name = spec if known else f"{Path(path).stem}-{digest[:6]}"
    return extract

class Statistics:
    """Mean and unbiased covariance, in float64, of features that are not kept."""
    cov = property(lambda self: self.scatter / (self.n - 1))
    def __init__(self, n=0, mean=0.0, scatter=0.0):
        self.n, self.mean, self.scatter = n, mean, scatter  # scatter: sum of (x - mean)(x - mean)'
    def update(self, features):
        x = features.double()
        return self.merge(Statistics(len(x), x.mean(0), len(x) * x.T.cov(correction=0)))
    def merge(self, other):  # Chan's formula: only deviations are squared, so no digits cancel
        n, gap = self.n + other.n, other.mean - self.mean
        self.scatter = self.scatter + other.scatter + self.n * other.n / n * torch.outer(gap, gap)
        self.n, self.mean = n, self.mean + other.n / n * gap
        return self

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2); with cov1 = R R' the last trace is that
    of (R' cov2 R)^1/2, which is symmetric: the roots of its eigenvalues do, no matrix root."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).double().cpu() for x in (mu1, cov1, mu2, cov2))
    fit = mu1.shape == mu2.shape == cov1.shape[1:] == cov2.shape[1:] != ()
    if not (fit and (mu1 - mu2 + cov1 + cov2).isfinite().all()):
        raise UserError("give two or more images, four in B, and finite features, as many in both")
    values, vectors = torch.linalg.eigh(cov1)  # for n <= d, zeros arrive as rounding
    root = vectors * values.where(values > 1e-12 * values[-1], 0).sqrt()
    shared = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + (cov1 + cov2).trace() - 2 * shared).clamp(min=0).item()

def metric_name(features, n):
    return "FID" if features == "inception" and n >= 50_000 else f"FD({features})@{n}"

def evaluate(batches, extractor, total=0):
    """Statistics of batches of uint8 images; a total (how many will come) shows progress."""
    statistics, start = Statistics(), time.perf_counter()
    for images in filter(len, batches):
        statistics.update(extractor(images))
        n, t = statistics.n, time.perf_counter() - start
        if total and sys.stderr.isatty():
            left = f"{n} of {total}, {n / t:.0f} images/s, {(total - n) * t / n:.0f} s left"
            print(left, end="   \r", file=sys.stderr)
    return statistics

def load_image(file):
    from PIL import Image
    with Image.open(file) as image:
        if image.mode[0] in "IF":  # the library would clip it to white
            raise ValueError("more than 8 bits a channel")
        return image.convert("RGB")

def read(source="cifar10"):
    """uint8 [N, 3, H, W], labels [N], class names (if any) of a folder, an .npz or cifar10."""
    from torchvision.datasets import CIFAR10, folder
    with blame(f"no images in {source}: give a folder of one size, .npz of uint8 NHWC, cifar10"):
        if source == "cifar10":
            if not Path("data", CIFAR10.base_folder).exists():
                fetch(*CIFAR, "data")
            data = CIFAR10("data", download=True)  # unpacks what is there
            images, labels, classes = data.data, data.targets, data.classes
        elif str(source).endswith(".npz"):
            arrays, classes = np.load(source), []  # runs no pickles
            images, labels = arrays["arr_0"].astype(np.uint8, casting="no"), arrays.get("arr_1", 0)
        else:
            Path(source or "?").stat()  # or the system's words for what is missing
            names = glob.glob("**", root_dir=source, recursive=True)  # follows links to folders
            names = sorted(filter(folder.is_image_file, names))
            images = [np.asarray(blame(name)(load_image)(Path(source, name))) for name in names]
            classes, labels = np.unique([n[:n.find("/") + 1] for n in names], return_inverse=True)
        x = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        labels = torch.from_numpy(np.broadcast_to(labels, len(x)).astype(int, casting="same_kind"))
        if not 0 <= labels.min() <= labels.max() < 10**4:
            raise ValueError("a label is below 0 or above 9999")
    return x, labels, [str(c).rstrip("/") or "." for c in classes] if len(classes) > 1 else []

def shuffled(source):  # always in the same order; a tensor is taken as it is
    images = source if torch.is_tensor(source) else read(source)[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]

def reference(source, extractor, n, batch=64):
    """Statistics of all of a source; the distance of n of its images from n others; that n."""
    cache = Path(f"data/fid-cifar10-train-{n}-{extractor.hash}.npz")
    path = str(cache if source == "cifar10" and cache.exists() else source)
    with blame(f"{path} is not a readable .npz: write it anew"):
        saved = dict(np.load(path)) if path.endswith(".npz") else {}
        if {"mu", "sigma"} <= saved.keys():  # n = 2, so that scatter / (n - 1) is the covariance
            mu, sigma = (saved[name].astype(float, casting="same_kind") for name in ("mu", "sigma"))
            return Statistics(2, mu, sigma), *saved.get("floor", (None, None))
    images = shuffled(source)
    n = min(n, len(images) // 2)
    parts = images.tensor_split([n, 2 * n])
    first, second, rest = (evaluate(x.split(batch), extractor, len(x)) for x in parts)
    floor = frechet_distance(first.mean, first.cov, second.mean, second.cov)
    whole = first.merge(second).merge(rest)
    if source == "cifar10":  # never half a file under the final name
        np.savez("data/part.npz", mu=whole.mean.cpu(), sigma=whole.cov.cpu(), floor=(floor, n))
        Path("data/part.npz").replace(cache)
    return whole, floor, n

def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("a", help="images to judge: a folder, an .npz or cifar10")
    parser.add_argument("b", help="the reference: the same, or an .npz of statistics")
    parser.add_argument("--features", default="inception", help="or random, or a TorchScript file")
    parser.add_argument("--weights", help="a local file of Inception's weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--n", type=int, default=0, help="judge so many of A, drawn at random")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    if not 0 < args.batch < 10**6 or (args.n or 4) < 4 or (
            args.weights and args.features != "inception"):
        parser.error("--batch must be 1 or more, --n 4 or more, --weights for inception only")
    for path in [p for p in (args.a, args.b) if not (p == "cifar10" or Path(p).exists())]:
        parser.error(f"{path} does not exist: give a folder, an .npz or cifar10")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = feature_extractor(args.features, device, args.weights)
    images = shuffled(args.a)[:args.n or None]
    real, floor, floor_n = reference(args.b, extractor, len(images), args.batch)
    fake = evaluate(images.split(args.batch), extractor, len(images))
    result = dict(metric=metric_name(extractor.name, fake.n),
                  value=round(frechet_distance(fake.mean, fake.cov, real.mean, real.cov), 4),
                  n=fake.n, features=extractor.name, reference=args.b, floor=floor, floor_n=floor_n,
                  warning="too large by about the floor: n < d" if fake.n < len(fake.mean) else "")
    words = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
             for k, v in result.items() if v not in ("", None)]
    print(json.dumps(result) if args.json else ", ".join(words))

if __name__ == "__main__":
    run(main)
