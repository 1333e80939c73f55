"""UHR-BAT costs: FLOPs and bytes of one question about one image by formula, stage by stage, before an image is read.

FLOPs as torch counts them: a multiplication and an addition are two, attention is the whole square, element-wise work
is nothing; averages and sums of the k-means and of the merging are nothing, too. `benchmarks` holds both formulas
against counters: FLOPs to the last one, bytes against measured peaks.

Letters: S scales, T tiles, P patches of a tile, N tokens, M tokens of a sequence, C width of the tower, D width of the
decoder, F width of an MLP, R regions, b bytes of a value.
"""

from dataclasses import dataclass

from ..budgets_uhr_bat import bounds_of_regions, count_tokens, first_with_tokens, is_one_budget
from ..geometry_uhr_bat import shown_patches
from ..image_pyramids_uhr_bat import ImagePyramid, UnreadImage, split_tiles
from ..image_reading_uhr_bat import HELD_PIXELS
from ..modeling_pointing_uhr_bat import BLURS, MAP_SIDE, MOST_COUNTED, TOLD_FACTS
from ..token_clustering_uhr_bat import BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS

# Text tokens of a prompt before and after the image (the chat template with a question of a dozen words), and those of
# an answer, where nobody says how many.
TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS = 14, 24, 64
# Bytes of a weight in NF4: 4 bits, and a scale of 8 bits for 64 weights.
NF4_BYTES = 0.516
# Bytes of a pixel as Pillow holds an RGB image: a fourth one fills the word.
PILLOW_PIXEL = 4


@dataclass(frozen=True)
class Question:
    """All of a question about an image that its price depends on.

    Attributes:
        num_pixels: of the image; 0 where it is cut into tiles already.
        tiles: int[S], tiles that pass the vision tower; all 0 where the image is encoded already.
        available: int[S], tokens that show the image, of these tiles.
        budgets: int[S], visual tokens that each scale may spend, or one number for all.
        text_before, text_after: text tokens before and after the image.
        num_answer_tokens: tokens that are generated.
        max_tiles: see [`UHRBatImageProcessor`]; None where every tile is encoded.
        native: whether the tiles are of levels down to the image's own resolution.
        num_questions: that are answered at once, as a batch does, or as many users of a server.
        num_images: that they are about, each of this size; cut and encoded one after the other, their tokens all held.
    """

    num_pixels: int
    tiles: list[int]
    available: list[int]
    budgets: list[int] | int
    text_before: int = TEXT_BEFORE
    text_after: int = TEXT_AFTER
    num_answer_tokens: int = ANSWER_TOKENS
    max_tiles: int | None = None
    native: bool = False
    num_questions: int = 1
    num_images: int = 1

    def __post_init__(self):
        if not 1 <= self.num_images <= self.num_questions:
            raise ValueError(
                f"{self.num_questions} questions about {self.num_images} images: at least one of both, and as many questions as "
                "images."
            )

    @property
    def num_held_pixels(self) -> int:
        """Pixels of the image that are in memory at once, and all read: none of a large one with native levels, whose tiles are
        read from the file."""
        return 0 if self.native and self.num_pixels >= HELD_PIXELS else self.num_pixels

    @property
    def counts(self) -> list[int]:
        """int[S], or int[1] for one budget: the visual tokens that are spent."""
        return count_tokens(self.budgets, range(len(self.available)), [1], [self.available])[0]

    @property
    def num_text(self) -> int:
        return self.text_before + self.text_after

    @property
    def prompt(self) -> int:
        """Tokens of the prompt with its image."""
        return self.num_text + sum(self.counts)

    @property
    def anchor_idx(self) -> int:
        return first_with_tokens(self.available)


def tiles_of(shown, patches_per_side: int) -> int:
    """Tiles of a scale that show any of the image, from bool[H, W] patches that do."""
    H, W = shown.shape
    p = patches_per_side
    return int(shown.reshape(H // p, p, W // p, p).any(axis=(1, 3)).sum())


def question_of(config, image_size: tuple[int, int], budgets=None, max_tiles=None, native=False, **others) -> Question:
    """The question about an image of (height, width) pixels: where the letterbox lies follows from its size.

    Args:
        budgets: int[S] or one number; None for those of the configuration.
        max_tiles: tiles that are encoded where the question looks, of the configuration's scales; None for all.
        native: of levels down to the image's own resolution instead.
        others: other values for the rest of [`Question`].

    Raises:
        ValueError: `native` without `max_tiles`, or with budgets for each scale.
    """
    num_pixels, budgets = image_size[0] * image_size[1], config.budgets if budgets is None else budgets
    if native:
        if max_tiles is None:
            raise ValueError(
                "`native` levels are encoded where the question looks, so many tiles: pass `max_tiles` with it."
            )
        pyramid = ImagePyramid(
            UnreadImage(*image_size), anchor=config.scales[0], tile_size=config.tile_size, patch_size=config.patch_size,
            mask_padding=config.mask_padding, max_tiles=max_tiles,
        )  # fmt: skip
        budgets = budgets if is_one_budget(budgets) else sum(budgets)
        return Question(
            num_pixels, pyramid.num_chosen, pyramid.available, budgets, max_tiles=max_tiles, native=True, **others
        )
    full = [(height * width, config.tile_size // config.patch_size) for height, width in config.grids]
    tiles, available = [N // p**2 for N, p in full], [N for N, _ in full]
    if config.mask_padding:
        shown = [shown_patches(image_size, grid) for grid in config.grids]
        available = [int(patches.sum()) for patches in shown]
        tiles = [tiles_of(patches, p) for patches, (_, p) in zip(shown, full)]
    if max_tiles is not None:
        tiles = split_tiles(tiles, max_tiles)
        available = [min(N, number * p**2) for N, number, (_, p) in zip(available, tiles, full)]
    return Question(num_pixels, tiles, available, budgets, max_tiles=max_tiles, **others)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def tower_layer_flops(config, num_tiles) -> int:
    vision = config.vision_config
    C, M = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2 + config.tower_form.num_class_tokens
    return num_tiles * (2 * M * 4 * C**2 + 2 * M * 2 * C * vision.intermediate_size + 4 * M**2 * C)


def tower_flops(config, num_tiles, up_to_features=False) -> int:
    """All layers of the tower; ours ends at the one that the features are read from."""
    vision = config.vision_config
    num_layers = vision.num_hidden_layers
    patches = 2 * (vision.image_size // vision.patch_size) ** 2 * 3 * vision.patch_size**2 * vision.hidden_size
    if up_to_features:
        num_layers = config.vision_feature_layer % (num_layers + 1)
    return num_tiles * patches + num_layers * tower_layer_flops(config, num_tiles)


def projector_flops(config, N) -> int:
    C, D = config.vision_config.hidden_size, config.text_config.hidden_size
    return 2 * N * (C * D + D * D)


def attention_widths(config) -> tuple[int, int]:
    """Width of all heads together, of the queries and of the keys. Not of every decoder is a head's the width by their number."""
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads * head, text.num_key_value_heads * head


def layer_weights(config) -> int:
    """Weights of the linear layers of one layer of the decoder."""
    D, (query, key) = config.text_config.hidden_size, attention_widths(config)
    return 2 * D * (query + key) + 3 * D * config.text_config.intermediate_size


def decoder_layer_flops(config, M, num_cached=0) -> int:
    return 2 * M * layer_weights(config) + 4 * M * (num_cached + M) * attention_widths(config)[0]


def decoder_flops(config, M, num_cached=0) -> int:
    """All layers, for M new tokens behind `num_cached` ones."""
    return config.text_config.num_hidden_layers * decoder_layer_flops(config, M, num_cached)


def head_flops(config, M) -> int:
    return 2 * M * config.text_config.hidden_size * config.text_config.vocab_size


def question_rows_flops(config, M, num_rows) -> int:
    """At the importance layer: queries and keys of all rows, and the scores of the question's."""
    query, key = attention_widths(config)
    return 2 * M * config.text_config.hidden_size * (query + key) + 2 * num_rows * M * query


def weighing_flops(config, num_tokens, layer, num_rows, num_text) -> int:
    """The question weighs tokens of the image, in a pass up to a layer that reads one row more than it scores."""
    num_layers, M = config.text_config.num_hidden_layers, num_text + num_tokens
    whole = layer % num_layers * decoder_layer_flops(config, M) + decoder_layer_flops(config, 1)
    return whole + question_rows_flops(config, M, num_rows)


def reading_layer(config) -> int:
    """Layer at which the question's attention to the anchor is read, of the decoder or of the region focus module."""
    return len(config.focus.layers) - 1 if config.importance_source == "region_focus" else config.importance_layer


def candidates_of(config, question) -> list[tuple[int, int, int]]:
    """(tokens, decoder layer, rows that ask) of every pass that refines the importance: scales after the anchor. Deeper levels
    than there are scales are read as the finest one, at which the last token asks alone."""
    layers, found = config.refinement_layers or [config.importance_layer] * len(config.refinement), []
    for scale_idx in range(question.anchor_idx + 1, len(question.available) if config.refinement else 0):
        step = min(scale_idx, len(config.refinement)) - 1
        rows = 1 if step == len(config.refinement) - 1 else question.text_after
        if number := min(config.refinement[step], question.available[scale_idx]):
            found.append((number, layers[step], rows))
    return found


def region_counts(config, question) -> list[int]:
    """int[S], regions that the tokens of every scale are clustered into, 0 where nothing is clustered."""
    counts = question.counts
    if is_one_budget(question.budgets):
        counts = bounds_of_regions(counts[0], question.available, config.anchor_share)
    if config.region_method in ("grid", "none"):
        return [0] * len(counts)
    if config.region_method == "birch":
        raise ValueError('What region_method="birch" costs depends on the image. Plan with "kmeans".')
    regions = [config.num_regions or count for count in counts]
    if config.coverage:
        regions = [min(pair) for pair in zip(regions, counts)]
    limits = zip(regions, counts, question.available)
    return [R if count and R < N else 0 for R, count, N in limits]


def kmeans_flops(config, sizes, regions) -> int:
    """Distances of every token to every centre, in all iterations."""
    D = config.text_config.hidden_size
    return sum(config.kmeans_iterations * 2 * N * (D + 2) * R for N, R in zip(sizes, regions))


def pointer_flops(config, N, num_text) -> int:
    """Of a pointer that reads N visual tokens and the text behind them (`modeling_pointing_uhr_bat.py`)."""
    D, H, K = config.text_config.hidden_size, config.pointing.hidden, config.pointing.width
    of_token = D * H + H * H + 2 * H + 2 * H * K  # seen; object and trust; ground and kind
    of_token += K + 2 * K + 2 * (2 + 2 * len(BLURS) + 1) * K  # meant, fitting, near either place
    of_text = 2 * 2 * D * 3 + 2 * D + 2 * D  # heard and gathered; names
    of_question = 2 * 2 * D * K + 3 * D + 2 * D * (K + 1) + D  # places, second, meant, asked
    told = TOLD_FACTS * H + H * D + (MOST_COUNTED + 1) * D + 1 + 3 * D
    on_map = len(BLURS) * 2 * 3 * MAP_SIDE**3
    return 2 * (N * of_token + num_text * of_text + of_question + told + on_map)


def question_flops(config, question: Question, calls=None) -> dict[str, int]:
    """{stage: FLOPs} of a question: "encode", "importance", "regions", "prefill", "answer"; "refinement" and "pointing"
    where there is one.

    Args:
        calls: what the model's calls cost, [`counting.HostCosts`] of a host; None for UHR-BAT's own formulas.
    """
    calls = calls or Formulas(config)
    num_tiles, at_once = sum(question.tiles), question.num_questions
    num_rows = question.text_after if config.question_tokens == "all" else 1
    anchor, steps = question.available[question.anchor_idx], range(question.num_answer_tokens - 1)
    flops = {
        "encode": calls.encode_flops(num_tiles),
        "importance": calls.weigh_flops(anchor, reading_layer(config), num_rows, question.num_text),
        "refinement": sum(
            calls.weigh_flops(*of_scale, question.num_text) for of_scale in candidates_of(config, question)
        ),
        "regions": kmeans_flops(config, question.available, region_counts(config, question)),
        "prefill": calls.pass_flops(question.prompt),
        "pointing": calls.pointing_flops(sum(question.counts), question.text_after),
        "answer": sum(calls.step_flops(question.prompt + step) for step in steps),
    }
    # Where the question looks its tiles are its own.
    encoded = at_once if question.max_tiles is not None else question.num_images
    flops = {stage: number * (encoded if stage == "encode" else at_once) for stage, number in flops.items()}
    return {stage: number for stage, number in flops.items() if number or stage not in ("refinement", "pointing")}


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def kmeans_bytes(config, N, R, on_gpu) -> int:
    """Three blocks in float32, three sets of centres, and order and labels of the tokens."""
    if not R:
        return 0
    width = config.text_config.hidden_size + 2
    block = min(GPU_BLOCK_ELEMENTS if on_gpu else BLOCK_ELEMENTS, N * max(width, R))
    return 4 * (3 * block + 3 * R * width) + 48 * N


class Formulas:
    """What each call of UHR-BAT costs, by its configuration.

    Attributes:
        row_width: of a token.
        linear_weights: of the decoder's linear layers, which 4 bits would hold.
        tiles_on_host: whether tiles that are kept for further questions are in the CPU's memory.
    """

    tiles_on_host = False

    def __init__(self, config):
        self.config, self.row_width = config, config.text_config.hidden_size
        self.linear_weights = config.text_config.num_hidden_layers * layer_weights(config)

    def encode_flops(self, num_tiles):
        P = (self.config.tile_size // self.config.patch_size) ** 2
        return tower_flops(self.config, num_tiles, up_to_features=True) + projector_flops(self.config, num_tiles * P)

    def weigh_flops(self, num_tokens, layer, num_rows, num_text):
        return weighing_flops(self.config, num_tokens, layer, num_rows, num_text)

    def pass_flops(self, M):
        return decoder_flops(self.config, M) + head_flops(self.config, 1)

    def pointing_flops(self, num_tokens, num_text):
        return pointer_flops(self.config, num_tokens, num_text) if self.config.pointer is not None else 0

    def step_flops(self, num_cached):
        return decoder_flops(self.config, 1, num_cached) + head_flops(self.config, 1)

    def chunk_bytes(self, num_tiles, b, on_gpu):
        """A chunk of so many tiles in the tower, at its widest: where patches are embedded, or in a layer's MLP.

        Before patches are embedded, a CPU's convolution pads the three colours to 16, beside the chunk and its copy. A layer
        has the residual and the normed states, and three tensors as wide as the MLP; a CPU's heap keeps the room of queries,
        keys, values and output, which the layer has given back.
        """
        vision = self.config.vision_config
        M = (vision.image_size // vision.patch_size) ** 2 + self.config.tower_form.num_class_tokens
        pixels = 4 * num_tiles * self.config.tile_size**2
        layer = b * num_tiles * M * ((2 if on_gpu else 6) * vision.hidden_size + 3 * vision.intermediate_size)
        return max(22 * pixels, 3 * pixels + layer)

    def added_bytes(self, N, chunk_size, b):
        """Tokens of a scale, the blocks that have got their embedding, and these in one piece, beside a block of embeddings
        in float32, twice."""
        block = min(chunk_size * (self.config.tile_size // self.config.patch_size) ** 2, N)
        return (3 * b * N + 8 * block) * self.row_width

    def weigh_bytes(self, M, question, b, on_gpu):
        scores = 10 * self.config.text_config.num_attention_heads * min(64, question.text_after) * M
        return self.pass_bytes(M, 1, b, on_gpu) + scores

    def pass_bytes(self, M, at_once, b, on_gpu):
        """A layer of the decoder while its MLP runs: sequence, residual and normed states, and the MLP's three products; and
        in a CPU's heap the room of the attention's queries, before and after they are turned, keys, values and output."""
        (query, key), text = (0, 0) if on_gpu else attention_widths(self.config), self.config.text_config
        return b * at_once * M * (3 * (text.hidden_size + text.intermediate_size) + 4 * query + 2 * key)

    def visual_bytes(self, question, b):
        """Visual tokens, the embedded prompt, and the prompt with both."""
        return 3 * b * self.row_width * question.prompt

    def cache_bytes(self, M, b):
        return 2 * b * M * self.config.text_config.num_hidden_layers * attention_widths(self.config)[1]

    def grown_bytes(self, M, at_once, b):
        """Keys and values of a layer are copied when a token is added."""
        grown = at_once * self.cache_bytes(M, b)
        return grown + grown // self.config.text_config.num_hidden_layers


def question_bytes(
    config, question: Question, weights: int, b: int, on_gpu: bool, chunk_size: int, cache_bytes: int, calls=None
) -> dict[str, dict[str, int]]:
    """{stage: {term: bytes}} of the device that the model is on; the peak is the greatest sum of a stage.

    What stays is in every stage: the weights, the pixel values that the caller holds, and, once they are there, the tokens
    of all scales (encode once, ask many). On a CPU, the image and its tiles are in the same memory.

    Args:
        weights: bytes of the model's parameters and buffers, as they are in memory.
        b: bytes of a value of the tokens: 4 for float32, 2 for bfloat16.
        on_gpu: whether clustering takes the blocks of a GPU.
        chunk_size, cache_bytes: the model's `vision_chunk_size` and `tile_cache_bytes`.
        calls: as of `question_flops`.
    """
    calls = calls or Formulas(config)
    W, at_once = calls.row_width, question.num_questions
    P, encoded = (config.tile_size // config.patch_size) ** 2, not any(question.tiles)
    num_tiles = 0 if encoded else sum(height * width // P for height, width in config.grids)
    if question.max_tiles is not None:  # read level by level, when they are asked for
        num_tiles = max(question.tiles)
    held = {"weights": weights, "pixel values": 4 * 3 * num_tiles * config.tile_size**2}
    others = question.num_images - 1  # whose tokens are there already
    stages = {}
    if question.num_pixels and not on_gpu:
        stages["preprocess"] = {
            **held, "image": PILLOW_PIXEL * question.num_held_pixels, "tiles of 8 bits": held["pixel values"] // 4
        }  # fmt: skip

    anchor = b * W * question.available[question.anchor_idx]
    of_scales = [b * W * N for N in question.available]
    if not encoded:
        peaks = []
        for scale_idx, (N, T) in enumerate(zip(question.available, question.tiles)):
            before = (
                others * (sum(of_scales) + anchor)
                + sum(of_scales[:scale_idx])
                + (anchor if scale_idx > question.anchor_idx else 0)
            )
            # What the projector gave out of all tiles so far; then the tokens of the scale.
            projected, chunk = b * T * P * W, calls.chunk_bytes(min(T, chunk_size), b, on_gpu)
            made = max(2 * projected, calls.added_bytes(N, chunk_size, b))
            peaks.append({"tokens of all scales": before + projected, "tower's chunk": chunk})
            peaks.append({"tokens of all scales": before + made, "tower's chunk": 0})
        stages["encode"] = held | max(peaks, key=lambda terms: sum(terms.values()))

    # Images keep their encoded tiles for further questions.
    if question.max_tiles is not None and not (on_gpu and calls.tiles_on_host):
        held["kept tiles"] = question.num_images * min(cache_bytes, sum(of_scales))
    # Positions, regions and their copies: a few whole numbers for a token.
    held = held | {
        "tokens of all scales": question.num_images * (sum(of_scales) + anchor + 32 * sum(question.available))
    }
    passes = [question.available[question.anchor_idx], *(number for number, _, _ in candidates_of(config, question))]
    M = question.num_text + max(passes)
    stages["importance"] = held | {"importance pass": calls.weigh_bytes(M, question, b, on_gpu)}
    regions = region_counts(config, question)
    blocks = [kmeans_bytes(config, N, R, on_gpu) for N, R in zip(question.available, regions)]
    stages["regions"] = held | {"k-means blocks": max(blocks)}
    joined = sum(of_scales) if is_one_budget(question.budgets) else 0
    stages["selection"] = held | {
        "tokens of all scales in one": joined,
        "visual tokens": at_once * b * W * sum(question.counts),
    }
    visual = {"visual tokens": at_once * calls.visual_bytes(question, b)}
    cache = at_once * calls.cache_bytes(question.prompt, b)
    stages["prefill"] = held | visual | {
        "KV cache": cache, "prefill": calls.pass_bytes(question.prompt, at_once, b, on_gpu)
    }  # fmt: skip
    grown = calls.grown_bytes(question.prompt + question.num_answer_tokens, at_once, b)
    stages["answer"] = held | visual | {"KV cache": grown, "scores": 8 * at_once * config.text_config.vocab_size}
    return stages


def host_bytes(config, question: Question) -> int:
    """What the machine beside a GPU holds at once: the image, where Pillow reads it whole, its tiles of 8 bits and its
    pixel values. A raster is streamed: then without the image."""
    values = 3 * sum(scale**2 for scale in config.scales)
    if question.max_tiles is not None:
        values = 3 * max(question.tiles) * config.tile_size**2
    return PILLOW_PIXEL * question.num_held_pixels + values + 4 * values


__all__ = ["Question", "question_bytes", "question_flops", "question_of"]
