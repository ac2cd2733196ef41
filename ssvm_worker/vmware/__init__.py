"""Access to vCenter and ESXi: sessions, snapshots, NFC leases and OVF. Callers receive plain values, not pyVmomi's."""
