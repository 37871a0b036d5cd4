"""What many tests share: tiny models, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch
import transformers
from hypothesis import HealthCheck

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which is chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from server.engine.base_dir import prepare_base
from tests.live import Sharing, shared_server
from tests.postgres import fresh_database, running_postgres
from tests.seaweed import Seaweed, running_seaweed
from tests.tiny import make_tiny

TinyModels = Callable[[str], Path]

# A busy machine is no failure. The fixtures that examples share are directories and servers: none needs to be new for each.
hypothesis.settings.register_profile(
    "looking", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], print_blob=True
)
# The gate tries the same cases every time; a developer's machine looks for new ones.
hypothesis.settings.register_profile("gate", hypothesis.settings.get_profile("looking"), derandomize=True)
hypothesis.settings.load_profile("gate" if os.environ.get("CI") else "looking")


@pytest.fixture(scope="session", autouse=True)
def _quiet_single_thread() -> None:
    """Two tests beside each other are faster than one with two threads."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """family → directory of a tiny random fp32 model, made on first use."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default base, converted once into the data directory that the demo uses too."""
    return prepare_base(None, Path(__file__).parents[1] / ".medley").path


@pytest.fixture(scope="session")
def sharing(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    """A live server on a tiny Llama. Its processes may end and start anew in a test, and nothing is known of what they hold before it."""
    with shared_server(tiny_models("llama"), tmp_path_factory.mktemp("shared")) as share:
        yield share


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3-compatible store."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as store:
        yield store


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a real PostgreSQL server."""
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'catalog.sqlite'}"
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        yield url
