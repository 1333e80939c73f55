"""UHR-BAT in VLMEvalKit: list it among the models of its vlmeval/config.py,

    from functools import partial
    from uhr_bat.evaluation.vlmevalkit_model import UHRBat
    supported_VLM["UHR-BAT"] = partial(UHRBat, model_path=DIR, budgets=[16, 24, 40, 66])
    supported_VLM["UHR-BAT-native"] = partial(UHRBat, model_path=DIR, budgets=146, max_tiles=128, native=True)

and run it as any other: python run.py --model UHR-BAT --data XLRS-Bench-lite.
"""

import torch
from vlmeval.vlm.base import BaseModel

from ..budgets_uhr_bat import split_budgets
from ..common.asking import answers, encode
from ..common.loading import ROOT, load_model
from .reducers import find_selector
from .running import looking_closer


class UHRBat(BaseModel):
    """A model folder as VLMEvalKit asks it: its own prompts, images and text in any order.

    Args:
        model_path: model folder, or name on the Hub; UHR-BAT-Tiny where none is given.
        budgets: int[S] or one number, visual tokens; those of the folder where none are given.
        selector: name of the rule that chooses them; the folder's where none is given.
        max_tiles, native: tiles that may be encoded for a question, and whether levels go down to the image's own
            pixels.
        generation: arguments of `generate`, as `max_new_tokens`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path=None, budgets=None, selector=None, max_tiles=None, native=False, **generation):
        self.processor, self.model = load_model(model_path or ROOT)
        self.model.eval()
        self.tiles, self.budgets = looking_closer(budgets, self.processor.default_budgets, max_tiles, native)
        self.rules = None if selector is None else {"selector": find_selector(selector, self.budgets)}
        split_budgets(
            self.processor.default_budgets if self.budgets is None else self.budgets, self.model.config.scales
        )
        self.generation = {"max_new_tokens": 512} | generation
        self.encoded = None, []

    def generate_inner(self, message, dataset=None) -> str:
        """The answer to a message, a list of {"type": "image" or "text", "value": path or text}."""
        placeholder = self.processor.image_token
        parts = [placeholder if part["type"] == "image" else part["value"].replace(placeholder, "") for part in message]
        paths = [part["value"] for part in message if part["type"] == "image"]
        features = self.features_of(paths)
        ((text, _),) = answers(
            self.model, self.processor, ["\n".join(parts)], [features], budgets=self.budgets,
            rules=self.rules, max_tiles=self.tiles.get("max_tiles"), **self.generation,
        )  # fmt: skip
        return text

    @torch.no_grad()
    def features_of(self, paths) -> list:
        """Encoded images; those of the message before are kept, as the next question often is about them."""
        if self.encoded[0] != paths:
            cut = self.processor.image_processor(paths, return_tensors="pt", **self.tiles) if paths else None
            self.encoded = paths, encode(self.model, cut) if paths else []
        return self.encoded[1]
