"""Talking to vCenter and ESXi: sessions, snapshots, NFC leases, OVF. What leaves this package is plain values."""
