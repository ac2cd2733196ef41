package main

import (
	"context"
	"testing"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// TestLeaseIsSettledWithItsInfo checks that an import does not use its lease between the two changes that make it ready.
// Otherwise, the import ends with a lease that has no record, and each of its uploads gets status 404.
func TestLeaseIsSettledWithItsInfo(t *testing.T) {
	ctx := &simulator.Context{
		Context: context.Background(), Session: &simulator.Session{}, Map: simulator.NewRegistry(),
	}
	it := new(simulator.HttpNfcLease)
	it.Self = types.ManagedObjectReference{Type: "HttpNfcLease", Value: "lease-1"}
	done := make(chan bool, 1)
	ctx.WithLock(it, func() { // as in the simulator's task, which has the context of the call
		it.State = types.HttpNfcLeaseStateReady
		go func() { done <- settled(ctx, it) }()
		select {
		case <-done:
			t.Fatal("the lease is settled before it has its info")
		case <-time.After(200 * time.Millisecond):
		}
		it.Info = new(types.HttpNfcLeaseInfo)
	})
	if !<-done {
		t.Fatal("the lease is not settled")
	}
}
