"""`uhr-bat train`: what a run learns, leaves, says and goes on from."""

import json
import os
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
import transformers
from copies import start_copies
from huggingface_hub import close_session, constants
from own_data import make_rows, write_rows
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_save_and_push import REPO, Hub, online, running
from uhr_bat.common.loading import ROOT, load_model, save_model
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.training import sft
from uhr_bat.training.collator import UHRBatDataCollator, WithAnswerMask
from uhr_bat.training.data import load_samples
from uhr_bat.training.options import read_options
from uhr_bat.training.scores import score

datasets = pytest.importorskip("datasets")
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return write_rows(folder / "train.json", make_rows(folder, 12))


@pytest.fixture
def arguments(small_folder, data, tmp_path):
    """A short run of the small model; more options go behind."""
    return [
        "--model_name_or_path", str(small_folder), "--train_data", str(data), "--output_dir", str(tmp_path / "out"),
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "true", "--report_to", "none",
        "--disable_tqdm", "true", "--learning_rate", "1e-2",
    ]  # fmt: skip


def run(arguments, *more):
    return sft.train(*read_options([*arguments, *more]))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- Recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path, arguments, tmp_path):
    # What cannot be here: the GPU, its optimiser, and the budgets of other scales.
    more = ["--config", str(path), "--budgets", "4", "8", "--load_in_4bit", "false", "--optim", "adamw_torch"]
    more += ["--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0", "--save_strategy", "steps"]
    more += ["--save_steps", "2", "--eval_share", "0.2", "--eval_steps", "2"]
    trainer = run(arguments, *more)
    assert trainer.state.global_step == 2 and (tmp_path / "out" / "checkpoint-2").is_dir()
    stated = read_options(["--config", str(path), "--use_cpu", "true"])
    assert (
        trainer.args.bf16 == stated[2].bf16 and trainer.args.gradient_checkpointing == stated[2].gradient_checkpointing
    )
    assert all(map(torch.isfinite, map(torch.tensor, logged(trainer, "train_loss"))))


def test_the_papers_recipe_says_what_the_paper_and_the_release_say():
    model, data, training = read_options(["--config", "paper_7b", "--use_cpu", "true"])
    assert model.freeze == ["vision_tower"] and data.budgets == [80, 320, 600, 2000] and data.max_length == 5000
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert (training.num_train_epochs, training.learning_rate, training.max_grad_norm) == (2, 2e-6, 0.5)
    assert training.get_warmup_steps(1000) == 200 and training.lr_scheduler_type == "cosine" and training.bf16


def test_an_option_that_there_is_not_is_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_data: a.json\nlearnig_rate: 1e-3\n")
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path)]) == 2
    assert "there is no option learnig_rate" in capsys.readouterr().err
    recipe.write_text("train_data: a.json\nlearning_rate: 1e-3\n")  # YAML reads 1e-3 as a text
    assert read_options(["--config", str(recipe), "--max_steps", "5"])[2].learning_rate == 1e-3
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path)]) == 2
    assert "a.json: there is no such file" in capsys.readouterr().err


def test_a_type_that_training_leaves_is_refused(arguments, capsys):
    assert sft.main([*arguments, "--dtype", "float16"]) == 2
    assert "`dtype` is one of auto, float32, bfloat16. Got 'float16'" in capsys.readouterr().err


# ---- What is trained ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_learn_at_their_rates_and_frozen_ones_not_at_all(arguments, small_folder, tmp_path):
    more = ["--freeze", "vision_tower", "--visual_learning_rate", "1e-4", "--lr_scheduler_type", "constant"]
    trainer = run(arguments, *more)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(one)]: group["lr"] for group in trainer.optimizer.param_groups for one in group["params"]}
    assert {rate for name, rate in rates.items() if "language_model" in name} == {1e-2}
    assert {rate for name, rate in rates.items() if "projector" in name or "scale_embedding" in name} == {1e-4}
    before, after = (load_file(folder / "model.safetensors") for folder in (small_folder, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(rates) and not any("vision_tower" in name for name in rates)


@pytest.mark.slow
def test_the_tower_and_what_follows_it_may_have_rates_of_their_own_and_nothing_be_frozen(arguments):
    more = [
        "--freeze",
        "none",
        "--visual_learning_rate",
        "1e-4",
        "--vision_tower_learning_rate",
        "1e-5",
        "--max_steps",
        "1",
    ]
    trainer = run(arguments, *more, "--lr_scheduler_type", "constant", "--save_strategy", "no")
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(one)]: group["lr"] for group in trainer.optimizer.param_groups for one in group["params"]}
    for part, rate in (
        ("vision_tower", 1e-5),
        ("projector", 1e-4),
        ("scale_embedding", 1e-4),
        ("language_model", 1e-2),
    ):
        assert {found for name, found in rates.items() if part in name} == {rate}


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early(arguments):
    more = [
        "--learning_rate",
        "0",
        "--max_steps",
        "20",
        "--eval_share",
        "0.2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]
    more += ["--early_stopping_patience", "2", "--save_steps", "1", "--eval_max_new_tokens", "0"]
    assert run(arguments, *more).state.global_step == 3
    with pytest.raises(ValueError, match="needs evaluations"):
        read_options([*arguments, "--early_stopping_patience", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [True, False])
def test_a_model_that_is_saved_in_float16_is_trained_in_another_type(arguments, small_folder, tmp_path, caplog, bf16):
    processor, model = load_model(small_folder, torch.float16, None)
    save_model(model, processor, tmp_path / "half")
    more = ["--model_name_or_path", str(tmp_path / "half"), "--save_strategy", "no", "--bf16", str(bf16)]
    with caplog.at_level("WARNING"):
        trainer = run(arguments, *more)
    wanted = torch.bfloat16 if bf16 else torch.float32
    types = {name: one.dtype for name, one in trainer.model.named_parameters()}
    assert {of_one for name, of_one in types.items() if ".pointer." not in name} == {wanted}
    assert "is saved in float16" in caplog.text
    assert load_model(tmp_path / "out", device_map=None)[1].dtype == wanted


@pytest.mark.slow
def test_answers_without_the_space_of_uhr_bat_tiny_are_counted_before_it_is_loaded(
    arguments, data, caplog, monkeypatch
):
    monkeypatch.setattr(sft, "prepare_model", lambda *args: 1 / 0)
    rows = json.loads(data.read_text())
    for row in rows[:3]:
        row["conversations"][1]["value"] = row["conversations"][1]["value"].strip()
    bare = write_rows(data.parent / "bare.json", rows)
    said = []
    for model, file in ((ROOT, bare), (ROOT, data), (arguments[1], bare)):
        caplog.clear()
        with caplog.at_level("WARNING"), pytest.raises(ZeroDivisionError):
            run(arguments, "--model_name_or_path", str(model), "--train_data", str(file))
        said.append("3 of 12 answers do not begin with a space, and those of UHR-BAT-Tiny do" in caplog.text)
    assert said == [True, False, False]  # no other model's answers are looked at


@pytest.mark.slow
def test_what_bears_loss_is_shown_before_the_first_step(arguments, capsys):
    run(arguments, "--max_steps", "1", "--save_strategy", "no")
    assert "<|im_start|>assistant\n>>> red<|im_end|><<<" in capsys.readouterr().out


@pytest.mark.slow
def test_the_seed_draws_an_adapters_first_weights(arguments):
    more = ["--use_peft", "true", "--learning_rate", "0", "--max_steps", "1", "--save_strategy", "no"]
    first, again, other = (
        {name: one for name, one in run(arguments, *more, "--seed", seed).model.named_parameters() if "lora_A" in name}
        for seed in ("1", "1", "2")
    )
    assert all(torch.equal(one, again[name]) and not torch.equal(one, other[name]) for name, one in first.items())


@pytest.mark.slow
def test_what_is_left_is_a_model_folder_that_answers(arguments, tmp_path):
    run(arguments)
    processor, model = load_model(tmp_path / "out", device_map=None)
    assert (tmp_path / "out" / "modeling_uhr_bat.py").is_file() and processor.default_budgets == model.config.budgets


@pytest.mark.slow
def test_a_colour_is_learnt_and_held_out_questions_show_it(arguments):
    more = ["--max_steps", "60", "--eval_share", "0.34", "--eval_strategy", "steps", "--eval_steps", "30"]
    trainer = run(arguments, *more, "--budget_range", "0.5", "1.5", "--save_strategy", "no", "--logging_steps", "5")
    assert logged(trainer, "loss")[-1] < 0.5 * logged(trainer, "loss")[0]
    assert logged(trainer, "eval_accuracy")[-1] > 0.5 and logged(trainer, "eval_loss")


@pytest.mark.parametrize("answer, right", [(" Red.", True), ("red", True), ("reddish", False), ("", False)])
def test_an_answer_is_right_but_for_case_and_a_full_stop(answer, right):
    assert score("accuracy", answer, "red") == right


@pytest.mark.slow
def test_samples_of_like_length_share_a_batch(arguments):
    trainer = run(arguments, "--train_sampling_strategy", "group_by_length", "--save_strategy", "no")
    assert trainer.train_dataset["length"] and type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"


@pytest.mark.slow
def test_pictures_of_what_was_kept_stand_beside_a_checkpoint(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    run(arguments, "--eval_share", "0.2", "--eval_pictures", "2", "--save_steps", "2")
    assert len(list((tmp_path / "out" / "checkpoint-2" / "kept").glob("*.jpg"))) == 2


# ---- Adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("targets, kinds", [(None, []), ("all-linear", []), (None, ["use_dora", "use_rslora"])])
def test_an_adapter_is_trained_and_merged_into_a_model(arguments, small_folder, tmp_path, targets, kinds):
    more = [] if targets is None else ["--lora_target_modules", targets]
    more += [word for kind in kinds for word in (f"--{kind}", "true")]
    trainer = run(arguments, "--use_peft", "true", "--lora_r", "2", *more)
    stated = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(stated[kind] == (kind in kinds) for kind in ("use_dora", "use_rslora"))
    adapted = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert adapted and all("lora_" in name for name in adapted)
    assert not any("encoder.layers.2." in name for name in adapted)  # no token comes through it
    assert targets or all("language_model" in name for name in adapted)
    convert(str(small_folder), tmp_path / "merged", merge_adapter=str(tmp_path / "out"))
    _, merged = load_model(tmp_path / "merged", device_map=None)
    batch = UHRBatDataCollator(trainer.processing_class)([trainer.train_dataset[0]])
    with torch.no_grad():
        wanted = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(merged.eval()(**batch).logits, wanted, rtol=1e-3, atol=1e-4)
        _, plain = load_model(small_folder, device_map=None)
        assert (plain.eval()(**batch).logits - wanted).abs().max() > 1e-3


def test_weights_of_four_bits_need_an_adapter(arguments, capsys):
    assert sft.main([*arguments, "--load_in_4bit", "true"]) == 2
    assert "only an adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_on_weights_of_four_bits_is_trained(arguments, small_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = run(arguments, "--use_peft", "true", "--load_in_4bit", "true", "--lora_r", "2")
    kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules()}
    four_bits = [name for name, kind in kinds.items() if kind == "Linear4bit" and "lora_" not in name]
    assert four_bits and all("language_model.layers" in name for name in four_bits)
    _, model = load_model(small_folder, device_map=None)
    PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()


# ---- Pushing --------------------------------------------------------------------------------------------------------


@contextmanager
def reached(hub, monkeypatch):
    """This process uploads to the stub for a `with` block: what the library reads of its environment when it is imported."""
    for name, value in online(hub).items():
        monkeypatch.setenv(name, value)
    for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    close_session()
    try:
        yield
    finally:
        close_session()


@pytest.mark.slow
def test_a_run_pushes_a_model_folder(arguments, monkeypatch):
    with running(Hub()) as hub, reached(hub, monkeypatch):
        assert not sft.main([*arguments, "--save_strategy", "no", "--push_to_hub", "true", "--hub_model_id", REPO])
    wanted = {"config.json", "model.safetensors", "modeling_uhr_bat.py", "processor_config.json", "tokenizer.json"}
    assert wanted <= hub.files.keys() and not any(name.startswith("checkpoint") for name in hub.files)


# ---- Hostile input --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_corrupt_image_ends_the_run_with_its_name_or_is_skipped(arguments, tmp_path, capsys):
    path = write_rows(tmp_path / "data.json", make_rows(tmp_path, 4))
    image = tmp_path / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:60])
    more = ["--train_data", str(path), "--save_strategy", "no"]
    assert sft.main([*arguments, *more]) == 2
    assert f"{path}, row 3: {image}: the image cannot be decoded whole" in capsys.readouterr().err
    trainer = run(arguments, *more, "--bad_samples", "skip")
    assert trainer.state.global_step == 2 and trainer.data_collator.num_skipped == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors"])
def test_a_full_disk_ends_the_run_with_the_folder_and_it_goes_on_when_there_is_room(
    arguments, tmp_path, capsys, monkeypatch, file
):
    out, more, save = tmp_path / "out", ["--max_steps", "3", "--save_steps", "1"], torch.save

    def full(value, path, *rest, **options):
        if "checkpoint-2" not in str(path) or file not in str(path):
            return save(value, path, *rest, **options)
        (out / "checkpoint-2" / file).write_bytes(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 40")  # as PyTorch says it

    with monkeypatch.context() as patch:
        if file == "optimizer.pt":
            patch.setattr(torch, "save", full)
        else:
            save = transformers.modeling_utils.safe_save_file
            patch.setattr(transformers.modeling_utils, "safe_save_file", full)
        assert sft.main([*arguments, *more]) == 2
    told = capsys.readouterr().err
    assert "out/checkpoint-2: it cannot be written to its end (" in told and "MB are free there" in told
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    trainer = run(arguments, *more)
    assert trainer.state.global_step == 3 and (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(arguments, tmp_path):
    out = tmp_path / "out"
    more = ["--max_steps", "6", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    run([*arguments, "--output_dir", str(tmp_path / "whole")], *more)
    (process,) = start_copies(1, sft.main, [*arguments, *more, "--max_steps", "100000"])
    give_up = time.time() + 240
    while not (out / "checkpoint-4" / "trainer_state.json").is_file() and time.time() < give_up:
        time.sleep(0.05)
    process.kill()
    process.join()
    # As if it had been killed while it wrote its third checkpoint, and none had come after.
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 4:
            os.replace(path, out / f"moved-{path.name}")
    (out / "checkpoint-6").mkdir()
    (out / "checkpoint-6" / "model.safetensors").write_bytes(b"cut off")
    trainer = run(arguments, *more)
    assert (out / "incomplete-checkpoint-6").is_dir() and trainer.state.global_step == 6
    assert json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_would_go_on_as_another_one_is_refused(arguments, data, tmp_path, caplog, capsys):
    more = ["--save_steps", "1", "--eval_max_new_tokens", "0", "--eval_share", "0.3"]
    run(arguments, *more)
    assert sft.main([*arguments, *more, "--use_peft", "true"]) == 2
    assert (
        "checkpoint-2 is of a run that trains the whole model, and this one trains an adapter"
        in capsys.readouterr().err
    )
    with caplog.at_level("WARNING"):
        before = load_file(tmp_path / "out" / "model.safetensors")
        again = run(arguments, *more)
        assert "The run goes on" not in caplog.text and "the run has made its 2 steps" in caplog.text
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert again.state.global_step == 2 and all(torch.equal(one, after[name]) for name, one in before.items())
        # An option whose callback the checkpoint did not have.
        more += ["--max_steps", "3", "--early_stopping_patience", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
        assert run(arguments, *more).state.global_step == 3
    for options, says in (
        (["--train_data", str(data), f"{data}:2"], "checkpoint-3 holds a run with samples 8, but 24 is asked for"),
        (["--budget_range", "0.5", "2"], "with budget_range [1.0, 1.0], but [0.5, 2.0] is asked for. Give another"),
        (["--freeze", "none"], "with freeze ['vision_tower'], but [] is asked for"),
    ):
        assert sft.main([*arguments, *more, *options]) == 2 and says in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_draws_what_the_whole_run_drew(arguments, tmp_path):
    more = ["--budget_range", "0.5", "2", "--max_steps", "9", "--save_steps", "4", "--logging_steps", "1"]
    more += ["--use_peft", "true", "--lora_dropout", "0.3", "--dataloader_num_workers", "2", "--learning_rate", "1e-3"]
    whole = run(arguments, *more)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    shutil.rmtree(tmp_path / "out" / "checkpoint-9", ignore_errors=True)
    resumed = run(arguments, *more)
    assert logged(resumed, "loss") == logged(whole, "loss") and len(logged(whole, "loss")) == 9
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(one, weights[name]) for name, one in resumed.model.named_parameters())


@pytest.mark.slow
def test_label_smoothing_learns_the_next_token_over_the_visual_tokens_of_the_question(arguments):
    plain = run(arguments, "--save_strategy", "no", "--logging_steps", "1")
    smooth = run(arguments, "--save_strategy", "no", "--logging_steps", "1", "--label_smoothing_factor", "1e-6")
    assert logged(smooth, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-3)


# ---- Other loops ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plain_loop_learns_with_the_same_parts(small_folder, data):
    processor, model = load_model(small_folder, device_map=None)
    loader = torch.utils.data.DataLoader(load_samples(data, processor), 4, collate_fn=UHRBatDataCollator(processor))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        for batch in loader:
            losses.append(model.train()(**batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_trls_trainer_learns_with_the_same_parts(small_folder, data, tmp_path):
    trl = pytest.importorskip("trl")
    processor, model = load_model(small_folder, device_map=None)
    config = trl.SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        bf16=False, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        logging_steps=1, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, config, train_dataset=load_samples(data, processor), data_collator=UHRBatDataCollator(processor),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.7 * logged(trainer, "loss")[0]


@pytest.mark.slow
def test_trls_preferences_are_scored_over_the_visual_tokens_of_the_question(small_folder, data, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    (processor, model), (_, reference) = (load_model(small_folder, device_map=None) for _ in range(2))
    turn = {role: {"role": role, "content": [{"type": "text", "text": "What?"}]} for role in ("user", "assistant")}
    turn["user"]["content"].insert(0, {"type": "image"})
    said = [
        {**turn["assistant"], "content": [{"type": "text", "text": text}]} for text in (" red", " a long one of blue")
    ]
    row = {"prompt": [turn["user"]], "chosen": said[:1], "rejected": said[1:]}
    rows = [row | {"images": [Image.new("RGB", (40, 30), (9 * number, 0, 0))]} for number in range(2)]
    config = trl.DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        remove_unused_columns=False, max_length=None, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    looked, compress = [], type(model.model).compress

    def keep(self, *args, **kwargs):
        outputs = compress(self, *args, **kwargs)
        looked.append([torch.cat([scale.flatten() for scale in image]) for image in outputs.importance])
        return outputs

    monkeypatch.setattr(type(model.model), "compress", keep)
    trl.DPOTrainer(
        model, ref_model=reference, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor, data_collator=WithAnswerMask(DataCollatorForVisionPreference(processor)),
    ).train()  # fmt: skip
    for chosen, other, rejected, another in looked:
        assert torch.equal(chosen, rejected) and torch.equal(other, another)
