"""``make cloudstack-peer PEER=host:port``: stories of a zone with a real management server, through its API.

tests/e2e/test_cloudstack_peer.py runs the same ones with the simulated server. A story is
skipped, with the reason, if the server or the operator does not give what it needs. All values come from the
environment: docs/how-to/cloudstack-peer.md.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from tests.cloudstack_peer import Api, Peer, StorySkipped, say, wait


def life(peer: Peer) -> None:
    """Register a template, make a link to it, and delete it."""
    template = peer.register("life")
    peer.wait_ready(template)
    if peer.has_system_vm():
        say(f"link: {peer.link(template)}")
    else:
        say("no link: without a system VM the server has no address for it")
    peer.delete(template)


def killed(peer: Peer) -> None:
    """Kill agent and worker during a download, and start both again."""
    template = peer.register("killed")
    peer.wait_moving(template)
    peer.stop(signal.SIGKILL)
    say("agent and worker are killed")
    peer.start()
    peer.wait_ready(template)
    peer.delete(template)


def restart(peer: Peer) -> None:
    """Restart the management server during a download."""
    command = peer.needed("RESTART_SERVER", "a command that restarts the management server")
    template = peer.register("restart")
    peer.wait_moving(template)
    peer.shell(command)
    peer.wait_up()
    peer.wait_ready(template)
    peer.delete(template)


def migration(peer: Peer) -> None:
    """Move the agents to another management server during a download."""
    servers = peer.servers()
    if len(servers) < 2:
        raise StorySkipped("the zone has one management server")
    peer.needed("MIGRATE", "yes: it moves all agents of one server to the other one, with prepareForMaintenance (4.21)")
    template = peer.register("migration")
    peer.wait_moving(template)
    first = peer.server_of_host()
    peer.call("prepareForMaintenance", managementserverid=first)
    try:
        wait(lambda: peer.server_of_host() not in ("", first), "the agent is at another server")
        peer.wait_up()
    finally:
        peer.call("cancelMaintenance", managementserverid=first)
    peer.wait_ready(template)
    peer.delete(template)


def certificates(peer: Peer) -> None:
    """Refuse certificates of another address, of another authority and of the past, and accept the right one."""
    peer.needed("STRICT", "yes: it makes the server strict for a while, so that all agents need certificates")
    peer.stop()
    with peer.settings({"ca.plugin.root.auth.strictness": "true", "ca.plugin.root.allow.expired.cert": "false"}):
        wrong = {
            "of another address": peer.issue("192.0.2.1"),
            "of another authority": peer.own_certificate(),
            "of the past": peer.issue(peer.address(), duration="-1"),
        }
        for name, directory in wrong.items():
            peer.check_refused(directory)
            say(f"a certificate {name} is refused")
        peer.start(certificate=peer.issue(peer.address()))
        peer.stop()
    peer.start()


def hung_export(peer: Peer) -> None:
    """Let the export of one store hang. The host stays Up, another store gets a template, and no template is lost."""
    hang = peer.needed("HANG_EXPORT", "a command that makes the export of a store hang, such as a firewall rule")
    go_on = peer.needed("FREE_EXPORT", "a command that ends this")
    store = peer.needed("HUNG_STORE", "the id of the image store of that export")
    if len(peer.stores()) < 2:
        raise StorySkipped("the zone has one image store")
    peer.shell(hang)
    try:
        # The API has no field for the store of a template. The server gives none to a read-only store.
        peer.call("updateImageStore", id=store, readonly="true")
        template = peer.register("healthy")
        peer.wait_ready(template)
        peer.wait_up()
    finally:
        peer.shell(go_on)
        peer.call("updateImageStore", id=store, readonly="false")
    peer.delete(template)


def ova(peer: Peer) -> None:
    """Register an OVA with two disks for VMware, which becomes ready with a template of its data disk."""
    url = peer.needed("OVA_URL", "the URL of an OVA with two disks, in a zone with VMware")
    fields = {"format": "OVA", "hypervisor": "VMware", "deployasis": "false"}
    template = peer.register("ova", url=url, **fields)
    peer.wait_ready(template)
    if len(found := peer.data_disks(template)) != 1:
        raise SystemExit(f"the OVA has {len(found)} templates of data disks, not 1")
    peer.delete(template)


def upload(peer: Peer) -> None:
    """Upload a template as a browser does."""
    if not peer.has_system_vm():
        raise StorySkipped("without a system VM the server has no address for uploads")
    peer.needed("UPLOAD", "yes, if `ssvm serve` with serve.cloudstack or Apache answers at the system VM's address")
    template = peer.upload("upload")
    peer.wait_ready(template)
    peer.delete(template)


def copy(peer: Peer) -> None:
    """Copy a template to a second zone, whose agent fetches it from this one."""
    zone = peer.needed("CLOUDSTACK_ZONE_2", "the id of a second zone with an agent")
    if not peer.has_system_vm():
        raise StorySkipped("without a system VM the server has no address for copies")
    template = peer.register("copy")
    peer.wait_ready(template)
    peer.call("copyTemplate", id=template, sourcezoneid=peer.zone, destzoneid=zone)
    peer.wait_ready(template, zone)
    peer.delete(template, zone)
    peer.delete(template)


STORIES: dict[str, Callable[[Peer], None]] = {
    each.__name__: each for each in (life, killed, restart, migration, certificates, hung_export, ova, upload, copy)
}


def main() -> int:
    """Run the stories that STORIES names, or all."""
    needed = ("PEER", "CLOUDSTACK_API", "CLOUDSTACK_API_KEY", "CLOUDSTACK_SECRET_KEY", "CLOUDSTACK_ZONE")
    needed += ("CLOUDSTACK_OSTYPE", "TEMPLATE_URL", "AGENT_NAME", "SSVM_CONFIG")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise SystemExit(f"set {', '.join(missing)}: docs/how-to/cloudstack-peer.md")
    names = os.environ.get("STORIES", "").split() or list(STORIES)
    if unknown := [each for each in names if each not in STORIES]:
        raise SystemExit(f"STORIES has {', '.join(unknown)}, which is none of {', '.join(STORIES)}")
    given = os.environ
    api = Api(given["CLOUDSTACK_API"], given["CLOUDSTACK_API_KEY"], given["CLOUDSTACK_SECRET_KEY"])
    peer, ends = Peer(api, given), {}
    try:
        peer.start()
        for name in names:
            say(f"--- {name}: {STORIES[name].__doc__}")
            try:
                STORIES[name](peer)
                ends[name] = "ended well"
            except StorySkipped as reason:
                ends[name] = f"skipped: {reason}"
                say(ends[name])
    finally:
        peer.stop()
    say("\n".join(["---", *(f"{name}: {end}" for name, end in ends.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
