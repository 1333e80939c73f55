"""The self-test of a model of another family: a change of the library becomes an error instead of a wrong answer."""

import torch

from ..hosts.looks import look
from ..hosts.settings import FAMILIES
from ..modeling_outputs_uhr_bat import Places


@torch.no_grad()
def self_test(processor, model):
    """Two tiles and one prompt: the order of rows, everything kept against the host's plain call, and a look against eager
    attention. Raises `ValueError` with what differs, and by how much."""
    p, side, prompts = model.patches_per_side, model.tile_size, processor.prompts
    tiles = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0)).float()
    rows = model.project_tiles(tiles)
    _compare(model, "a tile that is encoded with another", rows[1], model.project_tiles(tiles[1:])[0])
    if model.family_name not in FAMILIES:
        _check_order(model, tiles[0], rows[0])

    text = prompts.before + processor.image_token + prompts.after + "What is this?"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0].to(model.device)
    spots = model.find_placeholders(ids).nonzero()[:, 0].tolist()
    if len(spots) != 1:
        raise ValueError(f"The self-test found {len(spots)} image tokens in the prompt {text!r}, which has one.")
    whole_ids, start, _, inputs = model.prompt_with(ids, spots, rows[0], [Places(torch.arange(p * p), (p, p), 0)])
    kept, attention = model.host(**inputs).logits[0, -1], model.attention_of(model.config.importance_layer)

    # The plain call, with what stands behind a tile in some families out of sight.
    whole = model.reader.encode(model.host, tiles[:1].to(model.device))[1].shape[1]
    plain_ids = torch.cat((ids[:start], ids.new_full((whole,), model.image_token_id), ids[start + 1 :]))[None]
    mask = torch.ones_like(plain_ids)
    mask[:, start + p * p : start + whole] = 0
    plain = model.reader.inputs(tiles[:1], model.device)
    plain |= {name: model.find_placeholders(plain_ids).long() for name in model.type_names}
    plain |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if whole > p * p else {}
    plain = {name: value for name, value in plain.items() if name in model.taken}
    plain = model.host(input_ids=plain_ids, attention_mask=mask, **plain).logits[0, -1]
    _compare(model, "an image of one tile that is kept whole", kept, plain)

    base, decoder, begin = model.host.base_model, model.host.get_decoder(), start + p * p
    if model.settings.relative_attention:
        processor.empty_prompt()
    own, (seen,) = decoder.config._attn_implementation, look(base, [attention], [(begin, len(whole_ids))], **inputs)
    decoder.set_attn_implementation("eager")
    try:
        found = base(**inputs, use_cache=False, output_attentions=True).attentions
        found = dict(zip(model.attention if len(found) == len(model.attention) else range(len(found)), found))
        found = found[model.config.importance_layer][0, :, begin:].float().mean((0, 1))
        _compare(model, "a look", seen[0].mean(0), found)
    finally:
        decoder.set_attn_implementation(own)


def _check_order(model, tile, rows):
    """Raises `ValueError` where a tile's rows are not its cells, line by line, of a tower whose rows show most of what lies in
    them, as a trained one's do."""
    p, side = model.patches_per_side, model.tile_size
    # Odd lines of cells, or those of one half, in negative: it is their rows that change most, in each layer's columns.
    cells = torch.arange(side) * p // side
    lines = torch.stack((cells % 2 == 1, cells % 2 == 0, 2 * cells >= p, 2 * cells < p))
    negative = torch.cat((lines[:, None].expand(4, side, side), lines[:, :, None].expand(4, side, side)))
    drawn = torch.where(negative[:, None], 255 - tile, tile)
    changed = model._project_in_chunks(drawn, torch.arange(8), desc="Self-test") - rows
    changed = changed.float().unflatten(2, (model.reader.num_layers, -1)).norm(dim=-1).cpu()
    fits = (changed[::2] > changed[1::2]) == negative[::2, :: side // p, :: side // p].reshape(4, p * p, 1)
    if fits.float().mean(1).min() < 0.75:
        raise ValueError(f"The self-test of {model.family_name} failed: a tile's rows are not its cells, line by line.")


def _compare(model, what, got, expected):
    allowed = expected.float().abs().max().item() * torch.finfo(model.dtype).eps ** 0.5
    difference = (got.float() - expected.float()).abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"The self-test of {model.family_name} failed: {what} differs from the library's own by {difference:.1e}, where "
            f"{allowed:.1e} is rounding. This transformers is not fit for it; `check=False` loads it all the same."
        )
