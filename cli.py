"""`uhr-bat VERB ...`: every command of the project."""

import re
import sys
from importlib import import_module

# Verb: the module whose `main(arguments)` is imported when the verb is called, and one line for --help. The second
# word of a verb chooses among the modules of one subject; `tiny` does nothing by itself.
VERBS = {
    "ask": ("examples.ask", "ask about an image, and see where the visual tokens and the seconds go"),
    "detect": ("geo.detect", "find all objects of a kind in a large image, window by window, as GeoJSON"),
    "plan": ("planning.__main__", "what a question about an image will cost, and the budgets that fit"),
    "pictures": ("pictures.__main__", "draw what the model looked at and what it kept"),
    "evidence-map": ("geo.__main__", "what was kept as GeoJSON, GeoPackage, GeoTIFF and a page with a map"),
    "regions": ("regions.cache", "make SAM's label maps of many images, once"),
    "scene": ("scenes.painting", "paint a made-up scene"),
    "calibrate": (
        "evaluation.calibrate",
        "which layer of any model looks at what is asked about, kept for its loading",
    ),
    "evaluate": ("evaluation.evaluate", "a benchmark of the field: asked, scored, with its controls"),
    "compare": ("evaluation.compare_runs", "two runs of a benchmark, sample by sample"),
    "evidence": ("evaluation.evidence", "accuracy and evidence kept, against visual tokens"),
    "evidence native": ("evaluation.native", "the same for objects of a few native pixels, coarse to fine"),
    "evidence points": ("evaluation.points", "what answers point to, what they refuse, and how sure they are"),
    "evidence hosted": ("evaluation.hosted", "a model of another family: plain, with tiling, and by UHR-BAT's rules"),
    "evidence looks": ("evaluation.looks", "looks until evidence is in sight, guided by `uhr-bat mcp`'s where"),
    "evidence dates": ("evaluation.dates", "what is answered and kept of two dates, compared and each by itself"),
    "evidence recall": ("evaluation.recall", "evidence recall at budget: which objects a choice of tokens keeps"),
    "evidence partitions": ("evaluation.partitions", "what every partition into regions does to small objects"),
    "evidence ablations": ("evaluation.ablations", "the paper's Table 4 and ablations, each by one command"),
    "export": ("export.convert_checkpoint", "trained weights into a complete model folder"),
    "export 7b-config": ("export.model_folder", "the configuration files of the 7B model"),
    "train": ("training.sft", "fine-tune on your own images and questions, by a recipe"),
    "train memory": ("training.memory", "the GPU memory that a recipe needs, by a formula"),
    "train engine": ("training.engines", "the file of an engine for several GPUs: ddp, zero2, zero3, fsdp2"),
    "tiny": (None, "how UHR-BAT-Tiny is made, act by act"),
    "tiny build": ("export.build_tiny", "UHR-BAT-Tiny before it is trained, as a model folder"),
    "tiny vision": ("training.tiny.vision", "stage 1: the tower learns to read"),
    "tiny finetune": ("training.tiny.finetune", "stages 2 to 4: the decoder learns where to look and to answer"),
    "tiny zoom": ("training.tiny.zooming", "the last stage: the decoder learns to look closer, down to native pixels"),
    "tiny point": ("training.tiny.pointing", "a pointer: which visual tokens show what a question asks about"),
    "tiny focus": ("training.tiny.focusing", "LRS-VQA's system: its module learns where to look"),
    "tiny plain": ("training.tiny.plain", "a small model of another family, trained as such models are"),
    "tiny exchange": ("training.tiny.exchange", "another vision tower for a trained decoder"),
    "tiny dates": ("training.tiny.dates", "an adapter for two dates of a place"),
    "serve": ("serving.serve", "a server with OpenAI's API: many users, evidence in the answer"),
    "mcp": ("serving.mcp", "a server of tools for agents (MCP): open, ask, objects, look, where and plan"),
    "demo": ("serving.demo", "a page to open an image, ask and see what the answer was read from"),
    "batch": ("serving.batch", "ask a thousand images, on one machine or a cluster"),
    "bench": ("benchmarks.run", "speed and memory against the straightforward implementation"),
    "bench gpu": ("benchmarks.gpu", "the 7B geometry on a GPU"),
    "bench serve": ("benchmarks.serving", "many users at a time against a loop and against transformers serve"),
}

# These go with the next release.
OLD_NAMES = {
    "evidence-native": "evidence native",
    "recall": "evidence recall",
    "partitions": "evidence partitions",
    "ablations": "evidence ablations",
    "build-7b-config": "export 7b-config",
    "train-memory": "train memory",
    "train-engine": "train engine",
    "build-tiny": "tiny build",
    "train-vision": "tiny vision",
    "train-finetune": "tiny finetune",
    "train-zoom": "tiny zoom",
    "train-focus": "tiny focus",
    "train-exchange": "tiny exchange",
    "bench-gpu": "bench gpu",
    "bench-serve": "bench serve",
}


def acts(verb: str) -> dict[str, str]:
    """The second words of a verb, each with its line for --help."""
    return {name.split()[1]: text for name, (_, text) in VERBS.items() if name.startswith(f"{verb} ")}


def usage() -> str:
    verbs = {verb: text for verb, (_, text) in VERBS.items() if " " not in verb}
    lines = []
    for verb, text in verbs.items():
        lines.append(f"  {verb:<{max(map(len, verbs))}}  {text}")
        if acts(verb):
            lines[-1] += f"; {'also ' * bool(VERBS[verb][0])}{verb} {'|'.join(acts(verb))}"
    return "\n".join(["usage: uhr-bat VERB ...     (uhr-bat VERB --help: its options)", "", *lines])


def usage_of_acts(verb: str) -> str:
    known = acts(verb)
    lines = [f"  {verb} {act:<{max(map(len, known))}}  {text}" for act, text in known.items()]
    return "\n".join([f"usage: uhr-bat {verb} ACT ...     (uhr-bat {verb} ACT --help: its options)", "", *lines])


def refuse(usage: str, message: str) -> int:
    print(f"{usage}\n\nError: {message}.", file=sys.stderr)
    return 2


def main(arguments=None) -> int:
    """Run a verb; its exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [None]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb in OLD_NAMES:
        print(
            f"FutureWarning: `uhr-bat {verb}` is `uhr-bat {OLD_NAMES[verb]}` now. The old name goes with the next "
            "release.",
            file=sys.stderr,
        )
        verb, *act = OLD_NAMES[verb].split()
        rest = act + rest
    if verb not in VERBS or " " in verb:
        return refuse(usage(), "a verb is missing" if verb is None else f"there is no verb {verb!r}")
    if known := acts(verb):
        first = rest[0] if rest else None
        if first in known:
            verb, rest = f"{verb} {first}", rest[1:]
        elif first in ("-h", "--help"):
            print(usage_of_acts(verb), end="\n\n")
            if VERBS[verb][0] is None:
                return 0
        # Anything else is an argument of the verb itself, if that does something and it is no word.
        elif VERBS[verb][0] is None and (first is None or first.startswith("-")):
            return refuse(usage_of_acts(verb), f"which act of {verb}? It has {', '.join(known)}")
        elif first and (VERBS[verb][0] is None or re.fullmatch(r"\w[\w-]*", first)):
            return refuse(usage_of_acts(verb), f"{verb} has no {first!r}. It has {', '.join(known)}")
    try:
        return import_module(f".{VERBS[verb][0]}", __package__).main(rest) or 0
    except KeyboardInterrupt:
        return 130
