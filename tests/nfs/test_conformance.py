"""The store contract on a real export with a real client."""

from __future__ import annotations

import pytest

from ssvm_worker.stores.nfs.store import NfsStore
from tests.contracts.resumable_store import ResumableStoreContract
from tests.nfs.server import Export, Server


class TestNfsStore(ResumableStoreContract):
    @pytest.fixture(scope="class")
    def export(self, running_server: Server) -> Export:
        return running_server.export("conformance")

    @pytest.fixture
    def store(self, export: Export) -> NfsStore:
        """Return each test's own store on one mount; the server empties the export, as another client would."""
        export.empty()
        return export.store()
