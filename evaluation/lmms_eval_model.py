"""UHR-BAT in lmms-eval, whose tasks run on it as they are. Installed, it is found by its entry point:

    python -m lmms_eval --model uhr_bat --model_args pretrained=DIR,budgets=16:24:40:66,selector=distinct \\
        --tasks xlrs-lite --batch_size 8

`max_tiles=128,native=True` encodes an image where the question looks, down to its own pixels. `budgets`: one number for
all scales, or one a scale with colons between them (commas separate arguments there).
"""

import hashlib

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..budgets_uhr_bat import split_budgets
from ..common.asking import answers, compress, encode, write_prompts
from ..common.budgets import budgets as read_budgets
from ..common.loading import ROOT, load_model
from .reducers import find_selector
from .running import looking_closer

ARGUMENTS = ("pretrained", "budgets", "selector", "max_tiles", "native", "batch_size", "device", "dtype")


class Loss(tuple, GenerationResult):
    """(mean loss, whether each token is the likeliest), as lmms-eval's interface says.

    Its evaluator (0.7.3) makes a string of every pair that is no text with its counts; its own class of results it
    leaves as it is.
    """

    token_counts = None

    def __new__(cls, loss, likeliest):
        return super().__new__(cls, (loss, likeliest))

    def __init__(self, loss, likeliest):
        self.text = (loss, likeliest)


class UHRBat(lmms):
    """A model folder as lmms-eval asks it.

    Args:
        pretrained: model folder, or name on the Hub; UHR-BAT-Tiny where none is given.
        budgets: visual tokens, see above; those of the folder where none are given.
        selector: name of the rule that chooses them; the folder's where none is given.
        max_tiles, native: tiles that may be encoded for a question, and whether levels go down to the image's own
            pixels.
        batch_size: prompts that are answered together.
        device: "cpu", "cuda:0", ...; that of the process where none is given.
        dtype: of the weights, "auto" for that of the folder.
    """

    def __init__(
        self, pretrained=None, budgets=None, selector=None, max_tiles=None, native=False, batch_size=1, device=None,
        dtype="auto", **unknown,
    ):  # fmt: skip
        super().__init__()
        unknown = {name: value for name, value in unknown.items() if name != "max_batch_size"}
        if unknown:
            raise ValueError(f"uhr_bat has no model argument {', '.join(unknown)}. It has: {', '.join(ARGUMENTS)}.")
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        where = str(self.accelerator.device) if device is None or self._world_size > 1 else device
        self.processor, self.model = load_model(pretrained or ROOT, dtype, {"": where})
        self.model.eval()
        budgets = None if budgets is None else read_budgets(str(budgets), ":")
        self.tiles, self.budgets = looking_closer(budgets, self.processor.default_budgets, max_tiles, native)
        self.rules = None if selector is None else {"selector": find_selector(selector, self.budgets)}
        split_budgets(
            self.processor.default_budgets if self.budgets is None else self.budgets, self.model.config.scales
        )
        self.batch_size = int(batch_size)
        self.encoded = {}

    @property
    def device(self):
        return self.model.device

    # ---- Images ------------------------------------------------------------------------------------------------------

    def features_of(self, batch) -> list[list]:
        """Encoded images of every (doc_to_visual, doc_id, task, split); those of the batch before are kept."""
        keys = []
        images = {}
        for doc_to_visual, doc_id, task, split in batch:
            visuals = [] if doc_to_visual is None else doc_to_visual(self.task_dict[task][split][doc_id]) or []
            keys.append([key_of(visual) for visual in visuals])
            images |= dict(zip(keys[-1], visuals))
        self.encoded = {key: features for key, features in self.encoded.items() if key in images}
        for key, image in images.items():
            if key not in self.encoded:
                cut = self.processor.image_processor(image, return_tensors="pt", **self.tiles)
                (self.encoded[key],) = encode(self.model, cut)
        return [[self.encoded[key] for key in of_one] for of_one in keys]

    # ---- What lmms-eval asks -----------------------------------------------------------------------------------------

    def generate_until(self, requests) -> list[str]:
        """The answers, cut at the first of the task's stop texts; requests with equal settings are batched."""
        found = [None] * len(requests)
        for numbers in self.batches(requests, lambda arguments: sorted(arguments[1].items(), key=str)):
            contexts, settings, *where = zip(*(requests[number].args for number in numbers))
            options = generation_options(settings[0])
            stops = options.pop("until")
            said = answers(
                self.model, self.processor, contexts, self.features_of(zip(*where)), budgets=self.budgets,
                rules=self.rules, max_tiles=self.tiles.get("max_tiles"), **options,
            )  # fmt: skip
            for number, (text, _) in zip(numbers, said):
                for stop in stops:
                    text = text.split(stop)[0]
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args[:2], text)
        return found

    @torch.no_grad()
    def loglikelihood(self, requests) -> list[Loss]:
        """(mean negative log-likelihood of the continuation's tokens, whether each is the likeliest).

        The mean loss, not its negative: that is what lmms-eval's own models return, and its tasks of multiple choice
        take the smallest. Images are chosen from the context alone: the continuation has no part in it.
        """
        found = [None] * len(requests)
        for numbers in self.batches(requests, lambda arguments: ()):
            contexts, targets, *where = zip(*(requests[number].args for number in numbers))
            where = list(zip(*where))
            targets = [
                target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                for target, (_, doc_id, task, split) in zip(targets, where)
            ]
            for number, pair in zip(numbers, self.losses(contexts, targets, self.features_of(where))):
                found[number] = pair
        return found

    def losses(self, contexts, continuations, features) -> list[Loss]:
        options = {"budgets": self.budgets, "max_tiles": self.tiles.get("max_tiles")}
        prompt = write_prompts(self.model, self.processor, contexts, features, **options)
        compressed = compress(self.model, prompt, self.rules)
        tokenizer, device = self.processor.tokenizer, self.model.device
        endings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in map(str, continuations)]
        # Continuations are padded on the right; what stands behind one is not looked at by it.
        length = max(map(len, endings))
        ends = torch.tensor(
            [ids + [tokenizer.pad_token_id or 0] * (length - len(ids)) for ids in endings], device=device
        )
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in endings], device=device)
        inputs = {"input_ids": torch.cat((prompt["input_ids"], ends), 1)}
        inputs["attention_mask"] = torch.cat((prompt["attention_mask"], mask), 1)
        if compressed is not None:
            inputs |= self.model.visual_inputs(**inputs, compressed=compressed)
        answer_mask = torch.cat((torch.zeros_like(prompt["input_ids"]), mask), 1).bool()
        output = self.model(**inputs, answer_mask=answer_mask, logits_to_keep=length + 1)
        scores = output.logits[:, :-1].float().log_softmax(-1)
        chosen = scores.gather(-1, ends[..., None])[..., 0]
        likeliest = (scores.argmax(-1) == ends) | ~mask.bool()
        losses = -(chosen * mask).sum(1) / mask.sum(1)
        return [Loss(*pair) for pair in zip(losses.tolist(), likeliest.all(1).tolist())]

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("uhr_bat answers one question at a time: tasks of several rounds are not supported.")

    def batches(self, requests, settings):
        """Numbers of requests that go together: equal settings, in the order of the documents."""
        groups = {}
        for number, request in enumerate(requests):
            groups.setdefault(str(settings(request.args)), []).append(number)
        with tqdm(total=len(requests), desc="UHR-BAT", unit="request", disable=self._rank != 0) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    yield numbers[start : start + self.batch_size]
                    bar.update(len(numbers[start : start + self.batch_size]))


def key_of(image) -> str:
    return hashlib.sha1(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def generation_options(settings: dict) -> dict:
    """A task's generation settings as arguments of `generate`; `until` a list of texts."""
    until = settings.get("until") or []
    options = {
        "max_new_tokens": int(settings.get("max_new_tokens", 1024)),
        "num_beams": int(settings.get("num_beams") or 1),
        "until": [until] if isinstance(until, str) else list(until),
    }
    temperature = settings.get("temperature") or 0
    if temperature > 0 and settings.get("do_sample", True):
        options |= {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    return options
