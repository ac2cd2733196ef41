package main

import (
	"context"
	"fmt"
	"net/url"
	"reflect"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

type soapFault = soap.HasFault

// leaseTimeout is how many seconds a lease of a real vCenter lives without a Progress call.
const leaseTimeout = 300

// lease contains data about a lease that the simulator itself does not keep.
type lease struct {
	// outcome is open, completed, aborted or expired.
	outcome  string
	renewals int
	percent  int32
	last     time.Time
	// expired is closed when the lease expires, so that its data streams end.
	expired chan struct{}
	expire  func()
	// vm is the lease's VM. chosen contains checksum types by key. sent contains checksums of sent files by name.
	vm     types.ManagedObjectReference
	it     *simulator.HttpNfcLease
	chosen map[string]string
	sent   map[string]*sums
	// undo removes the VM that an import has created.
	undo func() string
}

// snapshot is a snapshot whose export behaves like a real host's: correct thumbprint and keys, and a lease that can expire.
type snapshot struct {
	*simulator.VirtualMachineSnapshot
	world *world
}

// ExportSnapshot opens a lease on the snapshot.
func (s *snapshot) ExportSnapshot(ctx *simulator.Context, req *types.ExportSnapshot) soapFault {
	if now, _ := s.world.now(); now.Exclusive && s.world.isLeased(s.Vm) {
		return &methods.ExportSnapshotBody{Fault_: simulator.Fault("busy", newFault("TaskInProgress"))}
	}
	if s.world.hostOf(s.Vm).Runtime.InMaintenanceMode {
		return &methods.ExportSnapshotBody{Fault_: simulator.Fault("maintenance", newFault("InvalidHostState"))}
	}
	res := s.VirtualMachineSnapshot.ExportSnapshot(ctx, req)
	body, ok := res.(*methods.ExportSnapshotBody)
	if !ok || body.Res == nil {
		return res
	}
	now, _ := s.world.now()
	it := ctx.Session.Get(body.Res.Returnval).(*simulator.HttpNfcLease)
	s.dress(it, now)
	s.world.watch(ctx, it, now)
	switch {
	case now.NeverReady:
		change(ctx, it, types.HttpNfcLeaseStateInitializing, nil)
	case now.LeaseError != "":
		change(ctx, it, types.HttpNfcLeaseStateError, newFault(now.LeaseError))
	}
	return res
}

// isLeased returns whether a VM has an open lease.
func (w *world) isLeased(vm types.ManagedObjectReference) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, each := range w.leases {
		if each.vm == vm && each.outcome == "open" {
			return true
		}
	}
	return false
}

// dress changes the lease's information to that of a real host, with the active faults.
func (s *snapshot) dress(it *simulator.HttpNfcLease, now faults) {
	it.Info.LeaseTimeout = leaseTimeout
	if now.LeaseTimeout != 0 {
		it.Info.LeaseTimeout = now.LeaseTimeout
	}
	devices := object.VirtualDeviceList(s.Config.Hardware.Device)
	var urls []types.HttpNfcLeaseDeviceUrl
	for _, each := range it.Info.DeviceUrl {
		if each.TargetId == now.Omit {
			continue
		}
		each.SslThumbprint, each.SslCertificate = s.world.thumbprint, now.Certificate
		if now.Thumbprint != nil {
			each.SslThumbprint = *now.Thumbprint
		}
		if address, err := url.Parse(each.Url); err == nil && (now.AnyHost || now.Host != "") {
			if address.Host = now.Host; now.AnyHost {
				address.Host = "*"
			}
			each.Url = address.String()
		}
		if !now.PlainKeys {
			each.Key = deviceKey(devices, s.Vm.Value, each)
		}
		urls = append(urls, each)
	}
	if data := s.world.nvramOf(s.Vm.Value); data != nil && len(urls) > 0 {
		urls = append(urls, nvramFile(urls[0], s.Vm.Value, int64(len(data))))
	}
	it.Info.DeviceUrl = urls
}

// nvramFile returns the lease's entry for the nvram. Unlike the entries of disks, it has a size.
func nvramFile(beside types.HttpNfcLeaseDeviceUrl, vm string, size int64) types.HttpNfcLeaseDeviceUrl {
	it := beside
	it.Url = strings.TrimSuffix(it.Url, baseName(it.Url)) + vm + ".nvram"
	it.Key, it.TargetId, it.FileSize = fmt.Sprintf("/%s/nvram", vm), vm+".nvram", size
	it.Disk = types.NewBool(false)
	return it
}

// checkLease registers the receiver of the manifest calls in the session.
func (w *world) checkLease(ctx *simulator.Context, ref types.ManagedObjectReference) {
	w.mu.Lock()
	mine := w.leases[ref.Value]
	w.mu.Unlock()
	if mine == nil || mine.outcome != "open" || ctx.Session.Registry.Get(ref) == nil {
		return
	}
	ctx.Session.Registry.Put(&checkedLease{mine.it, w, mine})
}

func (w *world) nvramOf(vm string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.nvram[vm]
}

// deviceKey names a disk by its controller and unit like the real product: /vm-12/ParaVirtualSCSIController0:1.
func deviceKey(devices object.VirtualDeviceList, vm string, it types.HttpNfcLeaseDeviceUrl) string {
	for _, disk := range devices.SelectByType((*types.VirtualDisk)(nil)) {
		device := disk.GetVirtualDevice()
		backing, ok := device.Backing.(types.BaseVirtualDeviceFileBackingInfo)
		if !ok || baseName(backing.GetVirtualDeviceFileBackingInfo().FileName) != it.TargetId {
			continue
		}
		if controller, ok := devices.FindByKey(device.ControllerKey).(types.BaseVirtualController); ok {
			kind := reflect.TypeOf(controller).Elem().Name()
			return fmt.Sprintf("/%s/%s%d:%d", vm, kind, controller.GetVirtualController().BusNumber, *device.UnitNumber)
		}
	}
	return it.Key
}

// apart returns a context of the same session that outlives the call and shares none of its locks.
func apart(ctx *simulator.Context) *simulator.Context {
	return &simulator.Context{Context: context.Background(), Session: ctx.Session, Map: ctx.Map}
}

// watch records a lease, and expires it when it is not renewed in time.
func (w *world) watch(ctx *simulator.Context, it *simulator.HttpNfcLease, now faults) {
	mine := &lease{outcome: "open", last: time.Now(), expired: make(chan struct{}), vm: it.Info.Entity, it: it}
	mine.chosen, mine.sent = map[string]string{}, map[string]*sums{}
	own := apart(ctx)
	mine.expire = func() {
		w.mu.Lock()
		open := mine.outcome == "open"
		if open {
			mine.outcome = "expired"
			close(mine.expired)
		}
		w.mu.Unlock()
		if open {
			w.undo(it.Self.Value)
			change(own, it, types.HttpNfcLeaseStateError, new(types.Timedout))
		}
	}
	w.mu.Lock()
	w.leases[it.Self.Value] = mine
	w.mu.Unlock()
	limit := time.Duration(it.Info.LeaseTimeout) * time.Second
	go func() {
		for ; ; time.Sleep(limit / 10) {
			w.mu.Lock()
			open, late := mine.outcome == "open", time.Since(mine.last) > limit
			w.mu.Unlock()
			if late {
				mine.expire()
			}
			if late || !open {
				return
			}
		}
	}()
}

// leaseCall records a call on a lease. It returns a fault if the lease has expired.
func (w *world) leaseCall(method *simulator.Method) types.BaseMethodFault {
	w.mu.Lock()
	defer w.mu.Unlock()
	mine := w.leases[method.This.Value]
	if mine == nil {
		return nil
	}
	if mine.outcome == "expired" && method.Name != "HttpNfcLeaseAbort" {
		return new(types.Timedout)
	}
	switch method.Name {
	case "HttpNfcLeaseProgress":
		mine.last, mine.percent = time.Now(), method.Body.(*types.HttpNfcLeaseProgress).Percent
		mine.renewals++
	case "HttpNfcLeaseComplete":
		mine.outcome = "completed"
	case "HttpNfcLeaseAbort":
		mine.outcome = "aborted"
	}
	return nil
}

// change sets the state of a lease and notifies the clients that wait for it.
func change(ctx *simulator.Context, it *simulator.HttpNfcLease, to types.HttpNfcLeaseState, fault types.BaseMethodFault) {
	changes := []types.PropertyChange{{Name: "state", Val: to}}
	if to == types.HttpNfcLeaseStateInitializing {
		changes = append(changes, types.PropertyChange{Name: "info", Val: nil})
	}
	if fault != nil {
		text := strings.TrimPrefix(fmt.Sprintf("%T", fault), "*types.")
		changes = append(changes, types.PropertyChange{
			Name: "error", Val: types.LocalizedMethodFault{Fault: fault, LocalizedMessage: text},
		})
	}
	ctx.WithLock(it, func() { ctx.Update(it, changes) })
}

// failedSnapshot returns a snapshot task that fails.
func failedSnapshot(ctx *simulator.Context, vm *simulator.VirtualMachine, fault types.BaseMethodFault) soapFault {
	task := simulator.CreateTask(vm, "createSnapshotEx", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		return nil, fault
	})
	return &methods.CreateSnapshotEx_TaskBody{Res: &types.CreateSnapshotEx_TaskResponse{Returnval: task.Run(ctx)}}
}
