"""Workers that share an ESXi host together respect its limit of parallel disks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from tests.servers.vcenter import make_vm
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

MiB = 1 << 20


def test_shared_limit(make_site: Callable[..., Site], esx: VCenterSimulator) -> None:
    """With a limit of one, a second backup waits until the first one's disk ends or its worker dies."""
    keys = {"host": esx.host, "port": esx.port, "username": esx.username, "password": esx.password}
    vcenters = {"esx": keys | {"ca_file": str(esx.ca_file)}}
    site = make_site(vcenters=vcenters, backup={"per_host": 1, "lease_delay_s": 0.1})
    paths = [make_vm(esx, MiB).machine.path for _ in range(2)]
    before = len(esx.state()["gets"])
    esx.fault(get={"do": "stall", "at": 1000})
    first = site.start()
    ids = [site.submit("backup", vcenter="esx", vm=paths[0], account="1", volume="v", id="b0")]
    site.until(lambda: len(esx.state()["gets"]) > before, "the first disk is asked for")

    site.start()
    ids.append(site.submit("backup", vcenter="esx", vm=paths[1], account="1", volume="w", id="b1"))
    site.until(lambda: "waiting for a slot" in str(site.ledger.get(ids[1]).progress), "the second one waits")
    with site.broker.client() as client:
        assert [client.zcard(key) for key in client.keys(f"{site.broker.prefix}ssvm.slots:esxi:*")] == [1]
    assert len(esx.state()["gets"]) == before + 1
    first.kill()
    site.until(lambda: len(esx.state()["gets"]) > before + 1, "the dead worker's slot is free")
    esx.fault()

    assert [site.wait(each).state for each in ids] == ["succeeded", "succeeded"]
