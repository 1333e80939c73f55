"""`uhr-bat VERB ...`: every command of the project."""

import sys
from importlib import import_module

# Verb: module with a `main(arguments)`, which is imported when the verb is called, and one line for --help.
VERBS = {
    "ask": ("examples.ask", "ask about an image, and see where the visual tokens and the seconds go"),
    "plan": ("planning.__main__", "what a question about an image will cost, and the budgets that fit"),
    "pictures": ("pictures.__main__", "draw what the model looked at and what it kept"),
    "evidence-map": ("geo.__main__", "what was kept as GeoJSON, GeoPackage, GeoTIFF and a page with a map"),
    "regions": ("regions.cache", "make SAM's label maps of many images, once"),
    "scene": ("scenes.painting", "paint a made-up scene"),
    "evidence": ("evaluation.evidence", "accuracy and evidence kept, against visual tokens"),
    "evidence-native": ("evaluation.native", "the same for objects of a few native pixels, coarse to fine"),
    "evaluate": ("evaluation.evaluate", "a benchmark of the field: asked, scored, with its controls"),
    "compare": ("evaluation.compare_runs", "two runs of a benchmark, sample by sample"),
    "recall": ("evaluation.recall", "evidence recall at budget: which objects a choice of tokens keeps"),
    "ablations": ("evaluation.ablations", "the paper's Table 4 and ablations, each by one command"),
    "partitions": ("evaluation.partitions", "what every partition into regions does to small objects"),
    "export": ("export.convert_checkpoint", "trained weights into a complete model folder"),
    "build-tiny": ("export.build_tiny", "UHR-BAT-Tiny before it is trained, as a model folder"),
    "build-7b-config": ("export.model_folder", "the configuration files of the 7B model"),
    "train": ("training.sft", "fine-tune on your own images and questions, by a recipe"),
    "train-engine": ("training.engines", "the file of an engine for several GPUs: ddp, zero2, zero3, fsdp2"),
    "train-memory": ("training.memory", "the GPU memory that a recipe needs, by a formula"),
    "train-vision": ("training.tiny.vision", "stage 1 of UHR-BAT-Tiny: the tower learns to read"),
    "train-finetune": ("training.tiny.finetune", "stages 2 to 4: the decoder learns where to look and to answer"),
    "train-zoom": ("training.tiny.zooming", "the last stage: the decoder learns to look closer, down to native pixels"),
    "train-focus": ("training.tiny.focusing", "LRS-VQA's system on UHR-BAT-Tiny: its module learns where to look"),
    "train-exchange": ("training.tiny.exchange", "another vision tower for a trained decoder"),
    "serve": ("serving.serve", "a server with OpenAI's API: many users, evidence in the answer"),
    "demo": ("serving.demo", "a page to open an image, ask and see what the answer was read from"),
    "batch": ("serving.batch", "ask a thousand images, on one machine or a cluster"),
    "bench": ("benchmarks.run", "speed and memory against the straightforward implementation"),
    "bench-serve": ("benchmarks.serving", "many users at a time against a loop and against transformers serve"),
    "bench-gpu": ("benchmarks.gpu", "the 7B geometry on a GPU"),
}


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: uhr-bat VERB ...     (uhr-bat VERB --help: its options)", "", *lines])


def main(arguments=None) -> int:
    """Run a verb; its exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [None]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        message = "a verb is missing" if verb is None else f"there is no verb {verb!r}"
        print(f"{usage()}\n\nError: {message}.", file=sys.stderr)
        return 2
    try:
        return import_module(f".{VERBS[verb][0]}", __package__).main(rest) or 0
    except KeyboardInterrupt:
        return 130
