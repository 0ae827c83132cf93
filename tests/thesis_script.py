"""The thesis' experiments on the embedded sample as one would write them by hand: PyTorch, transformers, scikit-learn.

"What Do Vision-Language Models Understand? Dissecting CLIP". It is the reference that the study's numbers are held
against, so of clipmill it uses only the sample's JPEG bytes and the checkpoint's folder; run as a script, it prints
what it finds. The prompts beyond generic-32 are our own sets, not those of the thesis.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from transformers import CLIPModel, CLIPProcessor

from engine.datasets import open_dataset
from export.checkpoint import MINI_CHECKPOINT

PROMPTS = Path(__file__).parents[1] / "probes" / "prompts"
TAUS = (0.5, 0.07, 0.05, 0.03, 0.02)
BATCH = 250


@torch.inference_mode()
def results(checkpoint: Path = MINI_CHECKPOINT) -> dict[str, dict[str, float]]:
    """Experiment -> what it found, as fractions and nats: accuracy, entropy, confidence, purity as they apply."""
    clip = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(checkpoint, use_fast=False)
    train, train_labels, class_names = embed_images(clip, processor, "train")
    test, test_labels, _ = embed_images(clip, processor, "test")

    def logits(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = embed_text(clip, processor, prompts)
        return train @ text.T, test @ text.T

    found = {}
    scaler = StandardScaler().fit(train.numpy())
    found["baseline"] = {
        "accuracy": svm_accuracy(
            scaler.transform(train.numpy()), train_labels, scaler.transform(test.numpy()), test_labels
        )
    }

    _, test_logits = logits([f"a photo of a {name}" for name in class_names])
    found["zero-shot"] = {"accuracy": float((test_logits.argmax(dim=1).numpy() == test_labels).mean())}

    for name, prompt_set in (
        ("class-agnostic-32", "generic-32"),
        ("vocabulary-99", "generic-99"),
        ("vocabulary-205", "generic-205"),
        ("vocabulary-415", "generic-415"),
    ):
        train_logits, test_logits = logits(read_lines(prompt_set))
        found[name] = {
            "accuracy": svm_accuracy(train_logits.numpy(), train_labels, test_logits.numpy(), test_labels),
            "entropy": mean_entropy(test_logits),
        }

    train_logits, test_logits = logits(read_lines("alternative-32"))
    for tau in TAUS:
        train_scaled, test_scaled = train_logits / tau, test_logits / tau
        found[f"temperature-{tau}"] = {
            "accuracy": svm_accuracy(train_scaled.numpy(), train_labels, test_scaled.numpy(), test_labels),
            "entropy": mean_entropy(test_scaled),
            "confidence": test_scaled.softmax(dim=1).max(dim=1).values.mean().item(),
        }

    for name, features in (
        ("clustering-embeddings", test),
        ("clustering-32", logits(read_lines("generic-32"))[1]),
        ("clustering-415", logits(read_lines("generic-415"))[1]),
    ):
        clusters = KMeans(n_clusters=10, n_init=10, random_state=42).fit_predict(features.numpy())
        found[name] = {"purity": purity(clusters, test_labels)}
    return found


def embed_images(
    clip: CLIPModel, processor: CLIPProcessor, split: str
) -> tuple[torch.Tensor, np.ndarray, tuple[str, ...]]:
    """Unit embeddings (N, D) float32 of a split of the sample, its labels (N,) and the names of its classes."""
    dataset = open_dataset("cifar10-sample", split)
    samples = list(dataset.samples(0, dataset.rows))
    features = []
    for start in range(0, len(samples), BATCH):
        images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples[start : start + BATCH]]
        features.append(clip.get_image_features(**processor(images=images, return_tensors="pt")))
    embeddings = torch.nn.functional.normalize(torch.cat(features), dim=-1)
    return embeddings, np.array([sample.label for sample in samples]), dataset.class_names


def embed_text(clip: CLIPModel, processor: CLIPProcessor, prompts: list[str]) -> torch.Tensor:
    """Unit embeddings (K, D) float32; the model raises ValueError for a prompt longer than its context."""
    tokens = processor(text=prompts, padding=True, return_tensors="pt")
    return torch.nn.functional.normalize(clip.get_text_features(**tokens), dim=-1)


def read_lines(prompt_set: str) -> list[str]:
    return (PROMPTS / f"{prompt_set}.txt").read_text(encoding="utf-8").splitlines()


def svm_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    svm = SVC(kernel="linear", C=1.0, random_state=42).fit(train, train_labels)
    return float((svm.predict(test) == test_labels).mean())


def mean_entropy(logits: torch.Tensor) -> float:
    """Nats, of the softmax of each row; 1e-9 keeps log from 0, as in the thesis."""
    p = logits.softmax(dim=1)
    return -(p * torch.log(p + 1e-9)).sum(dim=1).mean().item()


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose label is the most frequent one of their cluster."""
    counts: dict[int, dict[int, int]] = {}
    for cluster, label in zip(clusters.tolist(), labels.tolist(), strict=True):
        of_cluster = counts.setdefault(cluster, {})
        of_cluster[label] = of_cluster.get(label, 0) + 1
    return sum(max(of_cluster.values()) for of_cluster in counts.values()) / len(labels)


if __name__ == "__main__":
    for experiment, numbers in results().items():
        print(f"{experiment:22}", "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
