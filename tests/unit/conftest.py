"""What several unit tests share."""

import pytest

from llmcompress import catalog


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Installs a package of one module beside its metadata, as pip lays them out, for the time of a test."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    module = f"llmcompress_plugin_{tmp_path.name.replace('-', '_')}"

    def install(source, attribute="ENTRIES"):
        (folder / f"{module}.py").write_text(source)
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[llmcompress.plugins]\nmine = {module}:{attribute}\n")
        catalog.entries.cache_clear()

    monkeypatch.syspath_prepend(str(folder))
    yield install
    catalog.entries.cache_clear()
