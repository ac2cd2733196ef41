package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"regexp"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// strike simulates an event during a transfer. "logout" ends every session. "restart" also ends the data streams.
// "delete" removes the VM. "unsnap" removes its snapshots. "migrate" moves the VM to another host.
// "maintenance" puts the VM's host into maintenance mode until the faults are replaced. "evacuate" also moves the VM.
func (w *world) strike(what string, vm types.ManagedObjectReference) {
	own := &simulator.Context{Context: context.Background(), Session: &simulator.Session{}, Map: w.registry}
	switch what {
	case "restart":
		for _, each := range w.allLeases() {
			each.expire()
		}
		w.endSessions(own)
	case "logout":
		w.endSessions(own)
	case "migrate":
		w.migrate(vm)
	case "maintenance":
		w.enterMaintenance(vm)
	case "evacuate":
		w.enterMaintenance(vm)
		w.migrate(vm)
	case "delete":
		w.unsnap(own, vm)
		w.forget(own, vm)
	case "unsnap":
		w.unsnap(own, vm)
	}
}

// takeStrike starts an event that is not during a transfer.
func (w *world) takeStrike(rw http.ResponseWriter, r *http.Request) {
	var want struct {
		What string `json:"what"`
		VM   string `json:"vm"`
	}
	if err := json.NewDecoder(r.Body).Decode(&want); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	w.strike(want.What, types.ManagedObjectReference{Type: "VirtualMachine", Value: want.VM})
}

// forget removes an object from the registry and from every session's registry.
func (w *world) forget(own *simulator.Context, ref types.ManagedObjectReference) {
	w.registry.Remove(own, ref)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, session := range w.sessions {
		session.Remove(own, ref)
	}
}

func (w *world) unsnap(own *simulator.Context, vm types.ManagedObjectReference) {
	it := w.registry.Get(vm).(*simulator.VirtualMachine)
	for _, tree := range it.Snapshot.RootSnapshotList {
		w.forget(own, tree.Snapshot)
	}
	own.WithLock(it, func() { own.Update(it, []types.PropertyChange{{Name: "snapshot", Val: nil}}) })
}

// movesLeased returns the fault that refuses the move of a VM with a lease. Otherwise it ends its leases, or keeps them.
func (w *world) movesLeased(vm types.ManagedObjectReference) types.BaseMethodFault {
	switch now, _ := w.now(); now.Move {
	case "":
		w.endLeases(vm)
		return nil
	case "lives":
		return nil
	default:
		return newFault(now.Move)
	}
}

// migrate moves a VM to another host, unless that is refused.
func (w *world) migrate(vm types.ManagedObjectReference) {
	if w.movesLeased(vm) != nil {
		return
	}
	it := w.registry.Get(vm).(*simulator.VirtualMachine)
	for _, each := range w.registry.All("HostSystem") {
		if ref := each.Reference(); ref != *it.Runtime.Host {
			it.Runtime.Host = &ref
			break
		}
	}
}

// enterMaintenance puts the host of a VM into maintenance mode and ends the leases of the VM.
func (w *world) enterMaintenance(vm types.ManagedObjectReference) {
	w.hostOf(vm).Runtime.InMaintenanceMode = true
	w.endLeases(vm)
}

func (w *world) hostOf(vm types.ManagedObjectReference) *simulator.HostSystem {
	return w.registry.Get(*w.registry.Get(vm).(*simulator.VirtualMachine).Runtime.Host).(*simulator.HostSystem)
}

func (w *world) endLeases(vm types.ManagedObjectReference) {
	for _, each := range w.allLeases() {
		if each.vm == vm {
			each.expire()
		}
	}
}

func (w *world) allLeases() []*lease {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*lease
	for _, each := range w.leases {
		all = append(all, each)
	}
	return all
}

func (w *world) endSessions(own *simulator.Context) {
	w.mu.Lock()
	keys := w.sessions
	w.sessions = map[string]*simulator.Registry{}
	for _, each := range w.leases {
		if each.outcome == "open" {
			each.outcome = "aborted" // a lease ends with its session
		}
	}
	w.mu.Unlock()
	for key := range keys {
		w.registry.SessionManager().TerminateSession(own, &types.TerminateSession{SessionId: []string{key}})
	}
}

var methodName = regexp.MustCompile(`<(?:\w+:)?Body[^>]*>\s*<(?:\w+:)?(\w+)`)

// unknownFault is an answer with a fault whose type no client knows.
const unknownFault = `<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>new</faultstring><detail>
<NewInVersionTenFault xmlns="urn:vim25" xsi:type="NewInVersionTen"><sort>1</sort></NewInVersionTenFault>
</detail></soapenv:Fault></soapenv:Body></soapenv:Envelope>`

// called returns the name of the method that a request calls.
func called(r *http.Request) string {
	if r.Method != http.MethodPost {
		return ""
	}
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	if found := methodName.FindSubmatch(body); found != nil {
		return string(found[1])
	}
	return ""
}

// hanging delays the calls of a method while the fault is active. It drops a call whose client has disconnected.
func (w *world) hanging(next http.Handler) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		now, healed := w.now()
		if now.Hang == "" && now.UnknownFault == "" {
			next.ServeHTTP(rw, r)
			return
		}
		switch name := called(r); {
		case name == "":
		case name == now.UnknownFault:
			w.count(name, 1)
			rw.Header().Set("Content-Type", "text/xml; charset=utf-8")
			rw.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(rw, unknownFault)
			return
		case name == now.Hang && w.spend(name):
			select {
			case <-healed:
				w.count(name, -1) // the simulator counts the call again
			case <-r.Context().Done():
				return
			}
		}
		next.ServeHTTP(rw, r)
	}
}

// spend returns whether a call must hang, and counts such a call. The first HangAfter calls do not hang.
func (w *world) spend(method string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.faults.HangAfter--; w.faults.HangAfter >= 0 {
		return false
	}
	w.calls[method]++
	return true
}

func (w *world) count(method string, by int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls[method] += by
}

// ConsolidateVMDisksTask only clears the flag consolidationNeeded. With the fault Locked it does nothing.
func (m *machine) ConsolidateVMDisksTask(ctx *simulator.Context, _ *types.ConsolidateVMDisks_Task) soapFault {
	task := simulator.CreateTask(m.VirtualMachine, "consolidateDisks", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		now, _ := m.world.now()
		ctx.Update(m.VirtualMachine, consolidation(now.Locked))
		return nil, nil
	})
	return &methods.ConsolidateVMDisks_TaskBody{
		Res: &types.ConsolidateVMDisks_TaskResponse{Returnval: task.Run(ctx)},
	}
}

func consolidation(needed bool) []types.PropertyChange {
	return []types.PropertyChange{{Name: "runtime.consolidationNeeded", Val: needed}}
}

// RemoveSnapshotTask removes a snapshot. With the fault Consolidate, the disks then need consolidation.
func (s *snapshot) RemoveSnapshotTask(ctx *simulator.Context, req *types.RemoveSnapshot_Task) soapFault {
	if now, _ := s.world.now(); now.Consolidate {
		vm := ctx.Map.Get(s.Vm).(*simulator.VirtualMachine)
		ctx.WithLock(vm, func() { ctx.Update(vm, consolidation(true)) })
	}
	return s.VirtualMachineSnapshot.RemoveSnapshotTask(ctx, req)
}
