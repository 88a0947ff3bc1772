"""An S3 server on loopback (moto), as fixtures."""

import itertools
from collections.abc import Iterator

import fsspec
import pytest

_numbers = itertools.count()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of a server that runs in a thread of this process."""
    pytest.importorskip("s3fs", reason="pip install 'soups[s3]'")
    server_module = pytest.importorskip("moto.server", reason="pip install 'soups[dev]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh pool's URL in a bucket of the server; the environment points there, also for child processes."""
    for key, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "very-secret-testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    number = next(_numbers)
    fsspec.filesystem("s3").mkdir(f"bucket-{number}")
    return f"s3://bucket-{number}/pool"
