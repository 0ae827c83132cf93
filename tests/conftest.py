"""Bundles that many tests read: exported once a session, never written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.bundle import Bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def mini(bundles: Path) -> Bundle:
    """The embedded model's bundle."""
    from export.to_onnx import export_bundle

    return export_bundle("mini", bundles / "mini")


@pytest.fixture(scope="session")
def random_vit_b_32(bundles: Path) -> Bundle:
    """ViT-B/32 with random weights: the real architecture and image size, no tokenizer."""
    from export.to_onnx import export_bundle

    return export_bundle("random-vit-b-32", bundles / "random-vit-b-32")
