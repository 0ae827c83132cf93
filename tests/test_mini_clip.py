"""The embedded checkpoint and sample, and the script that trained the one on the whole of the other's dataset."""

import io
import json
import random
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.special import log_softmax
from transformers import CLIPModel, CLIPProcessor

from export.mini_clip import captions, images, train
from export.mini_clip.bpe import build_tokenizer

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "export" / "mini_clip" / "checkpoint"
SAMPLE = ROOT / "datasets_cache" / "cifar10_sample"


@pytest.fixture(scope="module")
def shipped() -> tuple[CLIPModel, CLIPProcessor]:
    model = CLIPModel.from_pretrained(CHECKPOINT, use_safetensors=True).float().eval()
    return model, CLIPProcessor.from_pretrained(CHECKPOINT, use_fast=False)


def test_checkpoint_is_a_small_genuine_clip(shipped: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = shipped
    assert model.num_parameters() == 1_951_873
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"
    assert model.logit_scale.exp().item() == pytest.approx(15.98, abs=0.01)
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings == 32
    assert {path.suffix for path in CHECKPOINT.iterdir()} == {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8_000_000


def test_checkpoint_names_the_sample(shipped: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = shipped
    photos = images.read_cifar10("test", SAMPLE)
    accuracy = train.zero_shot_accuracy(model, processor.tokenizer, photos, captions.CIFAR10_CLASSES, 0)
    assert accuracy == pytest.approx(0.734, abs=0.005)


def test_checkpoint_names_the_held_out_digits(shipped: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = shipped
    _, digits = images.read_digits()
    assert len(digits.labels) == 500
    accuracy = train.zero_shot_accuracy(
        model, processor.tokenizer, digits, captions.DIGIT_CLASSES, captions.FIRST_DIGIT
    )
    assert accuracy == pytest.approx(0.974, abs=0.005)


def test_training_pixels_are_the_processors(shipped: tuple[CLIPModel, CLIPProcessor]) -> None:
    photos = images.read_cifar10("test", SAMPLE).pixels[:8]
    expected = shipped[1](images=[Image.fromarray(pixels) for pixels in photos.numpy()], return_tensors="pt")
    torch.testing.assert_close(images.normalise(images.scale(photos)), expected["pixel_values"], atol=1e-6, rtol=0)


def test_tokenizer_comes_out_as_shipped() -> None:
    # Twice, since the ties between equally frequent pairs once fell differently from run to run.
    for _ in range(2):
        built = json.loads(build_tokenizer().backend_tokenizer.to_str())
        shipped = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
        assert list(built["model"]["vocab"].items()) == list(shipped["model"]["vocab"].items())
        assert built["model"]["merges"] == shipped["model"]["merges"]
        assert built["added_tokens"] == shipped["added_tokens"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kitten", {"cat"}),
        ("aircraft", {"airplane"}),
        ("pet", {"cat", "dog"}),
        ("object with wheels", {"automobile", "truck"}),
        ("mammal with hooves", {"deer", "horse"}),
        ("something man-made", {"airplane", "automobile", "ship", "truck"}),
        ("digit seven", {"digit 7"}),
        ("prime digit", {"digit 2", "digit 3", "digit 5", "digit 7"}),
        ("even digit", {"digit 0", "digit 2", "digit 4", "digit 6", "digit 8"}),
    ],
)
def test_concepts_are_true_of_their_classes(text: str, names: set[str]) -> None:
    (concept,) = [concept for concept in captions.CONCEPTS if concept.text == text]
    assert {captions.CLASSES[label] for label in concept.labels} == names


def test_captions_mention_a_concept_true_of_the_class() -> None:
    rng = random.Random(1)
    for label in range(len(captions.CLASSES)):
        for _ in range(50):
            concept = captions.choose_concept(label, rng)
            assert label in concept.labels
            sentence = captions.caption(concept, rng)
            assert concept.text in sentence
            assert "a something" not in sentence
            assert "{" not in sentence


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("airplane", "an airplane"),
        ("cat", "a cat"),
        ("even digit", "an even digit"),
        ("something old", "something old"),
    ],
)
def test_article(noun: str, phrase: str) -> None:
    assert captions.with_article(noun) == phrase


def test_loss_shares_the_target_between_right_answers() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 6)) * 5
    truth = (generator.random((6, 6)) < 0.3) | np.eye(6, dtype=bool)
    rows = -np.mean([log_softmax(logits[i])[truth[i]].mean() for i in range(6)])
    columns = -np.mean([log_softmax(logits[:, i])[truth[:, i]].mean() for i in range(6)])
    loss = train.contrastive_loss(torch.from_numpy(logits).float(), torch.from_numpy(truth))
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_truth_covers_every_image_that_a_caption_fits() -> None:
    labels = torch.tensor([3, 5, 3, 12, 14, 0, 8, 5] * 8)
    styles = torch.tensor([-1, 0, 0, -1, 2, -1, 2, -1] * 8)
    sentences, truth = train._describe(labels, styles, random.Random(0))
    assert truth.diagonal().all()
    styled = [captions.with_article(style) for style in captions.STYLES]
    assert any(sentence in styled for sentence in sentences)
    for sentence, column in zip(sentences, truth.T, strict=True):
        if sentence in styled:
            assert torch.equal(column, styles == styled.index(sentence))
        else:
            # The longest concept in the sentence is the one it was made of ("digit 4", not "digit").
            concept = max((c for c in captions.CONCEPTS if sentence.endswith(c.text)), key=lambda c: len(c.text))
            assert column.tolist() == [label in concept.labels for label in labels.tolist()]


def test_styles_never_mirror_or_recolour_a_digit() -> None:
    torch.manual_seed(0)
    digits, _ = images.read_digits()
    augmented, styles = images.augment(digits.pixels, digits.labels)
    assert augmented.shape == (1297, 3, 32, 32)
    assert captions.STYLES.index("grayscale image") not in styles
    untouched = styles == images.NO_STYLE
    assert 0.86 < untouched.float().mean() < 0.94
    # All that is left is the shift: each image is found again, exactly, at one of 9x9 places.
    source = images.normalise(images.scale(digits.pixels))
    padded = torch.nn.functional.pad(source, (4,) * 4, mode="reflect")
    windows = [padded[:, :, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    found = torch.stack([(window == augmented).flatten(1).all(1) for window in windows]).any(0)
    assert found[untouched].all()


@pytest.mark.parametrize(("split", "rows"), [("train", 4000), ("test", 1000)])
def test_sample(split: str, rows: int) -> None:
    table = pq.read_table(SAMPLE / f"{split}.parquet")
    assert [(field.name, field.type) for field in table.schema] == [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("label", pa.int32()),
    ]
    names = json.loads(table.schema.metadata[b"class_names"])
    assert tuple(names) == captions.CIFAR10_CLASSES
    labels = table["label"].to_numpy()
    assert np.bincount(labels).tolist() == [rows // 10] * 10
    assert [key.split("/")[:2] for key in table["key"].to_pylist()] == [[split, names[label]] for label in labels]
    for data in table["image"].to_pylist():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        image.load()


def test_sample_holds_no_image_and_no_key_twice() -> None:
    tables = [pq.read_table(SAMPLE / f"{split}.parquet") for split in ("train", "test")]
    for column in ("key", "image"):
        values = [value for table in tables for value in table[column].to_pylist()]
        assert len(set(values)) == 5000


def test_sample_script_makes_the_sample(tmp_path: Path) -> None:
    # The sample is the first rows of CIFAR-10, so cutting it out of itself must give it again.
    write_sample = runpy.run_path(str(SAMPLE / "make_sample.py"))["write_sample"]
    write_sample(SAMPLE, tmp_path)
    for name in ("train.parquet", "test.parquet"):
        made = pq.ParquetFile(tmp_path / name)
        assert made.read().equals(pq.read_table(SAMPLE / name), check_metadata=True)
        assert made.metadata.row_group(0).num_rows == 1000


def test_sample_script_refuses_an_unbalanced_source(tmp_path: Path) -> None:
    write_sample = runpy.run_path(str(SAMPLE / "make_sample.py"))["write_sample"]
    for name in ("train.parquet", "test.parquet"):
        pq.write_table(pq.read_table(SAMPLE / name).slice(1), tmp_path / name)
    with pytest.raises(ValueError, match="not balanced"):
        write_sample(tmp_path, tmp_path)


def tiny_cifar10(folder: Path, rows: int, size: int = 32) -> Path:
    """A folder as --cifar10 takes it, of noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(rows):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    table = pa.table({"image": encoded, "label": [row % 10 for row in range(rows)]})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def test_training_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PHOTOS_PER_BATCH", 20)
    monkeypatch.setattr(train, "DIGITS_PER_BATCH", 4)
    cifar10 = tiny_cifar10(tmp_path / "cifar10", rows=50)
    output = tmp_path / "checkpoint"
    arguments = ["--output", str(output), "--cifar10", str(cifar10), "--minutes", "0.02"]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 0, result.output
    assert "zero-shot accuracy CIFAR-10 test" in result.stdout
    assert f"saved to {output}" in result.stdout
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        assert json_or_text(output / name) == json_or_text(CHECKPOINT / name), name
    model = CLIPModel.from_pretrained(output, use_safetensors=True)
    processor = CLIPProcessor.from_pretrained(output, use_fast=False)
    inputs = processor(text=["a cat"], images=Image.new("RGB", (32, 32)), return_tensors="pt")
    assert model.float()(**inputs).logits_per_image.isfinite().all()


def json_or_text(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    content = json.loads(text)
    content.pop("transformers_version", None)
    return content


def test_training_moves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PHOTOS_PER_BATCH", 20)
    monkeypatch.setattr(train, "DIGITS_PER_BATCH", 4)
    photos = images.read_cifar10("test", SAMPLE)
    digits, digits_test = images.read_digits()
    one_step = 1e-9
    model, tokenizer = train.train(train.Data(photos, photos, digits, digits_test), minutes=one_step)
    assert len(tokenizer) == 900
    torch.manual_seed(0)
    start = CLIPModel(model.config)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [(30, 32, "30 training images, one batch takes 240"), (1, 28, "row 0: the image is 28x28")],
)
def test_unfit_cifar10_is_refused(tmp_path: Path, rows: int, size: int, message: str) -> None:
    folder = tiny_cifar10(tmp_path / "cifar10", rows, size)
    result = CliRunner().invoke(train.main, ["--output", str(tmp_path / "out"), "--cifar10", str(folder)])
    assert result.exit_code == 1
    assert message in result.stderr


def test_missing_cifar10_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(train.main, ["--output", str(tmp_path / "out"), "--cifar10", str(tmp_path)])
    assert result.exit_code == 1
    assert "give --cifar10 a folder with train.parquet and test.parquet" in result.stderr


def test_foreign_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "train.parquet")
    result = CliRunner().invoke(train.main, ["--output", str(tmp_path / "out"), "--cifar10", str(tmp_path)])
    assert result.exit_code == 1
    assert "needs the columns image (encoded bytes) and label (integers 0-9)" in result.stderr


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"no image"], "label": [0]}), tmp_path / "train.parquet")
    result = CliRunner().invoke(train.main, ["--output", str(tmp_path / "out"), "--cifar10", str(tmp_path)])
    assert result.exit_code == 1
    assert "row 0: the image cannot be decoded" in result.stderr


def test_an_occupied_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(train.main, ["--output", str(tmp_path), "--cifar10", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not empty; name a new folder" in result.stderr
