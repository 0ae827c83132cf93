"""The whole job as `make demo` does it, against transformers and scikit-learn doing the same by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from transformers import CLIPModel, CLIPProcessor

import cli
from engine.datasets import open_dataset
from export.checkpoint import MINI_CHECKPOINT

PROMPTS = [
    f"a photo of {name}"
    for name in (
        "an airplane", "an automobile", "a bird", "a cat", "a deer", "a dog", "a frog", "a horse", "a ship", "a truck",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("demo") / "fresh"
    result = CliRunner().invoke(cli.main, ["demo", "--output", str(folder), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@torch.inference_mode()
def reference(split: str, clip: CLIPModel, processor: CLIPProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of the sample by transformers, in its own preprocessing."""
    dataset = open_dataset("cifar10-sample", split)
    samples = list(dataset.samples(0, dataset.rows))
    images = [Image.open(io.BytesIO(sample.image)) for sample in samples if isinstance(sample.image, bytes)]
    pixels = processor(images=images, return_tensors="pt").pixel_values
    features = torch.cat([clip.get_image_features(pixel_values=batch) for batch in pixels.split(250)])
    labels = np.array([sample.label for sample in samples])
    return torch.nn.functional.normalize(features, dim=-1).numpy(), labels


def test_the_probes_find_what_transformers_and_scikit_learn_find(found: dict[str, object]) -> None:
    clip = CLIPModel.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(MINI_CHECKPOINT, use_fast=False)
    results = {result["probe"]: result for result in found["results"]}  # type: ignore[attr-defined]
    test, labels = reference("test", clip, processor)
    with torch.inference_mode():
        text = clip.get_text_features(**processor(text=PROMPTS, padding=True, return_tensors="pt"))
    zero_shot = (torch.from_numpy(test) @ text.T / text.norm(dim=-1)).argmax(1).numpy()
    assert results["zero-shot"]["accuracy"] > 0.6  # chance is 0.1
    assert results["zero-shot"]["accuracy"] == pytest.approx((zero_shot == labels).mean(), abs=0.005)

    train, train_labels = reference("train", clip, processor)
    scaler = StandardScaler().fit(train)
    svm = SVC(kernel="linear", C=1.0, random_state=42).fit(scaler.transform(train), train_labels)
    baseline = svm.score(scaler.transform(test), labels)
    assert results["baseline"]["accuracy"] == pytest.approx(baseline, abs=0.005)
    for probe, measure in (("class-agnostic", "accuracy"), ("cluster", "purity")):
        assert results[probe][measure] > 0.5


def test_the_demo_leaves_everything_it_names(found: dict[str, object]) -> None:
    folder = Path(str(found["folder"]))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*")) == [
        "models/mini",
        "runs/classes.parquet",
        "runs/generic-32.parquet",
        "runs/test",
        "runs/train",
    ]
    counts = {split: json.loads((folder / "runs" / split / "manifest.json").read_text()) for split in ("train", "test")}
    assert {split: manifest["written"] for split, manifest in counts.items()} == {"train": 4000, "test": 1000}


def test_the_demo_never_works_in_an_old_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "starts afresh" in result.stderr
