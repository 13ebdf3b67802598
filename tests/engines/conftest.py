# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import make_model
from vllm_pair import PROMPTS, TOKENS, Instance, instances


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def expected(model: Path, logs: Path) -> dict[str, list[int]]:
    """What a single instance says."""
    single = Instance(model, logs / "single.log", num_gpu_blocks_override=1000)
    with instances(single):
        for name, prompt in PROMPTS.items():
            single.add(name, prompt, TOKENS)
        return {name: single.finished(name)["tokens"] for name in PROMPTS}
