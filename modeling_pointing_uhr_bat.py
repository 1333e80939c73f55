# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT pointing: which of the visual tokens show the objects that a question asks about, and an answer that says so.

A token is pointed to with the probability

    p_i = object_i * there_i * meant_i * asked

that an object's middle lies in it, that it lies at a place that the question names (one, or two that it compares), that the
object is what the question names, if it names one, and that the question asks for objects at all. Each factor has a loss of its
own in training. Two places are told apart, so their objects are counted apart. What is found changes the state behind which
the first token of the answer is read, and nothing else: a number is said if it is what was counted.

Letters: V visual tokens, M text tokens, B prompts, D decoder width, H hidden width, K width of what is compared.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_outputs_uhr_bat import UHRBatCompressionOutput

MAP_SIDE = 48  # cells of the map on which places are found, over the square that the model sees
BLURS = (1.0, 2.5)  # cells, standard deviations with which the map is smoothed
MOST_POINTED = 1000  # tokens that are compared with each other
MOST_COUNTED = 9  # what is more is said by the decoder alone
LEAST_HEARD = 0.05  # probability of a token that says which of two places has more, where equally many are counted
LEAST_TRUST = 0.02
FACT_WEIGHT = 8.0  # of a number beside hundreds of entries of states, each about 1
TOLD_FACTS = 3 * (MOST_COUNTED + 1) + 3 + 6  # numbers of all and of either place, which is more, how sure that is


class Seen(NamedTuple):
    """What a pointer reads of visual tokens.

    Attributes:
        tokens: float[.., V, D], without the embedding of where they lie.
        centres: float[.., V, 2], (row, column) in the square that the model sees, 0 to 1.
        sides: float[.., V], sides of what they show, as parts of that of the square.
    """

    tokens: torch.Tensor
    centres: torch.Tensor
    sides: torch.Tensor


class Pointing(NamedTuple):
    """Logits of what a token is pointed to for, see the module; `scores` float[B, V] is their product as a probability.

    Attributes:
        object, meant: float[B, V].
        there: float[B, 2, V], of either place.
        fits: float[B, 2, V], of either place by what a token shows alone.
        second, asked: float[B], whether there is a second place, and whether objects are asked for.
        places: float[B, 2, 2 * D], the words for either place.
    """

    object: torch.Tensor
    meant: torch.Tensor
    there: torch.Tensor
    fits: torch.Tensor
    second: torch.Tensor
    asked: torch.Tensor
    places: torch.Tensor

    @property
    def of_places(self) -> torch.Tensor:
        """float[B, 2, V]: probability that a token is pointed to for either place."""
        other = torch.stack((torch.ones_like(self.second), self.second.sigmoid()), dim=1)[..., None]
        rest = self.object.sigmoid() * self.meant.sigmoid() * self.asked.sigmoid()[:, None]
        return rest[:, None] * self.there.sigmoid() * other

    @property
    def scores(self) -> torch.Tensor:
        return self.of_places.amax(1)


class Counted(NamedTuple):
    """What is counted of what B prompts point to.

    Attributes:
        tokens: long[n] of each prompt, one for each object.
        numbers: long[B, 3], of all, and of those that are surer of the first place and of the second one.
        order: long[B], 1 where the first place has more, -1 where the second one has, 0 where nothing says so.
    """

    tokens: list[torch.Tensor]
    numbers: torch.Tensor
    order: torch.Tensor


class UHRBatPointer(nn.Module):
    """Trained on frozen visual tokens and states of the decoder; no other part of a model depends on it."""

    def __init__(self, config):
        super().__init__()
        D, self.settings = config.text_config.hidden_size, config.pointing
        H, K = self.settings.hidden, self.settings.width
        self.see_1, self.see_2 = nn.Linear(D, H), nn.Linear(H, H)
        self.show, self.trust = nn.Linear(H, 1), nn.Linear(H, 1)
        self.ground, self.kind = nn.Linear(H, K), nn.Linear(H, K)
        self.listen = nn.Linear(2 * D, 3)  # to the words for the first place, the second one, and what is meant
        self.place, self.second = nn.Linear(2 * D, K), nn.Linear(3 * D, 1)
        self.mean, self.ask = nn.Linear(2 * D, K + 1), nn.Linear(D, 1)
        self.near_1 = nn.Linear(2 + 2 * len(BLURS), K)
        self.near_2 = nn.Linear(K, 1)
        # What was counted, where there is more, and anything else, each by how much the question asks for it: it hears nothing
        # else of the question, or it learns answers by heart.
        self.tell_number = nn.Linear(MOST_COUNTED + 1, D, bias=False)
        self.tell_name, self.tell_which = nn.Linear(2 * D, 1), nn.Linear(D, 3)
        self.tell_loud = nn.Linear(1, 1, bias=False)
        self.tell_1, self.tell_2 = nn.Linear(TOLD_FACTS, H), nn.Linear(H, D)

    def see(self, tokens) -> torch.Tensor:
        """float[.., V, D] -> float[.., V, H], which no question has a part in."""
        return F.gelu(self.see_2(F.gelu(self.see_1(tokens))))

    def forward(self, seen: Seen, visible, states, words, heard) -> tuple[Pointing, Counted, torch.Tensor]:
        """What is pointed to, what is counted of it, and what is told. The arguments are those of `point`."""
        found = self.point(self.see(seen.tokens), seen.centres, visible, states, words, heard)
        counted, names = self.count(found, seen, visible), self.names(states, words, heard) @ words
        return found, counted, self.tell(found, counted, names, visible, states[:, -1])

    def point(self, seen, centres, visible, states, words, heard) -> Pointing:
        """
        Args:
            seen: float[B, V, H] or [1, V, H] of `see`.
            centres: float[B, V, 2], as in [`Seen`].
            visible: bool[B, V], False where a row is padded.
            states: float[B, M, D], the decoder's last states of the text behind the images; the last one is that before the answer.
            words: float[B, M, D], the embeddings of that text.
            heard: bool[B, M], False where it is padded, on the left.
        """
        B = len(centres)
        text = torch.cat((states, words), dim=-1)
        weights = self.listen(text).masked_fill(~heard[..., None], -torch.inf).softmax(1)
        places, meant = (weights.transpose(1, 2) @ text).split((2, 1), dim=1)
        last = states[:, -1]
        second = self.second(torch.cat((places[:, 1], last), dim=-1))[:, 0]
        wanted, threshold = self.mean(meant[:, 0]).split((self.settings.width, 1), dim=-1)
        shown = self.kind(seen).expand(B, -1, -1)
        match = (shown @ wanted[..., None])[..., 0] + threshold
        ground, trust = self.ground(seen), F.softplus(self.trust(seen))[..., 0] * visible
        fits = self.place(places) @ ground.transpose(1, 2) / self.settings.width**0.5  # [B, 2, V]
        there = self._there(fits, trust, centres)
        objects = self.show(seen)[..., 0].expand(B, -1)
        return Pointing(objects, match, there, fits, second, self.ask(last)[:, 0], places)

    def _there(self, fits, trust, centres):
        """float[B, 2, V] logits: whether tokens lie at places, by what they and the tokens around them show."""
        B = len(fits)
        cells = (centres * MAP_SIDE).long().clamp(0, MAP_SIDE - 1)
        cells = cells[..., 0] * MAP_SIDE + cells[..., 1]
        trust = trust.expand(B, -1)
        layers = torch.stack((trust * fits[:, 0], trust * fits[:, 1], trust), dim=1)  # [B, 3, V]
        on_map = layers.new_zeros(B, 3, MAP_SIDE**2).scatter_add(2, cells[:, None].expand(-1, 3, -1), layers)
        on_map, steps = on_map.unflatten(2, (MAP_SIDE, MAP_SIDE)), torch.arange(MAP_SIDE, device=fits.device)
        found = [fits, (trust[:, None] * fits)]
        for blur in BLURS:
            kernel = (-((steps[:, None] - steps) ** 2) / (2 * blur**2)).exp().to(on_map)
            smooth = (kernel @ on_map @ kernel).flatten(2).gather(2, cells[:, None].expand(-1, 3, -1))
            weight = smooth[:, 2:] + LEAST_TRUST
            found += [smooth[:, :2] / weight, weight.log().expand(-1, 2, -1)]
        return self.near_2(F.gelu(self.near_1(torch.stack(found, dim=-1))))[..., 0]

    def count(self, pointing, seen: Seen, visible) -> Counted:
        """The tokens that count, of prompts whose tokens are `visible`, bool[B, V]."""
        scores, of_places = pointing.scores.detach() * visible, pointing.of_places.detach() * visible[:, None]
        tokens, numbers, orders = [], [], []
        for row in range(len(scores)):
            own = Seen(None, *(one[row if len(one) > 1 else 0] for one in seen[1:]))
            chosen = count_points(scores[row], own, self.settings.threshold)
            either = of_either(of_places[row, :, chosen])
            tokens.append(chosen)
            numbers.append([len(chosen), *map(len, either)])
            if len(either[0]) == len(either[1]):  # the surer ones, then
                either = of_either(of_places[row, :, count_points(scores[row], own, LEAST_HEARD)])
                more = float(either[0].sum() - either[1].sum())
            else:
                more = len(either[0]) - len(either[1])
            orders.append((more > 0) - (more < 0))
        return Counted(tokens, *(torch.tensor(one, device=scores.device) for one in (numbers, orders)))

    def names(self, states, words, heard) -> torch.Tensor:
        """float[B, 2, M]: how much every word of the question is that by which an answer names either place; the arguments are those
        of `point`."""
        logits = self.tell_name(torch.cat((states, words), dim=-1))[..., 0]
        weights = logits.masked_fill(~heard, -torch.inf).softmax(1)
        first = weights.cumsum(1) - weights / 2 < 0.5  # the place that is named first
        return 2 * torch.stack((weights * first, weights * ~first), dim=1)

    def tell(self, pointing, counted: Counted, names, visible, last) -> torch.Tensor:
        """float[B, D], to be added to the states `last` float[B, D] behind which the answer begins, with the `names` float[B, 2, D] of
        either place. Nothing that points is trained by it."""
        scores, of_places = pointing.scores.detach() * visible, pointing.of_places.detach() * visible[:, None]
        there = pointing.there.detach().sigmoid() * visible[:, None]
        second, asked = pointing.second.detach().sigmoid(), pointing.asked.detach().sigmoid()
        numbers = F.one_hot(counted.numbers.clamp_max(MOST_COUNTED), MOST_COUNTED + 1).to(last)
        facts = F.one_hot(counted.order + 1, 3).to(last)
        sure = torch.stack((scores.amax(1), *there.amax(2).unbind(1), second, asked, of_places.amax(2)[:, 0]), dim=1)
        known = torch.cat((FACT_WEIGHT * numbers.flatten(1), FACT_WEIGHT * facts, sure.to(last)), dim=1)
        number, place, other = self.tell_which(last.detach()).sigmoid().split(1, dim=1)
        told = number * self.tell_number(numbers[:, 0]) + other * self.tell_2(F.gelu(self.tell_1(known)))
        more = self.tell_loud(counted.order[:, None].to(last)) * (names[:, 0] - names[:, 1])
        return told + place * more


def of_either(of_places) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities float[2, n] of tokens for either place, each token's for the place that it is surer of."""
    first = of_places[0] >= of_places[1]
    return of_places[0, first], of_places[1, ~first]


def count_points(scores, seen: Seen, threshold: float) -> torch.Tensor:
    """long[n]: tokens that are pointed to, one for each object. Of tokens that touch or overlap one counts: that which shows
    least ground, and of such the surest.

    Args:
        scores: float[V], probabilities.
        seen: where they lie.
        threshold: least probability.
    """
    chosen = (scores >= threshold).nonzero()[:, 0]
    if not len(chosen):
        return chosen
    order = chosen[scores[chosen].argsort(descending=True, stable=True)][:MOST_POINTED]
    order = order[seen.sides[order].argsort(stable=True)]
    centres, sides = seen.centres[order].cpu().double(), seen.sides[order].cpu().double()
    apart = (centres[:, None] - centres).abs().amax(-1)
    touch = (apart <= 1.001 * (sides[:, None] + sides) / 2).tolist()
    kept = []
    for idx, touches in enumerate(touch):
        if not any(touches[other] for other in kept):
            kept.append(idx)
    return order[torch.tensor(kept, device=order.device)]


class UHRBatPointingMixin:
    """For UHR-BAT's own towers, with a `pointer`."""

    def seen_tokens(self, compressed: UHRBatCompressionOutput, image_idx: int) -> Seen:
        """What a pointer reads of the visual tokens of an image, in the order of `pooler_output`."""
        tokens, maps, scales = compressed.tokens[image_idx], compressed.slots[image_idx], compressed.scales[image_idx]
        found = []
        for rows, slots, positions, grid, scale in zip(tokens, maps.values, maps.positions, maps.grids, scales):
            kept = slots >= 0
            slots, positions = slots[kept], positions[kept]
            where = self.config.scale_embedding_additions * self.scale_embedding(scale, positions)
            axes = torch.stack((positions // grid[1], positions % grid[1]), dim=1) + 0.5
            # Of a merged token both are means.
            count = slots.bincount(minlength=len(rows))[:, None].to(where)
            mean = [torch.zeros(len(rows), one.shape[1], device=one.device).index_add(0, slots, one.float()) / count
                    for one in (where, axes / torch.tensor(grid, device=axes.device))]  # fmt: skip
            found.append((rows - mean[0].to(rows), mean[1], torch.full_like(mean[1][:, 0], 1 / grid[0])))
        return Seen(*map(torch.cat, zip(*found)))

    @torch.compiler.disable
    def point_and_tell(self, compressed, placeholder, attention_mask, answer_mask, words, states) -> torch.Tensor:
        """States float[B, M, D] of prompts, changed where the answer begins by what is pointed to; `compressed.pointed` is
        set. Prompts of one image that a question chose tokens of are looked at, others stay as they are.

        Args:
            compressed: what `compress` returned.
            placeholder: bool[B, M], where visual tokens stand.
            attention_mask: int[B, M] or None.
            answer_mask: bool[B, M] or None; the question ends where the first answer behind the image begins.
            words: float[B, M, D], the embeddings of the prompts.
            states: float[B, M, D], the decoder's last ones.
        """
        M = placeholder.shape[1]
        visible = visible_of(attention_mask, placeholder)
        place = torch.arange(M, device=visible.device)
        ends = visible & (visible.flip(1).cumsum(1).flip(1) == 1)
        compressed.pointed, image_idx = [None] * len(compressed.pooler_output), 0
        rows, lasts, changes = [], [], []
        dtype = self.pointer.see_1.weight.dtype  # float32, where the rest is float16 or quantised
        for row, num_images in enumerate(compressed.images_per_prompt):
            first_idx, image_idx = image_idx, image_idx + num_images
            spots = placeholder[row].nonzero()[:, 0]
            if num_images != 1 or not len(spots):
                continue
            start = int(spots[-1]) + 1
            end = int(ends[row].nonzero()[0, 0]) + 1
            if answer_mask is not None:
                answered = (answer_mask[row].to(place.device) & (place >= start)).nonzero()[:, 0]
                end = int(answered[0]) if len(answered) else end
            if start >= end:
                continue
            own = states[row : row + 1, start:end].to(dtype)
            seen = self.seen_tokens(compressed, first_idx)
            seen = Seen(seen.tokens.to(own)[None], seen.centres[None], seen.sides[None])
            known = torch.ones(1, len(compressed.pooler_output[first_idx]), dtype=torch.bool, device=own.device)
            heard = torch.ones_like(own[..., 0], dtype=torch.bool)
            said = words[row : row + 1, start:end].to(own)
            pointing, counted, told = self.pointer(seen, known, own, said, heard)
            scores = pointing.scores[0].detach().float()
            chosen = counted.tokens[0]
            compressed.pointed[first_idx] = torch.zeros_like(scores).index_copy(0, chosen, scores[chosen])
            rows.append(row)
            lasts.append(end - 1)
            changes.append(told[0])
        if not rows:
            return states
        where = torch.tensor(rows, device=states.device), torch.tensor(lasts, device=states.device)
        return states.index_put(where, torch.stack(changes).to(states), accumulate=True)


def _apart(position: int, point, width: int) -> float:
    """Squared distance of a token from a point (row, column) of its grid."""
    return (position // width - point[0]) ** 2 + (position % width - point[1]) ** 2


def visible_of(attention_mask, placeholder) -> torch.Tensor:
    """bool[B, M]: where a prompt is not padded, by any mask that the decoder takes: int[B, .., M], the library's masks float or
    bool[B, 1, M, ..] of queries and keys, one or a dictionary of them, or None. Masks of other kinds say that nothing is padded."""
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    B, M = placeholder.shape
    if not isinstance(attention_mask, torch.Tensor):
        return torch.ones_like(placeholder)
    if attention_mask.ndim == 2:
        return attention_mask[:, -M:].bool()
    last = attention_mask[:, 0, -1, :M]  # what the last token sees
    return (last if last.dtype == torch.bool else last == 0).expand(B, M)


def is_pointed_at(compressed) -> bool:
    """Whether a pointer reads what `compress` returned: tokens with their places, of no dynamic pyramid and no two dates."""
    known = compressed is not None and compressed.tokens is not None and compressed.scales is not None
    return known and compressed.regions is not None and compressed.differences is None


def pointed_tokens(compressed, image_idx: int) -> list[tuple[int, int, float]] | None:
    """(level, position on its grid, probability) of every token that is pointed to of an image, the finest level last; None where
    no pointer looked at it."""
    scores = None if compressed.pointed is None else compressed.pointed[image_idx]
    if scores is None:
        return None
    maps, found, start = compressed.slots[image_idx], [], 0
    scores = scores.tolist()
    for level, (slots, positions) in enumerate(zip(maps.values, maps.positions)):
        kept = slots >= 0
        slots, positions = slots[kept].tolist(), positions[kept].tolist()
        by_slot = dict(zip(slots, positions))
        if len(by_slot) < len(slots):  # of a merged token that which lies nearest to where it was counted
            means, width = compressed.places(image_idx)[level].points.tolist(), maps.grids[level][1]
            by_slot = {}
            for slot, position in zip(slots, positions):
                here = min((by_slot.get(slot, position), position), key=lambda one: _apart(one, means[slot], width))
                by_slot[slot] = here
        found += [
            (level, position, scores[start + slot])
            for slot, position in sorted(by_slot.items())
            if scores[start + slot] > 0
        ]
        start += len(by_slot)
    return found
