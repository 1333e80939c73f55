"""Runs on every supported release of transformers."""

import warnings

import pytest
import torch
from small import BUDGETS, IMAGE, PAD, count_tiles, pad_left, prompt, random_pixels, small_model
from transformers import TextStreamer
from uhr_bat.modeling_outputs_uhr_bat import CACHE

QUESTION = prompt(5, "image", 6, 7, 8)
SHORT = torch.tensor([[5, IMAGE, 6, 7, 8]])


def answer(model, **inputs):
    """long[B, new tokens], greedy unless told otherwise."""
    settings = {"do_sample": False, "max_new_tokens": 6, **inputs}
    start = settings.pop("start", 0)
    return model.generate(**settings)[:, start:]


def test_greedy_generation_is_the_argmax_of_repeated_forward_passes():
    model = small_model()
    features = model.encode_image(random_pixels())
    ids = QUESTION
    # The selection belongs to the question: what was answered so far has no part in it.
    visual = {"image": model.compress(input_ids=ids, image_features=features)}
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids, mm_encoder_outputs=visual).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(answer(model, input_ids=QUESTION, pixel_values=random_pixels()), ids)


def test_the_image_and_the_question_change_the_answer():
    model = small_model()
    answers = {
        tuple(answer(model, input_ids=ids, pixel_values=random_pixels(seed=seed), start=-6)[0].tolist())
        for ids in (QUESTION, prompt(5, "image", 30, 31, 32))
        for seed in (0, 1)
    }
    assert len(answers) == 4


def test_a_prompt_with_one_placeholder_is_expanded_to_the_budget():
    model = small_model()
    expanded = answer(model, input_ids=QUESTION, pixel_values=random_pixels())
    assert torch.equal(answer(model, input_ids=SHORT, pixel_values=random_pixels()), expanded)
    assert torch.equal(answer(model, inputs=SHORT, pixel_values=random_pixels()), expanded)
    assert (expanded[0] == IMAGE).sum() >= 14


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_images_are_encoded_once_whatever_the_beams(settings):
    model = small_model()
    calls = count_tiles(model)
    out = answer(model, input_ids=QUESTION, pixel_values=random_pixels(), **settings)
    assert sum(calls) == 14
    assert len(out) == settings.get("num_return_sequences", 1)


def test_one_beam_of_many_is_at_least_as_likely_as_the_greedy_answer():
    model = small_model()
    settings = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 4, "do_sample": False}
    inputs = {"input_ids": QUESTION, "image_features": model.encode_image(random_pixels())}
    greedy = model.generate(**inputs, **settings)
    beams = model.generate(**inputs, **settings, num_beams=8, length_penalty=0.0, eos_token_id=None)
    likelihood = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True).sum()
    assert beams.sequences_scores[0] >= likelihood - 1e-5


def test_returned_sequences_keep_the_images_of_a_prompt_together():
    model = small_model()
    batch = pad_left(torch.tensor([[5, IMAGE, 6, IMAGE, 7]]), torch.tensor([[5, IMAGE, 9]]))
    features = model.encode_image(random_pixels(3))
    one = answer(model, **batch, image_features=features)
    torch.manual_seed(0)
    # Sampling at a temperature near zero: every sequence of a prompt is its greedy answer.
    many = answer(model, **batch, image_features=features, do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert torch.equal(many, one.repeat_interleave(3, dim=0))


def test_sampling_is_repeatable_by_seed():
    model = small_model()
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(answer(model, input_ids=QUESTION, pixel_values=random_pixels(), do_sample=True))
    assert torch.equal(*runs)


def test_repetition_penalty_reads_valid_ids_only():
    model = small_model()
    out = answer(model, inputs=SHORT.masked_fill(SHORT == IMAGE, -200), pixel_values=random_pixels(),
                 repetition_penalty=1.3)  # fmt: skip
    assert 0 <= out.min() and out.max() < 50


def test_a_left_padded_batch_answers_as_one_by_one():
    model = small_model()
    prompts = [QUESTION, prompt(5, 9, 10, 11, "image", 30), prompt(5, 20, "image", 21, 22, 23, 24, 25)]
    pixel_values = random_pixels(3)
    batch = pad_left(*prompts)
    together = answer(model, **batch, pixel_values=pixel_values, start=batch["input_ids"].shape[1])
    for row, ids in enumerate(prompts):
        alone = answer(model, input_ids=ids, pixel_values=pixel_values[row : row + 1], start=ids.shape[1])
        assert torch.equal(together[row], alone[0])


def test_a_batch_of_prompts_that_are_not_expanded_answers_as_one_by_one():
    model = small_model()
    mask = torch.ones(2, 56, dtype=torch.long)
    mask[1, 3:4], mask[1, 19:20], mask[1, 24:56] = 0, 0, 0  # the second image has fewer tokens to spend
    features = model.encode_image(random_pixels(2), mask)
    prompts = [SHORT, torch.tensor([[5, 9, IMAGE, 7]])]
    batch = pad_left(*prompts)
    together = model.generate(**batch, image_features=features, do_sample=False, max_new_tokens=6)[:, -6:]
    for row, ids in enumerate(prompts):
        alone = answer(model, input_ids=ids, image_features=features[row : row + 1])[:, -6:]
        assert torch.equal(together[row], alone[0])


def test_a_prompt_without_an_image_may_stand_first_in_a_batch_that_is_not_expanded():
    model = small_model()
    out = answer(model, **pad_left(torch.tensor([[5, 6]]), SHORT), pixel_values=random_pixels())
    assert torch.equal(out[1], answer(model, input_ids=SHORT, pixel_values=random_pixels())[0])


def test_several_images_and_several_turns_answer():
    model = small_model()
    ids = torch.tensor([[5, IMAGE, 6, 7, 30, 31, 5, IMAGE, 8, 9]])
    features = model.encode_image(random_pixels(2))
    out = answer(model, input_ids=ids, image_features=features)
    swapped = answer(model, input_ids=ids, image_features=features[::-1])
    assert out.shape == (1, 8 + 14 + 6)  # the prompt's budget is shared by its images
    assert not torch.equal(out, swapped)


def test_a_prompt_without_an_image_answers_alone_and_beside_one_with():
    model = small_model()
    text = torch.tensor([[5, 6, 7, 8]])
    alone = answer(model, input_ids=text, start=4)
    batch = pad_left(QUESTION, text)
    together = answer(model, **batch, pixel_values=random_pixels(), start=batch["input_ids"].shape[1])
    assert torch.equal(together[1], alone[0])


# Without the compiled decoding step of a static cache, which adds nothing to this test.
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("settings", [STATIC, {"use_cache": False}], ids=["static", "none"])
def test_the_kind_of_cache_does_not_change_the_answer(settings):
    model = small_model()
    inputs = {"input_ids": QUESTION, "pixel_values": random_pixels()}
    assert torch.equal(answer(model, **inputs, **settings), answer(model, **inputs))


def test_a_prompt_given_as_embeddings_gets_the_same_answer():
    model = small_model()
    embeds = model.get_input_embeddings()(QUESTION).detach()
    out = answer(model, inputs_embeds=embeds, pixel_values=random_pixels())
    assert torch.equal(out, answer(model, input_ids=QUESTION, pixel_values=random_pixels(), start=QUESTION.shape[1]))


def test_encoding_once_and_asking_many_equals_asking_afresh():
    model = small_model()
    calls = count_tiles(model)
    features = model.encode_image(random_pixels())
    questions = [torch.tensor([[5, IMAGE, token, 7]]) for token in range(10, 15)]
    answers = [answer(model, input_ids=ids, image_features=features) for ids in questions]
    assert sum(calls) == 14
    for ids, known in zip(questions, answers):
        assert torch.equal(answer(model, input_ids=ids, pixel_values=random_pixels()), known)


def test_a_streamer_sees_the_answer_token_by_token():
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(str(int(token)) for token in ids)

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    pieces = []
    model = small_model()
    out = answer(
        model, input_ids=QUESTION, pixel_values=random_pixels(), streamer=Streamer(Tokenizer(), skip_prompt=True)
    )
    assert "".join(pieces).split() == [str(token) for token in out[0, QUESTION.shape[1] :].tolist()]


def test_a_typo_in_a_keyword_raises():
    with pytest.raises(ValueError, match="max_new_token'"):
        small_model().generate(input_ids=QUESTION, pixel_values=random_pixels(), max_new_token=3)


def test_a_prompt_over_the_context_window_raises_and_nothing_is_cut():
    ids = torch.cat((torch.full((1, 243), 9), SHORT), dim=1)
    with pytest.raises(ValueError, match="The prompt has 261 tokens with its images, but the context window holds 256"):
        small_model().generate(input_ids=ids, pixel_values=random_pixels())


def test_a_placeholder_without_an_image_raises():
    with pytest.raises(ValueError, match="tokens: 14 image tokens in the prompts, but no images"):
        small_model().generate(input_ids=QUESTION, max_new_tokens=2)


@pytest.mark.slow
def test_half_precision_answers():
    model = small_model().to(torch.bfloat16)
    out = answer(model, input_ids=QUESTION, pixel_values=random_pixels())
    assert out.shape == (1, QUESTION.shape[1] + 6)
    assert PAD not in out[0, : QUESTION.shape[1]]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_reading_the_prompt_in_chunks_does_not_change_the_answer(chunk):
    model = small_model()
    batch = {**pad_left(QUESTION, prompt(5, 9, 10, "image", 30)), "pixel_values": random_pixels(2)}
    assert torch.equal(answer(model, **batch, prefill_chunk_size=chunk), answer(model, **batch))


def pointing_model():
    """With a pointer that was not trained: it points to many tokens, and changes what is said."""
    model = small_model(pointer={"hidden": 8, "width": 4})
    pointer = model.model.pointer
    with torch.no_grad():
        for layer in (pointer.show, pointer.near_2, pointer.ask, pointer.mean):
            layer.bias[-1] = 20
        torch.nn.init.normal_(pointer.tell_2.weight, std=3.0)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 5},  # which is left out
    ],
    ids=str,
)
def test_what_is_pointed_to_is_known_to_whoever_asked_in_whatever_way(settings):
    model = pointing_model()
    batch = pad_left(QUESTION, prompt(5, 9, 10, "image", 30))
    features = model.encode_image(random_pixels(2))

    def asked(**settings):
        compressed = model.compress(**batch, image_features=features)
        ids = answer(model, **batch, **model.visual_inputs(**batch, compressed=compressed), **settings)
        return ids, compressed.pointed

    (ids, pointed), (right_ids, right) = asked(**settings), asked()
    assert all(torch.equal(*pair) and pair[0].sum() > 0 for pair in zip(pointed, right)) and len(pointed) == 2
    if settings.keys() <= {"use_cache", "prefill_chunk_size"}:
        assert torch.equal(ids, right_ids)
        model.model.pointer = None
        assert not torch.equal(asked()[0], right_ids)


@pytest.mark.parametrize("make", [small_model, pointing_model])
def test_looking_tokens_up_in_the_prompt_gives_the_greedy_answer(make):
    model = make()
    # Its end was said before, so that tokens are looked up in the first step.
    inputs = {"input_ids": prompt(7, 8, 9, 10, "image", 6, 7, 8), "pixel_values": random_pixels(), "eos_token_id": 49}
    assert torch.equal(answer(model, **inputs, prompt_lookup_num_tokens=2), answer(model, **inputs))


def first_turn(model):
    return model.generate(
        input_ids=QUESTION,
        pixel_values=random_pixels(),
        do_sample=False,
        max_new_tokens=6,
        bad_words_ids=[[IMAGE]],  # which the next turn could not tell from an image of its own
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("num_tokens", [1, 14])
def test_a_conversation_goes_on_from_its_cache_with_a_new_image(num_tokens):
    model = small_model()
    start = first_turn(model)
    turn = torch.cat((start.sequences, prompt(30, "image", 31, 32, num_tokens=num_tokens)), dim=1)
    out = answer(model, input_ids=turn, **{CACHE: start[CACHE]}, pixel_values=random_pixels(seed=1))
    # As if both images had been passed at once, the first one compressed for the first question.
    whole = torch.cat((start.sequences, prompt(30, "image", 31, 32)), dim=1)
    pixel_values = torch.cat((random_pixels(), random_pixels(seed=1)))
    visual = model.compress(input_ids=whole, pixel_values=pixel_values, budgets=torch.tensor([BUDGETS, BUDGETS]))
    visual.pooler_output[0] = model.compress(input_ids=QUESTION, pixel_values=random_pixels()).pooler_output[0]
    assert torch.equal(out, answer(model, input_ids=whole, mm_encoder_outputs={"image": visual}))


def test_a_conversation_goes_on_from_its_cache_without_an_image():
    model = small_model()
    start = first_turn(model)
    turn = torch.cat((start.sequences, torch.tensor([[30, 31, 32]])), dim=1)
    visual = {"image": model.compress(input_ids=QUESTION, pixel_values=random_pixels())}
    out = answer(model, input_ids=turn, **{CACHE: start[CACHE]})
    assert torch.equal(out, answer(model, input_ids=turn, mm_encoder_outputs=visual))


def test_embeddings_that_hold_the_visual_tokens_need_no_image():
    model = small_model()
    embeds = model.get_input_embeddings()(QUESTION).detach()
    embeds[QUESTION == IMAGE] = model.compress(input_ids=QUESTION, pixel_values=random_pixels()).pooler_output[0]
    wanted = answer(model, input_ids=QUESTION, pixel_values=random_pixels())
    assert torch.equal(answer(model, input_ids=QUESTION, inputs_embeds=embeds), wanted)


def test_a_conversation_over_the_context_window_raises():
    model = small_model()
    start = first_turn(model)
    mask = torch.ones(1, start[CACHE].get_seq_length() + 240, dtype=torch.long)
    with pytest.raises(ValueError, match="The prompt has 263 tokens"):
        answer(model, input_ids=torch.full((1, 240), 9), attention_mask=mask, **{CACHE: start[CACHE]})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_conversation_goes_on_from_its_cache_under_either_name(name):
    model = small_model()
    start = first_turn(model)
    turn = torch.cat((start.sequences, prompt(30, "image", 31, 32, num_tokens=1)), dim=1)
    settings = {"do_sample": False, "max_new_tokens": 4, "pixel_values": random_pixels(seed=1)}
    out = model.generate(turn, **{name: start[CACHE]}, **settings)
    other = first_turn(model)
    assert torch.equal(out, model.generate(turn, **{CACHE: other[CACHE]}, **settings))
    assert out.shape[1] == turn.shape[1] + 13 + 4


def test_the_former_name_of_the_cache_warns_where_the_library_has_a_new_one():
    model = small_model()
    ids = torch.tensor([[5, 6, 7]])
    calls = (model, model.model, lambda ids, **cache: model.generate(ids, max_new_tokens=1, **cache))
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FutureWarning)
            call(ids, past_key_values=None)
        told = [str(one.message) for one in caught if "`past_key_values` is deprecated" in str(one.message)]
        assert len(told) == (1 if CACHE == "cache" else 0)
