import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder
from small import BUDGETS, GRIDS, IMAGE, SIZES, count_tiles, pad_left, prompt, random_pixels, small_config, small_model
from uhr_bat import token_rules_uhr_bat
from uhr_bat.modeling_encoding_uhr_bat import first_identical_tile
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.token_compression_uhr_bat import align_importance, merge_tokens, select_tokens

QUESTION = prompt(5, "image", 6, 7, 8)
OTHER_QUESTION = prompt(5, "image", 30, 31, 32, 33)


def half_shown():
    """int[1, N]: the image fills the upper half of every scale."""
    return torch.cat([(torch.arange(h * w) < h * w // 2).long() for h, w in GRIDS])[None]


# ---- Geometry ----


def test_first_identical_tile_joins_tiles_of_one_colour_only():
    tiles = torch.randn(5, 3, 8, 8)
    tiles[[1, 3]] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    tiles[4] = tiles[0]
    tiles[2] = torch.tensor([0.1, 0.2, 0.4])[:, None, None]
    assert first_identical_tile(tiles).tolist() == [0, 1, 2, 1, 4]


@pytest.mark.parametrize("form", ["factorized", "per_scale"])
def test_scale_embedding_is_the_interpolated_table(form):
    model = small_model(scale_embedding_form=form, scale_embedding_grid=3).model
    embedding = model.scale_embedding
    for scale_idx, (height, width) in enumerate(GRIDS):
        if form == "factorized":
            table, vector, size = embedding.table, embedding.scale_vectors[scale_idx], (height, width)
        else:
            table, vector, size = embedding.tables[str(embedding.scales[scale_idx])], 0, (2, 2)
        side = round(table.shape[1] ** 0.5)
        assert side == (3 if form == "factorized" else min(height, 3))
        whole = F.interpolate(table.view(1, side, side, -1).permute(0, 3, 1, 2), size=size, mode="bilinear")
        whole = whole.repeat(1, 1, height // size[0], width // size[1])[0].permute(1, 2, 0).flatten(0, 1) + vector
        torch.testing.assert_close(embedding(embedding.scales[scale_idx], torch.arange(height * width)), whole)


# ---- Encoding ----


def test_every_tile_goes_through_the_vision_tower_once():
    model = small_model()
    calls = count_tiles(model)
    with torch.no_grad():
        model(input_ids=QUESTION, pixel_values=random_pixels())
    assert sum(calls) == 14
    assert max(calls) <= model.vision_chunk_size


def test_tiles_that_show_only_the_letterbox_are_not_encoded():
    model = small_model()
    calls = count_tiles(model)
    model.encode_image(random_pixels(), half_shown())
    assert sum(calls) == 1 + 2 + 6  # the upper half of 1, 2 and 3 rows of tiles; the middle row is half shown


def test_plain_tiles_are_encoded_once_where_padding_counts():
    model = small_model(mask_padding=False)
    calls = count_tiles(model)
    pixel_values = random_pixels()
    pixel_values[:, 5:] = 0.25
    features = model.encode_image(pixel_values)[0]
    assert sum(calls) == 1 + 4 + 1
    assert len(features.tokens[2]) == 36


def test_the_chunk_size_does_not_change_the_tokens():
    pixel_values = random_pixels()
    one, many = (small_model(vision_chunk_size=size).encode_image(pixel_values)[0] for size in (1, 14))
    for left, right in zip(one.tokens, many.tokens):
        torch.testing.assert_close(left, right)


def test_tokens_stand_row_by_row_over_the_whole_scale():
    model = small_model()
    pixel_values = random_pixels()
    features = model.encode_image(pixel_values)[0]
    with torch.no_grad():
        states = model.model.vision_tower.vision_model(pixel_values[0, 5:], output_hidden_states=True).hidden_states[
            -2
        ][:, 1:]
        tokens = model.model.multi_modal_projector(states).view(3, 3, 2, 2, -1).transpose(1, 2).reshape(36, -1)
        tokens = tokens + model.model.scale_embedding(24, torch.arange(36))
    torch.testing.assert_close(features.tokens[2], tokens)
    assert torch.equal(features.positions[2], torch.arange(36))


@pytest.mark.parametrize("additions", [0, 1, 2])
def test_the_pass_reads_the_scale_embedding_once_however_often_the_tokens_have_it(additions):
    model = small_model(scale_embedding_additions=additions)
    features = model.encode_image(random_pixels())[0]
    embedding = model.model.scale_embedding(8, torch.arange(4))
    torch.testing.assert_close(features.anchor_tokens + (additions - 1) * embedding, features.tokens[0])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pixel_values", (1, 13, 3, 8, 8), "[images, 14, 3, 8, 8] for the scales [8, 16, 24]. Got [1, 13, 3, 8, 8]"),
        ("pixel_values", (14, 3, 8, 8), "[images, 14, 3, 8, 8] for the scales [8, 16, 24]. Got [14, 3, 8, 8]"),
        ("pixel_attention_mask", (1, 55), "must have the shape [1, 56]"),
        ("regions", (2, 56), "must have the shape [1, 56]"),
    ],
)
def test_encode_image_names_the_shape_it_needs_and_the_one_it_got(name, shape, message):
    inputs = {"pixel_values": random_pixels(), name: torch.ones(shape)}
    with pytest.raises(ValueError) as error:
        small_model().encode_image(**inputs)
    assert message in str(error.value)


def test_an_image_that_shows_nothing_is_an_error():
    with pytest.raises(ValueError, match="leaves no patch that shows the image"):
        small_model().encode_image(random_pixels(), torch.zeros(1, 56))


def test_a_scale_that_shows_nothing_is_left_out_and_the_coarsest_of_the_others_is_the_anchor():
    model = small_model()
    calls = count_tiles(model)
    mask = torch.ones(1, 56)
    mask[0, :4] = 0
    (features,) = model.encode_image(random_pixels(), mask)
    assert features.available == [0, 16, 36] and features.anchor_idx == 1
    assert sum(calls) == 13
    out = model.compress(input_ids=torch.tensor([[5, IMAGE, 6]]), image_features=[features])
    assert [len(tokens) for tokens in out.tokens[0]] == [0, 5, 7]
    assert (out.slots[0][0] == -1).all() and (out.importance[0][1] > 0).all()


def test_a_budget_of_0_leaves_a_scale_out():
    out = small_model().compress(
        input_ids=torch.tensor([[5, IMAGE, 6]]), pixel_values=random_pixels(), budgets=[2, 0, 7]
    )
    assert [len(tokens) for tokens in out.tokens[0]] == [2, 0, 7]
    assert (out.slots[0][1] == -1).all()


# ---- Importance ----


def eager_importance(model, input_ids, anchor_tokens, rows):
    """Eq. 2 from the library's own attention weights: mean over heads and over the last `rows` rows."""
    decoder = model.model.language_model
    where = (input_ids[0] == IMAGE).nonzero()[:, 0]
    embeds = model.get_input_embeddings()(input_ids[0])
    sequence = torch.cat((embeds[: where[0]], anchor_tokens, embeds[where[-1] + 1 :]))
    decoder.set_attn_implementation("eager")
    attention = decoder(inputs_embeds=sequence[None], output_attentions=True).attentions[model.config.importance_layer]
    decoder.set_attn_implementation("sdpa")
    return attention[0].mean(0)[-rows:].mean(0)[where[0] : where[0] + len(anchor_tokens)]


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize(("question_tokens", "rows"), [("all", 3), ("last", 1)])
def test_importance_is_the_attention_of_the_question_to_the_anchor(layer, question_tokens, rows):
    model = small_model(importance_layer=layer, question_tokens=question_tokens)
    anchor_tokens = model.encode_image(random_pixels())[0].anchor_tokens
    with torch.no_grad():
        importance = model.estimate_importance(QUESTION[0], anchor_tokens)
        torch.testing.assert_close(importance, eager_importance(model, QUESTION, anchor_tokens, rows))


def test_a_question_of_any_length_counts_whole():
    model = small_model()
    question = prompt(5, "image", *(6 + token % 40 for token in range(150)))
    anchor_tokens = model.encode_image(random_pixels())[0].anchor_tokens
    with torch.no_grad():
        importance = model.estimate_importance(question[0], anchor_tokens)
        torch.testing.assert_close(importance, eager_importance(model, question, anchor_tokens, rows=150))


def test_the_pass_stops_at_the_importance_layer():
    model = small_model(importance_layer=1)
    seen = []
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(lambda *args, index=index: seen.append(index))
    model.compress(input_ids=QUESTION, pixel_values=random_pixels())
    assert seen == [0, 1]


def test_the_pass_never_builds_a_matrix_of_all_tokens_by_all_tokens():
    model = small_model()
    anchor_tokens = torch.randn(4000, 24)
    with torch.no_grad(), Recorder() as recorder:
        model.estimate_importance(QUESTION[0], anchor_tokens)
    assert recorder.largest < 4 * 4000 * 4000 / 10


def test_importance_can_be_trained():
    model = small_model()
    anchor_tokens = model.encode_image(random_pixels())[0].anchor_tokens.detach()
    model.estimate_importance(QUESTION[0], anchor_tokens)[0].backward()
    layers = model.model.language_model.layers
    assert layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert layers[2].self_attn.q_proj.weight.grad is None


def test_a_prompt_without_an_image_has_no_importance():
    with pytest.raises(ValueError, match="holds no image token"):
        small_model().estimate_importance(torch.tensor([5, 6]), torch.randn(4, 24))


def test_a_batch_of_prompts_is_not_one_prompt():
    with pytest.raises(ValueError, match=r"must be one prompt, long\[M\]. Got the shape \[1, 18\]"):
        small_model().estimate_importance(QUESTION, torch.randn(4, 24))


# ---- Compression ----


# Coverage without regions is left out: it would need a token for every token.
@pytest.mark.parametrize(
    ("method", "coverage"),
    [("kmeans", False), ("kmeans", True), ("birch", False), ("birch", True), ("grid", True), ("none", False)],
)
@pytest.mark.parametrize("rows_shown", range(1, 7))
def test_exactly_the_budget_is_spent_on_every_image(method, rows_shown, coverage):
    model = small_model(region_method=method, coverage=coverage)
    mask = torch.cat([(torch.arange(h).repeat_interleave(w) * 6 < rows_shown * h).long() for h, w in GRIDS])[None]
    shown = [int(part.sum()) for part in mask[0].split(SIZES)]
    spent = [min(pair) for pair in zip(BUDGETS, shown)]
    out = model.compress(
        input_ids=prompt(5, "image", 6, 7, num_tokens=sum(spent)),
        pixel_values=random_pixels(),
        pixel_attention_mask=mask,
        budgets=torch.tensor([spent]),
    )
    assert [len(tokens) for tokens in out.tokens[0]] == spent
    assert len(out.pooler_output[0]) == sum(spent)
    for slots, part, budget in zip(out.slots[0], mask[0].split(SIZES), spent):
        assert slots[slots >= 0].unique().tolist() == list(range(budget))
        assert (slots[part == 0] == -1).all()  # the letterbox is never chosen


def test_the_outputs_are_the_steps_of_section_3():
    model = small_model()
    features = model.encode_image(random_pixels())
    out = model.compress(input_ids=QUESTION, image_features=features)
    anchor = model.estimate_importance(QUESTION[0], features[0].anchor_tokens)
    # Tile by tile and row by row are the same on an anchor of one tile.
    assert torch.equal(features[0].anchor_positions, torch.arange(4))
    for scale_idx, grid in enumerate(GRIDS):
        importance, regions = out.importance[0][scale_idx], out.regions[0][scale_idx]
        torch.testing.assert_close(importance, align_importance(anchor.view(2, 2), grid))
        slots = select_tokens(importance.flatten(), regions, BUDGETS[scale_idx])
        assert torch.equal(out.slots[0][scale_idx], slots)
        tokens = merge_tokens(features[0].tokens[scale_idx], slots, BUDGETS[scale_idx])
        torch.testing.assert_close(out.tokens[0][scale_idx], tokens)
    torch.testing.assert_close(torch.cat(out.tokens[0]), out.pooler_output[0])


def test_the_letterbox_has_no_say_in_the_importance_of_its_neighbours():
    model = small_model()
    features = model.encode_image(random_pixels(), half_shown())
    question = torch.tensor([[5, IMAGE, 6]])
    out = model.compress(input_ids=question, image_features=features, budgets=[1, 2, 3])
    anchor = model.estimate_importance(question[0], features[0].anchor_tokens)
    assert len(anchor) == 2
    # One row of the anchor is left, so the aligned map cannot change from row to row.
    torch.testing.assert_close(out.importance[0][1][:2], align_importance(anchor.view(1, 2), (2, 4)))
    assert (out.importance[0][1][2:] == 0).all() and (out.regions[0][1].view(4, 4)[2:] == -1).all()


def test_the_question_guides_the_selection():
    model = small_model()
    features = model.encode_image(random_pixels())
    first, second = (model.compress(input_ids=ids, image_features=features) for ids in (QUESTION, OTHER_QUESTION))
    assert not torch.equal(first.importance[0][0], second.importance[0][0])
    assert any(not torch.equal(a, b) for a, b in zip(first.slots[0], second.slots[0]))


def test_an_image_is_clustered_once_for_any_number_of_questions(monkeypatch):
    calls = []

    def cluster(*args, **kwargs):
        calls.append(len(args[0]))
        return cluster_regions(*args, **kwargs)

    cluster_regions = token_rules_uhr_bat.cluster_regions
    monkeypatch.setattr(token_rules_uhr_bat, "cluster_regions", cluster)
    model = small_model()
    features = model.encode_image(random_pixels())
    for ids in (QUESTION, OTHER_QUESTION, QUESTION):
        model.compress(input_ids=ids, image_features=features)
    assert calls == [4, 16, 36]


def test_asking_an_encoded_image_gives_the_same_as_asking_afresh():
    model = small_model()
    features = model.encode_image(random_pixels())
    for ids in (QUESTION, OTHER_QUESTION):
        afresh = model.compress(input_ids=ids, pixel_values=random_pixels())
        again = model.compress(input_ids=ids, image_features=features)
        assert torch.equal(afresh.pooler_output[0], again.pooler_output[0])


def test_an_encoded_image_goes_to_another_device_as_a_whole():
    model = small_model()
    labels = torch.randint(0, 3, (1, 56))
    (features,) = model.encode_image(random_pixels(), regions=labels)
    model.compress(input_ids=QUESTION, image_features=[features])
    moved = features.to("meta")
    tensors = [moved.anchor_tokens, moved.anchor_positions, *moved.tokens, *moved.positions, *moved.regions]
    assert all(tensor.is_meta for tensor in (*tensors, *moved.partitions.values())) and len(moved.partitions) == 3
    assert model.encode_image(random_pixels())[0].to("cpu").regions is None


def test_the_same_input_gives_the_same_tokens():
    runs = [small_model().compress(input_ids=QUESTION, pixel_values=random_pixels()) for _ in range(2)]
    assert torch.equal(runs[0].pooler_output[0], runs[1].pooler_output[0])


def test_label_maps_take_the_place_of_clustering():
    model = small_model()
    labels = torch.randint(0, 3, (1, 56), generator=torch.Generator().manual_seed(1))
    out = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), regions=labels)
    for regions, part in zip(out.regions[0], labels[0].split(SIZES)):
        for label in (1, 2):
            assert len(regions[part == label].unique()) == min(1, int((part == label).sum()))
        background = regions[part == 0]
        assert len(background.unique()) == len(background)


def test_grid_regions_are_known_before_the_image_is_encoded():
    model = small_model(region_method="grid", num_regions=4)
    ids = torch.tensor([[5, IMAGE, 7]])
    first, second = (model.compress(input_ids=ids, pixel_values=random_pixels(seed=seed)) for seed in (0, 1))
    for scale_idx, (height, width) in enumerate(GRIDS):
        expected = torch.arange(4).view(2, 2).repeat_interleave(height // 2, 0).repeat_interleave(width // 2, 1)
        for out in (first, second):
            assert torch.equal(out.regions[0][scale_idx], expected.flatten())


def test_padding_a_prompt_on_the_left_changes_nothing():
    model = small_model()
    features = model.encode_image(random_pixels(2))
    batch = pad_left(QUESTION, prompt(5, 9, 10, "image", 6, 7, 8, 9, 10))
    together = model.compress(**batch, image_features=features)
    for row, image in enumerate(features):
        real = batch["input_ids"][row][batch["attention_mask"][row] == 1][None]
        alone = model.compress(input_ids=real, image_features=[image])
        assert torch.equal(together.pooler_output[row], alone.pooler_output[0])
    assert together.images_per_prompt == [1, 1]


def test_each_image_of_a_prompt_is_weighed_without_the_others():
    model = small_model()
    features = model.encode_image(random_pixels(2))
    out = model.compress(input_ids=torch.tensor([[5, IMAGE, 6, IMAGE, 7, 8]]), image_features=features)
    assert [[len(tokens) for tokens in image] for image in out.tokens] == [[1, 3, 4], [1, 2, 3]]
    first = model.compress(
        input_ids=torch.tensor([[5, IMAGE, 6, 7, 8]]), image_features=features[:1], budgets=torch.tensor([[1, 3, 4]])
    )
    second = model.compress(
        input_ids=torch.tensor([[5, 6, IMAGE, 7, 8]]), image_features=features[1:], budgets=torch.tensor([[1, 2, 3]])
    )
    assert torch.equal(out.pooler_output[0], first.pooler_output[0])
    assert torch.equal(out.pooler_output[1], second.pooler_output[0])


def test_a_budget_per_call_replaces_that_of_the_configuration():
    model = small_model()
    out = model.compress(input_ids=torch.tensor([[5, IMAGE, 6]]), pixel_values=random_pixels(), budgets=[3, 6, 20])
    assert [len(tokens) for tokens in out.tokens[0]] == [3, 6, 20]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"budgets": torch.tensor([[2, 5, 37]])}, "The budget of scale 24 px is 37 tokens, but 36 tokens of it show"),
        (
            {"token_counts": torch.tensor([[-1, 5, 7]])},
            "The budget of scale 8 px is -1 tokens, but 4 tokens of it show",
        ),
        ({"token_counts": torch.tensor([[2, 5]])}, "`token_counts` must have the shape [1, 3]: images and scales. Got"),
        ({"budgets": [2, 5]}, "Got 2 budgets [2, 5] and 3 scales [8, 16, 24]"),
        (
            {"attention_mask": torch.ones(1, 1, 3, 3)},
            "`attention_mask` must be [batch, sequence] here. Got [1, 1, 3, 3]",
        ),
        ({"input_ids": torch.tensor([[5, IMAGE, IMAGE, 6]])}, "tokens: [2] per prompt, features: [14] per"),
    ],
)
def test_wrong_counts_are_errors_with_both_numbers(inputs, message):
    inputs = {"input_ids": torch.tensor([[5, IMAGE, 6]]), "pixel_values": random_pixels(), **inputs}
    with pytest.raises(ValueError) as error:
        small_model().compress(**inputs)
    assert message in str(error.value)


# ---- Training ----


def test_the_selection_never_sees_the_answer():
    model = small_model()
    features = model.encode_image(random_pixels())
    outs = []
    for answer in ((9, 10), (40, 41, 42)):
        ids = prompt(5, "image", 6, 7, *answer)
        labels = ids.clone()
        labels[:, : -len(answer)] = -100
        outs.append(model.compress(input_ids=ids, image_features=features, labels=labels))
    assert torch.equal(outs[0].pooler_output[0], outs[1].pooler_output[0])
    asked = model.compress(input_ids=prompt(5, "image", 6, 7), image_features=features)
    assert torch.equal(outs[0].pooler_output[0], asked.pooler_output[0])


def test_an_answer_before_the_image_is_context():
    model = small_model()
    features = model.encode_image(random_pixels())
    ids = prompt(5, 6, 20, 21, "image", 7, 8, 30)
    labels = torch.full_like(ids, -100)
    labels[0, 2:4], labels[0, -1] = ids[0, 2:4], 30
    out = model.compress(input_ids=ids, image_features=features, labels=labels)
    asked = model.compress(input_ids=prompt(5, 6, 20, 21, "image", 7, 8), image_features=features)
    assert torch.equal(out.pooler_output[0], asked.pooler_output[0])


def test_image_tokens_do_not_count_in_the_loss():
    model = small_model()
    ids = prompt(5, "image", 6, 7, 8)
    labels = ids.masked_fill(ids == IMAGE, -100)
    features = model.encode_image(random_pixels())
    with torch.no_grad():
        marked = model(input_ids=ids, image_features=features, labels=labels).loss
        unmarked = model(input_ids=ids, image_features=features, labels=ids.clone()).loss
    torch.testing.assert_close(marked, unmarked)


def test_gradients_reach_every_parameter_that_is_trained_with_and_without_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = prompt(5, "image", 6, 7, 8)
        labels = ids.clone()
        labels[:, :-2] = -100
        model(input_ids=ids, pixel_values=random_pixels(), labels=labels).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]["model.vision_tower.vision_model.embeddings.patch_embedding.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_tail_of_the_vision_tower_that_nothing_reads_is_frozen():
    frozen = [name for name, parameter in small_model().named_parameters() if not parameter.requires_grad]
    assert frozen and all("encoder.layers.2." in name or "post_layernorm" in name for name in frozen)


def test_embeddings_in_place_of_ids_give_the_same_scores():
    model = small_model()
    with torch.no_grad():
        from_ids = model(input_ids=QUESTION, pixel_values=random_pixels()).logits
        embeds = model.get_input_embeddings()(QUESTION)
        from_embeds = model(inputs_embeds=embeds, pixel_values=random_pixels()).logits
    assert torch.equal(from_ids, from_embeds)


def test_the_base_model_gives_the_hidden_states_that_the_head_scores():
    model = small_model()
    with torch.no_grad():
        base = model.model(input_ids=QUESTION, pixel_values=random_pixels())
        scored = model(input_ids=QUESTION, pixel_values=random_pixels(), logits_to_keep=2)
    torch.testing.assert_close(model.lm_head(base.last_hidden_state[:, -2:]), scored.logits)
    assert [tuple(tokens.shape) for tokens in base.image_hidden_states] == [(14, 24)]


def test_get_image_features_returns_every_token_uncompressed():
    model = small_model()
    out = model.get_image_features(random_pixels(2), output_hidden_states=True)
    assert [tuple(tokens.shape) for tokens in out.pooler_output] == [(56, 24), (56, 24)]
    assert out.last_hidden_state.shape == (2, 14, 5, 16)
    assert all(state.shape == (2, 14, 5, 16) for state in out.hidden_states)


@pytest.mark.slow
def test_torch_compile_gives_the_same_scores():
    model = small_model()
    with torch.no_grad():
        plain = model(input_ids=QUESTION, pixel_values=random_pixels()).logits
        compiled = torch.compile(model, backend="eager")(input_ids=QUESTION, pixel_values=random_pixels()).logits
    torch.testing.assert_close(plain, compiled)


@pytest.mark.slow
def test_the_step_with_visual_tokens_compiles_as_one_graph_and_can_be_exported():
    model = small_model()
    with torch.no_grad():
        visual = {"image": model.compress(input_ids=QUESTION, pixel_values=random_pixels())}
        plain = model(input_ids=QUESTION, mm_encoder_outputs=visual).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=QUESTION, mm_encoder_outputs=visual).logits, plain)
        inputs = {"input_ids": QUESTION, "mm_encoder_outputs": visual, "use_cache": False}
        exported = torch.export.export(model, (), inputs).module()
        torch.testing.assert_close(exported(**inputs).logits, plain)


def test_what_was_compressed_comes_back_with_the_scores():
    model = small_model()
    with torch.no_grad():
        out = model(input_ids=QUESTION, pixel_values=random_pixels())
        compressed = model.compress(input_ids=QUESTION, pixel_values=random_pixels())
    assert torch.equal(out.image_outputs.slots[0][2], compressed.slots[0][2])
    assert torch.equal(out.image_hidden_states[0], compressed.pooler_output[0])
    assert model(input_ids=torch.tensor([[5, 6]])).image_hidden_states is None


def test_outputs_of_the_images_have_the_names_of_the_library_for_what_the_tower_did_not_keep():
    out = small_model()(input_ids=QUESTION, pixel_values=random_pixels(), output_hidden_states=True)
    assert out.hidden_states is not None
    assert out.image_outputs.hidden_states is None and out.image_outputs.attentions is None


def test_other_rules_for_one_call_leave_the_configuration_as_it_is():
    model = small_model()
    features = model.encode_image(random_pixels())
    out = model.compress(input_ids=QUESTION, image_features=features, rules={"region_method": "none"})
    assert out.regions[0][1].tolist() == list(range(16)) and model.config.region_method == "kmeans"
    plain = small_model(region_method="none").compress(input_ids=QUESTION, pixel_values=random_pixels())
    assert torch.equal(out.slots[0][2], plain.slots[0][2])
    again = model.compress(input_ids=QUESTION, image_features=features)
    assert again.regions[0][1].max() == 5


def test_the_old_names_of_arguments_are_taken_and_warned_about():
    model = small_model()
    labels = torch.randint(0, 3, (1, 56), generator=torch.Generator().manual_seed(0))
    expected = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), regions=labels)
    with pytest.warns(FutureWarning, match="Use `regions` instead"):
        out = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), region_labels=labels)
    assert torch.equal(out.slots[0][2], expected.slots[0][2])
    with pytest.warns(FutureWarning, match="Use `regions` instead"):
        model.generate(QUESTION, pixel_values=random_pixels(), region_labels=labels, max_new_tokens=1)
    with pytest.warns(FutureWarning, match="Use `regions` instead"):
        assert model.encode_image(random_pixels(), region_labels=labels)[0].regions is not None
    counts = torch.tensor([BUDGETS])
    out = model.compress(input_ids=QUESTION, pixel_values=random_pixels(), budgets=counts)
    assert [len(tokens) for tokens in out.tokens[0]] == list(BUDGETS)


@pytest.mark.parametrize("nothing", [{"pixel_values": torch.zeros(0)}, {"image_features": []}, {}])
def test_no_images_at_all_are_a_batch_of_text(nothing):
    model, text = small_model(), torch.tensor([[5, 6, 7]])
    expected = model(input_ids=text).logits
    assert torch.equal(model(input_ids=text, **nothing).logits, expected)
    assert torch.equal(model.generate(text, max_new_tokens=2, **nothing), model.generate(text, max_new_tokens=2))
    assert model.compress(input_ids=text, **{"image_features": [], **nothing}).pooler_output == []


@pytest.mark.parametrize("lost", [("token_counts",), ("token_counts", "images_per_prompt")])
@pytest.mark.parametrize("num_images", [1, 2])
def test_an_expanded_prompt_says_what_was_spent_where_the_counts_were_lost(lost, num_images):
    model = small_model()
    counts = torch.tensor([[2, 5, 7]]) if num_images == 1 else torch.tensor([[1, 3, 4], [1, 2, 3]])
    parts = [part for count in counts.sum(1).tolist() for part in (9, *[IMAGE] * count)]
    inputs = {"input_ids": torch.tensor([[5, *parts, 6, 7]]), "pixel_values": random_pixels(num_images)}
    exact = {"token_counts": counts, "images_per_prompt": torch.tensor([num_images])}
    with torch.no_grad():
        expected = model(**inputs, **exact).logits
        kept = {name: value for name, value in exact.items() if name not in lost}
        assert torch.equal(model(**inputs, **kept).logits, expected)


@pytest.mark.parametrize("changes", [{"scale_embedding_form": "per_scale", "token_mlp": True},
                                     {"region_focus": {"layers": [0, 1], "separator_token_id": 7}}])  # fmt: skip
def test_weights_that_a_checkpoint_lacks_begin_as_those_of_a_new_model(changes):
    config = small_config(**changes)
    fresh = UHRBatForConditionalGeneration(small_config(**changes)).state_dict()
    torch.empty(10**6).fill_(torch.nan)  # what memory holds that nobody wrote to
    found = UHRBatForConditionalGeneration.from_pretrained(None, config=config, state_dict={}).state_dict()
    assert fresh.keys() == found.keys() and all(one.isfinite().all() for one in found.values())
    for name, one in fresh.items():
        spread = float(one.std()) if one.numel() > 50 else None
        if spread is not None:
            assert float(found[name].std()) == pytest.approx(spread, rel=0.5, abs=1e-6), name
    tables = [one for name, one in found.items() if "scale_embedding" in name and one.numel() > 50]
    assert tables and all(0.2 < one.std() < 0.4 for one in tables)


def test_a_module_that_a_checkpoint_lacks_leaves_the_rest_as_it_is(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    focused = UHRBatForConditionalGeneration.from_pretrained(
        tmp_path, region_focus={"layers": [0, 1], "separator_token_id": 7}
    )
    found = focused.state_dict()
    assert all(torch.equal(found[name], one) for name, one in model.state_dict().items())
    assert not focused.model.image_newline.any() and all(one.isfinite().all() for one in found.values())
