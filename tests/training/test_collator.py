"""Batches of own data: what is learnt, what is padded, what is drawn, and what happens to an image that cannot be read."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from own_data import BUDGETS, SCALES, ask, make_rows, paint_images, write_rows
from PIL import Image
from rasters import write_dates
from torch.utils.data import DataLoader
from uhr_bat.common import asking
from uhr_bat.common.budgets import scale_budgets
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.regions.cache import to_tiles, write_whole
from uhr_bat.training.collator import IGNORED, UHRBatDataCollator
from uhr_bat.training.data import load_samples

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def samples(tmp_path_factory, processor):
    """One image and two questions, a sample each; two images; and text alone."""
    folder = tmp_path_factory.mktemp("data")
    paint_images(folder, 2)
    rows = [
        {"image": "images/0.png", "conversations": ask("<image>\nWhat?", "Red.", "And where?", "No more of it.")},
        {"image": ["images/0.png", "images/1.png"], "conversations": ask("<image>\n<image>\nWhich?", "The first.")},
        {"conversations": ask("Hello", "Good day.")},
    ]
    return load_samples(write_rows(folder / "data.json", rows), processor)


def importance(model, batch):
    """How important each place of a batch's images is to the selection."""
    with torch.no_grad():
        maps = model(**batch).image_outputs.importance
    return torch.cat([one.flatten() for scales in maps for one in scales])


@pytest.fixture(scope="module")
def model(small_folder):
    return UHRBatForConditionalGeneration.from_pretrained(small_folder).eval()


def test_answers_alone_are_learnt_with_the_token_that_ends_them(samples, processor):
    batch = UHRBatDataCollator(processor)(list(samples))
    learnt = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    ends = ["Red.<|im_end|>", "No more of it.<|im_end|>", "The first.<|im_end|>", "Good day.<|im_end|>"]
    assert learnt == ends
    assert torch.equal(batch["labels"], batch["input_ids"].where(batch["answer_mask"], IGNORED))


def test_the_prompt_is_that_of_an_answer_to_come(samples, processor):
    batch = UHRBatDataCollator(processor, padding_side="right")([samples[2]])
    asked = UHRBatDataCollator(processor).ask([samples[2]])
    text = processor.apply_chat_template(samples[2]["messages"][:-1], add_generation_prompt=True)
    images = [image["path"] for image in samples[2]["images"]]
    wanted = processor(images=images, text=text, return_tensors="pt")
    assert asked["answers"] == ["The first."] and asked["inputs"].keys() == wanted.keys()
    assert all(torch.equal(asked["inputs"][name], value) for name, value in wanted.items())
    length = wanted["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], wanted["input_ids"])
    assert (batch["labels"][0, :length] == IGNORED).all() and batch["labels"][0, length] != IGNORED


def test_the_selection_of_training_is_that_of_generation_whatever_the_answer(samples, processor, model):
    collator, alike = UHRBatDataCollator(processor), partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
    asked = importance(model, collator.ask([samples[1]])["inputs"])
    for answer in ("No more of it.", "Seven ships and a pier"):
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        batch = collator([samples[1] | {"messages": [*samples[1]["messages"][:-1], said]}])
        alike(importance(model, batch), asked)
        del batch["labels"]  # as label smoothing does
        alike(importance(model, batch), asked)
    del batch["answer_mask"]
    for other in (batch, collator([samples[0]])):
        with pytest.raises(AssertionError):
            alike(importance(model, other), asked)


def test_two_dates_are_chosen_from_as_ask_chooses_beside_rows_that_have_none(tmp_path, processor, model):
    earlier, later, apart = write_dates(tmp_path)
    pair = {"image": [earlier, later], "question": "What is new?", "answer": " Red.", "dates": True}
    rows = [pair, {"image": earlier, "question": "What?", "answer": " Blue."}, {**pair, "window": [0, 0, 40, 60]}]
    both, alone, windowed = load_samples(write_rows(tmp_path / "data.json", rows), processor)
    collator = UHRBatDataCollator(processor)
    for sample, batch, reading in ((both, [both, alone], {}), (windowed, [windowed], {"window": (0, 0, 40, 60)})):
        said = asking.ask(processor, model, later, "What is new?", before=earlier, max_new_tokens=1, **reading)
        with torch.no_grad():
            kept = model(**collator(batch)).image_outputs.slots
        for mine, asked in zip(kept, said.compressed.slots):
            assert all(map(torch.equal, mine.values, asked.values))
    assert collator([alone]).keys() == collator([both]).keys() - {"registration"}
    wrong = [{**pair, "image": images} for images in (earlier, [earlier] * 3, [earlier, apart])] + [{**pair, "dates": 1}]
    turns = ask("<image>\nWhat?", " Red.", "<image>\nWhat now?", " Blue.")
    wrong.append({"image": [earlier, later], "conversations": turns, "dates": True})
    with pytest.raises(ValueError) as refused:
        load_samples(write_rows(tmp_path / "wrong.json", wrong), processor)
    for told in ("5 of 5", "3 whose `dates` are not two images", "row 2: `dates` compares 2 images of one place in a prompt. Got 3",
                 "row 3: The two dates show no common ground", "1 whose `dates` cannot be read"):  # fmt: skip
        assert told in str(refused.value)


def test_a_sample_per_chat_learns_all_answers_over_what_the_first_question_needs(tmp_path, processor, model):
    path, _ = paint_images(tmp_path, 1)[0]
    turns = ask("<image>\nWhat?", "Red.", "And where?", "Here.")
    file = write_rows(tmp_path / "data.json", [{"image": path, "conversations": turns}])
    samples = load_samples(file, processor, sample_per="chat")
    batch = UHRBatDataCollator(processor)(list(samples))
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]) == "Red.<|im_end|>Here.<|im_end|>"
    first = load_samples(file, processor)[0]
    wanted = importance(model, UHRBatDataCollator(processor)([first]))
    torch.testing.assert_close(importance(model, batch), wanted, rtol=1e-4, atol=1e-7)
    assert batch["input_ids"].shape[1] == samples["length"][0]
    with pytest.raises(ValueError, match="`sample_per` is 'question' or 'chat'"):
        load_samples(file, processor, sample_per="turn")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_the_loss_of_its_samples(samples, processor, model, side):
    collator = UHRBatDataCollator(processor, padding_side=side)
    batch = collator(list(samples))
    assert batch["attention_mask"].sum(1).tolist() == samples["length"]
    assert (batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any()
    with torch.no_grad():
        together = float(model(**batch).loss)
        alone = [
            (float(model(**one).loss), int((one["labels"] != IGNORED).sum())) for one in map(collator, zip(samples))
        ]
    wanted = sum(loss * number for loss, number in alone) / sum(number for _, number in alone)
    assert together == pytest.approx(wanted, rel=1e-4)


def test_budgets_are_drawn_for_each_batch_between_two_factors(samples, processor):
    collator = UHRBatDataCollator(processor, budget_range=(0.5, 1.5))
    torch.manual_seed(0)
    drawn = [collator([samples[0]])["token_counts"][0].tolist() for _ in range(20)]
    assert len(set(map(tuple, drawn))) > 4
    assert all(2 <= coarse <= 6 and 4 <= fine <= 12 and abs(fine - 2 * coarse) <= 1 for coarse, fine in drawn)


def test_draws_follow_from_seed_epoch_and_samples_where_a_run_says_so(samples, processor):
    collator, drawn = UHRBatDataCollator(processor, budget_range=(0.5, 2)), {}
    for seed, epoch, number in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0)]:
        collator.seed_draws(seed, epoch)
        torch.manual_seed(len(drawn))
        factor = collator.draw_factor([samples[number]])
        assert drawn.setdefault((seed, epoch, number), factor) == factor and 0.5 <= factor <= 2
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize(
    "budgets, factor, least, scaled",
    [([4, 8], 1.5, 1, [6, 12]), ([0, 8], 0.01, 1, [0, 1]), ([4, 8], 0.1, 3, [3, 3]), (100, 0.5, 1, 50), ([224, 7424], 0.025, 1, [6, 186])],
)
def test_budgets_keep_their_proportions_and_leave_a_token_for_each_image(budgets, factor, least, scaled):
    assert scale_budgets(budgets, factor, least) == scaled


def test_one_budget_for_all_scales_is_spent(samples, processor, model):
    batch = UHRBatDataCollator(processor, budgets=20)(list(samples))
    assert batch["token_counts"].tolist() == [[20], [20], [10], [10]]
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)


def test_label_maps_are_the_regions_of_their_image(tmp_path, processor, model):
    path = write_rows(tmp_path / "data.json", make_rows(tmp_path, 2))
    labels = [{scale: torch.randint(1, 9, (scale // 8, scale // 8)) for scale in SCALES} for _ in range(2)]
    for idx, one in enumerate(labels):
        write_whole(to_tiles(one, 4), tmp_path / "masks" / f"{idx}.pt")
    samples = load_samples(path, processor, regions=tmp_path / "masks")
    batch = UHRBatDataCollator(processor)(list(samples))
    assert torch.equal(batch["regions"], torch.stack([torch.cat([one[s].flatten() for s in SCALES]) for one in labels]))
    with torch.no_grad():
        outputs = model(**batch).image_outputs
    shown = batch["pixel_attention_mask"][0, :16].bool()
    used, given = outputs.regions[0][0][shown], batch["regions"][0, :16][shown]
    assert torch.equal(used[:, None] == used, given[:, None] == given)
    write_whole(to_tiles({32: labels[0][32]}, 4), tmp_path / "masks" / "0.pt")
    with pytest.raises(ValueError, match=r"0\.pt: label maps of .* but the model has"):
        UHRBatDataCollator(processor)(list(samples))


def test_images_may_be_of_any_kind_that_the_processor_takes(tmp_path, processor):
    (path, _), *_ = paint_images(tmp_path, 1)
    content = (tmp_path / path).read_bytes()
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    turns += [{"role": "assistant", "content": "Red."}]
    kinds = [str(tmp_path / path), {"bytes": content, "path": None}, Image.open(io.BytesIO(content))]
    batch = UHRBatDataCollator(processor)([{"messages": turns, "images": [kind]} for kind in kinds])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])


def test_options_of_the_image_processor_are_handed_on(samples, processor):
    plain = UHRBatDataCollator(processor)([samples[0]])["pixel_values"]
    raw = UHRBatDataCollator(processor, image_options={"do_normalize": False, "do_rescale": False})([samples[0]])
    assert plain.max() < 5 and raw["pixel_values"].max() > 190


# ---- Workers --------------------------------------------------------------------------------------------------------


def test_what_a_worker_gets_is_small(processor):
    assert len(pickle.dumps(UHRBatDataCollator(processor))) < 1_000_000  # the tokenizer; a model is larger


@pytest.mark.slow
def test_workers_read_the_same_batches(samples, processor):
    settings = {"batch_size": 2, "collate_fn": UHRBatDataCollator(processor)}
    here = list(DataLoader(samples, **settings))
    there = list(DataLoader(samples, **settings, num_workers=1))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- Images that cannot be read -------------------------------------------------------------------------------------


@pytest.fixture
def with_a_corrupt_image(tmp_path, processor):
    path = write_rows(tmp_path / "data.json", make_rows(tmp_path, 4))
    image = tmp_path / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    return load_samples(path, processor)


def test_a_corrupt_image_is_named_with_its_row(with_a_corrupt_image, processor):
    with pytest.raises(OSError, match=r"data\.json, row 2: .*images/1\.png: the image cannot be decoded whole"):
        UHRBatDataCollator(processor)(list(with_a_corrupt_image))


def test_another_sample_takes_the_place_of_one_that_is_skipped(with_a_corrupt_image, processor, caplog):
    collator = UHRBatDataCollator(processor, bad_images="skip")
    rows = list(with_a_corrupt_image)
    batch = collator(rows)
    assert torch.equal(batch["input_ids"], collator([rows[idx] for idx in (0, 2, 3, 0)])["input_ids"])
    assert collator.num_skipped == 1
    assert torch.equal(collator([rows[1]])["input_ids"], collator([rows[0]])["input_ids"])
    assert collator.num_skipped == 2
    fresh = UHRBatDataCollator(processor, bad_images="skip")
    with pytest.raises(OSError, match=r"none was before it.*images/1\.png"):
        fresh([rows[1]])


@pytest.mark.slow
def test_what_workers_skip_is_counted_here(with_a_corrupt_image, processor):
    collator = UHRBatDataCollator(processor, bad_images="skip")
    assert len(list(DataLoader(with_a_corrupt_image, 2, collate_fn=collator, num_workers=2))) == 2
    assert collator.num_skipped == 1


def test_settings_that_cannot_be_are_refused(processor):
    for wrong in ({"budget_range": (2, 1)}, {"padding_side": "top"}, {"bad_images": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            UHRBatDataCollator(processor, **wrong)
    (bare := copy.copy(processor)).tokenizer = copy.deepcopy(processor.tokenizer)
    bare.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a padding token nor an end token: set `tokenizer.pad_token`"):
        UHRBatDataCollator(bare)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}], "name": "row 7"}
    with pytest.raises(ValueError, match="row 7: 0 placeholders, but 1 images"):
        UHRBatDataCollator(processor)([copy.deepcopy(row) | {"images": [Image.new("RGB", (8, 8))]}])
    assert BUDGETS == processor.default_budgets
