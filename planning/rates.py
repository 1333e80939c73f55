"""UHR-BAT rates: how fast a device is, measured once in a few seconds and kept in a file, for predictions of time.

It is measured with layers of the model's own widths and random weights, so that a plan needs no weights. The file lies in
the user's cache folder (`XDG_CACHE_HOME`, else ~/.cache), and says what it holds for: device, threads, releases, widths.

Letters: M tokens of a sequence, C width of the tower, D width of the decoder, R regions.
"""

import copy
import hashlib
import json
import os
import platform
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModel

from ..common.files import user_folder, whole_files, write_json
from ..image_views_uhr_bat import image_to_tiles, normalize_views
from ..token_clustering_uhr_bat import cluster_regions
from .costs import decoder_layer_flops, tower_layer_flops

# A probe is made larger until it takes so many seconds.
PROBE_SECONDS, MOST_CALLS = 0.2, 50
# Tokens that are read, sides of images in pixels, tokens and regions that are clustered, in probes.
PROBE_TOKENS, PROBE_SIDES, PROBE_KMEANS = (256, 1024, 4096), (256, 2048), (4096, 256)
# Rates were measured on a busy machine where the yardstick took so many times as long then as it takes now: they are measured
# again.
FAR_OFF = 1.5
_looked_at = set()  # files of rates that this process has held against the yardstick
_measuring = threading.Lock()  # two measurements at a time would each find a busy machine


@dataclass(frozen=True)
class Rates:
    """What a device takes, in seconds.

    Attributes:
        tower, decoder, kmeans: of a FLOP in the vision tower, in the decoder where it reads a prompt, in the clustering.
        decoder_layer: of one layer of the decoder that reads one token: its weights' way to the processor.
        pixel, view_pixel: of a pixel of the image that is resized, and of a pixel of its views.
        yardstick: of a tile in two layers of the tower, the longest while the rest was measured; 0: not known.
        load: processes that ran or waited for each processor of the machine before it was measured; over 1 it was busy.
    """

    tower: float
    decoder: float
    decoder_layer: float
    kmeans: float
    pixel: float
    view_pixel: float
    yardstick: float = 0.0
    load: float = 0.0


def machine_load() -> float:
    """Processes that run or wait for each processor, over the last minute; 0 where the machine does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def rates_file(config, device: torch.device, dtype: torch.dtype) -> tuple[Path, dict]:
    """(the file that keeps the rates of a device, what they hold for)."""
    vision, text = config.vision_config, config.text_config
    key = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tower": [vision.model_type, vision.hidden_size, vision.intermediate_size, config.tile_size, config.patch_size],
        "decoder": [text.model_type, text.hidden_size, text.intermediate_size],
        "scales": config.scales,
    }
    return user_folder() / f"rates-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json", key


def known_rates(config, device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The rates that were kept for a device, or None, where there are none or their file cannot be read."""
    path, key = rates_file(config, device, dtype)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        whole = kept["of"] == key and set(kept["rates"]) == {field.name for field in fields(Rates)}
        return Rates(**kept["rates"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rates_of(config, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates that were kept for a device, or new ones, which then are kept where there is a folder to keep them in.

    Those of a machine that was busy then are measured again, once this process sees that it takes much less time now.

    Raises:
        ValueError: the device is not here.
    """
    check_device(device)
    with _measuring:
        return _rates_of(config, device, dtype)


def _rates_of(config, device, dtype):
    path, key = rates_file(config, device, dtype)
    rates, looked_at = known_rates(config, device, dtype) or _unkept.get(path), path in _looked_at
    _looked_at.add(path)
    if rates is None:
        rates = measure_rates(config, device, dtype)
    elif looked_at or not _far_off(rates, config, device, dtype):
        return rates
    else:
        # What is measured is never too fast: of both, the faster one is nearer to the truth.
        new = measure_rates(config, device, dtype)
        rates = Rates(*(min(pair) for pair in zip(vars(rates).values(), vars(new).values())))
    if not _keep(path, {"of": key, "rates": vars(rates)}):
        _unkept[path] = rates
    return rates


def _far_off(rates, config, device, dtype) -> bool:
    """Whether the machine was much busier when the rates were measured: by its load, as short probes fit between the turns of
    others where long ones do not, or by the yardstick."""
    if rates.load > 1 and rates.load > FAR_OFF * machine_load():
        return True
    return bool(rates.yardstick) and rates.yardstick >= FAR_OFF * measure_yardstick(config, device, dtype)


_unkept = {}  # rates by their file, where it may not be written


def _keep(path, content) -> bool:
    """Whether the file was written, whole. It is not where there is no such folder, as without a home: the next process
    measures again."""
    try:
        with whole_files(path.parent) as built:
            write_json(built / path.name, content)
    except OSError:
        return False
    return True


def is_here(device: torch.device) -> bool:
    """Whether a device of this name is in this machine."""
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu"


def check_device(device: torch.device):
    """Raises `ValueError` for a device that is not in this machine."""
    if not is_here(device):
        raise ValueError(
            f"Seconds and free memory need the device itself, and there is no {device} here. Plan without them "
            "(`seconds=False`), or on the machine that has it."
        )


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left now: of a GPU with what this process keeps for later; of a machine up to the limit of
    its control group.

    Raises:
        ValueError: the device is not here, or a machine does not say.
    """
    check_device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration) as error:
        raise ValueError('This machine does not say what memory is free. Give a size, as "24GiB".') from error
    try:
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        return min(free, max(0, int((group / "memory.max").read_text()) - used))
    except (OSError, ValueError):  # no group, or one without a limit
        return free


@torch.inference_mode()
def measure_yardstick(config, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that two layers of the tower take for a tile, the least of some."""
    model, taken = _layers(config.vision_config, 2, device, dtype), []
    tile = torch.zeros(1, 3, config.tile_size, config.tile_size, device=device, dtype=dtype)
    for _ in range(8):
        start = time.perf_counter()
        model(tile)[0].flatten()[0].item()  # waits for a GPU
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@torch.inference_mode()
def measure_rates(config, device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device, with one and with two layers of the model's towers."""
    load = machine_load()
    vision, text = config.vision_config, copy.deepcopy(config.text_config)
    text.vocab_size = 8  # no embedding table is needed
    text.pad_token_id = text.eos_token_id = None

    def clocked(call) -> float:
        """Seconds of a call: the least of two to `MOST_CALLS`, after one that warms up; short ones are made more often, as other
        work on the machine weighs more on them."""
        taken = []
        while len(taken) < 3 or sum(taken) < PROBE_SECONDS and len(taken) < MOST_CALLS:
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    def per_layer(part, run, sizes) -> tuple[int, float]:
        """(size, seconds of a layer): what two layers take beside one, at the first size that takes long enough."""
        models = [_layers(part, number, device, dtype) for number in (1, 2)]
        for size in sizes:
            one, two = (clocked(lambda model=model: run(model, size)) for model in models)
            if two >= PROBE_SECONDS:
                break
        return size, max(two - one, two / 8)  # a busy machine may take as long for one as for two

    def see(model, size):
        return model(torch.zeros(size, 3, config.tile_size, config.tile_size, device=device, dtype=dtype))

    def read(model, size):
        return model(inputs_embeds=torch.zeros(1, size, text.hidden_size, device=device, dtype=dtype))

    yardsticks = [measure_yardstick(config, device, dtype)]
    tiles, tower = per_layer(vision, see, (1, 4, 16))
    _, one_token = per_layer(text, read, [1])
    tokens, decoder = per_layer(text, read, PROBE_TOKENS)
    yardsticks.append(measure_yardstick(config, device, dtype))
    kmeans = _kmeans_rate(config.text_config.hidden_size, device, dtype, clocked)
    pixels = _pixel_rates(config, clocked)
    yardsticks.append(measure_yardstick(config, device, dtype))
    return Rates(
        tower / tower_layer_flops(config, tiles),
        max(decoder - one_token, decoder / 8) / decoder_layer_flops(config, tokens),
        one_token,
        kmeans,
        *pixels,
        max(yardsticks),
        load,
    )


def _layers(part, number, device, dtype):
    """A tower with so many layers, in place of what `part` says."""
    part = copy.deepcopy(part)
    part.num_hidden_layers = number
    if getattr(part, "layer_types", None):  # not every decoder has this field
        part.layer_types = part.layer_types[:number]
    with device:
        return AutoModel.from_config(part, dtype=dtype).eval()


def _kmeans_rate(D, device, dtype, clocked) -> float:
    (N, R), generator = PROBE_KMEANS, torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator).to(device, dtype)
    coords = torch.rand(N, 2, generator=generator).to(device)
    return clocked(lambda: cluster_regions(features, coords, R, num_iterations=2)) / (2 * 2 * N * (D + 2) * R)


def _pixel_rates(config, clocked) -> tuple[float, float]:
    """Seconds of a pixel of the image, and of one of its views: from what a small and a large image take."""
    num_view_pixels = sum(scale**2 for scale in config.scales)
    shape = num_view_pixels // config.tile_size**2, 3, config.tile_size, config.tile_size

    def cut(image):
        tiles = image_to_tiles(image, config.scales, config.tile_size)
        normalize_views(tiles, (1 / 255, [0.5] * 3, [0.25] * 3), out=np.empty(shape, np.float32))

    images = [Image.effect_noise((side, side), 64).convert("RGB") for side in PROBE_SIDES]
    small, large = (clocked(lambda image=image: cut(image)) for image in images)
    pixel = max(large - small, large / 8) / (PROBE_SIDES[1] ** 2 - PROBE_SIDES[0] ** 2)
    return pixel, max(small - pixel * PROBE_SIDES[0] ** 2, small / 8) / num_view_pixels
